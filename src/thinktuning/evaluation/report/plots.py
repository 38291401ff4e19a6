"""The plots of a report: one panel per benchmark."""

from collections.abc import Mapping
from dataclasses import dataclass

from thinktuning.evaluation.report import svg
from thinktuning.evaluation.report.numbers import Numbers, Run
from thinktuning.evaluation.report.table import outcome_name, percent
from thinktuning.evaluation.statistics import Estimate
from thinktuning.types import Outcome

LEGEND = tuple((outcome.value, outcome_name(outcome)) for outcome in Outcome)


@dataclass(frozen=True)
class Dot:
    """A run's place in a panel: an estimate, and what to write at its right."""

    estimate: Estimate
    value: str


_TOKENS_RIGHT = 88


def accuracy(numbers: Numbers) -> list[str]:
    """Accuracy in percent with its interval: the average, then benchmark by benchmark."""
    columns: dict[str, Mapping[Run, Estimate]] = {
        b: _column(numbers, b) for b in numbers.benchmarks
    }
    if len(numbers.common) > 1:
        columns = {f"average of {len(numbers.common)} benchmarks": numbers.averages, **columns}
    panels = []
    for name, estimates in columns.items():
        dots = {run: Dot(_in_percent(e), percent(e.value)) for run, e in estimates.items()}
        panels.append(_dots(f"{name}, accuracy", dots, numbers, "%", svg.RIGHT))
    return panels


def tokens(numbers: Numbers) -> list[str]:
    """Tokens per response with their interval, benchmark by benchmark."""
    panels = []
    for b in numbers.benchmarks:
        dots = {}
        for run in numbers.runs:
            if (run, b) in numbers.summaries:
                found = numbers.summaries[run, b].tokens
                ratio = numbers.token_ratios.get((run, b))
                times = "" if ratio is None else f" ×{ratio.value:.2f}"
                dots[run] = Dot(found, f"{found.value:,.0f}{times}")
        panels.append(_dots(f"{b}, tokens per response", dots, numbers, "", _TOKENS_RIGHT))
    return panels


def outcomes(numbers: Numbers) -> list[str]:
    """Shares of all outcomes as stacked bars, benchmark by benchmark."""
    scale = svg.Scale(0, 100, stop=svg.WIDTH - 18)
    panels = []
    for b in numbers.benchmarks:
        marks = svg.axis(scale, (0, 25, 50, 75, 100), numbers.runs, "%")
        said = []
        for run, top in zip(numbers.runs, svg.row_tops(numbers.runs), strict=True):
            if (run, b) in numbers.summaries:
                shares = numbers.summaries[run, b].outcomes
                marks += _stack(shares, scale, top)
                named = ", ".join(f"{outcome_name(o)} {percent(s)}" for o, s in shares.items())
                said.append(f"{run}: {named}")
        panels.append(svg.panel(f"{b}, outcomes", _described(b, said), numbers.runs, marks))
    return panels


def _column(numbers: Numbers, benchmark: str) -> dict[Run, Estimate]:
    found = {run: numbers.summaries.get((run, benchmark)) for run in numbers.runs}
    return {run: summary.accuracy for run, summary in found.items() if summary is not None}


def _in_percent(share: Estimate) -> Estimate:
    return Estimate(100 * share.value, 100 * share.low, 100 * share.high)


def _dots(title: str, dots: Mapping[Run, Dot], numbers: Numbers, unit: str, right: float) -> str:
    """A row with a dot and its interval per run; a broken line where the baseline lies."""
    low = min(dot.estimate.low for dot in dots.values())
    high = max(dot.estimate.high for dot in dots.values())
    ticks = svg.round_ticks(low, high)
    scale = svg.Scale(ticks[0], ticks[-1], stop=svg.WIDTH - right)
    marks = svg.axis(scale, ticks, numbers.runs, unit)
    if numbers.baseline in dots:
        x = scale(dots[numbers.baseline].estimate.value)
        bottom = svg.height(numbers.runs) - svg.BOTTOM
        marks.append(svg.line(x, svg.TOP - 2, x, bottom, "baseline"))
    models = list(dict.fromkeys(run.model for run in numbers.runs))
    strategies = list(dict.fromkeys(run.strategy for run in numbers.runs))
    for run, top in zip(numbers.runs, svg.row_tops(numbers.runs), strict=True):
        y = top + svg.ROW / 2
        if run not in dots:
            marks.append(svg.text(svg.WIDTH, y + 4, "—", "value", "end"))
            continue
        dot, color = dots[run], svg.color(models.index(run.model))
        ends = scale(dot.estimate.low), scale(dot.estimate.high)
        marks.append(svg.line(ends[0], y, ends[1], y, f"whisker {color}"))
        marks.append(
            svg.symbol(scale(dot.estimate.value), y, strategies.index(run.strategy), color)
        )
        marks.append(svg.text(svg.WIDTH, y + 4, dot.value, "value", "end"))
    said = [
        f"{run}: {dot.value} ({dot.estimate.low:,.1f} to {dot.estimate.high:,.1f})"
        for run, dot in dots.items()
    ]
    return svg.panel(title, _described(title, said), numbers.runs, marks)


def _stack(shares: Mapping[Outcome, float], scale: svg.Scale, top: float) -> list[str]:
    bars, start = [], 0.0
    for outcome in Outcome:
        stop = start + 100 * shares[outcome]
        if stop > start:
            bars.append(svg.bar(scale(start), scale(stop), top + 6, svg.ROW - 12, outcome.value))
        start = stop
    return bars


def _described(title: str, said: list[str]) -> str:
    return f"{title}. {'; '.join(said)}"
