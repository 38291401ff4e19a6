"""What a table is, and how numbers are written in it."""

from dataclasses import dataclass

from thinktuning.evaluation.statistics import Estimate
from thinktuning.types import Outcome

MISSING = "—"


@dataclass(frozen=True)
class Entry:
    """A place in a table.

    Attributes:
        text: What it says.
        details: Smaller lines below.
        strong: Set in bold.
        heat: Shade of the background, -1 to 1; 0 for none.
    """

    text: str
    details: tuple[str, ...] = ()
    strong: bool = False
    heat: float = 0.0


@dataclass(frozen=True)
class Table:
    """A table whose rows begin with what they are of.

    Attributes:
        caption: What it shows and how to read it.
        head: Titles of all columns, the first one's included.
        rows: Each as long as ``head``.
        words: Its entries are words, not numbers: they are set flush left.
    """

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[Entry, ...], ...]
    words: bool = False


def percent(share: float) -> str:
    """A share as a number of percent with one decimal."""
    return f"{100 * share:.1f}"


def interval(estimate: Estimate) -> str:
    """Limits in percent."""
    return f"{percent(estimate.low)}–{percent(estimate.high)}"


def points(difference: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    rounded = f"{100 * difference:+.1f}"
    return "0.0" if float(rounded) == 0 else rounded.replace("-", "−")


def p_value(p: float) -> str:
    """Such as ``0.03``."""
    return "<0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def outcome_name(outcome: Outcome) -> str:
    """In words."""
    return outcome.value.replace("_", " ")
