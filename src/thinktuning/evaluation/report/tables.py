"""The tables of a report, which both files show."""

from collections.abc import Mapping, Sequence

from thinktuning.evaluation.report.numbers import Comparison, Numbers, Pair, Run
from thinktuning.evaluation.report.paper import beside_ours
from thinktuning.evaluation.report.table import (
    MISSING,
    Entry,
    Table,
    interval,
    outcome_name,
    p_value,
    percent,
    points,
)
from thinktuning.evaluation.statistics import Estimate
from thinktuning.evaluation.summary import BehaviorRate
from thinktuning.types import Outcome


def accuracy(numbers: Numbers) -> Table:
    """Runs by benchmarks, and their average."""
    best = {
        b: max(
            numbers.summaries[r, b].accuracy.value for r in numbers.runs if (r, b) in numbers.cells
        )
        for b in numbers.benchmarks
    }
    best_average = max((e.value for e in numbers.averages.values()), default=None)
    rows = []
    for run in numbers.runs:
        row = [_name(run), _estimate(numbers.averages.get(run), best_average)]
        for b in numbers.benchmarks:
            summary = numbers.summaries.get((run, b))
            row.append(_estimate(summary.accuracy if summary else None, best[b]))
        rows.append(tuple(row))
    caption = (
        f"Accuracy in percent, its interval of 95 % below it; the best of a column is bold. "
        f"{average_note(numbers)}"
    )
    return _by_benchmark(numbers, caption, rows)


def average_note(numbers: Numbers) -> str:
    """Over which benchmarks averages are; nothing where there is one alone."""
    if len(numbers.benchmarks) == 1:
        return ""
    if not numbers.common:
        return "There is no average, because no benchmark has all runs."
    if len(numbers.common) == len(numbers.benchmarks):
        return "The average is the plain mean over all benchmarks."
    return (
        f"The average is the plain mean over the benchmarks that have all runs: "
        f"{', '.join(numbers.common)}."
    )


def against_baseline(numbers: Numbers) -> Table:
    """Paired differences to the baseline, benchmark by benchmark."""
    rows = []
    for run in numbers.others:
        compared = [numbers.against_baseline.get((run, b)) for b in numbers.benchmarks]
        entries = [_comparison(c) for c in compared]
        average = numbers.difference_of_averages(run, numbers.baseline)
        rows.append((_name(run), _difference(average), *entries))
    caption = (
        f"Accuracy minus the baseline's ({numbers.baseline}) on the same items, in percentage "
        f"points, with: its interval of 95 %; items won–lost; p of the paired test, in brackets "
        f"adjusted for all tests of this table (Holm) where that differs. Bold: "
        f"adjusted p below 0.05."
    )
    return _by_benchmark(numbers, caption, rows)


def pairs(numbers: Numbers, benchmarks: Sequence[str]) -> Table:
    """Items won and lost between any two runs, all items of some benchmarks together."""
    found = numbers.all_pairs(benchmarks)
    rows = []
    for i, a in enumerate(numbers.runs):
        entries = [_versus(found, a, b) for b in numbers.runs]
        rows.append((Entry(f"{i + 1}  {a.model}", (a.strategy,)), *entries))
    return Table(
        f"Items that the run of the row gets right and the one of the column doesn't (or more "
        f"often so), and the other way round; p of the paired test, adjusted for all pairs of this "
        f"table (Holm), bold below 0.05. Items of {', '.join(benchmarks)}.",
        ("Run", *(str(i + 1) for i in range(len(numbers.runs)))),
        tuple(rows),
    )


def tokens(numbers: Numbers) -> Table:
    """Mean tokens per response, and over the baseline's."""
    rows = []
    for run in numbers.runs:
        row = [_name(run)]
        for b in numbers.benchmarks:
            summary, ratio = numbers.summaries.get((run, b)), numbers.token_ratios.get((run, b))
            times = () if ratio is None else (f"×{ratio.value:.2f}", _times(ratio))
            row.append(Entry(f"{summary.tokens.value:,.0f}", times) if summary else Entry(MISSING))
        rows.append(tuple(row))
    return Table(
        f"Tokens per response, over all turns; below, their ratio to the baseline's "
        f"({numbers.baseline}) on the same items, with its interval of 95 %.",
        ("Run", *numbers.benchmarks),
        tuple(rows),
    )


def samples(numbers: Numbers, benchmarks: Sequence[str]) -> Table:
    """mean@k, maj@k and pass@j, as plain means over benchmarks that all runs have."""
    draws = sorted({j for s in numbers.summaries.values() for j in s.pass_at if j > 1})
    rows = []
    for run in numbers.having(benchmarks):
        found = [numbers.summaries[run, b] for b in benchmarks]
        row = [percent(_mean([s.accuracy.value for s in found]))]
        row.append(percent(_mean([s.majority for s in found])))
        for j in draws:
            have = all(j in s.pass_at for s in found)
            row.append(percent(_mean([s.pass_at[j] for s in found])) if have else MISSING)
        k = "/".join(map(str, sorted({s.samples for s in found})))
        rows.append((_name(run), Entry(k), *map(Entry, row)))
    return Table(
        f"Several samples an item, in percent: the mean over samples, the majority's answer, and "
        f"the chance that one of j samples is correct. {_over(benchmarks)}",
        ("Run", "k", "mean@k", "maj@k", *(f"pass@{j}" for j in draws)),
        tuple(rows),
    )


def behaviors(numbers: Numbers, benchmarks: Sequence[str]) -> Table:
    """Share of responses with each behavior, as plain means over benchmarks that all runs have."""
    names = list(dict.fromkeys(n for s in numbers.summaries.values() for n in s.behaviors))
    rows = []
    for run in numbers.having(benchmarks):
        found = [[numbers.summaries[run, b].behaviors[name] for b in benchmarks] for name in names]
        rows.append((_name(run), *map(_rate, found)))
    return Table(
        f"Responses in which a behavior occurs at least once, in percent; below, occurrences per "
        f"response. They are found by the behavior's patterns, so they say how responses read. "
        f"{_over(benchmarks)}",
        ("Run", *names),
        tuple(rows),
    )


def outcomes(numbers: Numbers, benchmarks: Sequence[str]) -> Table:
    """Shares of all outcomes, as plain means over benchmarks that all runs have."""
    rows = []
    for run in numbers.having(benchmarks):
        found = [numbers.summaries[run, b].outcomes for b in benchmarks]
        entries = [Entry(percent(_mean([o[outcome] for o in found]))) for outcome in Outcome]
        rows.append((_name(run), *entries))
    return Table(
        f"Outcomes of the responses in percent. {_over(benchmarks)}",
        ("Run", *(outcome_name(outcome) for outcome in Outcome)),
        tuple(rows),
    )


def paper(numbers: Numbers) -> Table:
    """The paper's claims, and our differences where they correspond."""
    rows = []
    for beside in beside_ours(numbers):
        ours = Entry(MISSING)
        if beside.difference is not None and beside.runs is not None:
            first, second = beside.runs
            limits = f"{points(beside.difference.low)} to {points(beside.difference.high)}"
            which = f"{first} − {second}, {beside.where}"
            ours = Entry(points(beside.difference.value), (limits, which))
        rows.append((Entry(beside.claim.what), Entry(beside.claim.stated), ours))
    return Table(
        f"The paper's statements, and the corresponding difference of this comparison in "
        f"percentage points with its interval of 95 %. {average_note(numbers)}",
        ("Quantity", "The paper states", "Here"),
        tuple(rows),
        words=True,
    )


def settings(numbers: Numbers) -> Table:
    """What each cell was made with."""
    names = list(dict.fromkeys(n for cell in numbers.cells.values() for n in cell.settings))
    rows = []
    for run in numbers.runs:
        for b in numbers.benchmarks:
            if (run, b) in numbers.cells:
                cell, summary = numbers.cells[run, b], numbers.summaries[run, b]
                found = [cell.settings.get(name, MISSING) for name in names]
                shown = [b, f"{summary.items:,}", str(summary.samples), *found]
                rows.append((_name(run), *map(Entry, shown)))
    return Table(
        "Every cell, and what it was made with.",
        ("Run", "Benchmark", "Items", "Samples", *names),
        tuple(rows),
        words=True,
    )


def provenance(facts: Mapping[str, str]) -> Table:
    """Where and how the report was made."""
    rows = tuple((Entry(name), Entry(fact)) for name, fact in facts.items())
    return Table("Where and how this report was made.", ("Fact", "Value"), rows, words=True)


def _name(run: Run) -> Entry:
    return Entry(run.model, (run.strategy,))


def _by_benchmark(numbers: Numbers, caption: str, rows: Sequence[tuple[Entry, ...]]) -> Table:
    """Rows of a run, its average and its benchmarks; without the average of one benchmark."""
    head = ("Run", "Average", *numbers.benchmarks)
    if len(numbers.benchmarks) == 1:
        head, rows = head[::2], [row[::2] for row in rows]
    return Table(caption.rstrip(), head, tuple(rows))


def _over(benchmarks: Sequence[str]) -> str:
    names = ", ".join(benchmarks)
    return f"Of {names}." if len(benchmarks) == 1 else f"Plain means over {names}."


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _times(ratio: Estimate) -> str:
    return f"{ratio.low:.2f}–{ratio.high:.2f}"


def _estimate(estimate: Estimate | None, best: float | None) -> Entry:
    if estimate is None:
        return Entry(MISSING)
    return Entry(percent(estimate.value), (interval(estimate),), strong=estimate.value == best)


def _difference(difference: Estimate | None) -> Entry:
    if difference is None:
        return Entry(MISSING)
    limits = f"{points(difference.low)} to {points(difference.high)}"
    return Entry(points(difference.value), (limits,))


def _comparison(found: Comparison | None) -> Entry:
    if found is None:
        return Entry(MISSING)
    pair = found.paired
    shown = _difference(pair.difference)
    more = (f"{pair.wins:,}–{pair.losses:,}", _p(found), *_unpaired(found))
    return Entry(shown.text, (*shown.details, *more), strong=found.adjusted_p < 0.05)


def _p(found: Comparison) -> str:
    raw, adjusted = p_value(found.paired.p), p_value(found.adjusted_p)
    return f"p {raw}" if raw == adjusted else f"p {raw} ({adjusted})"


def _unpaired(found: Comparison) -> tuple[str, ...]:
    pair = found.paired
    return (f"{pair.unpaired:,} unpaired",) if pair.unpaired else ()


def _versus(found: Mapping[Pair, Comparison], row: Run, column: Run) -> Entry:
    """The later run of a pair sees its wins and losses the other way round."""
    comparison = found.get((row, column)) or found.get((column, row))
    if comparison is None:
        return Entry(MISSING if row != column else "·")
    pair = comparison.paired
    wins, losses = pair.wins, pair.losses
    if (row, column) not in found:
        wins, losses = losses, wins
    return Entry(
        f"{wins:,}–{losses:,}",
        (f"p {p_value(comparison.adjusted_p)}", *_unpaired(comparison)),
        strong=comparison.adjusted_p < 0.05,
        heat=(wins - losses) / max(1, wins + losses),
    )


def _rate(rates: Sequence[BehaviorRate]) -> Entry:
    share = _mean([rate.share for rate in rates])
    return Entry(percent(share), (f"{_mean([rate.mean for rate in rates]):.2f}",), heat=share)
