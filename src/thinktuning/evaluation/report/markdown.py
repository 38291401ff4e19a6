"""The report for GitHub: tables in Markdown, plots as files beside it."""

import re
from collections.abc import Sequence

from thinktuning.evaluation.report.sections import Section
from thinktuning.evaluation.report.svg import standalone
from thinktuning.evaluation.report.table import Entry, Table

PLOTS = "plots"


def markdown(title: str, overview: str, sections: Sequence[Section]) -> str:
    """The whole report; its plots are to be written by ``plot_files``."""
    parts = [f"# {title}", _escaped(overview)]
    for section in sections:
        parts.append(f"## {section.title}")
        parts += [_escaped(paragraph) for paragraph in section.text]
        if section.plots:
            parts.append(f"![{section.title}, by benchmark]({PLOTS}/{section.name}.svg)")
        parts += [_table(table) for table in section.tables]
        for name, table in section.more:
            summary = f"<details><summary>{_escaped(name)}</summary>"
            parts.append(f"{summary}\n\n{_table(table)}\n\n</details>")
    return "\n\n".join(parts) + "\n"


def plot_files(sections: Sequence[Section]) -> dict[str, str]:
    """SVG by file name."""
    return {
        f"{section.name}.svg": standalone(section.plots, section.legend)
        for section in sections
        if section.plots
    }


def _table(table: Table) -> str:
    lines = [_line(map(_escaped, table.head)), _line(["---"] * len(table.head))]
    lines += [_line(map(_entry, row)) for row in table.rows]
    return f"{_escaped(table.caption)}\n\n" + "\n".join(lines)


def _line(places: Sequence[str] | map) -> str:
    return f"| {' | '.join(places)} |"


def _entry(entry: Entry) -> str:
    text = _escaped(entry.text)
    shown = f"**{text}**" if entry.strong else text
    details = [f"<sub>{_escaped(detail)}</sub>" for detail in entry.details]
    return "<br>".join([shown, *details])


def _escaped(text: str) -> str:
    """Text that neither Markdown nor HTML takes for its own; on one line."""
    html = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", " ".join(html.split()))
