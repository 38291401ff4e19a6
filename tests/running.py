"""Starting runs and reading what they left."""

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from thinktuning.callbacks import RolloutCallback
from thinktuning.engines import TransformersEngine

CLOCKED = ("seconds/", "tokens_per_second/", "time_share/", "mfu/")
"""How metrics begin that a clock has measured, and no two runs have the same of."""


def fit_arguments(student: Path, questions: Path, root: Path, *more: str) -> list[str]:
    """A short run of a tiny student with a scripted teacher."""
    return [
        "fit",
        "--seed_everything=3",
        f"--model.pretrained={student}",
        "--model.group_size=4",
        "--model.max_new_tokens=64",
        "--model.optimizer=torch.optim.AdamW",
        "--model.optimizer.lr=1e-3",
        f"--data.source={questions}",
        "--data.val_size=4",
        "--data.batch_size=4",
        "--data.system_message=Add.",
        "--data.instruction=Box it.",
        "--guidance.gamma.start=0.5",
        "--guidance.teacher=scripted.ScriptedTeacher",
        "--guidance.max_new_tokens=160",
        "--trainer.accelerator=cpu",
        "--trainer.max_steps=3",
        f"--trainer.default_root_dir={root}",
        "--checkpoint.every_n_train_steps=1",
        *more,
    ]


def run(
    arguments: list[str], timeout: float = 300, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command where it finds the modules of the tests."""
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        arguments,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def run_on_ranks(number: int, runs: list[list[str]], folder: Path, timeout: float = 600) -> None:
    """Run these commands one after the other on the ranks of one launch; see ``ranks.py``."""
    listed = folder / "runs.json"
    listed.write_text(json.dumps(runs))
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}"]
    driver = Path(__file__).with_name("ranks.py")
    done = run([sys.executable, *launch, str(driver), str(listed)], timeout=timeout)
    assert done.returncode == 0, done.stderr[-4000:]


def scalars(run: Path) -> dict[str, list[float]]:
    """TensorBoard's scalars by tag, in the order of their steps."""
    events = EventAccumulator(str(run))
    events.Reload()
    return {tag: [e.value for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def audit(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "audit.jsonl").read_text().split("\n") if line]


def checkpoint(root: Path, version: int = 0) -> dict[str, Any]:
    path = root / f"version_{version}" / "checkpoints" / "last.ckpt"
    return torch.load(path, weights_only=True)


class ShoutingStage(RolloutCallback):
    """A user's own stage."""

    stage = "shouting"


@contextmanager
def room(length: int) -> Iterator[None]:
    """No file of this process can be longer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (length, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class FullDisk(Callback):
    """Lets no file grow past so many bytes at these steps, the first of which is 1.

    A limit of the size of files is the full disk that a test can have.
    """

    def __init__(self, steps: list[int], room: int) -> None:
        self.steps, self.room = steps, room

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self._allow(self.room if trainer.global_step + 1 in self.steps else None)

    def teardown(self, trainer, pl_module, stage) -> None:
        self._allow(None)

    def on_exception(self, trainer, pl_module, exception) -> None:
        self._allow(None)

    def _allow(self, room: int | None) -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard if room is None else room, hard))


class NamesTaken(Callback):
    """At step 3 what a killed run left lies in the way, at step 4 nothing can get its name.

    What a failed attempt has written is gone when the next step begins.
    """

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        folder, step = Path(trainer.checkpoint_callback.dirpath), trainer.global_step + 1
        assert not [path for path in folder.glob("*.tmp") if path.is_dir()], step
        if step == 3:
            (folder / "step=000003.ckpt.tmp").touch()
        if step == 4:
            (folder / "step=000004.ckpt").mkdir(exist_ok=True)
            (folder / "step=000004.ckpt.old").touch()


class StepMetric(Callback):
    """Logs the step as a metric."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        pl_module.log("steps_done", float(trainer.global_step), batch_size=1)


class ValidationStep(Callback):
    """Logs in every validation how many steps there were before."""

    def on_validation_epoch_end(self, trainer, pl_module) -> None:
        pl_module.log("val/steps_done", float(trainer.global_step), batch_size=1)


class UnguidedPhrases(Callback):
    """Logs the share of unguided rollouts that have a phrase."""

    def __init__(self, phrase: str) -> None:
        self.phrase = phrase

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        unguided = [r for r in outputs["rollouts"].rollouts if not r.guided]
        share = sum(self.phrase in r.text for r in unguided) / max(len(unguided), 1)
        pl_module.log("unguided_phrases", share, batch_size=1)


class LoggedEngine(TransformersEngine):
    """Notes how many prompts each call has, and may kill its process before one."""

    def __init__(self, log: str, killed_before: int | None = None) -> None:
        super().__init__()
        self.log = Path(log)
        self.killed_before = killed_before

    def sample(self, prompts, seeds, params):
        done = len(calls(self.log))
        if done == self.killed_before:
            os.kill(os.getpid(), signal.SIGKILL)
        with self.log.open("a") as file:
            file.write(f"{len(prompts)}\n")
        return super().sample(prompts, seeds, params)


def calls(log: Path) -> list[int]:
    """The prompts of each call of a LoggedEngine."""
    return [int(line) for line in log.read_text().split()] if log.exists() else []
