"""Checkpoints at rollout steps, the last one included, and wherever a signal ends the run."""

import logging
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from thinktuning.callbacks.signals import StopSignals
from thinktuning.checkpointing import is_whole
from thinktuning.errors import InputError, RunStopped, UnsavedError, too_small
from thinktuning.runs import checkpoints

log = logging.getLogger(__name__)


class RolloutCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint that doesn't lose the steps after the last interval.

    The first SIGTERM or SIGINT ends the run behind its step, with a checkpoint; the second at once.
    Where a checkpoint can't be written training goes on, and the next interval tries again.

    Args:
        keep: Newest checkpoints that stay, >= 1, where no metric is monitored and save_top_k is 1.
            An older one goes only when a newer one is whole.
        kwargs: Those of ``ModelCheckpoint``.
    """

    def __init__(self, keep: int = 2, **kwargs: Any) -> None:
        if faults := too_small(("keep", keep, 1)):
            raise InputError("checkpoint: " + "; ".join(faults))
        super().__init__(**kwargs)
        self.keep = keep
        self._signals = StopSignals()
        self._unsaved: Exception | None = None
        self._stopping: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to signals from now on; Lightning's own handlers would save nothing."""
        super().on_train_start(trainer, pl_module)
        self._signals.listen()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Save at every interval, at the run's last step whatever the interval, and on a signal."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        last_of_epochs = trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
        last = last_of_epochs or trainer.global_step == trainer.max_steps
        if not last:
            self._stopping = self._signals.on_any_rank(trainer.strategy)
        if last or self._stopping is not None:
            self._save_now(trainer)
        if last and self._unsaved is not None:
            raise self._unsaved

    # Not where the signal was seen: what others log behind a batch would be lost.
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """End the run if a signal asked for it."""
        self._stop()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the run if a signal asked for it."""
        self._stop()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save where a signal came meanwhile; the run ends before its next step."""
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == "fit":
            self._stopping = self._signals.on_any_rank(trainer.strategy)
            if self._stopping is not None:
                self._save_now(trainer)

    def _stop(self) -> None:
        if self._stopping is None:
            return
        if self._unsaved is not None:
            raise self._unsaved
        raise RunStopped(self._stopping, self._last_checkpoint_saved)

    def _save_now(self, trainer: Trainer) -> None:
        if not self._should_skip_saving_checkpoint(trainer):
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Save; where that fails say so, on all ranks, and leave what was there."""
        self._unsaved = None
        try:
            super()._save_checkpoint(trainer, filepath)
        except UnsavedError as error:
            self._unsaved = error
            trainer.strategy.barrier()  # where the other ranks wait in Trainer.save_checkpoint
        failed = trainer.strategy.reduce_boolean_decision(self._unsaved is not None, all=False)
        if failed:
            kept = self._last_checkpoint_saved or "none"
            log.error("%s; the newest whole checkpoint is %s", self._unsaved or filepath, kept)
            self._unsaved = self._unsaved or UnsavedError(f"{filepath} couldn't be written")
        elif self._keeps_newest():
            self._retire(trainer, Path(filepath))

    def _retire(self, trainer: Trainer, newest: Path) -> None:
        """Delete all but the newest ``keep``, if the newest is whole."""
        if trainer.is_global_zero and is_whole(newest):
            for old in checkpoints(newest.parent)[self.keep :]:
                trainer.strategy.remove_checkpoint(old)

    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """With a monitored metric, delete what Lightning names; it spares what a run began from."""
        if not self._keeps_newest():
            super()._remove_checkpoint(trainer, filepath)

    def _keeps_newest(self) -> bool:
        return self.monitor is None and self.save_top_k == 1

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave signals to whom they belonged."""
        self._signals.leave()
