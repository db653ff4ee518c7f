"""Finds the vectors nearest to one, and all pairs of near vectors: exactly, in blocks."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clip_embed.wire import Embeddings

_SEARCH_ROWS = 1 << 16  # in a block: 128 MiB of 512 numbers
_PAIR_ROWS = 2048
# How many numbers of each vector rule most pairs out. docs/search.md has the speed for 100,000 vectors of 512 numbers
# on two cores.
_HEAD = 64
_ROUNDING = 1e-4  # of float32 sums: a bound may be too low by this
MOST_PAIRS = 2_000_000  # to keep, 24 MB; of more, only those that connect the groups


def nearest(embeddings: Embeddings, query: Embeddings, count: int) -> tuple[NDArray[np.intp], Embeddings]:
    """The `count` rows of (N, D) nearest to a vector (D,), best first, and their cosines; fewer if N is smaller.

    Rows of NaN, which are failed images, are left out.
    """
    cosines = np.empty(len(embeddings), np.float32)
    for start in range(0, len(embeddings), _SEARCH_ROWS):
        rows = slice(start, start + _SEARCH_ROWS)
        np.matmul(embeddings[rows], query, out=cosines[rows])
    np.nan_to_num(cosines, copy=False, nan=-np.inf)
    count = min(count, len(cosines))
    best = np.argpartition(-cosines, count - 1)[:count] if count else np.empty(0, np.intp)
    best = best[np.lexsort((best, -cosines[best]))]
    best = best[np.isfinite(cosines[best])]
    return best, cosines[best]


@dataclass(frozen=True)
class Pairs:
    """Pairs of rows and their cosines: `first` < `second`, (P,) each.

    `total` is the number of pairs found. If that is over MOST_PAIRS, only a maximum spanning forest and the last pairs
    found are kept. They connect the same rows as all pairs, at any threshold from the requested one up.
    """

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    cosines: Embeddings
    total: int


def pairs_above(
    embeddings: Embeddings,
    threshold: float,
    *,
    included: NDArray[np.bool_] | None = None,
    advance: Callable[[float], object] = lambda _: None,
) -> Pairs:
    """All pairs of rows of (N, D) whose cosine is at least `threshold`, which is over 0.

    Args:
        included: (N,), the rows to compare; None for all. Rows of NaN have no pairs.
        advance: is called with the share that is done.

    Exact. All vectors are rotated so that their first numbers hold most of their length. The product of two heads plus
    the product of the lengths of their rests is never under the cosine (Cauchy-Schwarz). This rules out most pairs.
    """
    heads = _heads(embeddings)
    if included is not None:
        heads[~included] = 0
    parts: list[tuple[NDArray[np.int64], NDArray[np.int64], Embeddings]] = []
    kept = total = 0
    blocks = -(-len(embeddings) // _PAIR_ROWS)
    done = 0
    for first, second in _candidates(heads, threshold - _ROUNDING):
        done += 1
        advance(2 * done / (blocks * (blocks + 1)))
        if not len(first):
            continue
        cosines = _cosines(embeddings, first, second)
        is_near = cosines >= threshold
        parts.append((first[is_near], second[is_near], cosines[is_near]))
        kept += len(parts[-1][0])
        total += len(parts[-1][0])
        if kept > MOST_PAIRS:
            parts = [_spanning_forest(*map(np.concatenate, zip(*parts, strict=True)))]
            kept = len(parts[0][0])
    if not parts:
        return Pairs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32), 0)
    first, second, cosines = map(np.concatenate, zip(*parts, strict=True))
    return Pairs(first, second, cosines, total)


def _heads(embeddings: Embeddings) -> Embeddings:
    """(N, H + 1): the first H numbers of each rotated vector, and the length of the rest. Zeros for rows of NaN."""
    size = embeddings.shape[1]
    sample = np.nan_to_num(embeddings[:: max(1, len(embeddings) // 4096)])
    _, axes = np.linalg.eigh(sample.T @ sample)  # sorted by the sample's length along each, least first
    axes = np.ascontiguousarray(axes[:, ::-1][:, : min(_HEAD, size)])
    heads = np.empty((len(embeddings), axes.shape[1] + 1), np.float32)
    for start in range(0, len(embeddings), _PAIR_ROWS):
        rows = slice(start, start + _PAIR_ROWS)
        block = np.nan_to_num(embeddings[rows])
        head = block @ axes
        heads[rows, :-1] = head
        rest = np.einsum("ij,ij->i", block, block) - np.einsum("ij,ij->i", head, head)
        heads[rows, -1] = np.sqrt(np.maximum(rest, 0))
    return heads


def _candidates(heads: Embeddings, bound: float) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yields for every two blocks the pairs, first < second, that the bound does not rule out."""
    for start in range(0, len(heads), _PAIR_ROWS):
        ours = heads[start : start + _PAIR_ROWS]
        for other in range(start, len(heads), _PAIR_ROWS):
            product = ours @ heads[other : other + _PAIR_ROWS].T
            if other == start:
                product = np.triu(product, 1)  # zero the lower half and the diagonal
            if product.max() < bound:
                yield np.empty(0, np.int64), np.empty(0, np.int64)
                continue
            first, second = np.nonzero(product >= bound)
            yield first + start, second + other


def _cosines(embeddings: Embeddings, first: NDArray[np.int64], second: NDArray[np.int64]) -> Embeddings:
    cosines = np.empty(len(first), np.float32)
    for start in range(0, len(first), _PAIR_ROWS * 8):
        some = slice(start, start + _PAIR_ROWS * 8)
        np.einsum("ij,ij->i", embeddings[first[some]], embeddings[second[some]], out=cosines[some])
    return cosines


def _spanning_forest(
    first: NDArray[np.int64], second: NDArray[np.int64], cosines: Embeddings
) -> tuple[NDArray[np.int64], NDArray[np.int64], Embeddings]:
    """A maximum spanning forest of the pairs (Kruskal's): it connects the same rows at every threshold."""
    order = np.argsort(-cosines, kind="stable")
    sets = DisjointSets()
    kept = [index for index in order.tolist() if sets.join(int(first[index]), int(second[index]))]
    return first[kept], second[kept], cosines[kept]


class DisjointSets:
    """Disjoint sets of connected rows (union-find)."""

    def __init__(self) -> None:
        self._parents: dict[int, int] = {}

    def find(self, row: int) -> int:
        """The row that represents this row's set."""
        parents = self._parents
        root = row
        while (parent := parents.get(root, root)) != root:
            root = parent
        while row != root:
            parents[row], row = root, parents.get(row, row)
        return root

    def join(self, first: int, second: int) -> bool:
        """Connect two rows. Returns whether they were not connected before."""
        one, other = self.find(first), self.find(second)
        if one == other:
            return False
        self._parents[max(one, other)] = min(one, other)
        return True
