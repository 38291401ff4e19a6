"""Two hooks that Lightning doesn't have."""

from typing import TYPE_CHECKING

from lightning.pytorch import Callback, LightningModule, Trainer

from thinktuning.types import RolloutBatch

if TYPE_CHECKING:
    from thinktuning.module import ThinkTuningModule


class RolloutCallback(Callback):
    """A stage between sampling and scoring. Add a stage by adding such a callback.

    ``ThinkTuningModule.training_step`` calls the stages in the order of ``trainer.callbacks``.
    (Lightning's ``on_train_batch_start`` would run outside autocast and discard what it returns.)
    """

    stage = "rollouts"
    """Name of the stage in the progress bar and in the timings."""

    def on_rollouts(
        self, trainer: Trainer, module: "ThinkTuningModule", rollouts: RolloutBatch
    ) -> RolloutBatch:
        """Return the batch for the next stage: as many rollouts, in the same order."""
        return rollouts

    def needs_reference(self) -> bool:
        """Whether this stage asks the frozen reference, so that it must be loaded."""
        return False


class StageObserver(Callback):
    """A callback that is told how far a training step is."""

    def on_stage(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """A stage of the step begins."""
