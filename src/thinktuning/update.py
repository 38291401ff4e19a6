"""The optimizer steps of one batch."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from thinktuning.errors import LostGradientsError
from thinktuning.metrics import StepMetrics
from thinktuning.objective import (
    LossOutput,
    Mean,
    policy_loss,
    sampling_gap,
    supervised_loss,
    token_weights,
)
from thinktuning.policy import (
    TokenScores,
    completion_logprobs,
    forward_cost,
    release,
    rounded_weights,
    whole,
)
from thinktuning.recovery import halve_micro_batches, is_out_of_memory
from thinktuning.tensors import lengths_of, micro_batches, policy_inputs, split, trim
from thinktuning.types import PolicyInputs, RolloutBatch

if TYPE_CHECKING:
    from thinktuning.module import ThinkTuningModule
    from thinktuning.policy_module import PolicyModule

_LOST = (
    "the loss has a gradient with respect to the logprobs, but that of every trained weight is "
    "exactly 0, so that this run would learn nothing: a layer between them cuts gradients off, as "
    "4-bit layers do that were repacked for inference. Use model.lora.base float32 or bfloat16, "
    "and report this model"
)


class Work(NamedTuple):
    """What an update has trained on.

    Attributes:
        tokens: Of completions.
        flop: Floating-point operations that this takes; those of padding, and of what is computed a
            second time to save memory, don't count.
    """

    tokens: int
    flop: float


class _Ahead(NamedTuple):
    """What was computed before the batch was complete.

    Attributes:
        read: Completion ids of the rollouts by their places in the batch.
        old: float32 [B, T], of the policy that sampled.
        ref: float32 [B, T], of the reference.
    """

    read: dict[int, tuple[int, ...]]
    old: Tensor | None
    ref: Tensor | None


class Update(ABC):
    """Trains a module's policy on one batch, and notes what it saw. A child says what the loss is.

    Args:
        module: Whose policy and limits they are.
        metrics: Gets the numbers of this batch.
        num_mini_batches: Optimizer steps on the batch.
        temperature: The policy is softmax(logits / temperature).
        normalizer: The mean that an optimizer step takes; see ``ObjectiveConfig``.
    """

    def __init__(
        self,
        module: "PolicyModule",
        metrics: StepMetrics,
        num_mini_batches: int = 1,
        temperature: float = 1.0,
        normalizer: str = "token_mean",
    ) -> None:
        self.module = module
        self.metrics = metrics
        self.num_mini_batches = num_mini_batches
        self.temperature = temperature
        self.normalizer = normalizer
        self._rows = module.micro_batch_size  # of the micro-batch in work

    @abstractmethod
    def loss(self, micro: PolicyInputs) -> LossOutput:
        """Loss of a micro-batch, from its logprobs and token weights."""

    def trained_rows(self, mini: PolicyInputs) -> PolicyInputs:
        """The rows that are computed; their token weights count the others of the step too."""
        return mini

    def observe(self, micro: PolicyInputs, scores: TokenScores, output: LossOutput) -> None:
        """Note a micro-batch after its backward pass; its logprobs keep their gradient."""
        read = self.entropy_mask(micro)
        self.metrics.add(
            {
                "objective/loss": Mean(output.loss.detach(), 0),
                "objective/entropy": Mean((scores.entropy * read).sum(), read.sum()),
            }
        )

    def entropy_mask(self, micro: PolicyInputs) -> Tensor:
        """Tokens whose entropy is noted, bool [B, T]."""
        return micro.completion_mask

    def run(self, inputs: PolicyInputs) -> Work:
        """Take one optimizer step per mini-batch."""
        optimizer, scheduler = self.module.optimizers(), self.module.lr_schedulers()
        assert isinstance(optimizer, LightningOptimizer)
        assert isinstance(scheduler, LambdaLR)
        tokens, flop = 0, 0.0
        size = inputs.input_ids.shape[0] // self.num_mini_batches
        for number, mini in enumerate(split(inputs, size), start=1):
            weighted = self.trained_rows(self._with_token_weights(mini))
            tokens += int(weighted.completion_mask.sum())
            flop += self._flop(weighted)
            signal, loss = self._accumulated(mini, weighted)
            self._fill_missing_gradients()
            norm = self._clip_gradients()
            finite = bool(norm.isfinite() & self._over_ranks(loss, "sum").isfinite())
            if finite:
                self._check_arrival(signal, norm)
            else:
                optimizer.zero_grad()  # the optimizer passes over missing gradients
            self.module.skipped.note(finite, number, mini, self.module)
            clean_norm = norm.item() if finite else 0.0
            self.metrics.add({"optimizer/grad_norm": Mean(clean_norm, int(finite))})
            self.metrics.add({"optimizer/skipped_steps": Mean(int(not finite), 1)})
            if number < self.num_mini_batches:
                # Past Lightning's wrapper, so that global_step counts batches.
                self.module.trainer.strategy.optimizer_step(optimizer.optimizer, lambda: None)
            else:
                optimizer.step()
            optimizer.zero_grad()  # at once: the rollouts need their memory
        self.metrics.add({"optimizer/learning_rate": Mean(scheduler.get_last_lr()[0], 1)})
        scheduler.step()
        # The losses of a step's micro-batches and ranks add up to world_size times its loss, and
        # each rank counts its steps.
        self.metrics.add({"objective/loss": Mean(0.0, self.num_mini_batches)})
        return Work(tokens, flop)

    def _accumulated(self, mini: PolicyInputs, trained: PolicyInputs) -> Tensor:
        """Gradients of a mini-batch, with one more try where memory doesn't suffice.

        Returns:
            float32 [2]: the sum of the absolute gradients of the logprobs, and the loss.
        """
        noted = self.metrics.copy()
        try:
            return self._accumulate(mini, trained)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0]
        # Behind the handler, which would hold what the failed pass has computed.
        self.module.zero_grad()
        self.metrics.restore(noted)
        halve_micro_batches(self.module, self._rows, reason)
        return self._accumulate(mini, trained)

    def _accumulate(self, mini: PolicyInputs, trained: PolicyInputs) -> Tensor:
        sums = torch.zeros(2, device=self.module.device)
        with rounded_weights(self.module.policy) as gradients:
            backward = Tensor.backward if gradients.needed else self.module.manual_backward
            for micro in self._micro_batches(mini, trained):
                self._rows = micro.input_ids.shape[0]
                sums += self._backward(micro, backward)
        gradients.deliver(self.module.manual_backward)
        return sums

    def _flop(self, inputs: PolicyInputs) -> float:
        cost, lengths = forward_cost(self.module.policy), lengths_of(inputs)
        forward = sum(cost.flop(n) for n in lengths.prompts)
        for owner, n in zip(lengths.owner, lengths.completions, strict=True):
            before = lengths.prompts[owner]
            forward += cost.flop(before + n, since=before)
        frozen = not all(p.requires_grad for p in self.module.policy.parameters())
        return forward * (2 if frozen else 3)

    def _micro_batches(self, mini: PolicyInputs, trained: PolicyInputs) -> list[PolicyInputs]:
        """As many on every rank; one that runs short takes a rollout that counts for nothing."""
        micros = [trim(trained.rows(places)) for places in self._places(trained)]
        if missing := self._missing(len(micros)):
            spare = trim(mini.rows(slice(0, 1)))
            spare = replace(spare, completion_mask=torch.zeros_like(spare.completion_mask))
            micros += [spare] * missing
        return micros

    def _missing(self, passes: int) -> int:
        """How many more another rank takes: the passes of ranks wait for each other."""
        mine = torch.tensor(passes, device=self.module.device)
        return int(self._over_ranks(mine, "max")) - passes

    def _places(self, inputs: PolicyInputs) -> list[Tensor]:
        return micro_batches(
            inputs,
            self.module.micro_batch_size,
            self.module.micro_batch_tokens,
            self.module.scoring.packed,
        )

    def _with_token_weights(self, mini: PolicyInputs) -> PolicyInputs:
        """Weigh every token by its share in the mean over this optimizer step on all ranks."""
        counts = mini.advantages.new_tensor(
            [mini.completion_mask.sum(), mini.completion_mask.shape[0]], dtype=torch.float64
        )
        num_tokens, num_sequences = self._over_ranks(counts, "sum").tolist()
        weights = token_weights(
            mini.completion_mask,
            self.normalizer,
            int(num_tokens),
            int(num_sequences),
            self.module.max_new_tokens,
        )
        # DDP and FSDP average gradients over ranks, but each rank's loss is a part of a sum.
        return replace(mini, token_weights=weights * self.module.trainer.world_size)

    def _backward(self, micro: PolicyInputs, backward: Callable[[Tensor], None]) -> Tensor:
        """Add a micro-batch's gradients; see ``_accumulated`` for what is returned."""
        scores = completion_logprobs(
            self.module.policy, micro, self.temperature, self.module.scoring
        )
        if not scores.logprobs.requires_grad:
            raise LostGradientsError(_LOST)
        scores.logprobs.retain_grad()
        output = self.loss(replace(micro, logprobs=scores.logprobs))
        backward(output.loss)
        assert scores.logprobs.grad is not None
        self.observe(micro, scores, output)
        return torch.stack([scores.logprobs.grad.abs().sum(), output.loss.detach()])

    def _fill_missing_gradients(self) -> None:
        """A step without any gradient is one of gradient zero: momentum and weight decay go on."""
        for parameter in self.module.policy.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def _clip_gradients(self) -> Tensor:
        """Clip to ``max_grad_norm``; the norm before clipping."""
        limit = float("inf") if self.module.max_grad_norm is None else self.module.max_grad_norm
        return whole(nn.utils.clip_grad_norm_(self.module.policy.parameters(), limit))

    def _check_arrival(self, signal: Tensor, norm: Tensor) -> None:
        """Stop where the loss has a gradient of which no weight gets anything.

        Args:
            signal: Sum of the absolute gradients of the logprobs on this rank, a scalar.
            norm: Of the gradients of all weights on all ranks, a scalar.
        """
        # The norm is the same on all ranks, so that they ask each other together.
        if norm == 0 and self._over_ranks(signal, "sum") > 0:
            raise LostGradientsError(_LOST)

    def _over_ranks(self, values: Tensor, operation: str) -> Tensor:
        return self.module.trainer.strategy.reduce(values, reduce_op=operation)


class SupervisedUpdate(Update):
    """Raises the likelihood of the completions, whoever wrote them.

    Args:
        module: Whose policy and limits they are.
        metrics: Gets the numbers of this batch.
    """

    def trained_rows(self, mini: PolicyInputs) -> PolicyInputs:
        """Leave out completions that have no token in the loss."""
        return mini.rows(mini.completion_mask.any(dim=1))

    def loss(self, micro: PolicyInputs) -> LossOutput:
        """Mean negative logprob."""
        return supervised_loss(micro)


class PolicyUpdate(Update):
    """Trains on rollouts by their advantages.

    Args:
        module: Whose policy, objective and limits they are.
        metrics: Gets the numbers of this batch.
    """

    def __init__(self, module: "ThinkTuningModule", metrics: StepMetrics) -> None:
        super().__init__(
            module,
            metrics,
            module.num_mini_batches,
            module.temperature,
            module.objective.normalizer,
        )
        self.objective = module.objective
        self.as_reference = module.as_reference
        self._ahead = _Ahead({}, None, None)

    def read_ahead(self, batch: RolloutBatch, places: Sequence[int]) -> None:
        """Compute now what ``inputs`` needs of rollouts that stay as they are.

        Args:
            batch: Rollouts that needn't be scored yet.
            places: Of those that no later stage is expected to change; one that is changed all the
                same is computed again.
        """
        unscored = batch.with_rollouts(tuple(replace(r, advantage=0.0) for r in batch.rollouts))
        inputs = policy_inputs(unscored, self.module.device)
        wanted = torch.zeros(len(batch.rollouts), dtype=torch.bool, device=self.module.device)
        wanted[list(places)] = True
        read = {i: batch.rollouts[i].completion_ids for i in places}
        self._ahead = _Ahead(read, *self._fixed_logprobs(inputs, wanted))

    def inputs(self, batch: RolloutBatch) -> PolicyInputs:
        """The update's tensors, with those logprobs that it needs and that stay fixed during it.

        Args:
            batch: Rollouts with advantages.
        """
        inputs = policy_inputs(batch, self.module.device)
        ahead = self._ahead
        known = [ahead.read.get(i) == r.completion_ids for i, r in enumerate(batch.rollouts)]
        wanted = torch.tensor(known, device=self.module.device).logical_not()
        old, ref = self._fixed_logprobs(inputs, wanted)
        inputs = replace(
            inputs,
            old_logprobs=_merged(ahead.old, old, wanted),
            ref_logprobs=_merged(ahead.ref, ref, wanted),
        )
        self._compare_before_update(inputs)
        return inputs

    def _fixed_logprobs(
        self, inputs: PolicyInputs, wanted: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Those of the policy that sampled, and of the reference; None where nothing needs them."""
        old = ref = None
        if self.num_mini_batches > 1:
            old = self._frozen_logprobs(self.module.policy, inputs, wanted)
        if self.objective.kl_coef > 0:
            with self.as_reference() as reference:
                ref = self._frozen_logprobs(reference, inputs, wanted)
                release(reference)
        return old, ref

    @torch.no_grad()
    def _frozen_logprobs(self, model: nn.Module, inputs: PolicyInputs, wanted: Tensor) -> Tensor:
        """Logprobs of the rows in ``wanted``, bool [B]; what stands in others has no meaning."""
        result = torch.zeros_like(inputs.completion_mask, dtype=torch.float)
        rows = wanted.nonzero()[:, 0]
        with rounded_weights(model):
            parts = [rows[places] for places in self._places(inputs.rows(wanted))]
            spare = torch.zeros(1, dtype=torch.long, device=rows.device)
            for places in parts + [spare] * self._missing(len(parts)):
                micro = trim(inputs.rows(places))
                found = completion_logprobs(
                    model, micro, self.temperature, self.module.scoring
                ).logprobs
                result[places, : found.shape[1]] = found
        return result

    def _compare_before_update(self, inputs: PolicyInputs) -> None:
        """Compare engine and trainer where the update won't: on all rollouts if their logprobs are
        there already, on one of them if the update will read none.
        """
        if inputs.old_logprobs is not None:
            self._compare(inputs.old_logprobs, inputs)
        elif not self._over_ranks(self._trained(inputs).sum(), "sum"):
            one = trim(inputs.rows(slice(0, 1)))
            all_of_it = torch.ones(1, dtype=torch.bool, device=self.module.device)
            self._compare(self._frozen_logprobs(self.module.policy, one, all_of_it), one)

    def _compare(self, logprobs: Tensor, inputs: PolicyInputs) -> None:
        """Note how far the engine's logprobs are from the trainer's at the same weights."""
        assert inputs.sampling_logprobs is not None
        sampled = inputs.completion_mask & ~inputs.injected_mask
        gap = sampling_gap(logprobs, inputs.sampling_logprobs, sampled)
        self.metrics.add({"engine/logprob_gap": gap.mean, "engine/kl": gap.k3})
        self.metrics.peak("engine/logprob_gap", gap.maximum)

    def loss(self, micro: PolicyInputs) -> LossOutput:
        """Clipped on own tokens, shaped on injected ones."""
        return policy_loss(micro, self.objective)

    def trained_rows(self, mini: PolicyInputs) -> PolicyInputs:
        """Leave out rollouts without an advantage."""
        return mini.rows(self._trained(mini))

    def entropy_mask(self, micro: PolicyInputs) -> Tensor:
        """The student's own: behind injected ones it would tell how sure it is of others' words."""
        return micro.completion_mask & ~micro.injected_mask

    def _trained(self, inputs: PolicyInputs) -> Tensor:
        return (inputs.advantages != 0) | (self.objective.kl_coef > 0)

    def observe(self, micro: PolicyInputs, scores: TokenScores, output: LossOutput) -> None:
        """Note the objective's numbers, and the gap between engine and trainer."""
        super().observe(micro, scores, output)
        assert scores.logprobs.grad is not None
        signal = scores.logprobs.grad.abs()
        means = {f"objective/{name}": value for name, value in output.metrics.items()}
        for name in ("shaping_weight", "shaping_masked"):
            means[name.replace("_", "/")] = means.pop(f"objective/{name}")
        means["shaping/gradient_share"] = Mean(signal[micro.injected_mask].sum(), signal.sum())
        self.metrics.add(means)
        assert output.weight_max is not None
        self.metrics.peak("shaping/weight", output.weight_max)
        if micro.old_logprobs is None:  # this update's own are those of the weights that sampled
            self._compare(scores.logprobs, micro)


def _merged(ahead: Tensor | None, now: Tensor | None, wanted: Tensor) -> Tensor | None:
    """What was computed ahead, and in the rows in ``wanted``, bool [B], what was computed now."""
    if ahead is None or now is None:
        return now
    columns = min(ahead.shape[1], now.shape[1])
    now[~wanted, :columns] = ahead[~wanted, :columns]
    return now
