"""One row per cell with all its numbers, for other programs."""

import csv
from pathlib import Path

from thinktuning.evaluation.report.numbers import Numbers, Run
from thinktuning.evaluation.statistics import Estimate

Row = dict[str, str | int | float]


def write_csv(numbers: Numbers, path: Path) -> None:
    """Write the table; shares are from 0 to 1, and what a cell doesn't have is empty."""
    rows = [_row(numbers, run, b) for run, b in numbers.cells]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def _row(numbers: Numbers, run: Run, benchmark: str) -> Row:
    cell, summary = numbers.cells[run, benchmark], numbers.summaries[run, benchmark]
    row: Row = {"model": run.model, "strategy": run.strategy, "benchmark": benchmark}
    row |= {"items": summary.items, "samples": summary.samples}
    row |= _limits("accuracy", summary.accuracy) | {"majority": summary.majority}
    row |= {f"pass@{j}": share for j, share in summary.pass_at.items()}
    row |= _limits("tokens", summary.tokens)
    row |= {f"outcome_{outcome}": share for outcome, share in summary.outcomes.items()}
    for name, rate in summary.behaviors.items():
        row |= {f"behavior_{name}_share": rate.share, f"behavior_{name}_mean": rate.mean}
    row["baseline"] = str(numbers.baseline)
    if (run, benchmark) in numbers.token_ratios:
        row |= _limits("token_ratio", numbers.token_ratios[run, benchmark])
    if (run, benchmark) in numbers.against_baseline:
        comparison = numbers.against_baseline[run, benchmark]
        pair = comparison.paired
        row |= _limits("difference", pair.difference)
        row |= {"paired_items": pair.items, "unpaired_items": pair.unpaired}
        row |= {"wins": pair.wins, "losses": pair.losses, "ties": pair.ties}
        row |= {"p": pair.p, "p_holm": comparison.adjusted_p}
    return row | {f"setting_{name}": value for name, value in cell.settings.items()}


def _limits(name: str, estimate: Estimate) -> Row:
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
