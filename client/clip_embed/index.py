"""The index LIBRARY.usearch of a library, for libraries too large to compare every vector."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clip_embed.library import Library
from clip_embed.nearest import nearest
from clip_embed.wire import Embeddings

EXACT_ROWS = 1_000_000  # up to here comparing every vector is fast enough
_BLOCK = 8192
_EXPANSION = 512  # candidates for a query: more of them find more of the nearest
_QUERIES, _COUNT = 200, 10  # for the printed recall


def require_usearch() -> Any:
    """usearch's Index class, or ModuleNotFoundError with what to install."""
    try:
        from usearch.index import Index
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("an index needs usearch: pip install 'clip-embed[index]'") from error
    return Index


def open_index(library: Library, log: Callable[[str], object]) -> Any:
    """The library's index. If the library has changed, it is rebuilt and its recall passed to `log`."""
    kind, path = require_usearch(), library.path.with_name(f"{library.path.name}.usearch")
    if path.is_file() and path.stat().st_mtime_ns >= library.path.stat().st_mtime_ns:
        found = kind.restore(str(path), view=True)
        if found is not None and found.ndim == library.embeddings.shape[1]:
            found.expansion_search = _EXPANSION
            return found
    began_s = time.monotonic()
    index = kind(ndim=library.embeddings.shape[1], metric="ip", dtype="f16", expansion_search=_EXPANSION)
    for start in range(0, len(library.images), _BLOCK):
        block = library.embeddings[start : start + _BLOCK]
        there = np.flatnonzero(~np.isnan(block[:, 0]))
        index.add(there + start, block[there])
    _save(index, path)
    log(
        f"{path}: built from {len(index):,} vectors in {time.monotonic() - began_s:.0f} s; it finds "
        f"{recall(index, library.embeddings):.1%} of the {_COUNT} nearest"
    )
    return index


def nearest_by_index(
    index: Any, embeddings: Embeddings, query: Embeddings, count: int
) -> tuple[NDArray[np.intp], Embeddings]:
    """Like `nearest`, but some of the nearest may be missing. The cosines are exact."""
    rows = np.sort(index.search(query, count).keys.astype(np.intp))
    cosines = embeddings[rows] @ query
    order = np.argsort(-cosines, kind="stable")
    return rows[order], cosines[order]


def recall(index: Any, embeddings: Embeddings) -> float:
    """The share of the ten nearest vectors that the index finds, for a sample of the library's vectors."""
    shares = []
    for row in range(0, len(embeddings), max(1, len(embeddings) // _QUERIES)):
        query = np.asarray(embeddings[row])
        if not np.isnan(query[0]):
            exact, _ = nearest(embeddings, query, _COUNT)
            found, _ = nearest_by_index(index, embeddings, query, _COUNT)
            shares.append(len(set(exact.tolist()) & set(found.tolist())) / len(exact))
    return float(np.mean(shares)) if shares else 1.0


def _save(index: Any, path: Path) -> None:
    from clip_embed.atomic_file import lock_parts, replace_atomically  # need a system with flock

    with lock_parts(path) as folder, replace_atomically(path, folder) as file:
        file.write(index.save())
