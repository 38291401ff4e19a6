"""SIGTERM and SIGINT: the first is noted, a later one ends the process at once."""

import os
import signal
import threading
from time import monotonic
from types import FrameType
from typing import Any

import torch
from lightning.pytorch.strategies import Strategy

_SIGNALS = (signal.SIGTERM, signal.SIGINT)

# Where a manager signals a whole process group and a launcher forwards what it got, one stop comes
# several times.
_ECHO_SECONDS = 2


class StopSignals:
    """Notes that a run is to stop."""

    def __init__(self) -> None:
        self._received: int | None = None
        self._received_at = 0.0
        self._before: dict[int, Any] = {}

    def listen(self) -> None:
        """Take the signals over."""
        if self._before or threading.current_thread() is not threading.main_thread():
            return
        self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}

    def leave(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def on_any_rank(self, strategy: Strategy) -> int | None:
        """The signal that this or another rank has received; to be asked on all ranks together."""
        mine = torch.tensor(self._received or 0, device=strategy.root_device)
        return int(strategy.reduce(mine, reduce_op="max")) or None

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = monotonic()
        if number == self._received and now - self._received_at < _ECHO_SECONDS:
            return
        if self._received is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        # The moment first: the next signal may interrupt this handler.
        self._received_at = now
        self._received = number
        told = (
            f"\n{signal.Signals(number).name}: this step is finished and saved; again to stop at "
            f"once, {_ECHO_SECONDS} seconds from now or later\n"
        )
        os.write(2, told.encode())  # not print: a handler may interrupt the very same stream
