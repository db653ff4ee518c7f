"""Reads and writes Parquet: the columns path, size_bytes, mtime_ns and embedding, a fixed-size list of D float32.

The metadata key `clip_embed.provenance` names the weights.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from clip_embed.names import printable
from clip_embed.provenance import Provenance
from clip_embed.table import ImageFile, UnusableOutput
from clip_embed.wire import EMBEDDING_SIZE, Embeddings

NEEDS_SIDECAR = False
_PROVENANCE = b"clip_embed.provenance"
_NOTES = b"clip_embed.part"
_ERROR = "error"
ROW_GROUP = 8192  # rows, 16 MiB of embeddings, that a writer keeps in memory; not measured


def require_pyarrow() -> Any:
    """pyarrow, or ModuleNotFoundError with what to install."""
    try:
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("parquet needs pyarrow: pip install 'clip-embed[parquet]'") from error
    return pyarrow


class _Rows:
    def __init__(self, file: IO[bytes], provenance: Provenance | None) -> None:
        self._arrow = require_pyarrow()
        self._file, self._provenance = file, provenance
        self._writer: Any = None  # opened at the first embedding, which gives the size
        self._images: list[ImageFile] = []
        self._embeddings: list[Embeddings] = []

    def add(self, image: ImageFile, embedding: Embeddings | None) -> None:
        """Add a row. A failed image has none."""
        if embedding is not None:
            self._images.append(image)
            self._embeddings.append(embedding)
            if len(self._images) == ROW_GROUP:
                self._write()

    def finish(self) -> None:
        self._write()
        if self._writer is None:
            self._open(EMBEDDING_SIZE)
        self._writer.close()

    def _open(self, size: int) -> None:
        schema = _schema(self._arrow, self._provenance, size)
        # A dictionary would only cost time: the numbers of an embedding are all different.
        self._writer = self._arrow.parquet.ParquetWriter(self._file, schema, use_dictionary=False)

    def _write(self) -> None:
        if not self._images:
            return
        images, self._images = self._images, []
        size = len(self._embeddings[0])
        if self._writer is None:
            self._open(size)
        numbers = self._arrow.array(np.concatenate(self._embeddings))
        self._embeddings = []
        paths = [printable(image.path) for image in images]
        columns = [
            self._arrow.array(paths, "string"),
            self._arrow.array([image.size_bytes for image in images], "int64"),
            self._arrow.array([image.mtime_ns for image in images], "int64"),
            self._arrow.FixedSizeListArray.from_arrays(numbers, size),
        ]
        self._writer.write_table(self._arrow.table(columns, schema=self._writer.schema), ROW_GROUP)


def open_rows(file: IO[bytes], provenance: Provenance | None = None) -> _Rows:
    """Rows that are written in groups; the file is complete after `finish`."""
    return _Rows(file, provenance)


def open_vectors(path: Path) -> tuple[int, int, Iterator[tuple[list[ImageFile], Embeddings]]]:
    """A file's (N, D, batches of images and (n, D) vectors). Raises UnusableOutput as `read_images`.

    For a file of `write_part`, N counts failed images too, but the batches leave them out.
    """
    with _open(path, is_part=True) as file:
        count, size = file.metadata.num_rows, file.schema_arrow.field("embedding").type.list_size

    def batches() -> Iterator[tuple[list[ImageFile], Embeddings]]:
        with _open(path, is_part=True) as file:
            for batch in file.iter_batches(batch_size=ROW_GROUP):
                if _ERROR in batch.schema.names:
                    batch = batch.filter(batch.column(_ERROR).is_null())  # noqa: PLW2901
                vectors = batch.column("embedding").flatten().to_numpy()
                yield list(_images(batch)), vectors.reshape(batch.num_rows, size)

    return count, size, batches()


def read_provenance(path: Path) -> Provenance | None:
    """The provenance in the metadata of the file."""
    with _open(path, is_part=True) as file:
        return Provenance.from_json((file.schema_arrow.metadata or {}).get(_PROVENANCE, b""))


def write_part(
    file: Any,
    images: list[ImageFile],
    results: list[Embeddings | str],
    size: int,
    provenance: Provenance | None,
    notes: str,
) -> None:
    """Write a file with a row for every image: its (size,) embedding, or NaN and the reason in the column error.

    NaN, not null: pyarrow 25 writes fixed-size lists with nulls that it cannot read.
    """
    arrow = require_pyarrow()
    vectors = np.full((len(results), size), np.nan, np.float32)
    for row, result in enumerate(results):
        if not isinstance(result, str):
            vectors[row] = result
    schema = _schema(arrow, provenance, size).append(arrow.field(_ERROR, arrow.string()))
    schema = schema.with_metadata({**(schema.metadata or {}), _NOTES: notes})
    columns = [
        arrow.array([printable(image.path) for image in images], "string"),
        arrow.array([image.size_bytes for image in images], "int64"),
        arrow.array([image.mtime_ns for image in images], "int64"),
        arrow.FixedSizeListArray.from_arrays(arrow.array(vectors.ravel()), size),
        arrow.array([result if isinstance(result, str) else None for result in results], "string"),
    ]
    arrow.parquet.write_table(arrow.table(columns, schema=schema), file, row_group_size=ROW_GROUP, use_dictionary=False)


def read_notes(file: Any) -> tuple[str | None, Provenance | None]:
    """The notes of a part and its provenance; None if it is not a part."""
    arrow = require_pyarrow()
    try:
        metadata = arrow.parquet.read_schema(file).metadata or {}
    except arrow.ArrowInvalid:
        return None, None
    notes = metadata.get(_NOTES)
    return notes and notes.decode(), Provenance.from_json(metadata.get(_PROVENANCE, b""))


def read_images(path: Path) -> Iterator[ImageFile]:
    """The images of the rows."""
    with _open(path) as file:
        for batch in file.iter_batches(columns=["path", "size_bytes", "mtime_ns"]):
            yield from _images(batch)


def merge(
    paths: Iterable[Path],
    file: IO[bytes],
    keep: Callable[[ImageFile], bool],
    provenance: Provenance | None = None,
) -> None:
    """Write the rows of several tables whose images are to be kept, in groups."""
    arrow = require_pyarrow()
    buffered: list[Any] = []
    paths = list(paths)
    if len(sizes := {_size_in(path) for path in paths}) > 1:
        raise UnusableOutput(f"{paths[0]}: expected vectors of one length, got {', '.join(map(str, sorted(sizes)))}")
    schema = _schema(arrow, provenance, *sizes)
    with arrow.parquet.ParquetWriter(file, schema, use_dictionary=False) as writer:

        def write(at_least: int) -> None:
            if buffered and sum(batch.num_rows for batch in buffered) >= at_least:
                table = arrow.Table.from_batches(buffered).combine_chunks()
                writer.write_table(table.replace_schema_metadata(schema.metadata), ROW_GROUP)
                buffered.clear()

        for path in paths:
            with _open(path) as source:
                for batch in source.iter_batches(batch_size=ROW_GROUP):
                    buffered.append(batch.filter(arrow.array([keep(image) for image in _images(batch)], "bool")))
                    write(ROW_GROUP)
        write(1)


def _size_in(path: Path) -> int:
    with _open(path) as file:
        size: int = file.schema_arrow.field("embedding").type.list_size
        return size


def _schema(arrow: Any, provenance: Provenance | None = None, size: int = EMBEDDING_SIZE) -> Any:
    embedding = arrow.list_(arrow.float32(), size)
    return arrow.schema(
        [
            ("path", arrow.string()),
            ("size_bytes", arrow.int64()),
            ("mtime_ns", arrow.int64()),
            ("embedding", embedding),
        ],
        metadata={_PROVENANCE: provenance.to_json()} if provenance else None,
    )


def _open(path: Path, *, is_part: bool = False) -> Any:
    """The open file. `is_part` allows the column error."""
    arrow = require_pyarrow()
    try:
        file = arrow.parquet.ParquetFile(path)
    except arrow.ArrowInvalid as error:
        raise UnusableOutput(f"{path} is not a Parquet file: {error}") from error
    columns = file.schema_arrow
    if is_part and columns.names[-1] == _ERROR:
        columns = columns.remove(len(columns) - 1)
    size = getattr(columns.field("embedding").type, "list_size", 0) if "embedding" in columns.names else 0
    if not size or not columns.equals(_schema(arrow, size=size)):
        columns = ", ".join(f"{field.name} {field.type}" for field in file.schema_arrow)
        file.close()
        raise UnusableOutput(f"{path}: expected the columns of clip-embed, got {columns}")
    return file


def _images(batch: Any) -> Iterator[ImageFile]:
    columns = (batch.column(name).to_pylist() for name in ImageFile._fields)
    return map(ImageFile, *columns)
