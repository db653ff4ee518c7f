"""The vectors nearest to one, and all pairs of vectors that are near each other: exact, a block at a time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clip_embed.wire import Embeddings

_SEARCH_ROWS = 1 << 16  # at a time: 128 MiB of 512 numbers
_PAIR_ROWS = 2048
# The length of the part of each vector by which most pairs are ruled out. For 100,000 vectors of 512 numbers on two
# cores: see docs/search.md.
_HEAD = 64
_ROUNDING = 1e-4  # of float32 sums; by so much a bound may be too low
MOST_PAIRS = 2_000_000  # are held, 24 MB; of more, those that hold the groups together


def nearest(embeddings: Embeddings, query: Embeddings, count: int) -> tuple[NDArray[np.intp], Embeddings]:
    """The rows of (N, D) nearest to one vector (D,), best first, and their cosines; fewer than `count` of a small N.

    Rows of NaN, which are images that failed, are never among them.
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

    `total` is how many there are. Where that is over MOST_PAIRS, those that are here are enough to say which rows hang
    together at any threshold from the one that was asked for on: a maximum spanning forest, and the last ones found.
    """

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    cosines: Embeddings
    total: int


def pairs_above(
    embeddings: Embeddings,
    threshold: float,
    *,
    wanted: NDArray[np.bool_] | None = None,
    advance: Callable[[float], object] = lambda _: None,
) -> Pairs:
    """All pairs of rows of (N, D) whose cosine is at least `threshold`, which is over 0.

    Args:
        wanted: (N,), which rows to look at; None for all. Rows of NaN have no pairs.
        advance: is told the share that is done.

    Exact. Each vector is turned so that its first numbers hold most of it; the product of two heads and of the lengths
    of what is left is never under their cosine (Cauchy-Schwarz), so that most pairs need no more than these.
    """
    heads = _heads(embeddings)
    if wanted is not None:
        heads[~wanted] = 0
    parts: list[tuple[NDArray[np.int64], NDArray[np.int64], Embeddings]] = []
    held = total = 0
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
        held += len(parts[-1][0])
        total += len(parts[-1][0])
        if held > MOST_PAIRS:
            parts = [_spanning(*map(np.concatenate, zip(*parts, strict=True)))]
            held = len(parts[0][0])
    if not parts:
        return Pairs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32), 0)
    first, second, cosines = map(np.concatenate, zip(*parts, strict=True))
    return Pairs(first, second, cosines, total)


def _heads(embeddings: Embeddings) -> Embeddings:
    """(N, H + 1): the first H numbers of each turned vector, and the length of the rest. Zeros for rows of NaN."""
    size = embeddings.shape[1]
    sample = np.nan_to_num(embeddings[:: max(1, len(embeddings) // 4096)])
    _, axes = np.linalg.eigh(sample.T @ sample)  # by how much of the sample lies along each, least first
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
    """For each two blocks the pairs, first < second, that are not ruled out."""
    for start in range(0, len(heads), _PAIR_ROWS):
        ours = heads[start : start + _PAIR_ROWS]
        for other in range(start, len(heads), _PAIR_ROWS):
            product = ours @ heads[other : other + _PAIR_ROWS].T
            if other == start:
                product = np.triu(product, 1)  # the lower half and the diagonal, as zeros
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


def _spanning(
    first: NDArray[np.int64], second: NDArray[np.int64], cosines: Embeddings
) -> tuple[NDArray[np.int64], NDArray[np.int64], Embeddings]:
    """Those pairs that hang the same rows together as all do, at every threshold (Kruskal's)."""
    order = np.argsort(-cosines, kind="stable")
    joined = Joined()
    kept = [index for index in order.tolist() if joined.join(int(first[index]), int(second[index]))]
    return first[kept], second[kept], cosines[kept]


class Joined:
    """Which rows hang together."""

    def __init__(self) -> None:
        self._parents: dict[int, int] = {}

    def find(self, row: int) -> int:
        """The row that stands for all that hang together with this one."""
        parents = self._parents
        root = row
        while (parent := parents.get(root, root)) != root:
            root = parent
        while row != root:
            parents[row], row = root, parents.get(row, row)
        return root

    def join(self, first: int, second: int) -> bool:
        """Let two hang together; whether they did not before."""
        one, other = self.find(first), self.find(second)
        if one == other:
            return False
        self._parents[max(one, other)] = min(one, other)
        return True
