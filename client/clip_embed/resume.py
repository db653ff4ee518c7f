"""An output that continues where an earlier run of the command ended, even if it was killed.

Finished rows are kept in the folder `NAME.parts`, in files of some seconds' worth of rows, each written atomically. At
the end of a run these parts and the rows of NAME become one file, which replaces NAME in one step. A killed run loses
only the rows that were not in a part yet, and never leaves an incomplete file.
"""

import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from clip_embed.atomic_file import lock_parts, replace_atomically
from clip_embed.names import original, printable
from clip_embed.provenance import Provenance, sidecar_path, write_sidecar
from clip_embed.table import ImageFile, Table, TextRow, UnusableOutput, has_parts, is_missing, stat_image
from clip_embed.wire import Embeddings

_PROVENANCE = "provenance.json"  # of the parts
PART_ROWS = 1000  # 2 MiB of Parquet
PART_S = 5.0  # how much work a kill may lose; neither is measured


class ResumedOutput:
    """Implements `output.Output`. Each path has at most one row, that of the current file.

    Rows of paths that this run does not embed stay; `prune` drops those of files that no longer exist. Vectors with
    another provenance than the server's are refused.
    """

    def __init__(
        self, path: Path, table: Table, parts: Path, *, prune: bool, provenance: Provenance | None = None
    ) -> None:
        self._path = path
        self._parts = parts
        self._table = table
        self._rows: list[tuple[ImageFile, Embeddings]] = []
        self._written_s = time.monotonic()
        self._seen: set[str] = set()
        self.already_embedded = 0
        self._server_provenance = provenance
        self._provenance, self.warning = self._check_provenance()
        self._finished = {image.path: image[1:] for file in self._files() for image in table.read_images(file)}
        missing = [name for name in self._finished if prune and is_missing(original(name))]
        for name in missing:
            del self._finished[name]
        self.pruned = len(missing)
        self._is_changed = has_parts(path) or not path.exists() or bool(missing)

    def _check_provenance(self) -> tuple[Provenance | None, str | None]:
        """The provenance of all rows, old and new, and a warning if that of the old ones is not known.

        Raises:
            UnusableOutput: The old ones have other weights or another preprocess mode.
        """
        before = [self._table.read_provenance(self._path)] if self._path.exists() else []
        if has_parts(self._path):
            try:
                before.append(Provenance.from_json((self._parts / _PROVENANCE).read_bytes()))
            except FileNotFoundError:
                before.append(None)
        for one in before:
            if one and one != self._server_provenance:
                raise UnusableOutput(
                    f"{self._path} has vectors of {one}, but the server "
                    f"{f'has {self._server_provenance}' if self._server_provenance else 'does not name its weights'}: "
                    "write to a new file, or serve the same weights again"
                )
        if None not in before or self._server_provenance is None:
            return self._server_provenance, None
        return None, (
            f"{self._path} does not name the weights of its vectors, as files of earlier versions do not: they cannot "
            "be compared with the server's"
        )

    def unfinished(self, paths: Iterable[str], row_of: Callable[[str], ImageFile] = stat_image) -> Iterator[ImageFile]:
        """Yields each image once that has no row or has changed since, and each text that has no row."""
        for path in paths:
            name = printable(path)
            if name in self._seen:
                continue
            self._seen.add(name)
            image = row_of(path)
            is_readable = image.size_bytes is not None or isinstance(image, TextRow)
            if is_readable and self._finished.get(name) == image[1:]:
                self.already_embedded += 1
            else:
                yield image

    def add(self, image: ImageFile, embedding: Embeddings | None) -> None:
        """Add a row. A failed image has none, and loses the row of an earlier version of its file."""
        if embedding is not None:
            self._rows.append((image, embedding))
        elif self._finished.pop(printable(image.path), None):
            self._is_changed = True
        if len(self._rows) >= PART_ROWS or time.monotonic() - self._written_s > PART_S:
            self.write_part()

    def write_part(self) -> None:
        """Write the rows added so far to a part. After an exception, this can be tried again."""
        self._written_s = time.monotonic()
        if not self._rows:
            return
        number = max((int(part.stem) for part in self._parts.glob("*.part")), default=0) + 1
        if self._server_provenance and number == 1:
            (self._parts / _PROVENANCE).write_text(self._server_provenance.to_json())
        with replace_atomically(self._parts / f"{number:08d}.part", self._parts, like=self._path) as file:
            rows = self._table.open_rows(file, self._server_provenance)
            for image, embedding in self._rows:
                rows.add(image, embedding)
            rows.finish()
        self._finished.update((printable(image.path), image[1:]) for image, _ in self._rows)
        self._rows.clear()
        self._is_changed = True

    def merge(self) -> None:
        """Merge everything into one file. After an exception, the parts are unchanged."""
        self.write_part()
        if self._is_changed:
            missing = dict(self._finished)

            def keep(image: ImageFile) -> bool:
                if missing.get(image.path) != image[1:]:
                    return False  # an earlier version of the file, or a row that is in two files
                del missing[image.path]
                return True

            with replace_atomically(self._path, self._parts) as file:
                self._table.merge(self._files(), file, keep, self._provenance)
                sidecar_path(self._path).unlink(missing_ok=True)
            if self._table.NEEDS_SIDECAR:
                write_sidecar(self._path, self._provenance)
        shutil.rmtree(self._parts)

    def _files(self) -> Iterator[Path]:
        if self._path.exists():
            yield self._path
        yield from sorted(self._parts.glob("*.part"))


@contextmanager
def open_resumed(
    path: Path, table: Table, *, prune: bool = False, provenance: Provenance | None = None
) -> Iterator[ResumedOutput]:
    """An output to a file that may exist. After an exception its parts are kept, to be resumed.

    Raises:
        OSError: The file cannot be written.
        UnusableOutput: The file was not written by this command, has another provenance, or another process uses it.
    """
    with lock_parts(path) as parts:
        output = ResumedOutput(path, table, parts, prune=prune, provenance=provenance)
        try:
            yield output
        except BaseException:
            with suppress(OSError):
                output.write_part()
            raise
        output.merge()
