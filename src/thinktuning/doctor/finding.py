"""What a check has found."""

from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """How a check ended."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes:
        status: How it ended.
        found: What was seen, or why nothing was looked at.
        advice: What to do; empty where nothing is to be done.
        shown: A longer text that belongs to it; empty where there is none.
    """

    status: Status
    found: str
    advice: str = ""
    shown: str = ""


def ok(found: str, shown: str = "") -> Finding:
    """All is well."""
    return Finding(Status.OK, found, shown=shown)


def warning(found: str, advice: str, shown: str = "") -> Finding:
    """A run would work, perhaps not as it is meant to."""
    return Finding(Status.WARNING, found, advice, shown)


def failed(found: str, advice: str = "", shown: str = "") -> Finding:
    """A run would end with an error, or go wrong."""
    return Finding(Status.FAILED, found, advice, shown)


def skipped(found: str) -> Finding:
    """Nothing was looked at."""
    return Finding(Status.SKIPPED, found)
