"""What the modules that train a policy share: weights, optimizer, checkpoints, validation."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from jsonargparse import lazy_instance
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric
from transformers import PreTrainedModel

from thinktuning.callbacks.base import StageObserver
from thinktuning.callbacks.release import EngineRelease
from thinktuning.engines import (
    Completion,
    Engine,
    SamplingParams,
    TransformersEngine,
    derive_seed,
    own_weights,
)
from thinktuning.errors import InputError, too_small
from thinktuning.host_memory import return_freed_memory
from thinktuning.metrics import HELD_OUT, StepMetrics
from thinktuning.objective import Mean
from thinktuning.policy import (
    GROUPED,
    LoraSettings,
    Scoring,
    completion_text,
    end_of_turn_ids,
    load_base,
    load_model,
    load_tokenizer,
    native_bfloat16,
    recompute_activations,
    shard,
    suitable,
    with_adapters,
)
from thinktuning.recovery import SkippedSteps, memory_is_told
from thinktuning.resuming import begin_new_epoch
from thinktuning.rewards import verify_math
from thinktuning.strategy import FSDP2Strategy, check_strategy
from thinktuning.types import Prompt, Rollout

log = logging.getLogger(__name__)


class PolicyModule(LightningModule):
    """Holds the policy: all its weights or adapters on frozen ones, on one device or cut over many.

    A child trains it in ``training_step``, with manual optimization.

    Args:
        pretrained: The student: hub id, local folder, or embedded for SmolLM2-135M-Instruct from
            the package index.
        engine: Samples the student's answers.
        max_new_tokens: Length limit of an answer, injected parts and the end-of-turn token
            included.
        micro_batch_size: Rollouts in one forward and backward pass, at most; the result doesn't
            depend on it.
        micro_batch_tokens: Tokens in one such pass at most; null: any number. Packed, a prompt
            counts once; else padding counts too, and rollouts of similar length go together.
        optimizer: A torch optimizer class and its arguments.
        warmup_steps: Batches over which the learning rate rises from 0; constant after.
        max_grad_norm: Gradients are clipped to this norm; null doesn't clip.
        max_skipped_steps: An optimizer step with a loss or a gradient that isn't finite is skipped,
            and its batch kept in the run's folder; behind so many in a row the run ends. >= 1.
        attention: Transformers' attn_implementation. grouped_sdpa computes what sdpa does, without
            copying the keys and values that heads share.
        scoring: How logprobs are computed; neither choice changes them. What doesn't suit the model
            is left out, and logged.
        activation_checkpointing: Keep only the inputs of each transformer block for the backward
            and compute the rest again: less memory, a third more work in the update.
        lora: Train adapters on frozen weights, which are then the reference as well: one copy of
            them for student, reference and teacher. null trains all weights.
        seed: Of sampling, selection and adapters; taken from seed_everything by the CLI.
        faults: What a child found wrong with arguments of its own.
    """

    policy: Any  # a Transformers model, or peft's around one
    headline = "reward"
    """The metric that the progress bar shows."""

    def __init__(
        self,
        pretrained: str = "embedded",
        engine: Engine = lazy_instance(TransformersEngine),  # noqa: B008
        max_new_tokens: int = 1024,
        micro_batch_size: int = 8,
        micro_batch_tokens: int | None = None,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-6, weight_decay=0.01),
        warmup_steps: int = 0,
        max_grad_norm: float | None = 1.0,
        max_skipped_steps: int = 10,
        attention: str = GROUPED,
        scoring: Scoring = Scoring(),  # noqa: B008 (frozen)
        activation_checkpointing: bool = False,
        lora: LoraSettings | None = None,
        seed: int = 0,
        faults: Sequence[str] = (),
    ) -> None:
        super().__init__()
        faults = [
            *faults,
            *too_small(
                ("max_new_tokens", max_new_tokens, 1),
                ("micro_batch_size", micro_batch_size, 1),
                ("micro_batch_tokens", 1 if micro_batch_tokens is None else micro_batch_tokens, 1),
                ("warmup_steps", warmup_steps, 0),
                ("max_skipped_steps", max_skipped_steps, 1),
            ),
        ]
        if max_grad_norm is not None and not max_grad_norm > 0:
            faults.append(f"max_grad_norm must be positive or null, got {max_grad_norm}")
        if (fault := own_weights(engine)) is not None:
            faults.append(fault)
        if faults:
            raise InputError("model: " + "; ".join(faults))
        self.automatic_optimization = False
        self.strict_loading = False  # frozen weights aren't in checkpoints; see on_load_checkpoint
        self.pretrained = pretrained
        self.engine = engine
        self.max_new_tokens = max_new_tokens
        self.micro_batch_size = micro_batch_size
        self.micro_batch_tokens = micro_batch_tokens
        self.optimizer_factory = optimizer
        self.warmup_steps = warmup_steps
        self.max_grad_norm = max_grad_norm
        self.skipped = SkippedSteps(max_skipped_steps)
        self.attention = attention
        self.scoring = scoring
        self.activation_checkpointing = activation_checkpointing
        self.lora = lora
        self.seed = seed
        self._resumed_optimizer: str | None = None
        self._held_out: dict[str, Callable[[Rollout], float]] = {}
        self._held_out_means = nn.ModuleList()
        self._watch_held_out(HELD_OUT)

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
        device = self.trainer.strategy.root_device
        if precision == "bf16-mixed" and not native_bfloat16(device):
            log.warning(
                "this %s has no instructions for bfloat16: steps will take many times as long as "
                "with trainer.precision 32-true",
                device.type.upper(),
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
        """Load the policy."""
        if hasattr(self, "policy"):
            return
        self.tokenizer = load_tokenizer(self.pretrained)
        self.policy = self._load_student()
        self.stop_ids = end_of_turn_ids(self.tokenizer, self.policy.generation_config)
        if self.lora is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(derive_seed(self.seed, "adapters"))  # on every rank the same
                self.policy = with_adapters(self.policy, self.lora)
        if self._fitting():
            self._choose_scoring()
        if self.activation_checkpointing:
            recompute_activations(self.policy)
        self._shard(self.policy)

    def _choose_scoring(self) -> None:
        chosen = suitable(self.policy, self.scoring)
        if chosen != self.scoring:
            log.warning("model.scoring %s doesn't suit this model; using %s", self.scoring, chosen)
            self.scoring = chosen

    def _load_student(self) -> PreTrainedModel:
        """The weights that are trained, or that adapters are put on."""
        if self.lora is None:
            return load_model(self.pretrained, attention=self.attention)
        return load_base(self.pretrained, self.lora.base, self._compute_dtype, self.attention)

    @property
    def _compute_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.trainer.precision == "bf16-mixed" else torch.float32

    def _shard(self, model: nn.Module) -> None:
        strategy = self.trainer.strategy
        if isinstance(strategy, FSDP2Strategy):
            mesh = strategy.device_mesh["data_parallel"]
            shard(model, mesh, self._compute_dtype, strategy.cpu_offload)

    def _callbacks(self) -> list[Callback]:
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        return callbacks

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The optimizer, and a learning rate that is constant after its warm-up."""
        trained = (p for p in self.policy.parameters() if p.requires_grad)
        try:
            optimizer = self.optimizer_factory(trained)
        except (ValueError, TypeError) as error:
            raise InputError(f"model.optimizer can't be made: {error}") from error
        if isinstance(optimizer, torch.optim.LBFGS):
            raise InputError(
                "model.optimizer LBFGS asks for the loss several times a step, which isn't "
                "supported; use torch.optim.AdamW"
            )
        of_library = type(optimizer).__module__.partition(".")[0]
        if of_library == "bitsandbytes" and isinstance(self.trainer.strategy, FSDP2Strategy):
            raise InputError(
                f"model.optimizer {type(optimizer).__name__} can't step weights that are cut over "
                f"ranks: bitsandbytes doesn't know them; use torch.optim.AdamW, whose state FSDP2 "
                f"cuts as well, or trainer.strategy ddp"
            )
        warmup = self.warmup_steps
        # Stepped once a batch; the first batch already learns.
        scheduler = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (warmup + 1)))
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def on_train_start(self) -> None:
        """Begin a new epoch where the checkpoint was made at the end of one."""
        now, before = self._optimizer_name(), self._resumed_optimizer
        if before not in (None, now):  # not earlier: strategies make optimizers at their own time
            raise InputError(
                f"the checkpoint has the state of another optimizer, {before}, not of {now}; give "
                f"that one as model.optimizer"
            )
        begin_new_epoch(self.trainer)
        self._available_flops = get_available_flops(self.device, self._compute_dtype)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep the host's memory flat over the steps."""
        return_freed_memory()

    def _fitting(self) -> bool:
        return self.trainer.state.fn == "fit"

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Everything but the frozen weights, which are loaded anew."""
        state = super().state_dict(*args, **kwargs)
        own = {k: v for k, v in state.items() if k.startswith("policy.")}
        return own if self.lora is None else {k: v for k, v in own.items() if "lora_" in k}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note which model the weights belong to."""
        checkpoint["pretrained"] = self.pretrained
        checkpoint["lora"] = None if self.lora is None else asdict(self.lora)
        checkpoint["optimizer"] = self._optimizer_name()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse weights that aren't this policy's; strict loading would miss frozen ones."""
        lora = None if self.lora is None else asdict(self.lora)
        if checkpoint.get("lora") != lora:
            raise InputError(
                f"the checkpoint was made with model.lora {checkpoint.get('lora')}, not {lora}"
            )
        base = checkpoint["pretrained"]
        same = base == self.pretrained or Path(base).resolve() == Path(self.pretrained).resolve()
        if lora is not None and not same:
            raise InputError(
                f"the checkpoint's adapters belong to {base!r}, not to {self.pretrained!r}; if "
                f"that is the same model under another name, link the old name to it"
            )
        self._resumed_optimizer = checkpoint.get("optimizer")
        expected, found = set(self.state_dict()), set(checkpoint["state_dict"])
        if expected != found:
            raise InputError(
                f"the checkpoint isn't one of this model ({self.pretrained}): it lacks "
                f"{len(expected - found)} of its weights and has {len(found - expected)} others, "
                f"e.g. {sorted(expected ^ found)[0]!r}; give the configuration it was made with"
            )

    def _optimizer_name(self) -> str:
        kind = type(self.trainer.optimizers[0])
        return f"{kind.__module__}.{kind.__name__}"

    # -------------------------------------------------------------- sampling

    def _give_weights(self) -> None:
        """Make the engine sample from the policy as it is now."""
        self.engine.wake()
        self.engine.load_weights(self.policy, self.tokenizer)

    def _complete(
        self, prompts: Sequence[Prompt], seeds: list[list[int]], params: SamplingParams
    ) -> list[list[Completion]]:
        if not prompts:  # this rank's part of the last validation batch
            return []
        largest, rows = max(i for p in prompts for i in p.token_ids), self.policy.config.vocab_size
        if largest >= rows:
            raise InputError(
                f"the tokenizer of {self.pretrained!r} doesn't fit the model: its token "
                f"{self.tokenizer.convert_ids_to_tokens(largest)!r} has the id {largest}, and the "
                f"model's vocabulary has {rows}; give the tokenizer that belongs to the model, or "
                f"resize the model's embeddings and save it"
            )
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

    def validation_step(self, prompts: list[Prompt], batch_idx: int) -> dict[str, Any]:
        """Greedy answers of the student, without guidance.

        Returns:
            For callbacks: ``rollouts``, a tuple of them; none where this rank had no question.
        """
        return {"rollouts": self._evaluate(prompts, "val")}

    def test_step(self, prompts: list[Prompt], batch_idx: int) -> dict[str, Any]:
        """The same as validation."""
        return {"rollouts": self._evaluate(prompts, "test")}

    def _evaluate(self, prompts: Sequence[Prompt], prefix: str) -> tuple[Rollout, ...]:
        params = SamplingParams(self.max_new_tokens, self.stop_ids, temperature=0.0)
        with memory_is_told(self, "validation"):
            groups = self._complete(prompts, [[0]] * len(prompts), params)
        rollouts = self._judge(
            [
                self._rollout(prompt, 0, completion)
                for prompt, (completion,) in zip(prompts, groups, strict=True)
            ]
        )
        for (name, value), mean in zip(self._held_out.items(), self._held_out_means, strict=True):
            assert isinstance(mean, MeanMetric)
            for rollout in rollouts:
                mean.update(float(value(rollout)))
            self.log(f"{prefix}/{name}", mean, prog_bar=name == "accuracy", batch_size=1)
        return rollouts

    def _watch_held_out(self, values: Mapping[str, Callable[[Rollout], float]]) -> None:
        """Log the means of these, by their names, whenever held-out questions are answered."""
        self._held_out |= values
        self._held_out_means.extend(MeanMetric() for _ in values)

    def _judge(self, rollouts: Sequence[Rollout]) -> tuple[Rollout, ...]:
        """Fill in outcomes."""
        return tuple(
            replace(r, outcome=verify_math(r.text, r.prompt.answer, r.finished)) for r in rollouts
        )

    # --------------------------------------------------------------- logging

    @contextmanager
    def _stage(self, name: str, metrics: StepMetrics) -> Iterator[None]:
        """Time a stage, for the profiler too; tell the callbacks that it begins, and the user if it
        had too little memory.
        """
        for callback in self._callbacks():
            if isinstance(callback, StageObserver):
                callback.on_stage(self.trainer, self, name)
        profiler: Profiler = self.trainer.profiler  # type: ignore[attr-defined]
        with (
            memory_is_told(self, name),
            profiler.profile(f"[stage]{name}"),
            metrics.timed(name),
        ):
            yield
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # what a stage has begun counts as its own

    def _note_speed(
        self, metrics: StepMetrics, stage: str, tokens: int, flop: float | None = None
    ) -> None:
        """Tokens a second over all ranks and, where the device's speed is known, the share of it
        that the model's arithmetic used: the model FLOPs utilisation.
        """
        seconds = metrics.seconds[stage]
        per_second = Mean(tokens, seconds / self.trainer.world_size)
        metrics.add({f"tokens_per_second/{stage}": per_second})
        if flop is not None and self._available_flops is not None:
            metrics.add({f"mfu/{stage}": Mean(flop, seconds * self._available_flops)})

    def _log_step(self, step: int, metrics: StepMetrics) -> dict[str, float]:
        """Log a step's numbers, each over all ranks."""
        values = metrics.over_ranks(self.trainer.strategy)
        # Not self.log, which would repeat the last value of whatever this step has none of.
        for logger in self.loggers:
            logger.log_metrics(values, step=step)
        # For the progress bar and for callbacks that monitor a metric.
        for name, value in values.items():
            self.log(name, value, prog_bar=name == self.headline, logger=False, batch_size=1)
        return values

    def configure_callbacks(self) -> list[Callback]:
        """What belongs to every run of the module."""
        return [EngineRelease()]

    def teardown(self, stage: str) -> None:
        """Release the engine."""
        self.engine.close()
