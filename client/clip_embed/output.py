"""Where the command's embeddings go: JSON lines or one .npy array, on stdout or in a file that appears whole."""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Protocol

import numpy as np

from clip_embed.wire import EMBEDDING_SIZE, Embeddings


class Writer(Protocol):
    """Takes each image's (512,) float32 embedding in order, or None for one that failed."""

    def add(self, path: str, embedding: Embeddings | None) -> None: ...


class JsonLines:
    """One line of JSON for each embedding; each number is the shortest that reads back as the same float32."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def add(self, path: str, embedding: Embeddings | None) -> None:
        if embedding is not None:
            numbers = ", ".join(map(str, embedding))
            self._file.write(f'{{"path": {json.dumps(path)}, "embedding": [{numbers}]}}\n'.encode())
            self._file.flush()


class NpyRows:
    """The .npy format, one (N, 512) float32 array whose N is written last; a failed image's row is NaN."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._count = 0
        self._write_header()

    def add(self, path: str, embedding: Embeddings | None) -> None:
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


@contextmanager
def open_writer(output: Path | None, *, npy: bool) -> Iterator[Writer]:
    """A writer to a file, or to stdout when it is None. After an exception nothing of a file is left.

    Raises:
        OSError: It cannot be written.
    """
    if output is None and not npy:
        yield JsonLines(sys.stdout.buffer)
    elif output is None:
        with tempfile.TemporaryFile() as file:
            yield (rows := NpyRows(file))
            rows.finish()
            file.seek(0)
            shutil.copyfileobj(file, sys.stdout.buffer)
            sys.stdout.flush()
    else:
        unfinished = output.with_name(f".{output.name}.{os.getpid()}")
        try:
            with unfinished.open("xb") as file:
                writer = NpyRows(file) if npy else JsonLines(file)
                yield writer
                if isinstance(writer, NpyRows):
                    writer.finish()
            unfinished.replace(output)
        finally:
            unfinished.unlink(missing_ok=True)
