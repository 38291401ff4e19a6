"""What the baselines share: one optimizer step on completions that are to become likely."""

from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable

from thinktuning.metrics import StepMetrics, mean
from thinktuning.policy_module import PolicyModule
from thinktuning.tensors import policy_inputs
from thinktuning.types import Rollout, RolloutBatch
from thinktuning.update import SupervisedUpdate


class SupervisedModule(PolicyModule):
    """Trains the student to write given completions. A child says which, in ``training_step``.

    A batch of the trainer is one optimizer step: the mean negative logprob of all its completion
    tokens on all ranks.

    Args:
        optimizer: A torch optimizer class and its arguments.
        kwargs: The others of ``PolicyModule``.
    """

    headline = "objective/loss"

    def __init__(
        self,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-5, weight_decay=0.01),
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer=optimizer, **kwargs)

    def _train_on(self, rollouts: list[Rollout], metrics: StepMetrics) -> dict[str, Any]:
        """One optimizer step on those of the rollouts that are finished.

        Returns:
            For callbacks: ``rollouts``, the RolloutBatch, and ``metrics``, what was logged.
        """
        batch = RolloutBatch(self.global_step, 1, tuple(rollouts))
        with metrics.timed("step"), self._stage("update", metrics):
            inputs = policy_inputs(batch, self.device)
            finished = torch.tensor([r.finished for r in rollouts], device=self.device)
            mask = inputs.completion_mask & finished[:, None]
            trained = SupervisedUpdate(self, metrics).run(replace(inputs, completion_mask=mask))
        self._note_speed(metrics, "update", trained.tokens, trained.flop)
        lengths = mean(len(r.completion_ids) for r in rollouts if r.finished)
        metrics.add({"length/completion": lengths})
        return {"rollouts": batch, "metrics": self._log_step(batch.step, metrics)}
