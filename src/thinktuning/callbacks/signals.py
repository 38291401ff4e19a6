"""SIGTERM and SIGINT: the first is noted, the second ends the process at once."""

import os
import signal
import threading
from types import FrameType
from typing import Any

import torch
from lightning.pytorch.strategies import Strategy

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Notes that a run is to stop."""

    def __init__(self) -> None:
        self._received: int | None = None
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
        if self._received is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._received = number
        name = signal.Signals(number).name
        # Not print: a handler may interrupt the very same stream.
        os.write(2, f"\n{name}: this step is finished and saved; again to stop at once\n".encode())
