"""Writes the command's embeddings to stdout, a device or a FIFO, or to a file that is replaced atomically."""

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from typing import IO, Protocol

import numpy as np

from clip_embed import jsonl, parquet
from clip_embed.names import printable
from clip_embed.provenance import Provenance, sidecar_path, write_sidecar
from clip_embed.table import ImageFile, Rows, stat_image
from clip_embed.wire import EMBEDDING_SIZE, Embeddings


class Format(StrEnum):
    """The output formats."""

    jsonl = "jsonl"
    npy = "npy"
    parquet = "parquet"


class Output(Protocol):
    """Selects the images that still need an embedding, and takes their embeddings in order: None if one failed."""

    already_embedded: int  # how many images need none
    pruned: int  # how many rows were dropped because their image no longer exists
    warning: str | None  # about existing rows

    def unfinished(self, paths: Iterable[str], row_of: Callable[[str], ImageFile] = ...) -> Iterator[ImageFile]:
        """The rows to embed. `row_of` is `TextRow.of` for texts."""

    def add(self, image: ImageFile, embedding: Embeddings | None) -> None: ...


class NpyRows:
    """Writes .npy, one (N, D) float32 array whose N is written last. A failed image's row is NaN.

    Args:
        names: gets row i's path as line i.
    """

    def __init__(self, file: IO[bytes], names: IO[bytes] | None = None) -> None:
        self._file = file
        self._names = names
        self._count = 0
        self._size = 0  # D; not known before the first embedding
        self._write_header()

    def add(self, image: ImageFile, embedding: Embeddings | None) -> None:
        if embedding is not None and not self._size:
            self._begin(len(embedding))
        if self._size:
            row = np.full(self._size, np.nan) if embedding is None else embedding
            self._file.write(row.astype("<f4", copy=False).tobytes())
        if self._names:
            self._names.write(printable(image.path).encode() + b"\n")
        self._count += 1

    def _begin(self, size: int) -> None:
        """Write the rows of the images that failed before the first embedding."""
        self._size = size
        for _ in range(self._count):
            self._file.write(np.full(size, np.nan, "<f4").tobytes())

    def finish(self) -> None:
        if not self._size:
            self._begin(EMBEDDING_SIZE)
        self._file.seek(0)
        self._write_header()

    def _write_header(self) -> None:
        # numpy leaves room for N to grow, so the header keeps its length.
        header = {"descr": "<f4", "fortran_order": False, "shape": (self._count, self._size or EMBEDDING_SIZE)}
        np.lib.format.write_array_header_1_0(self._file, header)  # type: ignore[no-untyped-call]


class _NewOutput:
    """An output without earlier rows: every image needs an embedding."""

    already_embedded = pruned = 0
    warning: str | None = None

    def __init__(self, rows: Rows) -> None:
        self.add = rows.add

    def unfinished(self, paths: Iterable[str], row_of: Callable[[str], ImageFile] = stat_image) -> Iterator[ImageFile]:
        return map(row_of, paths)


@contextmanager
def open_output(path: Path | None, file_format: Format, provenance: Provenance | None = None) -> Iterator[Output]:
    """An output to a file, or to stdout if the path is None. After an exception no new file is left.

    `NAME.npy.paths` gets the paths of the images in `NAME.npy`. Other formats than Parquet get a provenance file.

    Raises:
        OSError: It cannot be written.
        UnusableOutput: Another process is writing it.
    """
    if path is None:
        with _stream(sys.stdout.buffer, file_format, provenance) as rows:
            yield _NewOutput(rows)
        return
    from clip_embed.atomic_file import is_special, lock_parts, replace_atomically  # need a system with flock

    if is_special(path):
        with path.open("wb") as file, _stream(file, file_format, provenance) as rows:
            yield _NewOutput(rows)
        return
    with lock_parts(path) as folder:
        with ExitStack() as files:
            names = None
            if file_format is Format.npy:
                names = files.enter_context(replace_atomically(path.with_name(f"{path.name}.paths"), folder))
            written = _rows(files.enter_context(replace_atomically(path, folder)), file_format, provenance, names)
            yield _NewOutput(files.enter_context(written))
            sidecar_path(path).unlink(missing_ok=True)
        if file_format is not Format.parquet:
            write_sidecar(path, provenance)


@contextmanager
def _stream(file: IO[bytes], file_format: Format, provenance: Provenance | None) -> Iterator[Rows]:
    """Rows for an output that cannot seek: JSON lines are written at once, other formats at the end."""
    if file_format is Format.jsonl:
        yield jsonl.open_rows(file)
        return
    with tempfile.TemporaryFile() as finished:
        with _rows(finished, file_format, provenance) as rows:
            yield rows
        finished.seek(0)
        shutil.copyfileobj(finished, file)
        file.flush()


@contextmanager
def _rows(
    file: IO[bytes], file_format: Format, provenance: Provenance | None, names: IO[bytes] | None = None
) -> Iterator[Rows]:
    rows: Rows
    match file_format:
        case Format.npy:
            rows = NpyRows(file, names)
        case Format.jsonl:
            rows = jsonl.open_rows(file)
        case Format.parquet:
            rows = parquet.open_rows(file, provenance)
    try:
        yield rows
    except BaseException:
        with suppress(Exception):  # a Parquet writer warns if it is collected without being closed
            rows.finish()
        raise
    rows.finish()
