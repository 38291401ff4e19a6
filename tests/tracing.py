"""Writes down every bit that a step saw and made, and kills the process where it is told to."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from running import CLOCKED

from thinktuning.callbacks import StageObserver
from thinktuning.types import RolloutBatch


class Trace(StageObserver):
    """One JSON line per step: prompts, tokens, logprobs, rewards, advantages, metrics, as hex.

    ``KILL_AT=stage:step`` sends this process SIGKILL, or the signal ``KILL_BY``: at the beginning
    of a stage, behind a batch of validation, in the middle of the two optimizer steps (``update``),
    or half-way through writing a checkpoint. ``KILL_BY=hang`` stays there for ever instead.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.kill_stage, _, step = os.environ.get("KILL_AT", "never:0").partition(":")
        self.kill_step = int(step)
        self.kill_by = os.environ.get("KILL_BY", str(int(signal.SIGKILL)))
        if self.kill_stage == "update":
            self._die_between_optimizer_steps(trainer)
        if self.kill_stage == "checkpoint":
            self._die_while_writing(trainer)

    def _due(self, trainer: Trainer) -> bool:
        return trainer.global_step == self.kill_step

    def _die_between_optimizer_steps(self, trainer: Trainer) -> None:
        step = trainer.strategy.optimizer_step

        def optimizer_step(*args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            if self._due(trainer):
                self._die()
            return result

        trainer.strategy.optimizer_step = optimizer_step

    def _die_while_writing(self, trainer: Trainer) -> None:
        import torch

        save = torch.save

        def half(content: Any, file: Any) -> None:
            if trainer.global_step <= self.kill_step:
                return save(content, file)
            file.write(b"half a checkpoint")
            file.flush()
            self._die()

        torch.save = half

    def on_stage(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        if stage == self.kill_stage != "update" and self._due(trainer):
            self._die()

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if self.kill_stage == "validation" and self._due(trainer):
            self._die()

    def _die(self) -> None:
        self.kill_step = -1  # once
        if self.kill_by == "hang":
            time.sleep(1000)
        os.kill(os.getpid(), int(self.kill_by))

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        rollouts: RolloutBatch = outputs["rollouts"]
        metrics = {
            name: float(value).hex()
            for name, value in outputs["metrics"].items()
            if not name.startswith(CLOCKED)
        }
        row = {
            "step": rollouts.step,
            "prompts": [p.index for p in batch],
            "completions": [list(r.completion_ids) for r in rollouts.rollouts],
            "logprobs": [[x.hex() for x in r.logprobs] for r in rollouts.rollouts],
            "rewards": [r.reward for r in rollouts.rollouts],
            "advantages": [float(r.advantage or 0).hex() for r in rollouts.rollouts],
            "metrics": metrics,
        }
        with (Path(trainer.log_dir) / "trace.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
