"""The findings, printed."""

from collections.abc import Mapping

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from thinktuning.doctor.finding import Finding, Status

_STYLES = {
    Status.OK: "green",
    Status.WARNING: "yellow",
    Status.FAILED: "bold red",
    Status.SKIPPED: "dim",
}


def print_findings(findings: Mapping[str, Finding], console: Console) -> None:
    """Print a row for each check, what the checks show, and a verdict.

    Args:
        findings: By the names of the checks.
        console: Where to.
    """
    # Text, not markup: messages and prompts may have square brackets.
    table = Table("check", "result", "found", "what to do", show_lines=True)
    for name, finding in findings.items():
        result = Text(finding.status, _STYLES[finding.status])
        table.add_row(name, result, Text(finding.found), Text(finding.advice))
    for name, finding in findings.items():
        if finding.shown:
            console.print(Panel(Text(finding.shown), title=name))
    console.print(table)
    console.print(_verdict(findings))


def _verdict(findings: Mapping[str, Finding]) -> str:
    counts = {status: 0 for status in Status}
    for finding in findings.values():
        counts[finding.status] += 1
    listed = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    return f"{len(findings)} checks: {listed}."
