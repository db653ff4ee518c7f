"""Which images the command finds, and what it leaves out and says so."""

import inspect
import io
import os
import sys
from pathlib import Path

import pytest

from clip_embed.file_listing import FileListing, UnusableList


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def found(listing: FileListing, *arguments: str, stdin: bytes = b"") -> list[str]:
    return list(listing.paths(arguments, io.BytesIO(stdin)))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_folders_images_are_sorted_and_other_files_not_taken_but_counted(here):
    """A named file is taken whatever its suffix; a found one only with an image's."""
    make(here, "b.JPG", "a.webp", "notes.txt", "sub/z.jpeg", "sub/IMG_1", "another/y.tiff", "sub.jpg/x.png")
    listing = FileListing()
    assert found(listing, ".", "notes.txt", "missing") == [
        *("a.webp", "b.JPG", "another/y.tiff", "sub/z.jpeg", "sub.jpg/x.png"),
        *("notes.txt", "missing"),
    ]
    assert listing.report() == "skipped: 1 .txt, 1 without an ending (--all tries every file by its content)"
    assert FileListing().report() is None


def test_the_endings_are_the_servers_or_all(here):
    make(here, "p/a.jpg", "p/b.heic", "p/c.HEIC", "p/d.mov", "p/e", "p/.DS_Store", "p/Thumbs.db")
    listing = FileListing(suffixes=frozenset({".heic"}))
    assert found(listing, "p") == ["p/b.heic", "p/c.HEIC"]
    assert listing.skipped == {".jpg": 1, ".mov": 1, "without an ending": 1}
    everything = FileListing(suffixes=None)
    assert found(everything, "p") == ["p/a.jpg", "p/b.heic", "p/c.HEIC", "p/d.mov", "p/e"]
    assert everything.report() == "skipped: 2 litter files (--include GLOB takes them)"


def test_a_report_is_one_line_also_of_a_thousand_endings(here):
    listing = FileListing()
    listing.skipped.update({".heic": 12034, ".mov": 80, **{f".x{number}": 1 for number in range(1000)}})
    report = listing.report()
    assert report.startswith("skipped: 12,034 .heic, 80 .mov, 1 .x0, ")
    assert report.endswith("992 with 992 other endings (--all tries every file by its content)")


def test_a_path_is_one_however_it_is_given(here):
    """In a folder, by itself and in a list; another name of the same file stays another."""
    make(here, "photos/a.jpg")
    for argument in ("photos", "./photos", "photos/", ".//photos/.", "photos/a.jpg", "./photos//a.jpg"):
        assert found(FileListing(), argument) == ["photos/a.jpg"]
    assert found(FileListing(), "-", stdin=b"./photos/./a.jpg\r\nphotos/../photos/a.jpg") == [
        "photos/a.jpg",
        "photos/../photos/a.jpg",
    ]


def test_litter_is_left_out_and_counted(here):
    litter = [
        "@eaDir/a.jpg/SYNO_THUMB.jpg",
        ".Trash-1000/files/b.jpg",
        ".thumbnails/c.png",
        "#recycle/d.jpg",
        "._a.jpg",
    ]
    litter += ["$RECYCLE.BIN/e.jpg", "__MACOSX/._a.jpg", "deep/in/.@__thumb/a.jpg", "deep/._b.PNG"]
    make(here, "photos/a.jpg", "photos/b.HEIC", "photos/c.heic", "photos/d.cr2", *(f"photos/{name}" for name in litter))
    make(here, "photos/._notes.txt", "photos/.hidden/h.jpg", "photos/#1/i.jpg")
    listing = FileListing()
    assert found(listing, "photos") == ["photos/a.jpg", "photos/#1/i.jpg", "photos/.hidden/h.jpg"]
    assert listing.report() == (
        "skipped: 2 .heic, 1 .cr2 (--all tries every file by its content); "
        "3 litter files, 7 litter folders (--include GLOB takes them)"
    )
    assert found(FileListing(), "photos/@eaDir", "photos/._a.jpg") == [
        "photos/@eaDir/a.jpg/SYNO_THUMB.jpg",
        "photos/._a.jpg",
    ]


def test_globs_leave_out_and_take_all_the_same(here):
    """Of a name, or of a path in the folder; a file that is named itself is taken."""
    make(here, "p/a.jpg", "p/b.png", "p/2019/c.jpg", "p/2019/keep.jpg", "p/@eaDir/d.jpg", "p/e.heic", "p/private/f.jpg")
    listing = FileListing(exclude=("*.png", "2019/*", "private"), include=("keep.*", "@eaDir", "*.heic"))
    assert found(listing, "p", "p/b.png") == ["p/a.jpg", "p/e.heic", "p/2019/keep.jpg", "p/@eaDir/d.jpg", "p/b.png"]
    assert listing.report() is None


def test_links_to_folders_are_counted_and_searched_where_they_are_named(here):
    make(here, "p/a.jpg", "albums/b.jpg")
    (here / "p/album").symlink_to("../albums")
    (here / "p/circle").symlink_to(".")
    (here / "p/itself.jpg").symlink_to("itself.jpg")
    (here / "p/linked.jpg").symlink_to("../albums/b.jpg")
    listing = FileListing()
    assert found(listing, "p") == ["p/a.jpg", "p/itself.jpg", "p/linked.jpg"]
    assert listing.report() == "skipped: 2 links to folders (give their paths too to search them)"
    assert found(FileListing(), "p/album") == ["p/album/b.jpg"]


def test_folders_may_be_as_deep_as_paths_are_long(here):
    """Deeper than Python's calls may be."""
    deep = "d/" * 300
    make(here, deep + "a.jpg")
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 150)
    try:
        assert found(FileListing(), ".") == [deep + "a.jpg"]
    finally:
        sys.setrecursionlimit(limit)


def test_an_argument_that_cannot_be_looked_at_is_an_image_that_cannot_be_read():
    assert found(FileListing(), "a" * 5000, "a\0b") == ["a" * 5000, "a\0b"]


def test_a_list_may_have_any_name_with_nul_behind_it(here):
    """As `find -print0` writes it; read in pieces, so a name may lie across two."""
    names = [b"a\nb.jpg", b"caf\xe9.jpg", b" c\r", *(b"%05d.jpg" % number for number in range(20_000))]
    got = found(FileListing(separator=b"\0"), "-", stdin=b"\0".join(names) + b"\0\0")
    assert got == [os.fsdecode(name) for name in names]
    assert found(FileListing(), "-", stdin=b"\n".join(names)) == ["a", "b.jpg", got[1], " c", *got[3:]]


@pytest.mark.parametrize(
    ("stdin", "separator", "says"),
    [
        (b"a.jpg\0b.jpg\0", b"\n", "-0 is for lists"),
        (b"\xff\xd8\xff\xe1\n\n and so on", b"\n", "got an image"),
        (b"\x89PNG\r\n\x1a\n\0\0", b"\n", "got an image"),
        (b"\0\0\0\x18ftypheic\0\0", b"\0", "got an image"),
        (b'{"path": "a.jpg", "embedding": [' + b"0.0312, " * 512 + b"]}\n", b"\n", "bytes without an end of a path"),
        (b"x" * 100_000, b"\0", "bytes without an end of a path"),
    ],
)
def test_what_is_no_list_is_a_sentence_and_no_path(stdin, separator, says):
    with pytest.raises(UnusableList, match=says):
        next(FileListing(separator=separator).paths(["-"], io.BytesIO(stdin)))
