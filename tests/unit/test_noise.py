"""Which differences are more than noise: ratios paired by round, and an exact test between runs."""

import pytest

from clip_tools.measuring.noise import change, paired_ratio, percentile, rank_sum_p


def test_drift_that_hits_both_arms_does_not_show_in_the_ratio():
    """The machine slows down to a third: each arm varies threefold, but their ratio stays the same."""
    drift = [1.0, 0.8, 0.5, 0.33]
    ratio = paired_ratio([30 * d for d in drift], [10 * d for d in drift])
    assert (ratio.median, ratio.lowest, ratio.highest) == pytest.approx((3, 3, 3))


def test_a_ratio_needs_as_many_rounds_on_both_sides():
    with pytest.raises(ValueError, match="as many rounds"):
        paired_ratio([1.0, 2.0], [1.0])


def test_rank_sum_p_matches_the_textbook():
    """Two of the 10 choose 5 = 252 ways to deal ten ranks separate them completely. Equal samples give 1."""
    assert rank_sum_p([1, 2, 3, 4, 5], [6, 7, 8, 9, 10]) == pytest.approx(2 / 252)
    assert rank_sum_p([5, 5, 5], [5, 5, 5]) == 1
    assert rank_sum_p([1, 3, 5, 7], [2, 4, 6, 8]) > 0.5


def test_a_change_is_distinguished_from_noise():
    before = [30.1, 29.8, 30.4, 30.0, 29.9]
    assert change(before, [40.2, 39.0, 41.0, 40.1, 39.7]).verdict == "faster"
    assert change(before, [20.2, 19.0, 21.0, 20.1, 19.7]).verdict == "slower"
    assert change(before, [29.9, 30.3, 30.0, 29.7, 30.2]).verdict == "the same within noise"


def test_less_time_is_faster():
    assert change([9, 9.1, 9.2, 9.3], [5, 5.1, 5.2, 5.3], more_is_better=False).verdict == "faster"


def test_a_change_of_one_percent_counts_as_noise():
    """The samples are completely separated, but by one percent only."""
    assert change([100.0, 100.1, 100.2, 100.3], [101.0, 101.1, 101.2, 101.3]).verdict == "the same within noise"


def test_three_rounds_are_too_few_to_tell():
    assert change([1.0, 1.1, 1.2], [9.0, 9.1, 9.2]).verdict == "too few rounds to tell"


def test_percentiles_are_values_that_were_measured():
    assert [percentile(range(1, 101), p) for p in (50, 95, 99, 100)] == [50, 95, 99, 100]
    assert percentile([7.0], 99) == 7.0
