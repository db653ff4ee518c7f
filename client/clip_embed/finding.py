"""The images that the command's arguments mean: files, folders to search, and a list on stdin."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import translate
from io import BufferedIOBase
from pathlib import Path

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}
# Photographs, but not in a format that the server takes: left out, and counted.
OTHER_SUFFIXES = {".heic", ".heif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2", ".psd"}
# What systems and programs put among photographs: thumbnails, resource forks, deleted files, older versions.
LITTER = (
    "._*",
    "@eaDir",
    "#recycle",
    "#snapshot",
    "@Recycle",
    "@Recently-Snapshot",
    ".@__thumb",
    ".Trash",
    ".Trash-*",
    ".Trashes",
    "$RECYCLE.BIN",
    ".thumbnails",
    ".AppleDouble",
    "__MACOSX",
    ".dtrash",
    ".stversions",
)


class UnusableList(Exception):
    """What came on stdin is no list of paths."""


@dataclass
class Search:
    """Finds images, and counts what it leaves out of the folders.

    Args:
        exclude: globs of names, or of paths inside the folder that is searched: what to leave out.
        include: the same, for what to take all the same: litter, what `exclude` names, other suffixes.
        separator: what ends each path on stdin.
    """

    exclude: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    separator: bytes = b"\n"
    left_out: Counter[str] = field(default_factory=Counter)
    linked_folders: int = 0

    def report(self) -> str | None:
        """What was left out so far, for people; None for nothing."""
        kinds = []
        if self.left_out:
            counts = ", ".join(f"{kind} {count}" for kind, count in sorted(self.left_out.items()))
            kinds.append(f"{counts} (--include GLOB takes them)")
        if self.linked_folders:
            kinds.append(f"links to folders {self.linked_folders} (give their paths too to search them)")
        return f"left out: {'; '.join(kinds)}" if kinds else None

    def paths(self, arguments: Iterable[str], stdin: BufferedIOBase) -> Iterator[str]:
        """The paths, lazily, each as `pathlib` writes it: `./a//b.jpg` is `a/b.jpg`.

        Of a folder its images sorted, then those of each folder in it. A file that is named itself is always taken, and
        so is a folder that cannot be listed, so that it is reported as an image that cannot be read.
        """
        for argument in arguments:
            if argument == "-":
                yield from (str(Path(os.fsdecode(path))) for path in self._listed(stdin))
            elif os.path.isdir(argument):  # noqa: PTH112  Path's raises for a folder above it that is closed
                yield from self._walk(str(Path(argument)))
            else:
                yield str(Path(argument))

    def _listed(self, stdin: BufferedIOBase) -> Iterator[bytes]:
        rest = b""
        while chunk := stdin.read1(1 << 16):
            *whole, rest = (rest + chunk).split(self.separator)
            yield from filter(None, map(self._path, whole))
        if path := self._path(rest):
            yield path

    def _path(self, item: bytes) -> bytes:
        if self.separator == b"\0":
            return item
        if b"\0" in item:
            raise UnusableList("stdin: expected a path in each line, came a NUL; give -0 for a list of `find -print0`")
        return item.removesuffix(b"\r")

    def _walk(self, given: str) -> Iterator[str]:
        exclude, include = _matcher(self.exclude), _matcher(self.include)
        root = "" if given == "." else given
        folders, unlisted = [""], []  # paths inside the root
        while folders:
            folder = folders.pop()
            try:
                with os.scandir(os.path.join(root, folder) or ".") as listed:  # noqa: PTH118  Path's takes ten times as long
                    entries = sorted(listed, key=lambda entry: entry.name)
            except OSError:
                unlisted.append(str(Path(root, folder)))
                continue
            subfolders = []
            for entry in entries:
                path, is_folder = os.path.join(folder, entry.name), _is_folder(entry)  # noqa: PTH118
                if is_folder and entry.is_symlink():  # it may lead in a circle, or to what is found anyway
                    self.linked_folders += 1
                elif not (include(entry.name) or include(path)) and (
                    self._is_left_out(entry.name, is_folder=is_folder) or exclude(entry.name) or exclude(path)
                ):
                    continue
                elif is_folder:
                    subfolders.append(path)
                else:
                    yield os.path.join(root, path)  # noqa: PTH118
            folders += reversed(subfolders)
        yield from unlisted

    def _is_left_out(self, name: str, *, is_folder: bool) -> bool:
        """Whether it is litter, or no photograph that the server takes. Counts both, but for other files."""
        suffix = os.path.splitext(name)[1].lower()  # noqa: PTH122
        if not is_folder and suffix not in IMAGE_SUFFIXES:
            if suffix in OTHER_SUFFIXES:
                self.left_out[f"{suffix} files"] += 1
            return True
        if _is_litter(name):
            self.left_out["litter folders" if is_folder else "litter files"] += 1
            return True
        return False


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _matcher(globs: Iterable[str]) -> Callable[[str], object]:
    """Whether a name or a path matches one of them."""
    return re.compile("|".join(map(translate, globs)) or "(?!)").match


_is_litter = _matcher(LITTER)
