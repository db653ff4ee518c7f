"""The nearest vectors and all near pairs are exactly those of the full product of all vectors."""

import numpy as np
import pytest

from clip_embed import nearest as module
from clip_embed.duplicates import connected_rows
from clip_embed.nearest import Pairs, nearest, pairs_above


def vectors(count: int, size: int, *, seed: int = 0) -> np.ndarray:
    """Unit vectors like CLIP's: one common direction, decreasing variance in the others, every fifth near another."""
    random = np.random.default_rng(seed)
    rows = random.standard_normal((count, size)) / np.sqrt(np.arange(1, size + 1))
    rows[:, -1] += 4
    rows[1::5] = rows[: len(rows[1::5]) * 5 : 5] + 0.15 * random.standard_normal((len(rows[1::5]), size)) / np.sqrt(
        size
    )
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def by_hand(rows: np.ndarray, threshold: float) -> dict[tuple[int, int], float]:
    product = np.triu(rows.astype(np.float64) @ rows.T.astype(np.float64), 1)
    return {(int(i), int(j)): product[i, j] for i, j in zip(*np.nonzero(product >= threshold), strict=True)}


def found(pairs: Pairs) -> dict[tuple[int, int], float]:
    keys = zip(pairs.first.tolist(), pairs.second.tolist(), strict=True)
    return dict(zip(keys, pairs.cosines.tolist(), strict=True))


@pytest.mark.parametrize(("count", "size"), [(700, 512), (1, 512), (2, 512), (333, 768), (100, 8)])
@pytest.mark.parametrize("threshold", [0.6, 0.96, 0.999])
def test_pairs_are_those_of_the_full_product(monkeypatch, count, size, threshold):
    """Also across blocks, with an incomplete last block, and for vectors shorter than the head that rules pairs out."""
    monkeypatch.setattr(module, "_PAIR_ROWS", 64)
    rows = vectors(count, size)
    got, expected = found(pairs_above(rows, threshold)), by_hand(rows, threshold)
    near_the_edge = {pair for pair, cosine in expected.items() if abs(cosine - threshold) < 1e-5}
    assert set(got) ^ set(expected) <= near_the_edge  # float32 rounding
    assert count < 100 or len(expected) >= 20 or threshold > 0.99
    assert all(abs(got[pair] - expected[pair]) < 1e-5 for pair in set(got) & set(expected))


def test_failed_and_excluded_rows_have_no_pairs():
    rows = np.repeat(vectors(1, 512), 5, axis=0)
    rows[1] = np.nan
    assert set(found(pairs_above(rows, 0.96, included=np.array([1, 1, 0, 1, 1], bool)))) == {(0, 3), (0, 4), (3, 4)}
    assert nearest(rows, rows[0], 9)[0].tolist() == [0, 2, 3, 4]


def test_too_many_pairs_are_reduced_to_those_that_give_the_same_groups(monkeypatch):
    monkeypatch.setattr(module, "_PAIR_ROWS", 64)
    rows = vectors(400, 512)
    everything = pairs_above(rows, 0.6)
    monkeypatch.setattr(module, "MOST_PAIRS", 300)
    few = pairs_above(rows, 0.6)
    assert few.total == everything.total > 2000
    assert len(few.first) < 1200
    for threshold in (0.6, 0.7, 0.8, 0.96, 0.98):
        groups = [connected_rows(at(pairs, threshold)) for pairs in (few, everything)]
        assert sorted(groups[0]) == sorted(groups[1])


def at(pairs: Pairs, threshold: float) -> Pairs:
    some = pairs.cosines >= threshold
    return Pairs(pairs.first[some], pairs.second[some], pairs.cosines[some], int(some.sum()))


def test_the_nearest_are_those_of_the_full_product_best_first(monkeypatch):
    monkeypatch.setattr(module, "_SEARCH_ROWS", 64)
    rows = vectors(500, 512)
    for query in rows[:3]:
        got, cosines = nearest(rows, query, 7)
        expected = np.argsort(-(rows.astype(np.float64) @ query), kind="stable")[:7]
        assert got.tolist() == expected.tolist()
        assert np.allclose(cosines, rows[expected] @ query, atol=1e-6)
    assert len(nearest(rows, rows[0], 9999)[0]) == 500
    assert len(nearest(rows[:0], rows[0], 3)[0]) == 0
