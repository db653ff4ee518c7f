"""Reads and writes JSON lines, a `table.Table`. A line of an image:

    {"path": ..., "size_bytes": ..., "mtime_ns": ..., "embedding": [...]}

A text's line is `{"text": ..., "embedding": [...]}`.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

from clip_embed.names import printable
from clip_embed.provenance import Provenance, read_sidecar
from clip_embed.table import ImageFile, UnusableOutput
from clip_embed.wire import Embeddings

NEEDS_SIDECAR = True
_EMBEDDING = b', "embedding": ['  # cannot occur inside a JSON string, where quotes are escaped


class _Rows:
    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def add(self, image: ImageFile, embedding: Embeddings | None) -> None:
        """Write a line; each number is the shortest that reads back as the same float32. A failed image has no line."""
        if embedding is not None:
            head = json.dumps(image._replace(path=printable(image.path))._asdict())[:-1].encode()
            self._file.write(head + _EMBEDDING + ", ".join(map(str, embedding)).encode() + b"]}\n")
            self._file.flush()

    def finish(self) -> None:
        pass


def open_rows(file: IO[bytes], provenance: Provenance | None = None) -> _Rows:
    """Rows that are written and flushed line by line."""
    return _Rows(file)


def read_provenance(path: Path) -> Provenance | None:
    """The provenance from the file beside the table."""
    return read_sidecar(path)


def read_images(path: Path) -> Iterator[ImageFile]:
    """The images of the rows, without an incomplete last line, which a killed process left."""
    return (image for image, _ in _lines(path))


def merge(
    paths: Iterable[Path],
    file: IO[bytes],
    keep: Callable[[ImageFile], bool],
    provenance: Provenance | None = None,
) -> None:
    """Append the rows of several tables whose images are to be kept."""
    for path in paths:
        file.writelines(line for image, line in _lines(path) if keep(image))


def _lines(path: Path) -> Iterator[tuple[ImageFile, bytes]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            head, found, numbers = line.partition(_EMBEDDING)
            try:
                row = json.loads(head + b"}")
                name = row["path"] if "path" in row else row["text"]
                image = ImageFile("" + name, row.get("size_bytes"), row.get("mtime_ns"))
            except (ValueError, KeyError, TypeError, AttributeError):
                found = b""
            if not found or not numbers.endswith(b"]}\n"):
                raise UnusableOutput(
                    f'{path}, line {number}: expected {{"path": ..., "embedding": [...]}} of clip-embed'
                )
            yield image, line
