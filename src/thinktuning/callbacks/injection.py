"""Stage 3a: the feedback becomes part of the rollouts."""

from typing import TYPE_CHECKING, Literal

from lightning.pytorch import Trainer

from thinktuning.callbacks.base import RolloutCallback
from thinktuning.teaching import inject
from thinktuning.types import Rollout, RolloutBatch

if TYPE_CHECKING:
    from thinktuning.module import ThinkTuningModule


class BehaviorInjection(RolloutCallback):
    r"""Splices parsed feedback into its rollout; the guided rollout replaces the original.

    Args:
        separator: Stands before the reflection and before the continuation.
        overlong: A guided rollout past the length limit stays unguided, or it is cut off there as
            in the authors' recipe and earns nothing.
    """

    stage = "injection"

    def __init__(
        self, separator: str = "\n\n", overlong: Literal["unguided", "cut"] = "unguided"
    ) -> None:
        self.separator = separator
        self.overlong = overlong

    def on_rollouts(
        self, trainer: Trainer, module: "ThinkTuningModule", rollouts: RolloutBatch
    ) -> RolloutBatch:
        """Inject into every rollout that has feedback."""
        return rollouts.with_rollouts(tuple(self._inject(module, r) for r in rollouts.rollouts))

    def _inject(self, module: "ThinkTuningModule", rollout: Rollout) -> Rollout:
        if rollout.guidance is None or rollout.guidance.feedback is None:
            return rollout
        return inject(
            rollout,
            rollout.guidance.feedback,
            module.tokenizer,
            module.stop_ids,
            module.max_new_tokens,
            self.separator,
            self.overlong,
        )
