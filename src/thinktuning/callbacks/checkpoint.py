"""Checkpoints at rollout steps, the last one included."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class RolloutCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint that doesn't lose the steps after the last interval."""

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Save at every interval, and at the run's last step whatever the interval."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        last_of_epochs = trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
        last = last_of_epochs or trainer.global_step == trainer.max_steps
        if last and not self._should_skip_saving_checkpoint(trainer):
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)
