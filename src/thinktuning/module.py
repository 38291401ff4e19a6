"""The LightningModule: holds the policy and the frozen reference, and keeps the stages in order.

How it differs from the paper and from the authors' recipe:

* Advantage-aware shaping follows the paper's equation; the recipe's bounds are swapped, so that its
  coefficient is constant.
* By default only guidance tokens are shaped, and the end-of-turn token behind them counts as one.
* The student's token ids are never decoded and encoded again.
* A guided rollout that would be too long stays unguided (option: cut off).
* The teacher's reply is constrained to its tagged form (option: free, as ``configs/gsm8k.yaml``).
"""

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedModel

from thinktuning.callbacks.base import RolloutCallback
from thinktuning.engines import SamplingParams, derive_seed
from thinktuning.errors import InputError, too_small
from thinktuning.metrics import StepMetrics, held_out_rewards, rollout_means
from thinktuning.objective import Mean, ObjectiveConfig
from thinktuning.policy import load_model, without_adapters
from thinktuning.policy_module import PolicyModule
from thinktuning.rewards import (
    MathReward,
    Reward,
    RewardGuard,
    reward_names,
    score,
    score_rollouts,
)
from thinktuning.tensors import with_advantages
from thinktuning.types import Prompt, Rollout, RolloutBatch
from thinktuning.update import PolicyUpdate


class ThinkTuningModule(PolicyModule):
    """ThinkTuning: GRPO on a student whose rollouts a teacher has partly continued.

    A batch of the trainer is a rollout batch: sampling, guidance, scoring and
    ``num_mini_batches`` optimizer steps. Steps, checkpoints and plots count rollout batches.

    Args:
        group_size: Answers per question, at least 2.
        temperature: Of sampling; the policy is softmax(logits / temperature). Positive. There is no
            top-p or top-k, since the ratio to a policy with a part cut off would be wrong.
        num_mini_batches: Optimizer steps per rollout batch; divides the questions of a rank.
        objective: What the update optimises.
        rewards: Added up; null is 1 for a correct answer.
        reward_seconds: Deadline of a call of a reward, > 0. One that raises, hangs or returns no
            number earns that response 0 (reward/failed).
        max_failed_rewards: The run ends behind so many such responses of one reward in a row, >= 1.
        max_logprob_gap: Warns in every step in which the engine's logprobs and the trainer's differ
            by more on average, in nats; null never does. bfloat16 makes 0.03.
        kwargs: Those of ``PolicyModule``. The frozen reference begins as the same weights as the
            student; the engine also samples from the teacher where that has no engine of its own.
    """

    reference: PreTrainedModel

    def __init__(
        self,
        group_size: int = 8,
        temperature: float = 1.0,
        num_mini_batches: int = 1,
        objective: ObjectiveConfig = ObjectiveConfig(),  # noqa: B008 (frozen)
        rewards: list[Reward] | None = None,
        reward_seconds: float = 60.0,
        max_failed_rewards: int = 16,
        max_logprob_gap: float | None = 0.2,
        **kwargs: Any,
    ) -> None:
        faults = too_small(
            ("group_size", group_size, 2),
            ("num_mini_batches", num_mini_batches, 1),
            ("max_failed_rewards", max_failed_rewards, 1),
        )
        if not 0 < reward_seconds <= threading.TIMEOUT_MAX:
            faults.append(
                f"reward_seconds must be positive and at most {threading.TIMEOUT_MAX:.0f}, got "
                f"{reward_seconds}"
            )
        if max_logprob_gap is not None and not max_logprob_gap > 0:
            faults.append(f"max_logprob_gap must be positive or null, got {max_logprob_gap}")
        if not 0 < temperature < math.inf:
            faults.append(f"temperature must be positive, got {temperature}")
        if rewards is not None and not rewards:
            faults.append("rewards must name at least one, or be null for a correct answer's")
        super().__init__(faults=faults, **kwargs)
        self.group_size = group_size
        self.temperature = temperature
        self.num_mini_batches = num_mini_batches
        self.objective = objective
        self.rewards: Sequence[Reward] = [MathReward()] if rewards is None else rewards
        self.guard = RewardGuard(reward_seconds, max_failed_rewards)
        self.max_logprob_gap = max_logprob_gap
        self._watch_held_out(held_out_rewards(reward_names(self.rewards)))

    # ---------------------------------------------------------------- models

    def configure_model(self) -> None:
        """Load the policy, and the reference where a KL term or a stage asks for it."""
        super().configure_model()  # first: one whole model at a time
        if hasattr(self, "reference"):
            return
        if self.lora is None and self._fitting() and self._needs_reference():
            # What the policy computes with, whose own weights are float32 for the optimizer's sake.
            self.reference = load_model(self.pretrained, self._compute_dtype, self.attention)
            self.reference.requires_grad_(False)
            self._shard(self.reference)

    @contextmanager
    def as_reference(self) -> Iterator[PreTrainedModel]:
        """The frozen reference: a model of its own, or the student without its adapters."""
        if self.lora is None:
            yield self.reference
            return
        with without_adapters(self.policy):
            yield self.policy

    def _needs_reference(self) -> bool:
        return self.objective.kl_coef > 0 or any(c.needs_reference() for c in self._stages())

    def _stages(self) -> list[RolloutCallback]:
        return [c for c in self._callbacks() if isinstance(c, RolloutCallback)]

    # -------------------------------------------------------------- training

    def training_step(self, prompts: list[Prompt], batch_idx: int) -> dict[str, Any]:
        """One rollout batch, from questions to ``num_mini_batches`` optimizer steps.

        Returns:
            For callbacks: ``rollouts``, the scored RolloutBatch, and ``metrics``, what was logged.
        """
        metrics = StepMetrics()
        update = self._update = PolicyUpdate(self, metrics)
        with metrics.timed("step"):
            with self._stage("sync", metrics):
                self._give_weights()
            with self._stage("rollout", metrics):
                rollouts = self._sample(prompts)
            for callback in self._stages():
                with self._stage(callback.stage, metrics):
                    rollouts = callback.on_rollouts(self.trainer, self, rollouts)
            self.engine.sleep()
            with self._stage("reward", metrics):
                rollouts = score(rollouts, self.rewards, self.guard)
                rollouts = with_advantages(
                    rollouts, self.objective.advantage_scale, self.objective.cut_off
                )
            with self._stage("logprobs", metrics):
                inputs = update.inputs(rollouts)
            with self._stage("update", metrics):
                trained = update.run(inputs)
        metrics.add(rollout_means(rollouts))
        sampled_tokens = sum(len((r.original or r).completion_ids) for r in rollouts.rollouts)
        self._note_speed(metrics, "rollout", sampled_tokens)
        self._note_speed(metrics, "update", trained.tokens, trained.flop)
        if "guidance" in metrics.seconds:
            replies = (r.guidance.tokens for r in rollouts.rollouts if r.guidance is not None)
            self._note_speed(metrics, "guidance", sum(replies))
            teaching = Mean(metrics.seconds["guidance"], metrics.seconds["step"])
            metrics.add({"time_share/guidance": teaching})
        values = self._log_step(rollouts.step, metrics)
        self._watch_drift(rollouts.step, values)
        return {"rollouts": rollouts, "metrics": values}

    def _watch_drift(self, step: int, values: Mapping[str, float]) -> None:
        """Say so where the engine doesn't sample from the policy that is trained."""
        gap, limit = values.get("engine/logprob_gap", 0.0), self.max_logprob_gap
        if limit is not None and not gap <= limit:  # so that nan is told as well
            rank_zero_warn(
                f"step {step}: logprobs of the engine and of the trainer differ by "
                f"{gap:.3f} nats on average, and model.max_logprob_gap={limit} is allowed: what is "
                f"trained on is less and less what the policy would say; see docs/engines.md"
            )

    def work_ahead(self, rollouts: RolloutBatch, places: Sequence[int]) -> None:
        """Let a stage that waits for another machine use the time, on all ranks alike.

        Args:
            rollouts: The step's, as they are.
            places: Of those that will stay so.
        """
        self._update.read_ahead(rollouts, places)

    def _sample(self, prompts: Sequence[Prompt]) -> RolloutBatch:
        """Stage 1: the student answers every question ``group_size`` times."""
        if len(prompts) % self.num_mini_batches:
            raise InputError(
                f"model: num_mini_batches={self.num_mini_batches} must divide the questions of a "
                f"rollout batch on each rank, {len(prompts)}"
            )
        step = self.global_step
        seeds = [
            [derive_seed(self.seed, step, p.index, i, "rollout") for i in range(self.group_size)]
            for p in prompts
        ]
        params = SamplingParams(self.max_new_tokens, self.stop_ids, self.temperature)
        groups = self._complete(prompts, seeds, params)
        rollouts = [
            self._rollout(prompt, i, completion)
            for prompt, group in zip(prompts, groups, strict=True)
            for i, completion in enumerate(group)
        ]
        return RolloutBatch(step, self.group_size, tuple(rollouts))

    def _judge(self, rollouts: Sequence[Rollout]) -> tuple[Rollout, ...]:
        """Fill in outcomes and rewards."""
        return tuple(score_rollouts(rollouts, self.rewards, self.guard))
