"""All numbers of a comparison, computed once for the three files that show them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import combinations
from typing import TypeVar

import numpy as np

from thinktuning.errors import InputError
from thinktuning.evaluation.statistics import (
    Estimate,
    Paired,
    holm,
    mean_of,
    paired,
    ratio_interval,
)
from thinktuning.evaluation.summary import Cell, Summary, summarise
from thinktuning.teaching.behaviors import Behavior


@dataclass(frozen=True)
class Run:
    """A row of the report: a model with a strategy."""

    model: str
    strategy: str

    def __str__(self) -> str:
        return f"{self.model}/{self.strategy}"


@dataclass(frozen=True)
class Comparison:
    """A paired comparison, and its p-value adjusted for the others of its table (Holm)."""

    paired: Paired
    adjusted_p: float


Pair = tuple[Run, Run]
Key = TypeVar("Key")


@dataclass(frozen=True)
class Numbers:
    """A comparison in numbers.

    Attributes:
        cells: By run and benchmark; not every run needs to have every benchmark.
        summaries: One per cell.
        runs: Those of one model side by side; else in the order of the cells.
        benchmarks: In the order of the cells.
        baseline: The run that others are compared with.
    """

    cells: Mapping[tuple[Run, str], Cell]
    summaries: Mapping[tuple[Run, str], Summary]
    runs: tuple[Run, ...]
    benchmarks: tuple[str, ...]
    baseline: Run

    @cached_property
    def common(self) -> tuple[str, ...]:
        """The benchmarks that every run has: averages are over these."""
        return tuple(b for b in self.benchmarks if self.having((b,)) == self.runs)

    @property
    def others(self) -> tuple[Run, ...]:
        """All runs but the baseline."""
        return tuple(run for run in self.runs if run != self.baseline)

    def having(self, benchmarks: Sequence[str]) -> tuple[Run, ...]:
        """The runs that have all of some benchmarks."""
        return tuple(r for r in self.runs if all((r, b) in self.cells for b in benchmarks))

    @cached_property
    def averages(self) -> Mapping[Run, Estimate]:
        """Plain mean of the accuracies on the common benchmarks; empty without any."""
        if not self.common:
            return {}
        return {
            run: mean_of([self.summaries[run, b].accuracy for b in self.common])
            for run in self.runs
        }

    @cached_property
    def against_baseline(self) -> Mapping[tuple[Run, str], Comparison]:
        """Each other run minus the baseline, benchmark by benchmark, as one table."""
        found = {
            (run, b): self.pair(run, self.baseline, (b,))
            for run in self.others
            for b in self.benchmarks
        }
        return _adjusted(found)

    @cached_property
    def token_ratios(self) -> Mapping[tuple[Run, str], Estimate]:
        """Tokens per response over the baseline's, on the items that both have."""
        ratios = {}
        for run in self.others:
            for b in self.benchmarks:
                ratio = self._token_ratio(run, b)
                if ratio is not None:
                    ratios[run, b] = ratio
        return ratios

    def all_pairs(self, benchmarks: Sequence[str]) -> Mapping[Pair, Comparison]:
        """Any two runs on the items of some benchmarks together, the earlier run first."""
        shares = {run: self._shares(run, benchmarks) for run in self.runs}
        found = {(a, b): paired(shares[a], shares[b]) for a, b in combinations(self.runs, 2)}
        return _adjusted(found)

    def pair(self, first: Run, second: Run, benchmarks: Sequence[str]) -> Paired | None:
        """Two runs on the items of some benchmarks together; None without a common item."""
        return paired(self._shares(first, benchmarks), self._shares(second, benchmarks))

    def difference_of_averages(self, first: Run, second: Run) -> Estimate | None:
        """Mean of the paired differences on the common benchmarks; None without any."""
        found = [self.pair(first, second, (b,)) for b in self.common]
        differences = [p.difference for p in found if p is not None]
        return mean_of(differences) if differences and len(differences) == len(found) else None

    def _shares(self, run: Run, benchmarks: Sequence[str]) -> dict[str, Fraction]:
        cells = [self.cells[run, b] for b in benchmarks if (run, b) in self.cells]
        return {f"{c.benchmark} {item}": s for c in cells for item, s in c.shares.items()}

    def _token_ratio(self, run: Run, benchmark: str) -> Estimate | None:
        if (run, benchmark) not in self.cells or (self.baseline, benchmark) not in self.cells:
            return None
        tokens = self.cells[run, benchmark].tokens
        base = self.cells[self.baseline, benchmark].tokens
        shared = [item for item in tokens if item in base]
        # An engine that fails may give answers of no token, which no ratio can be taken of.
        if not shared or min(base[item] for item in shared) == 0:
            return None
        values = np.array([tokens[item] for item in shared], dtype=np.float64)
        return ratio_interval(values, np.array([base[item] for item in shared], dtype=np.float64))


def count(cells: Iterable[Cell], baseline: str | None, behaviors: Sequence[Behavior]) -> Numbers:
    """All numbers of a comparison.

    Args:
        cells: Finished ones, in the order of the report.
        baseline: ``MODEL/STRATEGY`` of a run, or None for the first one.
        behaviors: To be counted in the responses.

    Raises:
        InputError: If there is no cell, one is there twice, an id stands for different items, or no
            cell is of the baseline.
    """
    by_key: dict[tuple[Run, str], Cell] = {}
    for cell in cells:
        key = Run(cell.model, cell.strategy), cell.benchmark
        if key in by_key:
            raise InputError(
                f"report: {key[0]} on {key[1]} is there twice; expected each model, strategy and "
                f"benchmark once; give models with the same label different ones"
            )
        by_key[key] = cell
    if not by_key:
        raise InputError("report: there is no finished cell to report on")
    _check_items(by_key.values())
    runs = list(dict.fromkeys(run for run, _ in by_key))
    models = list(dict.fromkeys(run.model for run in runs))
    return Numbers(
        cells=by_key,
        summaries={key: summarise(cell, behaviors) for key, cell in by_key.items()},
        runs=tuple(sorted(runs, key=lambda run: models.index(run.model))),
        benchmarks=tuple(dict.fromkeys(b for _, b in by_key)),
        baseline=_baseline(runs, baseline),
    )


def _check_items(cells: Iterable[Cell]) -> None:
    """Items are compared by their ids, so an id must mean the same item in all cells."""
    known: dict[tuple[str, str], tuple[object, ...]] = {}
    for cell in cells:
        for result in cell.results:
            item = result.question, result.choices, result.answer
            if known.setdefault((cell.benchmark, result.id), item) != item:
                raise InputError(
                    f"report: item {result.id!r} of {cell.benchmark} isn't the same question in "
                    f"all runs; evaluate the runs on the same file or version of the benchmark"
                )


def _baseline(runs: Sequence[Run], wanted: str | None) -> Run:
    if wanted is None:
        return runs[0]
    for run in runs:
        if str(run) == wanted:
            return run
    raise InputError(
        f"baseline {wanted!r} is not among the runs; expected one of {', '.join(map(str, runs))}"
    )


def _adjusted(found: Mapping[Key, Paired | None]) -> dict[Key, Comparison]:
    """The comparisons that there are, their p-values adjusted for each other."""
    real = {key: comparison for key, comparison in found.items() if comparison is not None}
    adjusted = holm([comparison.p for comparison in real.values()])
    return {key: Comparison(real[key], p) for key, p in zip(real, adjusted, strict=True)}
