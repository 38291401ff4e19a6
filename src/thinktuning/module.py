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
from dataclasses import asdict
from typing import Any

import torch
from jsonargparse import lazy_instance
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import nn
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
)
from thinktuning.policy import (
    LoraSettings,
    completion_text,
    end_of_turn_ids,
    load_base,
    load_model,
    load_tokenizer,
    recompute_activations,
    shard,
    with_adapters,
    without_adapters,
)
from thinktuning.rewards import MathReward, Reward, score, verify_math
from thinktuning.strategy import FSDP2Strategy, check_strategy
from thinktuning.tensors import policy_inputs, with_advantages
from thinktuning.types import Outcome, Prompt, Rollout, RolloutBatch
from thinktuning.update import PolicyUpdate

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
        activation_checkpointing: Keep only the inputs of each transformer block for the backward
            and compute the rest again: less memory, a third more work in the update.
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
        activation_checkpointing: bool = False,
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
        self.activation_checkpointing = activation_checkpointing
        self.lora = lora
        self.seed = seed
        self.val_accuracy, self.val_no_answer = MeanMetric(), MeanMetric()
        self.val_length, self.val_cut_off = MeanMetric(), MeanMetric()

    # ---------------------------------------------------------------- models

    def setup(self, stage: str) -> None:
        """Refuse what can't be done right."""
        check_strategy(self.trainer.strategy)
        precision = str(self.trainer.precision)
        if precision not in ("32-true", "bf16-mixed"):
            raise InputError(
                f"trainer.precision {precision} isn't supported; expected bf16-mixed or 32-true: "
                f"weights stay in float32, since in fewer bits an update of 1e-6 rounds away, and "
                f"a scaled loss (16-mixed) doesn't go with clipping here"
            )
        if not isinstance(self.trainer.strategy, FSDP2Strategy) or self.lora is None:
            return
        if self.lora.base == "bfloat16" and precision == "32-true":
            raise InputError(
                "model.lora.base bfloat16 would be gathered and computed in float32 under "
                "fsdp2 with trainer.precision 32-true; use bf16-mixed"
            )
        if self.lora.base == "8bit":
            raise InputError(
                "model.lora.base 8bit can't be cut over ranks: bitsandbytes keeps scales beside "
                "its weights that FSDP2 doesn't know; use 4bit, bfloat16, or trainer.strategy ddp"
            )

    def configure_model(self) -> None:
        """Load the policy, and the reference where a KL term or a stage asks for it."""
        if hasattr(self, "policy"):
            return
        self.tokenizer = load_tokenizer(self.pretrained)
        self.policy = self._load_student()
        self.stop_ids = end_of_turn_ids(self.tokenizer, self.policy.generation_config)
        if self.lora is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(derive_seed(self.seed, "adapters"))  # on every rank the same
                self.policy = with_adapters(self.policy, self.lora)
        if self.activation_checkpointing:
            recompute_activations(self.policy)
        self._shard(self.policy)  # before the reference is loaded: one whole model at a time
        if self.lora is None and self._fitting() and self._needs_reference():
            self.reference = load_model(self.pretrained, attention=self.attention)
            self.reference.requires_grad_(False)
            self._shard(self.reference)

    def _load_student(self) -> PreTrainedModel:
        """The weights that are trained, or that adapters are put on."""
        if self.lora is None:
            return load_model(self.pretrained, attention=self.attention)
        return load_base(self.pretrained, self.lora.base, self._compute_dtype, self.attention)

    @property
    def _compute_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.trainer.precision == "bf16-mixed" else torch.float32

    @contextmanager
    def as_reference(self) -> Iterator[PreTrainedModel]:
        """The frozen reference: a model of its own, or the student without its adapters."""
        if self.lora is None:
            yield self.reference
            return
        with without_adapters(self.policy):
            yield self.policy

    def _shard(self, model: nn.Module) -> None:
        strategy = self.trainer.strategy
        if isinstance(strategy, FSDP2Strategy):
            mesh = strategy.device_mesh["data_parallel"]
            shard(model, mesh, self._compute_dtype, strategy.cpu_offload)

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
        of_library = type(optimizer).__module__.partition(".")[0]
        if of_library == "bitsandbytes" and isinstance(self.trainer.strategy, FSDP2Strategy):
            raise InputError(
                f"model.optimizer {type(optimizer).__name__} can't step weights that are cut over "
                f"ranks: bitsandbytes doesn't know them; use torch.optim.AdamW, whose state FSDP2 "
                f"cuts as well, or trainer.strategy ddp"
            )
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
                update = PolicyUpdate(self, metrics)
                inputs = update.with_fixed_logprobs(policy_inputs(rollouts, self.device))
            with self._stage("update", metrics):
                trained_tokens = update.run(inputs)
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
        if not prompts:  # this rank's part of the last validation batch
            return []
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
