"""The rows that the command writes, and the interface of their file formats."""

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from clip_embed.provenance import Provenance
from clip_embed.wire import Embeddings

_INT64 = 2**63 - 1  # the largest in Parquet and SQL; times in ns exceed it from the year 2262 on


class UnusableOutput(Exception):
    """The file at the output's path was not written by this command, or another process is writing it."""


class ImageFile(NamedTuple):
    """A path with the size and time that show whether the file has changed; both None if it cannot be read.

    In rows read from a file, the path is in its `printable` form.
    """

    path: str
    size_bytes: int | None
    mtime_ns: int | None


class TextRow(ImageFile):
    """A text in place of a path, without size and time."""

    @classmethod
    def of(cls, text: str) -> "TextRow":
        return cls(text, None, None)

    def _asdict(self) -> dict[str, Any]:
        return {"text": self.path}


class Rows(Protocol):
    """Writes each image's (D,) float32 embedding in order; None for a failed image."""

    def add(self, image: ImageFile, embedding: Embeddings | None) -> None: ...

    def finish(self) -> None:
        """Write the remaining rows. Without this call the file is incomplete."""


class Table(Protocol):
    """A format whose rows have names, so that a run can be resumed: `jsonl` and `parquet`."""

    NEEDS_SIDECAR: bool
    """Whether the provenance is in a file beside the table, as the format has no place for it."""

    def open_rows(self, file: IO[bytes], provenance: Provenance | None = None, /) -> Rows:
        """Start a table in an open file, which stays open."""

    def read_provenance(self, path: Path, /) -> Provenance | None:
        """The provenance of a file's vectors; None if the file does not have it.

        Raises:
            UnusableOutput: It is not a file that this module wrote.
        """

    def read_images(self, path: Path, /) -> Iterator[ImageFile]:
        """The images in a file.

        Raises:
            UnusableOutput: It is not a file that this module wrote.
        """

    def merge(
        self,
        paths: Iterable[Path],
        file: IO[bytes],
        keep: Callable[[ImageFile], bool],
        provenance: Provenance | None = None,
        /,
    ) -> None:
        """Write the rows of several files as one table, in order. `keep`, called once per row, selects the rows."""


def stat_image(path: str) -> ImageFile:
    """The file's current size and time. If it changes before it is read, the next run sees it as changed."""
    try:
        status = os.stat(path)  # noqa: PTH116  Path would normalise the name
    except (OSError, ValueError):  # ValueError: the path has a NUL
        return ImageFile(path, None, None)
    return ImageFile(path, status.st_size, max(-_INT64, min(status.st_mtime_ns, _INT64)))


def is_missing(path: str) -> bool:
    """Whether the file certainly does not exist."""
    try:
        os.stat(path)  # noqa: PTH116
    except (FileNotFoundError, NotADirectoryError):
        return True
    except (OSError, ValueError):
        return False
    return False


def parts_folder(path: Path) -> Path:
    """The folder in which `resume` keeps finished rows until the file has them."""
    return path.with_name(path.name + ".parts")


def has_parts(path: Path) -> bool:
    """Whether that folder has parts."""
    return any(parts_folder(path).glob("*.part"))
