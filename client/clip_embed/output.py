"""Where the command's embeddings go: to stdout, or to a file that appears whole."""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from typing import IO, Protocol

import numpy as np

from clip_embed import jsonl, parquet
from clip_embed.table import ImageFile, Rows, look_at
from clip_embed.wire import EMBEDDING_SIZE, Embeddings


class Format(StrEnum):
    """What the command writes."""

    jsonl = "jsonl"
    npy = "npy"
    parquet = "parquet"


class Output(Protocol):
    """Says which images still need an embedding, and takes what came of each in order: None if it failed."""

    already_there: int  # how many need none

    def unfinished(self, paths: Iterable[str]) -> Iterator[ImageFile]: ...

    def add(self, image: ImageFile, embedding: Embeddings | None) -> None: ...


class NpyRows:
    """The .npy format, one (N, 512) float32 array whose N is written last; a failed image's row is NaN."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._count = 0
        self._write_header()

    def add(self, image: ImageFile, embedding: Embeddings | None) -> None:
        row = np.full(EMBEDDING_SIZE, np.nan) if embedding is None else embedding
        self._file.write(row.astype("<f4", copy=False).tobytes())
        self._count += 1

    def finish(self) -> None:
        self._file.seek(0)
        self._write_header()

    def _write_header(self) -> None:
        # numpy leaves room for the first number to grow, so the header is as long with N as it was with 0.
        header = {"descr": "<f4", "fortran_order": False, "shape": (self._count, EMBEDDING_SIZE)}
        np.lib.format.write_array_header_1_0(self._file, header)  # type: ignore[no-untyped-call]


class _All:
    """An output that begins empty, so that every image needs an embedding."""

    already_there = 0

    def __init__(self, rows: Rows) -> None:
        self.add = rows.add

    def unfinished(self, paths: Iterable[str]) -> Iterator[ImageFile]:
        return map(look_at, paths)


@contextmanager
def open_output(path: Path | None, file_format: Format) -> Iterator[Output]:
    """An output to a file, or to stdout when the path is None. After an exception nothing of a file is left.

    Raises:
        OSError: It cannot be written.
    """
    if path is None and file_format is Format.jsonl:
        yield _All(jsonl.open_rows(sys.stdout.buffer))
    elif path is None:
        with tempfile.TemporaryFile() as whole:
            with _rows(whole, file_format) as rows:
                yield _All(rows)
            whole.seek(0)
            shutil.copyfileobj(whole, sys.stdout.buffer)
            sys.stdout.flush()
    else:
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with unfinished.open("xb") as file, _rows(file, file_format) as rows:
                yield _All(rows)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)


@contextmanager
def _rows(file: IO[bytes], file_format: Format) -> Iterator[Rows]:
    rows: Rows
    match file_format:
        case Format.npy:
            rows = NpyRows(file)
        case Format.jsonl:
            rows = jsonl.open_rows(file)
        case Format.parquet:
            rows = parquet.open_rows(file)
    try:
        yield rows
    except BaseException:
        with suppress(Exception):  # a Parquet writer that is never closed complains when it is collected
            rows.finish()
        raise
    rows.finish()
