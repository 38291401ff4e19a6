"""A worker process for symbolic comparison, which can be killed where sympy hangs."""

import atexit
import contextlib
import json
import logging
import os
import select
import subprocess
import sys
import threading
import time

from thinktuning.errors import FailingRewardError
from thinktuning.types import Outcome

log = logging.getLogger(__name__)

_START_SECONDS = 60.0  # importing sympy on a busy machine
# Seconds before a start, by how many have failed before it; behind the last one the run ends.
_PAUSES = (0.0, 1.0, 10.0, 60.0)
_ORPHAN_SECONDS = 5.0  # behind the deadline


class Verifier:
    r"""Compares two answers in a worker process with a hard deadline.

    ``\boxed{9^{9^{9^{9}}}}`` keeps sympy busy for ever, and math-verify's own timeout relies on
    signals, which only work in a main thread. The worker starts with the first comparison.

    Args:
        seconds: Deadline of one comparison.
    """

    def __init__(self, seconds: float = 5.0) -> None:
        self.seconds = seconds
        self._worker: subprocess.Popen[bytes] | None = None
        self._failed_starts = 0  # in a row
        self._lock = threading.RLock()
        atexit.register(self.close)

    def compare(self, boxed: str, answer: str) -> Outcome:
        """``correct``, ``wrong``, ``no_answer`` (no mathematics in the box) or ``timeout``, also
        where the worker dies of it twice (of too little memory, mostly) or doesn't start.

        Raises:
            FailingRewardError: If the worker hasn't started four times in a row.
        """
        request = json.dumps([boxed, answer]).encode() + b"\n"
        with self._lock:
            for _ in range(2):
                worker = self._running_worker()
                if worker is None:
                    return Outcome.TIMEOUT
                assert worker.stdin is not None
                with contextlib.suppress(BrokenPipeError):  # it died: the read below sees that
                    worker.stdin.write(request)
                reply = self._read_line(worker, self.seconds)
                if reply:
                    return Outcome(reply)
                self.close()
                if reply is None:
                    return Outcome.TIMEOUT
        log.warning("the verifier's worker process died twice on %.200r and %r", boxed, answer)
        return Outcome.TIMEOUT

    def start(self) -> None:
        """Start the worker, unless it runs.

        Raises:
            OSError: If the system has no room for a process.
            RuntimeError: If it ends, or isn't ready in a minute.
        """
        with self._lock:
            if self._worker is not None and self._worker.poll() is None:
                return
            # A module of its own and not multiprocessing, which would import the trainer again.
            module = "thinktuning.rewards.verifier_worker"
            self._worker = subprocess.Popen(
                [sys.executable, "-m", module, str(self.seconds + _ORPHAN_SECONDS)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
            )
            if self._read_line(self._worker, _START_SECONDS) != "ready":
                self.close()
                raise RuntimeError("the verifier's worker process did not start")

    def close(self) -> None:
        """End the worker, if there is one."""
        if self._worker is not None:
            self._worker.kill()
            self._worker.communicate()
            self._worker = None

    def _running_worker(self) -> subprocess.Popen[bytes] | None:
        """The worker; None: it doesn't start, maybe for want of memory, which others may free."""
        if self._worker is None or self._worker.poll() is not None:
            time.sleep(_PAUSES[self._failed_starts])
        try:
            self.start()
        except (OSError, RuntimeError) as error:
            self._note_failed_start(error)
            return None
        self._failed_starts = 0
        return self._worker

    def _note_failed_start(self, error: Exception) -> None:
        log.warning("the verifier can't compare an answer, which counts as a timeout: %s", error)
        self._failed_starts += 1
        if self._failed_starts < len(_PAUSES):
            return
        self._failed_starts = 0
        raise FailingRewardError(
            f"the verifier's worker process could not be started {len(_PAUSES)} times in a row, "
            f"the last time: {error}. Free memory, or run `python -m "
            f"thinktuning.rewards.verifier_worker` to see why, and go on with --ckpt_path last"
        ) from error

    @staticmethod
    def _read_line(worker: subprocess.Popen[bytes], seconds: float) -> str | None:
        """The worker's next line; None: silent past the deadline; empty: the worker has ended."""
        assert worker.stdout is not None
        deadline = time.monotonic() + seconds
        line = b""
        while not line.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([worker.stdout], [], [], left)[0]:
                return None
            chunk = os.read(worker.stdout.fileno(), 4096)
            if not chunk:
                return ""
            line += chunk
        return line.decode().strip()
