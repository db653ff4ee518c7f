"""The rows that the command writes, and what each file format of them has to offer."""

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from clip_embed.provenance import Provenance
from clip_embed.wire import Embeddings

_INT64 = 2**63 - 1  # Parquet's and SQL's; a time in ns is over it from the year 2262 on


class UnusableOutput(Exception):
    """What is at the output's path was not written by this command, or another process is writing it."""


class ImageFile(NamedTuple):
    """A path, and the size and time by which a changed file is told; None for both when it cannot be looked at.

    The path of a row that was read is in its `printable` form.
    """

    path: str
    size_bytes: int | None
    mtime_ns: int | None


class TextRow(ImageFile):
    """A text in the place of a path, without size and time."""

    @classmethod
    def of(cls, text: str) -> "TextRow":
        return cls(text, None, None)

    def _asdict(self) -> dict[str, Any]:
        return {"text": self.path}


class Rows(Protocol):
    """Takes each image's (D,) float32 embedding in order, or None for one that failed."""

    def add(self, image: ImageFile, embedding: Embeddings | None) -> None: ...

    def finish(self) -> None:
        """Writes what is left. Without it the file is not whole."""


class Table(Protocol):
    """A format whose rows have names, so that a run can go on where another ended. `jsonl` and `parquet` are two."""

    def open_rows(self, file: IO[bytes], provenance: Provenance | None = None, /) -> Rows:
        """Writes a table to an open file, which it leaves open."""

    def read_provenance(self, path: Path, /) -> Provenance | None:
        """Of which weights a file's vectors are; None where it does not say.

        Raises:
            UnusableOutput: It is not a file that this module wrote.
        """

    def read_images(self, path: Path, /) -> Iterator[ImageFile]:
        """The images whose embeddings a file holds.

        Raises:
            UnusableOutput: It is not a file that this module wrote.
        """

    def merge(
        self,
        paths: Iterable[Path],
        file: IO[bytes],
        wants: Callable[[ImageFile], bool],
        provenance: Provenance | None = None,
        /,
    ) -> None:
        """Write the rows of several files as one table, in order. `wants`, called once a row, says which to keep."""


def look_at(path: str) -> ImageFile:
    """The file as it is now. It is read later, so a file that changes in between is seen as changed the next time."""
    try:
        status = os.stat(path)  # noqa: PTH116  Path would normalise the name
    except (OSError, ValueError):  # ValueError: a NUL in it
        return ImageFile(path, None, None)
    return ImageFile(path, status.st_size, max(-_INT64, min(status.st_mtime_ns, _INT64)))


def is_gone(path: str) -> bool:
    """Whether there is no such file; not where that cannot be told."""
    try:
        os.stat(path)  # noqa: PTH116
    except (FileNotFoundError, NotADirectoryError):
        return True
    except (OSError, ValueError):
        return False
    return False


def parts_of(path: Path) -> Path:
    """The folder of what `resume` keeps until it is in the file itself."""
    return path.with_name(path.name + ".parts")


def has_parts(path: Path) -> bool:
    """Whether there is something in it."""
    return any(parts_of(path).glob("*.part"))
