"""Which files `clip-embed` takes, and how it reports those that it skips."""

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


def test_a_folders_images_are_sorted_and_its_other_files_counted(here):
    """A file given by name is taken whatever its suffix; a file in a folder only with the suffix of an image."""
    make(here, "b.JPG", "a.webp", "notes.txt", "sub/z.jpeg", "sub/IMG_1", "another/y.tiff", "sub.jpg/x.png")
    listing = FileListing()
    assert found(listing, ".", "notes.txt", "missing") == [
        *("a.webp", "b.JPG", "another/y.tiff", "sub/z.jpeg", "sub.jpg/x.png"),
        *("notes.txt", "missing"),
    ]
    assert listing.report() == "skipped: 1 .txt, 1 without an ending (--all tries every file by its content)"
    assert FileListing().report() is None


def test_files_are_taken_by_suffix_or_all_if_there_are_no_suffixes(here):
    make(here, "p/a.jpg", "p/b.heic", "p/c.HEIC", "p/d.mov", "p/e", "p/.DS_Store", "p/Thumbs.db")
    listing = FileListing(suffixes=frozenset({".heic"}))
    assert found(listing, "p") == ["p/b.heic", "p/c.HEIC"]
    assert listing.skipped == {".jpg": 1, ".mov": 1, "without an ending": 1}
    everything = FileListing(suffixes=None)
    assert found(everything, "p") == ["p/a.jpg", "p/b.heic", "p/c.HEIC", "p/d.mov", "p/e"]
    assert everything.report() == "skipped: 2 litter files (--include GLOB takes them)"


def test_a_report_of_a_thousand_suffixes_is_one_line(here):
    listing = FileListing()
    listing.skipped.update({".heic": 12034, ".mov": 80, **{f".x{number}": 1 for number in range(1000)}})
    report = listing.report()
    assert report.startswith("skipped: 12,034 .heic, 80 .mov, 1 .x0, ")
    assert report.endswith("992 with 992 other endings (--all tries every file by its content)")


def test_a_path_is_normalised_however_it_is_given(here):
    """In a folder, by itself and on stdin. `..` is not resolved, because it may follow a link."""
    make(here, "photos/a.jpg")
    for argument in ("photos", "./photos", "photos/", ".//photos/.", "photos/a.jpg", "./photos//a.jpg"):
        assert found(FileListing(), argument) == ["photos/a.jpg"]
    assert found(FileListing(), "-", stdin=b"./photos/./a.jpg\r\nphotos/../photos/a.jpg") == [
        "photos/a.jpg",
        "photos/../photos/a.jpg",
    ]


def test_litter_is_skipped_and_counted(here):
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


def test_globs_exclude_and_include_files_and_folders(here):
    """They match a name or a path in the folder. A file given by name is always taken."""
    make(here, "p/a.jpg", "p/b.png", "p/2019/c.jpg", "p/2019/keep.jpg", "p/@eaDir/d.jpg", "p/e.heic", "p/private/f.jpg")
    listing = FileListing(exclude=("*.png", "2019/*", "private"), include=("keep.*", "@eaDir", "*.heic"))
    assert found(listing, "p", "p/b.png") == ["p/a.jpg", "p/e.heic", "p/2019/keep.jpg", "p/@eaDir/d.jpg", "p/b.png"]
    assert listing.report() is None


def test_links_to_folders_are_counted_and_searched_only_when_given_by_name(here):
    make(here, "p/a.jpg", "albums/b.jpg")
    (here / "p/album").symlink_to("../albums")
    (here / "p/circle").symlink_to(".")
    (here / "p/itself.jpg").symlink_to("itself.jpg")
    (here / "p/linked.jpg").symlink_to("../albums/b.jpg")
    listing = FileListing()
    assert found(listing, "p") == ["p/a.jpg", "p/itself.jpg", "p/linked.jpg"]
    assert listing.report() == "skipped: 2 links to folders (give their paths too to search them)"
    assert found(FileListing(), "p/album") == ["p/album/b.jpg"]


def test_folders_may_be_deeper_than_pythons_recursion_limit(here):
    deep = "d/" * 300
    make(here, deep + "a.jpg")
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 150)
    try:
        assert found(FileListing(), ".") == [deep + "a.jpg"]
    finally:
        sys.setrecursionlimit(limit)


def test_a_path_that_the_system_rejects_is_listed_as_an_image():
    assert found(FileListing(), "a" * 5000, "a\0b") == ["a" * 5000, "a\0b"]


def test_a_nul_separated_list_may_contain_any_name(here):
    """As `find -print0` writes it. The list is read in chunks, so a name may span two."""
    names = [b"a\nb.jpg", b"caf\xe9.jpg", b" c\r", *(b"%05d.jpg" % number for number in range(20_000))]
    got = found(FileListing(separator=b"\0"), "-", stdin=b"\0".join(names) + b"\0\0")
    assert got == [os.fsdecode(name) for name in names]
    assert found(FileListing(), "-", stdin=b"\n".join(names)) == ["a", "b.jpg", got[1], " c", *got[3:]]


@pytest.mark.parametrize(
    ("stdin", "separator", "message"),
    [
        (b"a.jpg\0b.jpg\0", b"\n", "-0 is for lists"),
        (b"\xff\xd8\xff\xe1\n\n and so on", b"\n", "got an image"),
        (b"\x89PNG\r\n\x1a\n\0\0", b"\n", "got an image"),
        (b"\0\0\0\x18ftypheic\0\0", b"\0", "got an image"),
        (b'{"path": "a.jpg", "embedding": [' + b"0.0312, " * 512 + b"]}\n", b"\n", "bytes without an end of a path"),
        (b"x" * 100_000, b"\0", "bytes without an end of a path"),
    ],
)
def test_stdin_that_is_not_a_list_is_refused_with_the_reason(stdin, separator, message):
    with pytest.raises(UnusableList, match=message):
        next(FileListing(separator=separator).paths(["-"], io.BytesIO(stdin)))
