"""The numbers of one finished cell: a model with a strategy on a benchmark."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property

import numpy as np

from thinktuning.errors import InputError
from thinktuning.evaluation.records import ItemResult, Sample
from thinktuning.evaluation.statistics import Estimate, Values, accuracy_interval, mean_interval
from thinktuning.teaching.behaviors import Behavior, count_occurrences
from thinktuning.types import Outcome


@dataclass(frozen=True)
class Cell:
    """A finished cell.

    Attributes:
        model: How the report calls the model.
        strategy: Name of the prompting strategy.
        benchmark: Name of the benchmark.
        results: One per item of the benchmark.
        settings: What else it was made with, for the report to show.
    """

    model: str
    strategy: str
    benchmark: str
    results: tuple[ItemResult, ...]
    settings: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def shares(self) -> dict[str, Fraction]:
        """The part of each item's samples that is correct, by the item's id."""
        return {r.id: Fraction(_correct(r), len(r.samples)) for r in self.results}

    @cached_property
    def tokens(self) -> dict[str, float]:
        """Tokens per response, as a mean over each item's samples, by the item's id."""
        return {r.id: sum(s.tokens for s in r.samples) / len(r.samples) for r in self.results}


@dataclass(frozen=True)
class BehaviorRate:
    """How often responses show a behavior, by its patterns.

    Attributes:
        share: Of the responses, with at least one occurrence.
        mean: Occurrences per response.
    """

    share: float
    mean: float


@dataclass(frozen=True)
class Summary:
    """What a cell comes to.

    Attributes:
        items: Their number.
        samples: k, per item.
        accuracy: mean@k: the mean over items of the share of correct samples.
        majority: maj@k: share of items whose most frequent answer is correct; see
            ``majority_vote``.
        pass_at: pass@j for j = 1, 2, 4, … below k, and k: the chance that at least one of j
            samples is correct.
        tokens: Mean per response, over all turns of a strategy.
        outcomes: Share of each outcome among all samples.
        behaviors: By the behavior's name, of the judged responses.
    """

    items: int
    samples: int
    accuracy: Estimate
    majority: float
    pass_at: Mapping[int, float]
    tokens: Estimate
    outcomes: Mapping[Outcome, float]
    behaviors: Mapping[str, BehaviorRate]


def summarise(cell: Cell, behaviors: Sequence[Behavior]) -> Summary:
    """The numbers of a cell; behaviors without patterns can't be counted and are left out.

    Raises:
        InputError: If it has no item, an item twice, or items with different numbers of samples.
    """
    k = _samples_per_item(cell)
    correct = [_correct(result) for result in cell.results]
    samples = [sample for result in cell.results for sample in result.samples]
    found = Counter(sample.outcome for sample in samples)
    return Summary(
        items=len(cell.results),
        samples=k,
        accuracy=accuracy_interval(_values([float(share) for share in cell.shares.values()])),
        majority=_mean([majority_vote(result.samples) for result in cell.results]),
        pass_at={j: _mean([pass_at(k, c, j) for c in correct]) for j in _draws(k)},
        tokens=mean_interval(_values(list(cell.tokens.values()))),
        outcomes={outcome: found[outcome] / len(samples) for outcome in Outcome},
        behaviors={b.name: _rate(b, samples) for b in behaviors if b.patterns},
    )


def pass_at(samples: int, correct: int, draws: int) -> float:
    """Chance that ``draws`` of the samples, drawn without replacement, hold a correct one.

    This is the unbiased estimate of pass@draws (Chen et al., 2021).
    """
    return 1 - math.comb(samples - correct, draws) / math.comb(samples, draws)


def majority_vote(samples: Sequence[Sample]) -> float:
    """Chance that the most frequent answer is correct, where ties are drawn at random.

    All correct samples vote for one answer, however they write it; wrong ones for the text that was
    extracted from them. Samples without an extracted answer don't vote.
    """
    votes: Counter[str] = Counter()
    right = 0
    for sample in samples:
        if sample.outcome is Outcome.CORRECT:
            right += 1
        elif sample.extracted is not None:
            votes[sample.extracted] += 1
    most = max([right, *votes.values()])
    if most == 0 or right < most:
        return 0.0
    return 1 / (1 + sum(count == most for count in votes.values()))


def _samples_per_item(cell: Cell) -> int:
    where = f"{cell.model}, {cell.strategy}, {cell.benchmark}"
    if not cell.results:
        raise InputError(f"{where}: there are no items to summarise; evaluate it again")
    ids = Counter(result.id for result in cell.results)
    twice = sorted(item for item, count in ids.items() if count > 1)
    if twice:
        raise InputError(f"{where}: items must be there once, but {twice[0]!r} is there again")
    numbers = sorted({len(result.samples) for result in cell.results})
    if len(numbers) > 1 or numbers[0] == 0:
        raise InputError(
            f"{where}: all items must have the same number of samples, at least 1, but they have "
            f"{', '.join(map(str, numbers))}; evaluate it again"
        )
    return numbers[0]


def _correct(result: ItemResult) -> int:
    return sum(sample.outcome is Outcome.CORRECT for sample in result.samples)


def _draws(k: int) -> list[int]:
    powers = [2**i for i in range(k.bit_length())]
    return powers if powers[-1] == k else [*powers, k]


def _rate(behavior: Behavior, samples: Sequence[Sample]) -> BehaviorRate:
    counts = [count_occurrences(behavior, sample.response) for sample in samples]
    return BehaviorRate(_mean([count > 0 for count in counts]), _mean(counts))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _values(values: Sequence[float]) -> Values:
    return np.array(values, dtype=np.float64)
