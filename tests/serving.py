"""A real server for a teacher, and a run that waits where a test wants to do something to it."""

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import HTTPServer
from pathlib import Path
from typing import TypeVar
from urllib.request import ProxyHandler, build_opener

from lightning.pytorch import LightningModule, Trainer

from thinktuning.callbacks import StageObserver

Served = TypeVar("Served", bound=HTTPServer)

PATIENCE = 180.0  # seconds; only a fault takes that long


def wait_until(done: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not done():
        assert time.monotonic() < end, f"waited in vain until {what}"
        time.sleep(0.05)


@contextmanager
def answering(server: Served) -> Iterator[Served]:
    """A server of this process that answers until the block ends."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class VllmServer:
    """vLLM's OpenAI-compatible server for the model in ``folder``, under the name ``teacher``.

    It comes back on the same port and logs into ``log``. ``options`` are further arguments,
    ``environment`` further variables.
    """

    def __init__(self, folder: Path, log: Path, *options: str, **environment: str) -> None:
        self.folder = folder
        self.log = log
        self.options = options
        self.environment = environment
        self.port = _free_port()
        self.base_url = f"http://127.0.0.1:{self.port}/v1"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns when it answers."""
        command = [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(self.folder), "--served-model-name", "teacher"),
            *("--host", "127.0.0.1", "--port", str(self.port)),
            *("--dtype", "float32", "--enforce-eager", "--max-model-len", "1024"),
            *("--generation-config", "vllm"),
            *self.options,
        ]
        small = {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            # Even an eager vLLM compiles small functions, which fails in a path with a space.
            "TORCHDYNAMO_DISABLE": "1",
        }
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, **small, **self.environment},
                stdout=log,
                stderr=log,
                start_new_session=True,  # its workers are killed with it
            )
        wait_until(self._answers, "the server answers")

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.log.read_text(errors="replace")[-3000:]
        try:
            with build_opener(ProxyHandler({})).open(
                f"http://127.0.0.1:{self.port}/health", timeout=5
            ) as response:
                return response.status == 200
        except OSError:
            return False

    def kill(self) -> None:
        """It is gone from one moment to the next, as after a crash."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self.stop()

    def stop(self) -> None:
        """End it and its workers, which give their shared memory back unless they are killed."""
        if self._process is None:
            return
        group = self._process.pid
        with suppress(ProcessLookupError):  # raised where nobody is left
            os.killpg(group, signal.SIGTERM)
            for _ in range(100):
                self._process.poll()
                time.sleep(0.1)
                os.killpg(group, 0)
            os.killpg(group, signal.SIGKILL)
        self._process.wait()
        self._process = None


def _free_port() -> int:
    """Below the ports that connections come from, so that nobody takes it during a restart."""
    for port in random.sample(range(20000, 32000), 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no free port")


class WaitsBeforeGuidance(StageObserver):
    """Says in ``folder`` that a step's guidance is about to begin, and waits for leave."""

    def __init__(self, folder: str, steps: list[int]) -> None:
        self.folder = Path(folder)
        self.steps = steps

    def on_stage(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        if stage != "guidance" or trainer.global_step not in self.steps:
            return
        (self.folder / f"waits-{trainer.global_step}").touch()
        wait_until((self.folder / f"leave-{trainer.global_step}").exists, "the test gives leave")
