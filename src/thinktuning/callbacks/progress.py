"""Progress: a Rich bar on a terminal, a line per step elsewhere."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console

from thinktuning.callbacks.base import StageObserver


class RolloutProgress(RichProgressBar, StageObserver):
    """Shows the step, the stage it is in and the reward.

    Where the output isn't a terminal (a log file, CI) a bar can't move: every step prints a line.
    """

    def __init__(self) -> None:
        super().__init__(leave=True)
        self._stage = "starting"
        if not Console().is_terminal:
            self.disable()

    def on_stage(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """Name the stage in the bar."""
        self._stage = stage
        if self.progress is not None and self.train_progress_bar_id is not None:
            self._update_metrics(trainer, module)
            self.refresh(hard=True)

    def _get_train_description(self, current_epoch: int) -> str:
        return f"Epoch {current_epoch + 1}"

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """The stage in front of the metrics that the module asked to be shown."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return {"stage": self._stage, **metrics}

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Move the bar, or print the step's line."""
        self._stage = "done"
        if self.is_enabled:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        elif trainer.is_global_zero:
            metrics = self.get_metrics(trainer, pl_module)
            del metrics["stage"]
            shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            print(f"step {trainer.global_step}  {shown}", flush=True)
