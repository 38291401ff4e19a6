"""What a report says, in which order; both files show these sections."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from thinktuning.evaluation.report import plots, tables
from thinktuning.evaluation.report.numbers import Numbers
from thinktuning.evaluation.report.paper import SOURCE
from thinktuning.evaluation.report.table import Table, percent, points
from thinktuning.evaluation.statistics import RESAMPLES

TITLE = "Comparison of models and prompting strategies"


@dataclass(frozen=True)
class Section:
    """A part of the report.

    Attributes:
        name: Letters for a link or a file.
        title: Its heading.
        text: Paragraphs.
        tables: Shown.
        more: Tables that one must ask for, with what they are of.
        plots: SVG panels, one per benchmark.
        legend: Class and name of each colour of the plots.
    """

    name: str
    title: str
    text: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    more: tuple[tuple[str, Table], ...] = ()
    plots: tuple[str, ...] = ()
    legend: tuple[tuple[str, str], ...] = ()


def sections(numbers: Numbers, paper: bool, facts: Mapping[str, str]) -> list[Section]:
    """All sections that there is something to say in.

    Args:
        numbers: To be shown.
        paper: Whether to show the paper's statements.
        facts: Where and how the report was made.
    """
    several = any(summary.samples > 1 for summary in numbers.summaries.values())
    found = [_accuracy(numbers)]
    if several:
        found.append(_samples(numbers))
    if numbers.others:
        found.append(_paired(numbers))
    found.append(_tokens(numbers))
    if any(summary.behaviors for summary in numbers.summaries.values()):
        found.append(_averaged("behaviors", "Behaviors", numbers, tables.behaviors))
    found.append(_outcomes(numbers))
    if paper:
        found.append(_paper(numbers))
    found += [_methods(), _settings(numbers, facts)]
    return found


def overview(numbers: Numbers) -> str:
    """What was run, and what came out, in a paragraph."""
    models = len({run.model for run in numbers.runs})
    strategies = len({run.strategy for run in numbers.runs})
    items = {(b, i) for (_, b), cell in numbers.cells.items() for i in cell.shares}
    ks = sorted({summary.samples for summary in numbers.summaries.values()})
    k = " or ".join(map(str, ks))
    said = (
        f"{_number(len(numbers.runs), 'run')} ({_number(models, 'model')}, "
        f"{_number(strategies, 'prompting strategy', 'prompting strategies')}) on "
        f"{_number(len(numbers.benchmarks), 'benchmark')} with {len(items):,} items in all, "
        f"{k} {'sample' if ks == [1] else 'samples'} an item."
    )
    missing = len(numbers.runs) * len(numbers.benchmarks) - len(numbers.cells)
    if missing:
        said += (
            f" {_number(missing, 'cell')} of the table {'is' if missing == 1 else 'are'} missing."
        )
    if not numbers.others or not numbers.averages:
        return said
    best = max(numbers.runs, key=lambda run: numbers.averages[run].value)
    average = numbers.averages[best]
    what = "average accuracy" if len(numbers.benchmarks) > 1 else "accuracy"
    said += (
        f" The highest {what} is {percent(average.value)} % "
        f"({percent(average.low)} to {percent(average.high)}), of {best}"
    )
    difference = numbers.difference_of_averages(best, numbers.baseline)
    if best == numbers.baseline or difference is None:
        return f"{said}."
    return (
        f"{said}: {points(difference.value)} points ({points(difference.low)} to "
        f"{points(difference.high)}) against the baseline, {numbers.baseline}."
    )


def _accuracy(numbers: Numbers) -> Section:
    dots = (
        "Dots are accuracies, lines their intervals of 95 %; the broken line is the baseline "
        f"({numbers.baseline}). Colours are models, shapes strategies. Axes need not start at 0."
    )
    return Section(
        "accuracy",
        "Accuracy",
        (dots,),
        (tables.accuracy(numbers),),
        (),
        tuple(plots.accuracy(numbers)),
    )


def _samples(numbers: Numbers) -> Section:
    return _averaged("samples", "Several samples an item", numbers, tables.samples)


def _paired(numbers: Numbers) -> Section:
    shown = [tables.against_baseline(numbers)]
    if len(numbers.benchmarks) > 1:
        shown.append(tables.pairs(numbers, numbers.benchmarks))
    more = tuple((f"{b} alone", tables.pairs(numbers, (b,))) for b in numbers.benchmarks)
    return Section("pairs", "Item by item", (), tuple(shown), more)


def _tokens(numbers: Numbers) -> Section:
    dots = (
        "Dots are means, lines their intervals of 95 %; the broken line is the baseline "
        f"({numbers.baseline}), and × the ratio to it. Axes need not start at 0."
    )
    return Section(
        "tokens",
        "Tokens per response",
        (dots,),
        (tables.tokens(numbers),),
        (),
        tuple(plots.tokens(numbers)),
    )


def _outcomes(numbers: Numbers) -> Section:
    section = _averaged("outcomes", "Outcomes", numbers, tables.outcomes)
    return replace(section, plots=tuple(plots.outcomes(numbers)), legend=plots.LEGEND)


def _averaged(
    name: str, title: str, numbers: Numbers, table: Callable[[Numbers, Sequence[str]], Table]
) -> Section:
    """A table over the common benchmarks, and one for each benchmark on demand."""
    shown = (table(numbers, numbers.common),) if numbers.common else ()
    each = tuple((f"{b} alone", table(numbers, (b,))) for b in numbers.benchmarks)
    return Section(name, title, (), shown, each if len(each) > 1 or not shown else ())


def _paper(numbers: Numbers) -> Section:
    note = (
        f"From {SOURCE}. Runs of this comparison stand beside a statement where their labels say "
        f"which they are; the paper's figures are of another model on other data."
    )
    title = (
        "The paper's figures (RRV et al., EMNLP 2025, as the paper states them; other model, "
        "other data: not comparable)"
    )
    return Section("paper", title, (note,), (tables.paper(numbers),))


def _methods() -> Section:
    return Section(
        "methods",
        "How the numbers are made",
        (
            "Accuracy is mean@k: the mean over items of the share of correct samples. With one "
            "sample an item its interval is Wilson's; with several, the percentile interval of a "
            f"bootstrap over items ({RESAMPLES:,} draws, fixed seed), as for tokens and their "
            "ratios. Intervals of averages add up those of the benchmarks as independent.",
            "Two runs are compared on the items that both have; items of one run only are left out "
            "and counted as unpaired. The test is the exact paired permutation test over items, "
            "which with one sample an item is McNemar's. Differences have Newcombe's interval for "
            "paired proportions (his method 10) with one sample an item, else that of a paired "
            "bootstrap. In tables p-values are adjusted for all tests of their table by Holm's "
            "method; intervals aren't adjusted. All this is about the choice of items: none of it "
            "says how much another training run would differ.",
            "maj@k takes the most frequent answer, ties at random in expectation; pass@j is the "
            "unbiased estimate from k samples.",
        ),
    )


def _settings(numbers: Numbers, facts: Mapping[str, str]) -> Section:
    shown = (tables.provenance(facts),) if facts else ()
    every = tables.settings(numbers)
    return Section("settings", "Settings and provenance", (), shown, (("Every cell", every),))


def _number(count: int, one: str, many: str | None = None) -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"
