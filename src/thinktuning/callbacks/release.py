"""Engines are closed where a run fails, too."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class EngineRelease(Callback):
    """Closes the module's engine on an error: Lightning tears down only what succeeds."""

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Release the engine."""
        module: Any = pl_module
        module.engine.close()
