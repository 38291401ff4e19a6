"""What the sides of ``versus.py`` share: they wait for a word, take a step, and say how it was.

Needs the standard library alone, since one side runs in an environment of its own.
"""

import json
import random
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SYSTEM = "You solve problems in a few short steps."


def questions(path: str) -> list[str]:
    """Those of a file in GSM8K's form."""
    return [json.loads(line)["question"] for line in Path(path).read_text().splitlines()]


def reward(text: str) -> float:
    """0 or 1 as if drawn, so that every group has advantages; the same for a text on each side."""
    return float(random.Random(text).random() < 0.5)


class Steps:
    """Takes part in the game: a step for every line of input, its figures as a line of output."""

    def __init__(self) -> None:
        self._out, sys.stdout = sys.stdout, sys.stderr  # libraries print as well
        self._started = 0.0
        self.seconds: dict[str, float] = {}  # and whatever else a side counts in a step

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its seconds added to a part of the step."""

        def run(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
            return result

        return run

    def wait(self) -> None:
        """Before a step; the process ends where no more are asked for."""
        self._say({"ready": True})
        if not sys.stdin.readline():
            sys.exit(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        self.seconds = {}
        self._started = time.perf_counter()

    def tell(self, **more: float) -> None:
        """After a step."""
        taken = time.perf_counter() - self._started
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found is not None, "Linux tells its peak memory"
        self._say({"step": taken, "peak_gib": int(found[1]) / 2**20, **self.seconds, **more})

    def _say(self, message: dict[str, Any]) -> None:
        print(json.dumps(message), file=self._out, flush=True)
