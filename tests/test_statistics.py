"""Intervals and tests against hand values, enumeration, scipy and published examples."""

from fractions import Fraction
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from thinktuning.evaluation import statistics
from thinktuning.evaluation.statistics import (
    Estimate,
    accuracy_interval,
    holm,
    mean_interval,
    mean_of,
    paired,
    ratio_interval,
    sign_flip_p,
)


def ones(right: int, of: int) -> np.ndarray:
    return np.array([1.0] * right + [0.0] * (of - right))


def table(both: int, first: int, second: int, neither: int):
    """Two runs with one sample an item, from how many items which of them gets right."""
    pairs = [(1, 1)] * both + [(1, 0)] * first + [(0, 1)] * second + [(0, 0)] * neither
    return tuple({f"{i}": Fraction(pair[run]) for i, pair in enumerate(pairs)} for run in (0, 1))


def of(shares: list[Fraction]) -> dict[str, Fraction]:
    return {str(i): share for i, share in enumerate(shares)}


def test_wilson_of_a_published_example():
    # Newcombe (1998), Statistics in Medicine 17, 857-872, table I: 81/263, 15/148, 0/20, 1/29.
    for right, items, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        found = accuracy_interval(ones(right, items))
        assert found.value == right / items
        assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


def test_items_are_the_trials_however_many_samples_they_have():
    """All samples of every item wrong: the items are what was drawn, so there are 20 trials."""
    assert accuracy_interval(np.zeros(20)).high == pytest.approx(0.1611, abs=5e-5)


def test_bootstrap_agrees_with_scipys():
    shares = np.random.default_rng(7).integers(0, 5, size=150) / 4
    found = accuracy_interval(shares)
    reference = stats.bootstrap(
        (shares,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(1)
    ).confidence_interval
    assert found.value == shares.mean()
    assert (found.low, found.high) == pytest.approx(tuple(reference), abs=0.003)


def test_bootstrap_agrees_with_all_resamples_there_are():
    values = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    means = [np.mean(draw) for draw in product(values, repeat=5)]
    found = mean_interval(values)
    assert (found.low, found.high) == pytest.approx(np.quantile(means, (0.025, 0.975)), abs=0.21)
    assert found == mean_interval(values)


def test_bootstrap_in_parts_draws_the_same_number(monkeypatch):
    """Large benchmarks are resampled in parts, which must neither lose draws nor repeat them."""
    monkeypatch.setattr(statistics, "_CHUNK", 4_000)
    seen = []

    def statistic(rows):
        seen.append(rows)
        return rows.mean(axis=1)

    assert len(statistics._resample(3, statistic)) == statistics.RESAMPLES
    assert len(seen) == 8 and not np.array_equal(seen[0], seen[1])


def test_ratio_is_of_means_and_paired():
    base = np.array([10.0, 100.0, 1000.0, 30.0])
    found = ratio_interval(3 * base, base)
    assert (found.value, found.low, found.high) == pytest.approx((3, 3, 3))
    values = np.array([20.0, 100.0, 500.0, 60.0])
    found = ratio_interval(values, base)
    assert found.value == 680 / 1140
    assert found.low < found.value < found.high <= 2


def test_average_adds_distances_as_squares():
    # Distances below 0.03 and 0.04: 0.05 of the sum, 0.025 of the mean; above 0.05 and 0.12.
    found = mean_of([Estimate(0.5, 0.47, 0.55), Estimate(0.1, 0.06, 0.22)])
    assert (found.value, found.low, found.high) == pytest.approx((0.3, 0.275, 0.365))


@pytest.mark.parametrize(
    ("counts", "low", "high"),
    # As the formula of confIntPairedProportion in R's biostatUZH has it, which is Newcombe's method
    # 10: with a negative correlation, one too small for its correction, a corrected one, and a
    # strongly negative one.
    [
        ((36, 12, 2, 0), 0.0569, 0.3404),
        ((1, 1, 7, 12), -0.5069, -0.0256),
        ((10, 15, 5, 20), 0.0258, 0.3569),
        ((5, 20, 10, 5), -0.0149, 0.4774),
    ],
)
def test_difference_of_paired_proportions_is_newcombes(counts, low, high):
    found = paired(*table(*counts)).difference
    assert found.value == pytest.approx((counts[1] - counts[2]) / sum(counts))
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


def test_difference_has_a_width_even_if_no_item_sets_the_runs_apart():
    found = paired(*table(0, 0, 0, 20))
    assert found.p == 1 and found.difference.value == 0
    # With an empty margin the correlation is 0: both sides are Wilson's upper limit of 0 in 20.
    assert (found.difference.low, found.difference.high) == pytest.approx(
        (-0.1611, 0.1611), abs=1e-4
    )


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 20), st.integers(0, 20))
def test_one_sample_an_item_is_exact_mcnemar(first, second, both, neither):
    if first + second + both + neither == 0:
        return
    found = paired(*table(both, first, second, neither))
    expected = stats.binomtest(first, first + second).pvalue if first + second else 1.0
    assert found.p == pytest.approx(expected, rel=1e-9)
    assert (found.wins, found.losses, found.ties) == (first, second, both + neither)


def test_mcnemar_far_out_in_the_tail():
    assert paired(*table(0, 200, 0, 0)).p == pytest.approx(2 * 0.5**200)


def enumerated_p(differences: list[Fraction]) -> float:
    found = abs(sum(differences))
    sums = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in product((1, -1), repeat=len(differences))
    ]
    return sum(s >= found for s in sums) / len(sums)


shares_of = st.sampled_from([Fraction(c, k) for k in (1, 2, 3, 4) for c in range(k + 1)])


@given(st.lists(st.tuples(shares_of, shares_of), min_size=1, max_size=7))
def test_permutation_test_agrees_with_all_sign_flips(pairs):
    differences = [a - b for a, b in pairs]
    assert sign_flip_p(differences) == pytest.approx(enumerated_p(differences), rel=1e-9)


def test_permutation_test_agrees_with_scipys_on_many_items():
    generator = np.random.default_rng(3)
    first, second = generator.binomial(4, 0.55, 200), generator.binomial(4, 0.49, 200)
    reference = stats.permutation_test(
        (first, second),
        lambda a, b, axis: (a - b).mean(axis=axis),
        permutation_type="samples",
        n_resamples=40_000,
        vectorized=True,
        rng=np.random.default_rng(4),
    )
    differences = [Fraction(int(a - b), 4) for a, b in zip(first, second, strict=True)]
    assert 0.005 < reference.pvalue < 0.5
    assert sign_flip_p(differences) == pytest.approx(reference.pvalue, abs=0.01)


def test_a_handful_of_items_proves_nothing():
    """A bootstrap would call three differences of the same sign significant at 1 in 10,000."""
    first, second = of([Fraction(1, 2)] * 3), of([Fraction(1, 4)] * 3)
    assert paired(first, second).p == 0.25


def test_several_samples_have_the_bootstrap_of_paired_differences():
    generator = np.random.default_rng(5)
    hard = generator.random(200)
    first, second = ([Fraction(int(c), 4) for c in generator.binomial(4, hard)] for _ in range(2))
    found = paired(of(first), of(second)).difference
    floats = np.array([float(a - b) for a, b in zip(first, second, strict=True)])
    reference = stats.bootstrap(
        (floats,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(1)
    ).confidence_interval
    assert found.value == pytest.approx(floats.mean())
    assert (found.low, found.high) == pytest.approx(tuple(reference), abs=0.003)


def test_swapping_the_runs_changes_only_signs():
    first, second = table(11, 9, 4, 6)
    one, other = paired(first, second), paired(second, first)
    assert (one.wins, one.losses, one.p) == (other.losses, other.wins, other.p)
    assert one.difference.low == pytest.approx(-other.difference.high)
    assert one.difference.high == pytest.approx(-other.difference.low)


def test_items_are_paired_by_id_and_the_rest_is_counted():
    first = {"a": Fraction(1), "b": Fraction(0), "c": Fraction(1)}
    second = {"c": Fraction(0), "b": Fraction(0), "d": Fraction(1), "e": Fraction(1)}
    found = paired(first, second)
    assert (found.items, found.unpaired) == (2, 3)
    assert (found.wins, found.losses, found.ties) == (1, 0, 1)
    assert found.difference.value == 0.5
    assert paired({"a": Fraction(1)}, {"b": Fraction(1)}) is None


def test_holm_by_hand():
    # Sorted 0.01, 0.02, 0.03, 0.04: times 4, 3, 2, 1, and never below an earlier one.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    # As statsmodels 0.14 has it: multipletests(p_values, method="holm").
    assert holm([0.5, 0.001, 0.3]) == pytest.approx([0.6, 0.003, 0.6])
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_the_closed_test_of_bonferroni(p_values):
    """A hypothesis is rejected where Bonferroni rejects every set of hypotheses with it."""
    indices = range(len(p_values))
    sets = [s for size in range(1, len(p_values) + 1) for s in combinations(indices, size)]
    closed = [
        max(min(1.0, len(s) * min(p_values[i] for i in s)) for s in sets if one in s)
        for one in indices
    ]
    assert holm(p_values) == pytest.approx(closed)


def test_wilson_intervals_cover_what_they_should():
    """Of 400 simulated accuracies near 95 % have the true one in their interval."""
    generator = np.random.default_rng(11)
    covered = 0
    for _ in range(400):
        found = accuracy_interval(ones(generator.binomial(60, 0.3), 60))
        covered += found.low <= 0.3 <= found.high
    assert 0.92 <= covered / 400 <= 0.98
