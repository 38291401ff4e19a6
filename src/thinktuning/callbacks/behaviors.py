"""How often held-out answers show the behaviors that are taught."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from thinktuning.callbacks.guidance import TeacherGuidance
from thinktuning.teaching import count_occurrences


class BehaviorRates(Callback):
    """Logs ``val/behavior/<name>``, the share of unguided, held-out answers that show a behavior.

    Under the verb ``test`` it is ``test/behavior/<name>``. Behaviors are those of TeacherGuidance,
    with guidance or without; one without patterns can't be counted.
    """

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count."""
        stages = [c for c in trainer.callbacks if isinstance(c, TeacherGuidance)]  # type: ignore[attr-defined]
        self._behaviors = [b for stage in stages for b in stage.behaviors if b.patterns]
        self._shown = torch.zeros(len(self._behaviors) + 1, dtype=torch.float64)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count a batch's answers, and those that show each behavior."""
        for rollout in outputs["rollouts"]:
            shown = [count_occurrences(b, rollout.text) > 0 for b in self._behaviors]
            self._shown += torch.tensor([*shown, True])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the shares over all ranks."""
        self._log(trainer, pl_module, "val")

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same as validation."""
        self._log(trainer, pl_module, "test")

    def _log(self, trainer: Trainer, pl_module: LightningModule, prefix: str) -> None:
        counts = trainer.strategy.reduce(
            self._shown.to(trainer.strategy.root_device), reduce_op="sum"
        )
        *shown, answers = counts.tolist()
        for behavior, count in zip(self._behaviors, shown, strict=True):
            name = f"{prefix}/behavior/{behavior.name}"
            # The same on all ranks already; Lightning would advise to sync it.
            pl_module.log(name, count / answers, batch_size=1, sync_dist=True)
