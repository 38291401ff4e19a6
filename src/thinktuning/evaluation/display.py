"""What an evaluation says when it ends."""

from collections.abc import Callable, Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from thinktuning.evaluation.statistics import Estimate
from thinktuning.evaluation.summary import Cell, Summary
from thinktuning.types import Outcome

Columns = Mapping[str, Callable[[Summary], str]]


def print_results(cells: Sequence[Cell], summaries: Sequence[Summary], console: Console) -> None:
    """Print a row for each cell in each of some tables."""
    tables = {
        f"{cells[0].model}: accuracy in percent": _accuracy(summaries[0]),
        "Tokens per response, and outcomes that earn nothing, in percent": _outcomes(),
    }
    counted = summaries[0].behaviors
    if counted:
        title = "Responses in percent that show a behavior, by its patterns"
        tables[title] = {name.replace("_", " "): _behavior_share(name) for name in counted}
    for title, columns in tables.items():
        console.print(_table(title, columns, cells, summaries))


def scalars(cell: Cell, summary: Summary) -> dict[str, float]:
    """A cell's numbers for a logger, by tag; accuracy and tokens are logged by themselves."""
    values = {f"outcome/{outcome}": share for outcome, share in summary.outcomes.items()}
    values |= {f"behavior/{name}": rate.share for name, rate in summary.behaviors.items()}
    if summary.samples > 1:
        values["majority"] = summary.majority
        values |= {f"pass_at_{j}": value for j, value in summary.pass_at.items()}
    return {f"{cell.strategy}/{cell.benchmark}/{name}": value for name, value in values.items()}


def _accuracy(first: Summary) -> Columns:
    """All cells of an evaluation have as many samples as the first."""
    k = first.samples
    columns: dict[str, Callable[[Summary], str]] = {
        "items": lambda s: str(s.items),
        "accuracy" if k == 1 else f"mean@{k}": lambda s: _percent(s.accuracy.value),
        "95 % interval": lambda s: _interval(s.accuracy),
    }
    if k > 1:
        columns[f"maj@{k}"] = lambda s: _percent(s.majority)
        columns |= {f"pass@{j}": _pass_at(j) for j in first.pass_at}
    return columns


def _pass_at(j: int) -> Callable[[Summary], str]:
    return lambda s: _percent(s.pass_at[j])


def _outcomes() -> Columns:
    columns: dict[str, Callable[[Summary], str]] = {"tokens": lambda s: f"{s.tokens.value:.0f}"}
    others = [outcome for outcome in Outcome if outcome is not Outcome.CORRECT]
    return columns | {outcome.value.replace("_", " "): _share(outcome) for outcome in others}


def _share(outcome: Outcome) -> Callable[[Summary], str]:
    return lambda s: _percent(s.outcomes[outcome])


def _behavior_share(name: str) -> Callable[[Summary], str]:
    return lambda s: _percent(s.behaviors[name].share)


def _table(
    title: str, columns: Columns, cells: Sequence[Cell], summaries: Sequence[Summary]
) -> Table:
    table = Table(title=Text(title), title_justify="left")
    for name in ("benchmark", "strategy"):
        table.add_column(name, no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right")
    for cell, summary in zip(cells, summaries, strict=True):
        values = [show(summary) for show in columns.values()]
        table.add_row(cell.benchmark, cell.strategy, *values)
    return table


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _interval(estimate: Estimate) -> str:
    return f"{_percent(estimate.low)} to {_percent(estimate.high)}"
