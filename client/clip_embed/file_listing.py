"""Lists the images in the command's arguments: files, folders to search, and paths on stdin."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import translate
from io import BufferedIOBase
from pathlib import Path

# The suffixes to take if the server does not report any: every server accepts these formats.
IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
)
# Files that systems and programs put beside photographs: thumbnails, resource forks, deleted files, old versions.
LITTER = (
    "._*",
    ".DS_Store",
    "Thumbs.db",
    "desktop.ini",
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
_MOST_ENDINGS = 10  # in the report
_LONGEST_PATH = 4096  # bytes; Linux's limit
# The first bytes of an image on stdin: JPEG, PNG, GIF, WebP, TIFF (and raw formats), HEIC and AVIF.
_IMAGE = re.compile(rb"\xff\xd8\xff|\x89PNG|GIF8|RIFF....WEBP|II\*\0|MM\0\*|....ftyp", re.DOTALL)


class UnusableList(Exception):
    """The data on stdin is not a list of paths."""


@dataclass
class FileListing:
    """Finds images and counts the files in folders that it skips.

    Args:
        exclude: globs of names, or of paths inside the searched folder, to skip.
        include: globs of what to take although it would be skipped: litter, matches of `exclude`, other suffixes.
        separator: ends each path on stdin.
        suffixes: the suffixes of files to take, in lower case; None for all files.
    """

    exclude: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    separator: bytes = b"\n"
    suffixes: frozenset[str] | None = IMAGE_SUFFIXES
    skipped: Counter[str] = field(default_factory=Counter)
    litter: Counter[str] = field(default_factory=Counter)
    linked_folders: int = 0

    def report(self) -> str | None:
        """A message about the files skipped so far; None if there are none."""
        kinds = []
        if self.skipped:
            endings = self.skipped.most_common()
            counts = [f"{count:,} {ending}" for ending, count in endings[:_MOST_ENDINGS]]
            if rest := endings[_MOST_ENDINGS:]:
                counts.append(f"{sum(count for _, count in rest):,} with {len(rest):,} other endings")
            kinds.append(f"{', '.join(counts)} (--all tries every file by its content)")
        if self.litter:
            counts = [f"{count:,} litter {kind}{'s' * (count > 1)}" for kind, count in sorted(self.litter.items())]
            kinds.append(f"{', '.join(counts)} (--include GLOB takes them)")
        if self.linked_folders:
            kinds.append(f"{self.linked_folders:,} links to folders (give their paths too to search them)")
        return f"skipped: {'; '.join(kinds)}" if kinds else None

    def paths(self, arguments: Iterable[str], stdin: BufferedIOBase) -> Iterator[str]:
        """Yields the paths lazily, each as `pathlib` writes it: `./a//b.jpg` becomes `a/b.jpg`.

        A folder yields its images in order, then those of its subfolders. A file given by name is always taken. So is a
        folder that cannot be listed, so that it is reported as an unreadable image.
        """
        for argument in arguments:
            if argument == "-":
                yield from (str(Path(os.fsdecode(path))) for path in self._listed(stdin))
            elif os.path.isdir(argument):  # noqa: PTH112  Path's raises for a folder above it that is closed
                yield from self._walk(str(Path(argument)))
            else:
                yield str(Path(argument))

    def _listed(self, stdin: BufferedIOBase) -> Iterator[bytes]:
        rest, is_begin = b"", True
        while chunk := stdin.read1(1 << 16):
            if is_begin and _IMAGE.match(chunk):
                raise UnusableList("stdin: expected a list of paths, got an image: give its path in place of -")
            is_begin = False
            if self.separator == b"\n" and b"\0" in chunk:
                raise UnusableList("stdin: expected a path in each line, got a NUL; -0 is for lists of `find -print0`")
            *whole, rest = (rest + chunk).split(self.separator)
            yield from filter(None, map(self._path, whole))
        if path := self._path(rest):
            yield path

    def _path(self, item: bytes) -> bytes:
        if len(item) > _LONGEST_PATH:
            raise UnusableList(f"stdin: expected a list of paths, got {len(item):,} bytes without an end of a path")
        return item if self.separator == b"\0" else item.removesuffix(b"\r")

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
                if is_folder and entry.is_symlink():  # it may be a cycle, or lead to files that are found anyway
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

    def accepts(self, name: str) -> bool:
        """Whether to take a file in a folder, by its name. Counts the others."""
        return not self._is_left_out(name, is_folder=False)

    def _is_left_out(self, name: str, *, is_folder: bool) -> bool:
        """Whether it is litter or a file with another suffix. Counts both."""
        if _is_litter(name):
            self.litter["folder" if is_folder else "file"] += 1
            return True
        suffix = os.path.splitext(name)[1].lower()  # noqa: PTH122
        if is_folder or self.suffixes is None or suffix in self.suffixes:
            return False
        self.skipped[suffix or "without an ending"] += 1
        return True


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _matcher(globs: Iterable[str]) -> Callable[[str], object]:
    """A function that tells whether a name or path matches one of the globs."""
    return re.compile("|".join(map(translate, globs)) or "(?!)").match


_is_litter = _matcher(LITTER)
