"""The report of a comparison: a page, Markdown and a table for other programs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from thinktuning.evaluation.report.html import html
from thinktuning.evaluation.report.markdown import PLOTS, markdown, plot_files
from thinktuning.evaluation.report.numbers import count
from thinktuning.evaluation.report.sections import TITLE, overview, sections
from thinktuning.evaluation.report.table_csv import write_csv
from thinktuning.evaluation.summary import Cell
from thinktuning.teaching.behaviors import Behavior

__all__ = ["write_report"]


def write_report(
    cells: Sequence[Cell],
    output: Path,
    baseline: str | None,
    behaviors: Sequence[Behavior],
    paper: bool,
    provenance: Mapping[str, str],
) -> None:
    """Write ``report.html``, ``report.md`` with its ``plots/``, and ``report.csv``.

    Args:
        cells: Finished ones; their order is the report's.
        output: Folder; made if it isn't there. Files of an earlier report are replaced.
        baseline: ``MODEL/STRATEGY`` that the others are compared with; None for the first cell's.
        behaviors: To be counted in the responses.
        paper: Whether to show the paper's statements beside ours.
        provenance: Where and how the report was made, to be shown as it is.

    Raises:
        InputError: If there is no cell, one is there twice, items don't go together, or no cell is
            of the baseline.
    """
    numbers = count(cells, baseline, behaviors)
    parts, summary = sections(numbers, paper, provenance), overview(numbers)
    (output / PLOTS).mkdir(parents=True, exist_ok=True)
    (output / "report.html").write_text(html(TITLE, summary, parts), encoding="utf-8")
    (output / "report.md").write_text(markdown(TITLE, summary, parts), encoding="utf-8")
    for name, plot in plot_files(parts).items():
        (output / PLOTS / name).write_text(plot, encoding="utf-8")
    write_csv(numbers, output / "report.csv")
