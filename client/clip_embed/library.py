"""Reads a file that `clip-embed` wrote, Parquet or `.npy`: its images, vectors and provenance."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from clip_embed import parquet
from clip_embed.names import original
from clip_embed.provenance import Provenance, read_sidecar
from clip_embed.table import ImageFile, UnusableOutput
from clip_embed.wire import Embeddings

ENDINGS = (".parquet", ".npy")
_IN_MEMORY_BYTES = 1 << 30  # of vectors from Parquet; more go to a temporary file


@dataclass(frozen=True)
class Library:
    """The images of a file and their vectors.

    Args:
        images: N; their paths are the original ones, not their `printable` form.
        embeddings: (N, D) float32, row i of image i; NaN if the image failed. It may be a memory map.
        provenance: of the vectors; None if the file does not have one, like those of earlier versions.
    """

    path: Path
    images: Sequence[ImageFile]
    embeddings: Embeddings
    provenance: Provenance | None


def read_library(path: Path) -> Library:
    """The library in a file, or in the Parquet parts of a folder.

    Raises:
        UnusableOutput: It is not a file that clip-embed wrote, or its parts are of different weights.
        ModuleNotFoundError: It is Parquet, and pyarrow is not installed.
    """
    if path.is_dir() and any(path.glob("*.parquet")):
        return _read_parquet(path)
    if not path.is_file():
        raise UnusableOutput(f"{path}: expected a .parquet or .npy file that clip-embed wrote, found none")
    ending = path.suffix.lower()
    if ending == ".parquet":
        return _read_parquet(path)
    if ending == ".npy":
        return _read_npy(path)
    raise UnusableOutput(f"{path}: expected a name that ends with {' or '.join(ENDINGS)}: embed to one of these")


def _read_npy(path: Path) -> Library:
    names = path.with_name(f"{path.name}.paths")
    try:
        embeddings = np.load(path, mmap_mode="r")
    except ValueError as error:
        raise UnusableOutput(f"{path} is not a .npy file: {error}") from error
    if embeddings.ndim != 2 or embeddings.dtype != np.float32:
        raise UnusableOutput(f"{path}: expected (N, D) float32, got {embeddings.shape} {embeddings.dtype}")
    try:
        paths = names.read_bytes().decode().split("\n")[:-1]
    except FileNotFoundError as error:
        raise UnusableOutput(f"{names} is missing: expected it beside {path}, with the path of each row") from error
    if len(paths) != len(embeddings):
        raise UnusableOutput(
            f"{path} has {len(embeddings)} rows and {names} {len(paths)} paths: they are of different runs"
        )
    images = [ImageFile(original(name), None, None) for name in paths]
    return Library(path, images, embeddings, read_sidecar(path))


def _read_parquet(path: Path) -> Library:
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if len(kinds := {parquet.read_provenance(file) for file in files}) > 1:
        raise UnusableOutput(f"{path}: expected parts of the same weights, got {'; '.join(map(str, kinds))}")
    counts, sizes, batches = zip(*map(parquet.open_vectors, files), strict=True)
    count, size = sum(counts), max(sizes)
    if count * size * 4 <= _IN_MEMORY_BYTES:
        embeddings = np.empty((count, size), np.float32)
    else:
        with tempfile.NamedTemporaryFile() as file:  # its name disappears at once, its data with the array
            embeddings = np.memmap(file.name, np.float32, "w+", shape=(count, size))
    images: list[ImageFile] = []
    for some, vectors in chain.from_iterable(batches):
        embeddings[len(images) : len(images) + len(some)] = vectors
        images += [image._replace(path=original(image.path)) for image in some]
    return Library(path, images, embeddings[: len(images)], kinds.pop())
