"""What differs by more than noise: ratios paired by round, and an exact test between two runs."""

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Two runs of one commit on one machine differ by a percent or two in the median; not measured further.
SMALLEST_CHANGE = 0.02
SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class Ratio:
    """How many times more one arm gives than another: the median of the rounds' ratios, and the lowest and highest."""

    median: float
    lowest: float
    highest: float
    rounds: int

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.lowest:.2f} to {self.highest:.2f}, {self.rounds} rounds)"


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Ratio:
    """The ratio of two arms measured in the same rounds: round i of one against round i of the other.

    Pairing takes out what drifts from round to round, for both arms met the same drift. Raises ValueError when the
    rounds do not match.
    """
    if len(numerators) != len(denominators) or not numerators:
        raise ValueError(f"expected as many rounds on both sides, came {len(numerators)} and {len(denominators)}")
    ratios = [one / other for one, other in zip(numerators, denominators, strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios), len(ratios))


def rank_sum_p(before: Sequence[float], after: Sequence[float]) -> float:
    """The exact two-sided p-value of Wilcoxon's rank-sum test, ties given their mean rank.

    1 where nothing tells the two apart. Enumerates every way to deal the ranks, so it is for a dozen rounds a side.
    """
    if not before or not after:
        return 1.0
    values = sorted([*before, *after])
    mean_rank = {
        value: statistics.mean(i for i, other in enumerate(values, 1) if other == value) for value in set(values)
    }
    ranks = [mean_rank[value] for value in [*before, *after]]
    expected = len(before) * (len(values) + 1) / 2
    seen = abs(sum(ranks[: len(before)]) - expected)
    deals = [abs(sum(deal) - expected) for deal in itertools.combinations(ranks, len(before))]
    return sum(distance >= seen - 1e-9 for distance in deals) / len(deals)


@dataclass(frozen=True)
class Change:
    """One quantity in two runs. `verdict`: faster, slower, the same within noise, or too few rounds to tell."""

    before: float
    after: float
    ratio: float
    p_value: float
    verdict: str


def change(before: Sequence[float], after: Sequence[float], *, more_is_better: bool = True) -> Change:
    """The change from one run's rounds to another's.

    A change counts when it is larger than SMALLEST_CHANGE and chance alone would show its like in fewer than one of
    twenty pairs of runs. Under four rounds a side no difference can be that rare.
    """
    old, new = statistics.median(before), statistics.median(after)
    ratio, p_value = new / old, rank_sum_p(before, after)
    if rank_sum_p(range(len(before)), range(len(before), len(before) + len(after))) > SIGNIFICANCE:
        verdict = "too few rounds to tell"
    elif p_value > SIGNIFICANCE or abs(ratio - 1) < SMALLEST_CHANGE:
        verdict = "the same within noise"
    else:
        verdict = "faster" if (ratio > 1) == more_is_better else "slower"
    return Change(old, new, ratio, p_value, verdict)


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` of the values do not exceed (nearest rank)."""
    return float(np.percentile(values, percent, method="inverted_cdf"))
