"""Panels drawn as SVG: one row per run, its label at the left, a number at the right.

A panel is as wide as a phone, so that its text stays legible there; wider pages put several side by
side. Colours are classes, which the page or ``standalone`` gives a meaning.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from math import ceil, floor, log10

from thinktuning.evaluation.report.numbers import Run

WIDTH, LEFT, RIGHT = 360, 124, 46
ROW, GAP, TOP, BOTTOM = 25, 7, 26, 24
_LABEL_LETTERS = 17
_COLORS = 7
_SYMBOLS = (
    "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0z",
    "M-3.6,-3.6h7.2v7.2h-7.2z",
    "M0,-5.2L5.2,0L0,5.2L-5.2,0z",
    "M0,-4.8L4.6,3.6H-4.6z",
)


@dataclass(frozen=True)
class Scale:
    """Where values of an axis lie.

    Attributes:
        low: Value at ``start``.
        high: Value at ``stop``.
        start: In pixels.
        stop: In pixels.
    """

    low: float
    high: float
    start: float = LEFT
    stop: float = WIDTH - RIGHT

    def __call__(self, value: float) -> float:
        """Pixels from the left."""
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.stop - self.start), 1)


def round_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round values around ``low`` to ``high``, evenly spaced, both ends covered."""
    # Values that are all the same differ by rounding at most, which no axis is to show.
    high = max(high, low + 1e-3 * max(abs(low), 1.0))
    power = 10.0 ** floor(log10((high - low) / (most - 1)))
    for step in (power, 2 * power, 5 * power, 10 * power, 20 * power):
        first, last = floor(low / step + 1e-9), ceil(high / step - 1e-9)
        if 0 < last - first < most:
            break
    return [round(i * step, 10) for i in range(first, last + 1)]


def row_tops(runs: Sequence[Run]) -> list[float]:
    """Where each run's row begins; runs of one model stand together."""
    tops, top = [], float(TOP)
    for i, run in enumerate(runs):
        if i and run.model != runs[i - 1].model:
            top += GAP
        tops.append(top)
        top += ROW
    return tops


def height(runs: Sequence[Run]) -> float:
    """Of a whole panel."""
    return row_tops(runs)[-1] + ROW + BOTTOM


def panel(title: str, description: str, runs: Sequence[Run], marks: Sequence[str]) -> str:
    """A panel with its title and row labels around what is drawn in it."""
    labels = []
    for i, (run, top) in enumerate(zip(runs, row_tops(runs), strict=True)):
        first = i == 0 or run.model != runs[i - 1].model
        labels.append(_label(run, top, first))
    parts = "".join([text(0, 14, title, "title"), *labels, *marks])
    return (
        f'<svg class="plot" xmlns="http://www.w3.org/2000/svg" role="img" '
        f'viewBox="0 0 {WIDTH} {height(runs):g}" width="{WIDTH}" height="{height(runs):g}" '
        f'aria-label="{escape(description)}">{parts}</svg>'
    )


def axis(scale: Scale, ticks: Sequence[float], runs: Sequence[Run], unit: str) -> list[str]:
    """Grid lines with their values below."""
    bottom = height(runs) - BOTTOM
    shown = [f"{tick:,g}{unit}" for tick in ticks]
    lines = [line(scale(tick), TOP - 2, scale(tick), bottom, "grid") for tick in ticks]
    values = [
        text(scale(tick), bottom + 14, label, "tick", "middle")
        for tick, label in zip(ticks, shown, strict=True)
    ]
    return lines + values


def text(x: float, y: float, content: str, style: str, anchor: str = "start") -> str:
    """A line of text; its baseline starts, ends or is centred at (x, y)."""
    return (
        f'<text x="{x:g}" y="{y:g}" class="{style}" text-anchor="{anchor}">{escape(content)}</text>'
    )


def line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    """A straight line."""
    return f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" class="{style}"/>'


def bar(x1: float, x2: float, y: float, tall: float, style: str) -> str:
    """A filled rectangle."""
    return (
        f'<rect x="{x1:g}" y="{y:g}" width="{x2 - x1:g}" height="{tall:g}" class="fill {style}"/>'
    )


def symbol(x: float, y: float, number: int, style: str) -> str:
    """One of four shapes around (x, y)."""
    path = _SYMBOLS[number % len(_SYMBOLS)]
    return f'<path transform="translate({x:g},{y:g})" d="{path}" class="fill {style}"/>'


def color(number: int) -> str:
    """Class of the n-th colour; they start again after the last one."""
    return f"color{number % _COLORS}"


def standalone(
    panels: Sequence[str], legend: Sequence[tuple[str, str]] = (), across: int = 2
) -> str:
    """Panels of equal height in one SVG file of its own, light on any page.

    Args:
        panels: SVG elements.
        legend: Class and name of each colour, where the panels don't say it.
        across: Panels side by side.
    """
    tall = float(panels[0].split('viewBox="0 0 ', 1)[1].split('"', 1)[0].split()[1])
    step, above = WIDTH + 30, 34.0 if legend else 12.0
    placed = [
        panel.replace(
            "<svg ",
            f'<svg x="{20 + i % across * step}" y="{above + i // across * (tall + 14):g}" ',
            1,
        )
        for i, panel in enumerate(panels)
    ]
    wide = 40 + min(across, len(panels)) * step - 30
    high = above + ceil(len(panels) / across) * (tall + 14)
    keys = [
        bar(20 + 100 * i, 30 + 100 * i, 10, 10, style) + text(35 + 100 * i, 19, name, "tick")
        for i, (style, name) in enumerate(legend)
    ]
    styles = (resources.files(__package__) / "plots.css").read_text(encoding="utf-8")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide:g} {high:g}" width="{wide:g}" '
        f'height="{high:g}"><style>{styles}</style><rect width="100%" height="100%" fill="#fff"/>'
        f"{''.join(keys + placed)}</svg>\n"
    )


def _label(run: Run, top: float, first: bool) -> str:
    """The strategy, below the model's name in the first of its rows."""
    whole = f"<title>{escape(str(run))}</title>"
    model = text(0, top + 10.5, _shortened(run.model), "model") if first else ""
    strategy = text(0, top + (21.5 if first else 16), _shortened(run.strategy), "strategy")
    return f"<g>{whole}{model}{strategy}</g>"


def _shortened(name: str) -> str:
    """Without its middle where it is too long: names differ at their ends."""
    if len(name) <= _LABEL_LETTERS:
        return name
    half = _LABEL_LETTERS // 2
    return f"{name[:half].rstrip('-._ ')}…{name[-half:].lstrip('-._ ')}"
