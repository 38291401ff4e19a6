"""Checkpoints at rollout steps, the last one included, and wherever a signal ends the run."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from thinktuning.callbacks.signals import StopSignals
from thinktuning.checkpointing import is_whole
from thinktuning.errors import InputError, RunStopped, UnsavedError, too_small
from thinktuning.runs import checkpoints

log = logging.getLogger(__name__)


class RolloutCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint that doesn't lose the steps after the last interval.

    The first SIGTERM or SIGINT ends the run behind its step, with a checkpoint; a later one at
    once. Where ``trainer.should_stop`` ends it (Timer, EarlyStopping), that step is saved as well.
    Where a checkpoint can't be written training goes on, what is there stays, and the next interval
    tries again.

    Args:
        keep: Newest checkpoints that stay, >= 1, where no metric is monitored and save_top_k is 1.
            An older one goes only when a newer one is whole.
        kwargs: Those of ``ModelCheckpoint``, but for ``train_time_interval`` and
            ``save_on_exception``.

    Raises:
        InputError: If a setting isn't supported, or nothing would be saved before the last step.
    """

    def __init__(self, keep: int = 2, **kwargs: Any) -> None:
        if faults := [*too_small(("keep", keep, 1)), *_unsupported(kwargs)]:
            raise InputError("checkpoint: " + "; ".join(faults))
        super().__init__(**kwargs)
        self.keep = keep
        self._signals = StopSignals()
        self._unsaved: Exception | None = None
        self._stopping: int | None = None
        self._validated_at: int | None = None
        self._unranked = False

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
        # Lightning forgets what it has put off where val_check_interval is 1.
        self._unranked |= self._defer_save_until_validation
        self._defer_save_until_validation = False
        last_of_epochs = trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
        last_of_steps = trainer.global_step == trainer.max_steps
        if last_of_epochs or last_of_steps or _stops_early(trainer):
            self._save_last_step(trainer)
            return
        self._stopping = self._signals.on_any_rank(trainer.strategy)
        if self._stopping is not None:
            self._save_now(trainer)

    # Not where the signal was seen: what others log behind a batch would be lost, and so would the
    # validation that is due behind it, which a resumed run takes for done.
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """End the run if a signal asked for it."""
        if self._stopping is None:
            return
        if self._unsaved is not None:
            raise self._unsaved
        raise RunStopped(self._stopping, self._last_checkpoint_saved)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what waited for its metric, and where a signal came meanwhile: the run ends before
        its next step.
        """
        self._validated_at = trainer.global_step
        if self._unranked and trainer.state.fn == "fit":
            self._unranked = False
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == "fit":
            self._stopping = self._signals.on_any_rank(trainer.strategy)
            if self._stopping is not None:
                self._save_now(trainer)
            if _stops_early(trainer):
                self._save_last_step(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save at every interval of epochs, and where a callback has ended the run."""
        with _behind_last_batch(trainer):
            super().on_train_epoch_end(trainer, pl_module)
            if _stops_early(trainer):
                self._save_last_step(trainer)

    def _save_last_step(self, trainer: Trainer) -> None:
        """Save this step, behind which the run ends; that it can't be saved is an error."""
        self._save_now(trainer)
        if self._unsaved is not None:
            raise self._unsaved

    def _save_now(self, trainer: Trainer) -> None:
        """Save this step whatever is kept: Lightning may find it not good enough."""
        if self._should_skip_saving_checkpoint(trainer):
            return
        candidates = self._monitor_candidates(trainer)
        if self.monitor is None or self.monitor in candidates:
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)
        if self._unsaved is None and self._last_global_step_saved != trainer.global_step:
            # Under a name of its own: another step's may be the configured one.
            name = f"step={trainer.global_step:06d}{self.FILE_EXTENSION}"
            self._unranked = self.monitor is not None and self.monitor not in candidates
            self._save_checkpoint(trainer, str(Path(str(self.dirpath), name)))
            self._save_last_checkpoint(trainer, candidates)

    def _monitor_candidates(self, trainer: Trainer) -> dict[str, Tensor]:
        """What has been logged, without a monitored metric of an earlier step's validation."""
        candidates = super()._monitor_candidates(trainer)
        metric = self.monitor or ""
        if metric.startswith("val/") and self._validated_at != trainer.global_step:
            candidates.pop(metric, None)
        return candidates

    def _save_topk_checkpoint(
        self, trainer: Trainer, monitor_candidates: dict[str, Tensor]
    ) -> None:
        """Save; where that fails the best ones are those that they were."""
        self._unsaved = None
        before = deepcopy(self.state_dict())
        super()._save_topk_checkpoint(trainer, monitor_candidates)
        if self._unsaved is not None:
            self.load_state_dict(before)

    def _save_last_checkpoint(
        self, trainer: Trainer, monitor_candidates: dict[str, Tensor]
    ) -> None:
        """Leave the last one that there is where the newest couldn't be saved."""
        if self._unsaved is None:
            super()._save_last_checkpoint(trainer, monitor_candidates)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Save; where that fails on a rank, say so, and let all take the step for unsaved."""
        before = self._last_global_step_saved, self._last_checkpoint_saved
        fault: UnsavedError | None = None
        try:
            super()._save_checkpoint(trainer, filepath)
        except UnsavedError as error:
            fault = error
            trainer.strategy.barrier()  # where the other ranks wait in Trainer.save_checkpoint
        if trainer.strategy.reduce_boolean_decision(fault is not None, all=False):
            self._last_global_step_saved, self._last_checkpoint_saved = before
            self._unsaved = fault or UnsavedError(f"{filepath} couldn't be written")
            if trainer.is_global_zero:  # which knows the reason, whichever rank failed
                log.error("%s; the newest whole checkpoint is %s", fault, before[1] or "none")
        elif self._keeps_newest():
            self._retire(trainer, Path(filepath))

    def _retire(self, trainer: Trainer, newest: Path) -> None:
        """Delete all but the newest ``keep``, if the newest is whole."""
        if trainer.is_global_zero and is_whole(newest):
            # By name: the clock may say that it is older than others.
            others = [path for path in checkpoints(newest.parent) if path != newest]
            for old in others[self.keep - 1 :]:
                trainer.strategy.remove_checkpoint(old)

    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """With a monitored metric, delete what Lightning names; it spares what a run began from.

        Nothing goes where the newest one couldn't be saved.
        """
        if not self._keeps_newest() and self._unsaved is None:
            super()._remove_checkpoint(trainer, filepath)

    def _keeps_newest(self) -> bool:
        return self.monitor is None and self.save_top_k == 1

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave signals to whom they belonged."""
        self._signals.leave()


def _unsupported(settings: Mapping[str, Any]) -> Iterator[str]:
    """Faults of settings that Lightning takes, and that would save nothing or half a step."""
    steps, epochs = settings.get("every_n_train_steps"), settings.get("every_n_epochs")
    if settings.get("train_time_interval") is not None:
        # ModelCheckpoint forgets it where a module steps its optimizer itself.
        yield "train_time_interval isn't supported; set every_n_train_steps instead"
    elif not steps and not epochs and (steps, epochs) != (None, None):
        yield (
            f"every_n_train_steps={steps} and every_n_epochs={epochs} would save nothing before "
            f"the last step; set one of them to at least 1"
        )
    if settings.get("save_on_exception"):
        yield (
            "save_on_exception isn't supported: it would save in the midst of a step, and ranks "
            "would wait for each other; leave it false, and set a smaller every_n_train_steps"
        )


def _stops_early(trainer: Trainer) -> bool:
    """Whether a callback ends the run behind this step."""
    enough_steps = trainer.global_step >= (trainer.min_steps or 0)
    epochs = trainer.current_epoch + trainer.is_last_batch
    return trainer.should_stop and enough_steps and epochs >= (trainer.min_epochs or 0)


@contextmanager
def _behind_last_batch(trainer: Trainer) -> Iterator[None]:
    """Count the end of an epoch as Lightning does behind its last batch.

    Of a checkpoint with a complete epoch Lightning (2.6.6) doesn't give the data its position back:
    the resumed run would be trained on the first epoch's order again.
    """
    _count_epoch_end(trainer, -1)
    try:
        yield
    finally:
        _count_epoch_end(trainer, 1)


def _count_epoch_end(trainer: Trainer, number: int) -> None:
    loop: Any = trainer.fit_loop
    for epochs in (loop.epoch_progress.total, loop.epoch_progress.current):
        epochs.processed += number
    for batches in (loop.epoch_loop.batch_progress.total, loop.epoch_loop.batch_progress.current):
        batches.completed += number
