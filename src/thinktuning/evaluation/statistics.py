"""How sure the numbers of a comparison are: intervals of 95 % and paired tests.

An item's share is the part of its samples that is correct: 0 or 1 where there is one sample. Items
are what is drawn at random; the samples of one item aren't independent, so no function here counts
them as if they were.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray
from scipy.signal import fftconvolve
from scipy.stats import binom, binomtest

RESAMPLES = 10_000
_SEED = 0
_CHUNK = 4_000_000  # drawn indices at a time: 32 MB

Shares = Mapping[str, Fraction]
Values = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A number with its interval of 95 %, ``low`` to ``high``, in the number's own unit."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Paired:
    """Two runs on the same items.

    Attributes:
        items: In both runs; the comparison is of these alone.
        unpaired: In one of the runs only, and so left out.
        wins: Items of which the first run gets the larger share right.
        losses: Items of which the second one does.
        difference: Accuracy of the first run minus the second one's.
        p: Of the exact paired permutation test, two-sided; see ``sign_flip_p``.
    """

    items: int
    unpaired: int
    wins: int
    losses: int
    difference: Estimate
    p: float

    @property
    def ties(self) -> int:
        """Items of which both runs get the same share right."""
        return self.items - self.wins - self.losses


def accuracy_interval(shares: Values) -> Estimate:
    """Mean of the items' shares.

    Where every item is all right or all wrong, as with one sample an item, the interval is
    Wilson's, with the items as trials. Else it is of a bootstrap over items.

    Args:
        shares: float64 [items], at least one.
    """
    if not _one_trial_each(shares):
        return mean_interval(shares)
    wilson = binomtest(int(shares.sum()), len(shares)).proportion_ci(method="wilson")
    return Estimate(float(shares.mean()), float(wilson.low), float(wilson.high))


def mean_interval(values: Values) -> Estimate:
    """Mean over items, with the percentile interval of a bootstrap over them.

    Args:
        values: float64 [items], at least one.
    """
    means = _resample(len(values), lambda rows: values[rows].mean(axis=1))
    return _estimate(float(values.mean()), means)


def ratio_interval(values: Values, base: Values) -> Estimate:
    """Ratio of two means over the same items, with the interval of a paired bootstrap.

    Args:
        values: float64 [items], at least one.
        base: float64 [items], above 0.
    """
    ratios = _resample(len(values), lambda rows: values[rows].sum(axis=1) / base[rows].sum(axis=1))
    return _estimate(float(values.sum() / base.sum()), ratios)


def mean_of(estimates: Sequence[Estimate]) -> Estimate:
    """Plain mean of independent estimates, such as of several benchmarks.

    The distances between values and limits are added as squares, as standard errors would be, but
    each side by itself (Zou and Donner, 2008): the interval may be asymmetric, as those of its
    parts.

    Args:
        estimates: At least one.
    """
    value = math.fsum(e.value for e in estimates) / len(estimates)
    below = math.hypot(*(e.value - e.low for e in estimates)) / len(estimates)
    above = math.hypot(*(e.high - e.value for e in estimates)) / len(estimates)
    return Estimate(value, value - below, value + above)


def paired(first: Shares, second: Shares) -> Paired | None:
    """Compare two runs on the items that both have; None if there are none."""
    shared = [item for item in first if item in second]
    if not shared:
        return None
    differences = [first[item] - second[item] for item in shared]
    return Paired(
        items=len(shared),
        unpaired=len(first) + len(second) - 2 * len(shared),
        wins=sum(d.numerator > 0 for d in differences),
        losses=sum(d.numerator < 0 for d in differences),
        difference=_difference(
            np.array([float(first[item]) for item in shared]),
            np.array([float(second[item]) for item in shared]),
        ),
        p=sign_flip_p(differences),
    )


def sign_flip_p(differences: Sequence[Fraction]) -> float:
    """Two-sided p of the exact paired permutation test: are two runs exchangeable on every item?

    If they are, each difference could as well have the other sign, all independently: p is the
    probability of a sum at least as far from 0 as the one found. Where each difference is -1, 0 or
    1, as with one sample an item, this is exact McNemar. It stays right for a handful of items,
    where p-values of a bootstrap are far too small.

    Args:
        differences: First run's share minus the second one's, item by item.
    """
    scale = math.lcm(*(d.denominator for d in differences))
    signed = [d.numerator * (scale // d.denominator) for d in differences]
    found = abs(sum(signed))
    flips_of = Counter(abs(step) for step in signed if step)
    sums = np.ones(1)  # probabilities of the sums -reach, -reach + 1, …, reach
    for step, flips in flips_of.items():
        one_size = np.zeros(2 * flips * step + 1)
        one_size[:: 2 * step] = binom.pmf(np.arange(flips + 1), flips, 0.5)
        sums = fftconvolve(sums, one_size) if len(sums) > 1 else one_size
    reach = len(sums) // 2
    # The transform may leave tiny negative probabilities behind.
    tail = float(np.clip(sums[reach + found :], 0, None).sum())
    return min(1.0, 2 * tail) if found else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values that hold the chance of any false finding among them (Holm, 1979)."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def _difference(first: Values, second: Values) -> Estimate:
    """Difference of accuracies on the same items: Newcombe's interval, else a paired bootstrap."""
    if _one_trial_each(first) and _one_trial_each(second):
        return _newcombe(first, second)
    return mean_interval(first - second)


def _newcombe(first: Values, second: Values) -> Estimate:
    """Newcombe's hybrid score interval for paired proportions (1998, method 10).

    It puts both Wilson intervals together by way of the correlation, and has a width even if no
    item sets the two apart, where a bootstrap has none.
    """
    a, b = accuracy_interval(first), accuracy_interval(second)
    correlation = _corrected_correlation(first, second)

    def side(reach_a: float, reach_b: float) -> float:
        squares = reach_a**2 - 2 * correlation * reach_a * reach_b + reach_b**2
        return math.sqrt(max(squares, 0.0))

    value = a.value - b.value
    low = value - side(a.value - a.low, b.high - b.value)
    high = value + side(a.high - a.value, b.value - b.low)
    return Estimate(value, low, high)


def _corrected_correlation(first: Values, second: Values) -> float:
    """Phi of a 2 by 2 table, a positive one corrected for continuity; 0 with an empty margin."""
    n = len(first)
    right_a, right_b = first.sum(), second.sum()
    margins = right_a * (n - right_a) * right_b * (n - right_b)
    if margins == 0:
        return 0.0
    product = n * (first * second).sum() - right_a * right_b
    if product > 0:
        product = max(product - n / 2, 0.0)
    return float(product / math.sqrt(margins))


def _one_trial_each(shares: Values) -> bool:
    return bool(np.isin(shares, (0, 1)).all())


def _resample(items: int, statistic: Callable[[NDArray[np.int64]], Values]) -> Values:
    """A statistic of ``RESAMPLES`` draws of as many items, with replacement; always the same ones.

    Args:
        items: Their number.
        statistic: From int64 [draws, items], numbers of items, to float64 [draws].
    """
    generator = np.random.default_rng(_SEED)
    most = max(1, _CHUNK // items)
    parts = []
    for start in range(0, RESAMPLES, most):
        draws = min(most, RESAMPLES - start)
        parts.append(statistic(generator.integers(0, items, size=(draws, items))))
    return np.concatenate(parts)


def _estimate(value: float, resampled: Values) -> Estimate:
    low, high = np.quantile(resampled, (0.025, 0.975))
    return Estimate(value, float(low), float(high))
