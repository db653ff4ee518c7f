"""An output that goes on where an earlier run of the command ended, however it ended.

What is finished is kept in `NAME.parts`, in files that appear whole: some seconds' worth of rows each. At the end of a
run they become one file together with what NAME held, which it takes the place of in one step. A run that is killed
loses the rows that had not yet become a part, and never leaves half a file.
"""

import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from clip_embed.destination import locked, whole
from clip_embed.names import original, printable
from clip_embed.table import ImageFile, Table, has_parts, is_gone, look_at
from clip_embed.wire import Embeddings

PART_ROWS = 1000  # 2 MiB of Parquet
PART_S = 5.0  # what a kill may cost; neither was measured


class Resumed:
    """Implements `output.Output`. Each path has one row at most, that of the file as it is now.

    Rows of other paths stay, as of files that were not named this time; `prune` drops those of files that are gone.
    """

    def __init__(self, path: Path, table: Table, parts: Path, *, prune: bool) -> None:
        self._path = path
        self._parts = parts
        self._table = table
        self._rows: list[tuple[ImageFile, Embeddings]] = []
        self._written_s = time.monotonic()
        self._seen: set[str] = set()
        self.already_there = 0
        self._finished = {image.path: image[1:] for file in self._files() for image in table.read_images(file)}
        gone = [name for name in self._finished if prune and is_gone(original(name))]
        for name in gone:
            del self._finished[name]
        self.pruned = len(gone)
        self._is_changed = has_parts(path) or not path.exists() or bool(gone)

    def unfinished(self, paths: Iterable[str]) -> Iterator[ImageFile]:
        """Each image once that has no row, or the row of a file that has changed since."""
        for path in paths:
            name = printable(path)
            if name in self._seen:
                continue
            self._seen.add(name)
            image = look_at(path)
            if image.size_bytes is not None and self._finished.get(name) == image[1:]:
                self.already_there += 1
            else:
                yield image

    def add(self, image: ImageFile, embedding: Embeddings | None) -> None:
        """A failed image has no row, not even that of the file as it was before it changed."""
        if embedding is not None:
            self._rows.append((image, embedding))
        elif self._finished.pop(printable(image.path), None):
            self._is_changed = True
        if len(self._rows) >= PART_ROWS or time.monotonic() - self._written_s > PART_S:
            self.write_part()

    def write_part(self) -> None:
        """Keeps what was added so far. After an exception it was not kept, and can be again."""
        self._written_s = time.monotonic()
        if not self._rows:
            return
        number = max((int(part.stem) for part in self._parts.glob("*.part")), default=0) + 1
        with whole(self._parts / f"{number:08d}.part", self._parts, like=self._path) as file:
            rows = self._table.open_rows(file)
            for image, embedding in self._rows:
                rows.add(image, embedding)
            rows.finish()
        self._finished.update((printable(image.path), image[1:]) for image, _ in self._rows)
        self._rows.clear()
        self._is_changed = True

    def merge(self) -> None:
        """Makes one file of it all. After an exception the parts are as they were."""
        self.write_part()
        if self._is_changed:
            missing = dict(self._finished)

            def wants(image: ImageFile) -> bool:
                if missing.get(image.path) != image[1:]:
                    return False  # a file as it was before, or a row that is in two files
                del missing[image.path]
                return True

            with whole(self._path, self._parts) as file:
                self._table.merge(self._files(), file, wants)
        shutil.rmtree(self._parts)

    def _files(self) -> Iterator[Path]:
        if self._path.exists():
            yield self._path
        yield from sorted(self._parts.glob("*.part"))


@contextmanager
def open_resumed(path: Path, table: Table, *, prune: bool = False) -> Iterator[Resumed]:
    """An output to a file that may be there from before. After an exception its parts are left, to be resumed.

    Raises:
        OSError: It cannot be written.
        UnusableOutput: What is there was not written by this command, or another process is at it.
    """
    with locked(path) as parts:
        output = Resumed(path, table, parts, prune=prune)
        try:
            yield output
        except BaseException:
            with suppress(OSError):
                output.write_part()
            raise
        output.merge()
