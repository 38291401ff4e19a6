"""What the baselines share: one optimizer step on completions that are to become likely."""

from dataclasses import replace
from typing import Any

import torch
from jsonargparse import lazy_instance
from lightning.pytorch.cli import OptimizerCallable

from thinktuning.engines import Engine, TransformersEngine
from thinktuning.metrics import StepMetrics, mean
from thinktuning.objective import Mean
from thinktuning.policy import LoraSettings
from thinktuning.policy_module import PolicyModule
from thinktuning.tensors import policy_inputs
from thinktuning.types import Rollout, RolloutBatch
from thinktuning.update import SupervisedUpdate


class SupervisedModule(PolicyModule):
    """Trains the student to write given completions. A child says which, in ``training_step``.

    A batch of the trainer is one optimizer step: the mean negative logprob of all its completion
    tokens on all ranks.

    Args:
        pretrained: The student: hub id, local folder, or embedded for SmolLM2-135M-Instruct from
            the package index.
        engine: Samples the student's answers.
        max_new_tokens: Length limit of an answer, the end-of-turn token included.
        micro_batch_size: Completions in one forward and backward pass; the result doesn't depend on
            it.
        optimizer: A torch optimizer class and its arguments.
        warmup_steps: Batches over which the learning rate rises from 0; constant after.
        max_grad_norm: Gradients are clipped to this norm; null doesn't clip.
        attention: Transformers' attn_implementation.
        activation_checkpointing: Keep only the inputs of each transformer block for the backward
            and compute the rest again: less memory, a third more work.
        lora: Train adapters on frozen weights; null trains all weights.
        seed: Of sampling and of adapters; taken from seed_everything by the CLI.
    """

    headline = "objective/loss"

    def __init__(
        self,
        pretrained: str = "embedded",
        engine: Engine = lazy_instance(TransformersEngine),  # noqa: B008
        max_new_tokens: int = 1024,
        micro_batch_size: int = 4,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-5, weight_decay=0.01),
        warmup_steps: int = 0,
        max_grad_norm: float | None = 1.0,
        attention: str = "sdpa",
        activation_checkpointing: bool = False,
        lora: LoraSettings | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            pretrained=pretrained,
            engine=engine,
            max_new_tokens=max_new_tokens,
            micro_batch_size=micro_batch_size,
            optimizer=optimizer,
            warmup_steps=warmup_steps,
            max_grad_norm=max_grad_norm,
            attention=attention,
            activation_checkpointing=activation_checkpointing,
            lora=lora,
            seed=seed,
        )

    def _train_on(self, rollouts: list[Rollout], metrics: StepMetrics) -> dict[str, Any]:
        """One optimizer step on those of the rollouts that are finished; the others only fill rows,
        since all ranks must run the same number of backward passes.

        Returns:
            For callbacks: ``rollouts``, the RolloutBatch, and ``metrics``, what was logged.
        """
        batch = RolloutBatch(self.global_step, 1, tuple(rollouts))
        with metrics.timed("step"), self._stage("update", metrics):
            inputs = policy_inputs(batch, self.device)
            finished = torch.tensor([r.finished for r in rollouts], device=self.device)
            mask = inputs.completion_mask & finished[:, None]
            tokens = SupervisedUpdate(self, metrics).run(replace(inputs, completion_mask=mask))
        seconds = metrics.seconds["update"] / self.trainer.world_size
        metrics.add(
            {
                "tokens_per_second/update": Mean(tokens, seconds),
                "length/completion": mean(len(r.completion_ids) for r in rollouts if r.finished),
            }
        )
        return {"rollouts": batch, "metrics": self._log_step(batch.step, metrics)}
