"""The LightningModule: holds the policy and the frozen reference, and keeps the stages in order.

How it differs from the paper and from the authors' recipe:

* Advantage-aware shaping follows the paper's equation; the recipe's bounds are swapped, so that its
  coefficient is constant.
* By default only guidance tokens are shaped, and the end-of-turn token behind them counts as one.
* The student's token ids are never decoded and encoded again.
* A guided rollout that would be too long stays unguided (option: cut off).
* The teacher's reply is constrained to its tagged form (option: free, as ``configs/gsm8k.yaml``).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
from jsonargparse import lazy_instance
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric
from transformers import PreTrainedModel

from thinktuning.callbacks.base import RolloutCallback, StageObserver
from thinktuning.engines import (
    Completion,
    Engine,
    SamplingParams,
    TransformersEngine,
    derive_seed,
)
from thinktuning.errors import InputError
from thinktuning.metrics import StepMetrics, rollout_means
from thinktuning.objective import (
    Mean,
    ObjectiveConfig,
    policy_loss,
    sampling_gap,
    token_weights,
)
from thinktuning.policy import (
    LoraSettings,
    completion_logprobs,
    completion_text,
    end_of_turn_ids,
    load_model,
    load_tokenizer,
    with_adapters,
)
from thinktuning.rewards import MathReward, Reward, score, verify_math
from thinktuning.tensors import policy_inputs, split, trim, with_advantages
from thinktuning.types import Outcome, PolicyInputs, Prompt, Rollout, RolloutBatch

_REFERENCE = "reference."


class ThinkTuningModule(LightningModule):
    """ThinkTuning: GRPO on a student whose rollouts a teacher has partly continued.

    A batch of the trainer is a rollout batch: sampling, guidance, scoring and
    ``num_mini_batches`` optimizer steps. Steps, checkpoints and plots count rollout batches.

    Args:
        pretrained: The student: hub id, local folder, or embedded for SmolLM2-135M-Instruct from
            the package index. The frozen reference begins as the same weights.
        engine: Samples the student's answers, and the teacher's where it has no engine of its own.
        group_size: Answers per question, at least 2.
        max_new_tokens: Length limit of an answer, the injected part included.
        temperature: Of sampling; the policy is softmax(logits / temperature). Positive. There is no
            top-p or top-k, since the ratio to a policy with a part cut off would be wrong.
        num_mini_batches: Optimizer steps per rollout batch; divides the questions of a rank.
        micro_batch_size: Rollouts in one forward and backward pass; the result doesn't depend on
            it.
        objective: What the update optimises.
        rewards: Added up; null is 1 for a correct answer.
        optimizer: A torch optimizer class and its arguments.
        warmup_steps: Rollout batches over which the learning rate rises from 0; constant after.
        max_grad_norm: Gradients are clipped to this norm; null doesn't clip.
        attention: Transformers' attn_implementation.
        lora: Train adapters on frozen weights, which are then the reference as well: one copy of
            them for student, reference and teacher. null trains all weights.
        seed: Of sampling and selection; taken from seed_everything by the CLI.
    """

    reference: PreTrainedModel
    policy: Any  # a Transformers model, or peft's around one

    def __init__(
        self,
        pretrained: str = "embedded",
        engine: Engine = lazy_instance(TransformersEngine),  # noqa: B008
        group_size: int = 8,
        max_new_tokens: int = 1024,
        temperature: float = 1.0,
        num_mini_batches: int = 1,
        micro_batch_size: int = 4,
        objective: ObjectiveConfig = ObjectiveConfig(),  # noqa: B008 (frozen)
        rewards: list[Reward] | None = None,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-6, weight_decay=0.01),
        warmup_steps: int = 0,
        max_grad_norm: float | None = 1.0,
        attention: str = "sdpa",
        lora: LoraSettings | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        faults = [
            f"{name} must be at least {least}, got {value}"
            for name, value, least in (
                ("group_size", group_size, 2),
                ("max_new_tokens", max_new_tokens, 1),
                ("num_mini_batches", num_mini_batches, 1),
                ("micro_batch_size", micro_batch_size, 1),
                ("warmup_steps", warmup_steps, 0),
            )
            if value < least
        ]
        if temperature <= 0:
            faults.append(f"temperature must be positive, got {temperature}")
        if max_grad_norm is not None and max_grad_norm <= 0:
            faults.append(f"max_grad_norm must be positive or null, got {max_grad_norm}")
        if getattr(engine, "pretrained", None) is not None:
            faults.append(
                "its engine samples from the trained weights: leave out engine.pretrained, "
                "which is for a teacher (guidance.teacher)"
            )
        if faults:
            raise InputError("model: " + "; ".join(faults))
        self.automatic_optimization = False
        self.strict_loading = False  # the reference isn't in checkpoints; see on_load_checkpoint
        self.pretrained = pretrained
        self.engine = engine
        self.group_size = group_size
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.num_mini_batches = num_mini_batches
        self.micro_batch_size = micro_batch_size
        self.objective = objective
        self.rewards: Sequence[Reward] = [MathReward()] if rewards is None else rewards
        self.optimizer_factory = optimizer
        self.warmup_steps = warmup_steps
        self.max_grad_norm = max_grad_norm
        self.attention = attention
        self.lora = lora
        self.seed = seed
        self.val_accuracy, self.val_no_answer = MeanMetric(), MeanMetric()
        self.val_length, self.val_cut_off = MeanMetric(), MeanMetric()

    # ---------------------------------------------------------------- models

    def configure_model(self) -> None:
        """Load the policy, and the reference where a KL term or a stage asks for it."""
        if hasattr(self, "policy"):
            return
        self.tokenizer = load_tokenizer(self.pretrained)
        self.policy = load_model(self.pretrained, attention=self.attention)
        self.stop_ids = end_of_turn_ids(self.tokenizer, self.policy.generation_config)
        if self.lora is not None:
            self.policy = with_adapters(self.policy, self.lora)
        elif self._fitting() and self._needs_reference():
            self.reference = load_model(self.pretrained, attention=self.attention)
            self.reference.requires_grad_(False)

    @contextmanager
    def as_reference(self) -> Iterator[PreTrainedModel]:
        """The frozen reference: a model of its own, or the student without its adapters."""
        if self.lora is None:
            yield self.reference
            return
        with self.policy.disable_adapter():
            yield self.policy

    def on_fit_start(self) -> None:
        """Refuse what manual optimization can't do right."""
        if self.trainer.precision == "16-mixed":
            raise InputError(
                "trainer.precision 16-mixed scales the loss, which clipping here doesn't undo; "
                "use bf16-mixed or 32-true"
            )

    def _fitting(self) -> bool:
        return self.trainer.state.fn == "fit"

    def _needs_reference(self) -> bool:
        return self.objective.kl_coef > 0 or any(c.needs_reference() for c in self._stages())

    def _stages(self) -> list[RolloutCallback]:
        return [c for c in self._callbacks() if isinstance(c, RolloutCallback)]

    def _callbacks(self) -> list[Callback]:
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        return callbacks

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The optimizer, and a learning rate that is constant after its warm-up."""
        optimizer = self.optimizer_factory(p for p in self.policy.parameters() if p.requires_grad)
        warmup = self.warmup_steps
        # Stepped once a rollout batch; the first batch already learns.
        scheduler = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (warmup + 1)))
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Everything but the frozen weights, which are loaded anew."""
        state = super().state_dict(*args, **kwargs)
        own = {k: v for k, v in state.items() if not k.startswith(_REFERENCE)}
        return own if self.lora is None else {k: v for k, v in own.items() if "lora_" in k}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note which model the weights belong to."""
        checkpoint["pretrained"] = self.pretrained
        checkpoint["lora"] = None if self.lora is None else asdict(self.lora)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse weights that aren't this policy's; strict loading would miss the reference."""
        lora = None if self.lora is None else asdict(self.lora)
        if checkpoint.get("lora") != lora:
            raise InputError(
                f"the checkpoint was made with model.lora {checkpoint.get('lora')}, not {lora}"
            )
        if lora is not None and checkpoint["pretrained"] != self.pretrained:
            raise InputError(
                f"the checkpoint's adapters belong to {checkpoint['pretrained']!r}, not to "
                f"{self.pretrained!r}"
            )
        expected, found = set(self.state_dict()), set(checkpoint["state_dict"])
        if expected != found:
            raise InputError(
                f"the checkpoint isn't one of this model ({self.pretrained}): it lacks "
                f"{len(expected - found)} of its weights and has {len(found - expected)} others, "
                f"e.g. {sorted(expected ^ found)[0]!r}; give the configuration it was made with"
            )

    # -------------------------------------------------------------- training

    def training_step(self, prompts: list[Prompt], batch_idx: int) -> dict[str, Any]:
        """One rollout batch, from questions to ``num_mini_batches`` optimizer steps.

        Returns:
            For callbacks: ``rollouts``, the scored RolloutBatch, and ``metrics``, what was logged.
        """
        metrics = StepMetrics()
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
                rollouts = score(rollouts, self.rewards)
                rollouts = with_advantages(rollouts, self.objective.advantage_scale)
            with self._stage("logprobs", metrics):
                inputs = self._with_fixed_logprobs(policy_inputs(rollouts, self.device))
                self._compare_before_update(inputs, metrics)
            with self._stage("update", metrics):
                trained_tokens = self._update(inputs, metrics)
        metrics.add(rollout_means(rollouts))
        sampled_tokens = sum(len((r.original or r).completion_ids) for r in rollouts.rollouts)
        for name, tokens in (("rollout", sampled_tokens), ("update", trained_tokens)):
            seconds = metrics.seconds[name] / self.trainer.world_size
            metrics.add({f"tokens_per_second/{name}": Mean(tokens, seconds)})
        return {"rollouts": rollouts, "metrics": self._log_step(rollouts.step, metrics)}

    def _give_weights(self) -> None:
        """Make the engine sample from the policy as it is now."""
        self.engine.wake()
        self.engine.load_weights(self.policy, self.tokenizer)

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

    def _complete(
        self, prompts: Sequence[Prompt], seeds: list[list[int]], params: SamplingParams
    ) -> list[list[Completion]]:
        longest, limit = max(len(p.token_ids) for p in prompts), self.engine.context_length
        if limit is not None and longest + params.max_new_tokens > limit:
            raise InputError(
                f"model: a prompt of {longest} tokens and max_new_tokens={params.max_new_tokens} "
                f"need more than the {limit} positions that the model or its engine has; lower "
                f"model.max_new_tokens or data.max_prompt_tokens"
            )
        return self.engine.sample([p.token_ids for p in prompts], seeds, params)

    def _rollout(self, prompt: Prompt, sample: int, completion: Completion) -> Rollout:
        return Rollout(
            prompt=prompt,
            sample=sample,
            completion_ids=completion.token_ids,
            logprobs=completion.logprobs,
            injected_mask=(False,) * len(completion.token_ids),
            finished=completion.finish_reason == "stop",
            text=self.decode(completion.token_ids),
        )

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of a completion without its control tokens."""
        return completion_text(self.tokenizer, token_ids)

    def _with_fixed_logprobs(self, inputs: PolicyInputs) -> PolicyInputs:
        """Add the logprobs that stay fixed during the update, as far as it needs them."""
        if self.num_mini_batches > 1:
            inputs = replace(inputs, old_logprobs=self._frozen_logprobs(self.policy, inputs))
        if self.objective.kl_coef > 0:
            with self.as_reference() as reference:
                inputs = replace(inputs, ref_logprobs=self._frozen_logprobs(reference, inputs))
        return inputs

    @torch.no_grad()
    def _frozen_logprobs(self, model: nn.Module, inputs: PolicyInputs) -> Tensor:
        width = inputs.completion_mask.shape[1]
        rows = []
        for micro in split(inputs, self.micro_batch_size):
            logprobs = completion_logprobs(model, trim(micro), self.temperature).logprobs
            rows.append(nn.functional.pad(logprobs, (0, width - logprobs.shape[1])))
        return torch.cat(rows)

    def _compare_before_update(self, inputs: PolicyInputs, metrics: StepMetrics) -> None:
        """Compare engine and trainer where the update won't: on all rollouts if their logprobs are
        there already, on one of them if the update will read none.
        """
        if inputs.old_logprobs is not None:
            self._compare(inputs.old_logprobs, inputs, metrics)
        elif not self._without_idle_rows(inputs).input_ids.shape[0]:
            one = trim(inputs.rows(slice(0, 1)))
            self._compare(self._frozen_logprobs(self.policy, one), one, metrics)

    def _compare(self, logprobs: Tensor, inputs: PolicyInputs, metrics: StepMetrics) -> None:
        """Note how far the engine's logprobs are from the trainer's at the same weights."""
        assert inputs.sampling_logprobs is not None
        sampled = inputs.completion_mask & ~inputs.injected_mask
        gap = sampling_gap(logprobs, inputs.sampling_logprobs, sampled)
        metrics.add({"engine/logprob_gap": gap.mean, "engine/kl": gap.k3})
        metrics.peak("engine/logprob_gap", gap.maximum)

    def _update(self, inputs: PolicyInputs, metrics: StepMetrics) -> int:
        """Stage 3: one optimizer step per mini-batch.

        Returns:
            Completion tokens that were trained on.
        """
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        assert isinstance(optimizer, LightningOptimizer)
        assert isinstance(scheduler, LambdaLR)
        trained_tokens = 0
        size = inputs.input_ids.shape[0] // self.num_mini_batches
        for number, mini in enumerate(split(inputs, size), start=1):
            optimizer.zero_grad()
            weighted = self._without_idle_rows(self._with_token_weights(mini))
            trained_tokens += int(weighted.completion_mask.sum())
            for micro in split(weighted, self.micro_batch_size):
                self._backward(trim(micro), metrics)
            self._fill_missing_gradients()
            norm = self._clip_gradients()
            finite = bool(norm.isfinite())
            if not finite:
                optimizer.zero_grad(set_to_none=True)  # the optimizer passes over missing gradients
            clean_norm = norm.item() if finite else 0.0
            metrics.add({"optimizer/grad_norm": Mean(clean_norm, int(finite))})
            metrics.add({"optimizer/skipped_steps": Mean(int(not finite), 1)})
            if number < self.num_mini_batches:
                # Past Lightning's wrapper, so that global_step counts rollout batches.
                self.trainer.strategy.optimizer_step(optimizer.optimizer, lambda: None)
            else:
                optimizer.step()
        metrics.add({"optimizer/learning_rate": Mean(scheduler.get_last_lr()[0], 1)})
        scheduler.step()
        # The losses of a step's micro-batches and ranks add up to world_size times its loss, and
        # each rank counts its steps.
        metrics.add({"objective/loss": Mean(0.0, self.num_mini_batches)})
        return trained_tokens

    def _with_token_weights(self, mini: PolicyInputs) -> PolicyInputs:
        """Weigh every token by its share in the mean over this optimizer step on all ranks."""
        counts = mini.advantages.new_tensor(
            [mini.completion_mask.sum(), mini.completion_mask.shape[0]], dtype=torch.float64
        )
        num_tokens, num_sequences = self._sum_over_ranks(counts).tolist()
        weights = token_weights(
            mini.completion_mask,
            self.objective.normalizer,
            int(num_tokens),
            int(num_sequences),
            self.max_new_tokens,
        )
        # DDP and FSDP average gradients over ranks, but each rank's loss is a part of a sum.
        return replace(mini, token_weights=weights * self.trainer.world_size)

    def _without_idle_rows(self, mini: PolicyInputs) -> PolicyInputs:
        """Leave out rollouts whose gradient is zero; the weights of the others stay."""
        # On several ranks all must run the same number of backward passes, which synchronise.
        if self.objective.kl_coef > 0 or self.trainer.world_size > 1:
            return mini
        return mini.rows(mini.advantages != 0)

    def _fill_missing_gradients(self) -> None:
        """A step without any gradient is one of gradient zero: momentum and weight decay go on."""
        for parameter in self.policy.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def _backward(self, micro: PolicyInputs, metrics: StepMetrics) -> None:
        scores = completion_logprobs(self.policy, micro, self.temperature)
        scores.logprobs.retain_grad()
        output = policy_loss(replace(micro, logprobs=scores.logprobs), self.objective)
        self.manual_backward(output.loss)
        assert scores.logprobs.grad is not None
        signal = scores.logprobs.grad.abs()
        means = {f"objective/{name}": value for name, value in output.metrics.items()}
        for name in ("shaping_weight", "shaping_masked"):
            means[name.replace("_", "/")] = means.pop(f"objective/{name}")
        metrics.add(means)
        metrics.add(
            {
                "objective/loss": Mean(output.loss.detach(), 0),
                "objective/entropy": Mean(scores.entropy.sum(), micro.completion_mask.sum()),
                "shaping/gradient_share": Mean(signal[micro.injected_mask].sum(), signal.sum()),
            }
        )
        metrics.peak("shaping/weight", output.weight_max)
        if micro.old_logprobs is None:  # this update's own are those of the weights that sampled
            self._compare(scores.logprobs, micro, metrics)

    def _clip_gradients(self) -> Tensor:
        """Clip to ``max_grad_norm``; the norm before clipping."""
        limit = float("inf") if self.max_grad_norm is None else self.max_grad_norm
        return nn.utils.clip_grad_norm_(self.policy.parameters(), limit)

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        return self.trainer.strategy.reduce(values, reduce_op="sum")

    # ------------------------------------------------------------ validation

    def on_validation_start(self) -> None:
        """Give the engine the weights to evaluate."""
        self._give_weights()

    def on_validation_end(self) -> None:
        """Free the device for training."""
        self.engine.sleep()

    on_test_start = on_validation_start
    on_test_end = on_validation_end

    def validation_step(self, prompts: list[Prompt], batch_idx: int) -> None:
        """Greedy answers of the student, without guidance."""
        self._evaluate(prompts, "val")

    def test_step(self, prompts: list[Prompt], batch_idx: int) -> None:
        """The same as validation."""
        self._evaluate(prompts, "test")

    def _evaluate(self, prompts: Sequence[Prompt], prefix: str) -> None:
        params = SamplingParams(self.max_new_tokens, self.stop_ids, temperature=0.0)
        groups = self._complete(prompts, [[0]] * len(prompts), params)
        for prompt, (completion,) in zip(prompts, groups, strict=True):
            rollout = self._rollout(prompt, 0, completion)
            outcome = verify_math(rollout.text, prompt.answer, rollout.finished)
            self.val_accuracy.update(float(outcome is Outcome.CORRECT))
            self.val_no_answer.update(float(outcome is Outcome.NO_ANSWER))
            self.val_length.update(float(len(rollout.completion_ids)))
            self.val_cut_off.update(float(not rollout.finished))
        self.log(f"{prefix}/accuracy", self.val_accuracy, prog_bar=True, batch_size=1)
        self.log(f"{prefix}/no_answer", self.val_no_answer, batch_size=1)
        self.log(f"{prefix}/length", self.val_length, batch_size=1)
        self.log(f"{prefix}/cut_off", self.val_cut_off, batch_size=1)

    # --------------------------------------------------------------- logging

    @contextmanager
    def _stage(self, name: str, metrics: StepMetrics) -> Iterator[None]:
        """Time a stage and tell the callbacks that it begins."""
        for callback in self._callbacks():
            if isinstance(callback, StageObserver):
                callback.on_stage(self.trainer, self, name)
        with metrics.timed(name):
            yield

    def _log_step(self, step: int, metrics: StepMetrics) -> dict[str, float]:
        """Log a step's numbers, each over all ranks."""
        values = metrics.over_ranks(self.trainer.strategy)
        values["reward"] = values.pop("reward/all")
        # Not self.log, which would repeat the last value of whatever this step has none of.
        for logger in self.loggers:
            logger.log_metrics(values, step=step)
        # For the progress bar and for callbacks that monitor a metric.
        self.log("reward", values["reward"], prog_bar=True, logger=False, batch_size=1)
        others = {name: value for name, value in values.items() if name != "reward"}
        self.log_dict(others, logger=False, batch_size=1)
        return values

    def teardown(self, stage: str) -> None:
        """Release the engine."""
        self.engine.close()
