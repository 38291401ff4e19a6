"""The loss: PPO-clip on the student's own tokens, a shaping weight on guidance tokens."""

from dataclasses import dataclass, fields
from typing import Literal, NamedTuple, get_args, get_origin

import torch
from torch import Tensor

from thinktuning.errors import InputError
from thinktuning.objective.means import Mean, masked_mean
from thinktuning.objective.mismatch import MAX_LOG_RATIO, importance_weight
from thinktuning.objective.shaping import advantage_aware_weight, luffy_weight, unshaped_weight
from thinktuning.types import PolicyInputs


@dataclass(frozen=True)
class ObjectiveConfig:
    """What the update optimises. The defaults are the paper's method.

    Attributes:
        clip_eps: The probability ratio of own tokens is clipped to 1 - clip_eps … 1 + clip_eps.
        clip_eps_high: Upper clipping distance where it differs (clip-higher); None: clip_eps.
        dual_clip: For a negative advantage the loss is at most dual_clip * |A|; None: no bound.
        kl_coef: Weight of the k3 estimate of KL(policy || reference); 0 loads no reference for it.
        advantage_scale: Divide advantages by the group's standard deviation (std), or not (none,
            Dr. GRPO).
        cut_off: Answers that the length limit has ended are trained on like others (train), or
            only count, in their group's mean and among the tokens of the step (ignore, as DAPO's
            overlong filtering). A KL term is about all answers.
        normalizer: Mean over all completion tokens of the optimizer step (token_mean), mean of
            each completion's token mean (sequence_mean), or the sum over tokens divided by
            completions times the length limit (fixed_length, Dr. GRPO).
        shaping: Weight of guidance tokens: aas; luffy, pi / (pi + 0.1); clip, the clipped ratio of
            own tokens; none, plain policy gradient.
        scope: Which tokens the shaping is for: the injected ones (guidance), or every token of a
            guided rollout as in the authors' recipe (trajectory).
        c_max: Bound of the AAS coefficient; less than mask_below.
        advantage_bound: Advantage at which the AAS coefficient reaches c_max.
        mask_below: AAS masks tokens below this probability where the advantage is negative.
        importance: Weigh own tokens by min(pi_trainer / pi_engine, importance_cap), since an engine
            such as vLLM samples from a slightly different policy: by token, by sequence (the
            product over a rollout), or none.
        importance_cap: Upper bound of that weight.
    """

    clip_eps: float = 0.2
    clip_eps_high: float | None = None
    dual_clip: float | None = 3.0
    kl_coef: float = 0.0
    advantage_scale: Literal["std", "none"] = "std"
    cut_off: Literal["train", "ignore"] = "train"
    normalizer: Literal["token_mean", "sequence_mean", "fixed_length"] = "token_mean"
    shaping: Literal["aas", "luffy", "clip", "none"] = "aas"
    scope: Literal["guidance", "trajectory"] = "guidance"
    c_max: float = 1e-3
    advantage_bound: float = 4.0
    mask_below: float = 0.01
    importance: Literal["none", "token", "sequence"] = "none"
    importance_cap: float = 2.0

    def __post_init__(self) -> None:
        faults = [
            f"{f.name} must be one of {', '.join(get_args(f.type))}, got {getattr(self, f.name)!r}"
            for f in fields(self)
            if get_origin(f.type) is Literal and getattr(self, f.name) not in get_args(f.type)
        ]
        if not 0 < self.clip_eps < 1:
            faults.append(f"clip_eps must be between 0 and 1, got {self.clip_eps}")
        if self.clip_eps_high is not None and not self.clip_eps_high > 0:
            faults.append(f"clip_eps_high must be positive or null, got {self.clip_eps_high}")
        if self.dual_clip is not None and not self.dual_clip > 1:
            faults.append(f"dual_clip must be above 1 or null, got {self.dual_clip}")
        if not self.kl_coef >= 0:
            faults.append(f"kl_coef must not be negative, got {self.kl_coef}")
        if not self.advantage_bound > 0:
            faults.append(f"advantage_bound must be positive, got {self.advantage_bound}")
        if not self.importance_cap > 0:
            faults.append(f"importance_cap must be positive, got {self.importance_cap}")
        if not 0 < self.c_max < self.mask_below < 1:
            faults.append(
                f"0 < c_max < mask_below < 1 must hold, else AAS has a pole at pi = c_max; "
                f"got c_max={self.c_max}, mask_below={self.mask_below}"
            )
        if faults:
            raise InputError("objective: " + "; ".join(faults))


class LossOutput(NamedTuple):
    """What a loss function returns.

    Attributes:
        loss: Scalar with gradient; the losses of all micro-batches of a step add up to its loss.
        metrics: Detached sums and counts by name.
        weight_max: The largest shaping weight, detached; None where nothing is shaped.
    """

    loss: Tensor
    metrics: dict[str, Mean]
    weight_max: Tensor | None = None


def token_weights(
    completion_mask: Tensor,
    normalizer: str = "token_mean",
    num_tokens: int | None = None,
    num_sequences: int | None = None,
    max_tokens: int | None = None,
) -> Tensor:
    """Share of every token in the mean that an optimizer step takes.

    Args:
        completion_mask: Bool [B, T].
        normalizer: See ``ObjectiveConfig``.
        num_tokens: Completion tokens of the whole step over all ranks; None: of these rows.
        num_sequences: Rollouts of the whole step over all ranks; None: these rows.
        max_tokens: Length limit of a completion; needed by ``fixed_length``.

    Returns:
        Float32 [B, T], 0 outside the mask.
    """
    mask = completion_mask.float()
    sequences = mask.shape[0] if num_sequences is None else num_sequences
    if normalizer == "token_mean":
        tokens = mask.sum() if num_tokens is None else num_tokens
        return mask / max(float(tokens), 1.0)
    if normalizer == "sequence_mean":
        return mask / (mask.sum(dim=1, keepdim=True).clamp(min=1) * sequences)
    if normalizer == "fixed_length":
        if max_tokens is None:
            raise InputError("normalizer 'fixed_length' needs max_tokens, the length limit")
        return mask / (sequences * max_tokens)
    raise InputError(f"unknown normalizer {normalizer!r}")


def policy_loss(inputs: PolicyInputs, config: ObjectiveConfig) -> LossOutput:
    """Loss of one micro-batch.

    ``sum(weight * token_loss)`` over completion tokens, where ``token_loss`` is

    * own tokens: ``-min(r*A, clip(r)*A)`` with ``r = pi/pi_old``, for ``A < 0`` at most
      ``-dual_clip*A``; times the importance weight where one is asked for;
    * shaped tokens: ``-w*A`` with the configured shaping weight ``w``;
    * all tokens, if ``kl_coef > 0``: plus ``kl_coef * (x - 1 - log x)`` with ``x = pi_ref/pi``.

    Args:
        inputs: With ``logprobs`` set; ``ref_logprobs`` too if ``kl_coef > 0``, and
            ``sampling_logprobs`` for an importance weight.
        config: The objective.

    Returns:
        The loss and its metrics.

    Source:
        Schulman et al. 2017, arXiv 1707.06347 (clip); Ye et al. 2020, arXiv 1912.09729 (dual clip);
        RRV et al. 2025, arXiv 2508.07616 (AAS); joschu.net/blog/kl-approx.html (k3).
    """
    mask = inputs.completion_mask
    assert inputs.logprobs is not None, "logprobs must be set before the loss"
    # What stands outside the mask may be inf or NaN, and a product would pass it on.
    logprobs = torch.where(mask, inputs.logprobs, 0.0)
    advantages = inputs.advantages[:, None]
    weights = inputs.token_weights
    if weights is None:
        weights = token_weights(mask, config.normalizer, max_tokens=mask.shape[1])

    shaped = _shaped_mask(inputs, config)
    own = mask & ~shaped
    old = logprobs.detach() if inputs.old_logprobs is None else inputs.old_logprobs
    clipped_loss, clipped = _clipped_loss(inputs, logprobs, old, own, config)
    importance = _importance_weight(inputs, old, config)
    clipped_loss = clipped_loss * importance
    shaping_weight = _shaping_weight(logprobs, advantages, config)
    token_loss = torch.where(shaped, -shaping_weight * advantages, clipped_loss)

    detached_weight = shaping_weight.detach()
    metrics = {
        "clip_fraction": masked_mean(clipped, own),
        "shaping_weight": masked_mean(detached_weight, shaped),
        "shaping_masked": masked_mean(detached_weight == 0, shaped),
    }
    if config.importance != "none":
        metrics["importance"] = masked_mean(importance, own)
        metrics["importance_capped"] = masked_mean(importance >= config.importance_cap, own)
    if config.kl_coef > 0:
        assert inputs.ref_logprobs is not None, "a KL term needs ref_logprobs"
        log_x = (inputs.ref_logprobs - logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        kl = log_x.expm1() - log_x  # exp(x) - 1 would cancel where the policies are close
        token_loss = token_loss + config.kl_coef * kl
        metrics["kl"] = masked_mean(kl.detach(), mask)

    loss = torch.where(mask, token_loss, 0.0).mul(weights).sum()
    weight_max = detached_weight.masked_fill(~shaped, 0.0).max()
    return LossOutput(loss, metrics, weight_max)


def supervised_loss(inputs: PolicyInputs) -> LossOutput:
    """Weighted mean of the negative logprobs of the completion tokens, in nats.

    Args:
        inputs: With ``logprobs`` set. Without ``token_weights``, the mean over these rows' tokens.

    Returns:
        The loss; no metrics.
    """
    mask = inputs.completion_mask
    assert inputs.logprobs is not None, "logprobs must be set before the loss"
    weights = token_weights(mask) if inputs.token_weights is None else inputs.token_weights
    loss = torch.where(mask, -inputs.logprobs, 0.0).mul(weights).sum()
    return LossOutput(loss, {})


def _shaped_mask(inputs: PolicyInputs, config: ObjectiveConfig) -> Tensor:
    """Bool [B, T]: the tokens that get a shaping weight instead of the clipped ratio."""
    if config.shaping == "clip":
        return torch.zeros_like(inputs.injected_mask)
    if config.scope == "trajectory":
        return inputs.completion_mask & inputs.injected_mask.any(dim=1, keepdim=True)
    return inputs.completion_mask & inputs.injected_mask


def _shaping_weight(logprobs: Tensor, advantages: Tensor, config: ObjectiveConfig) -> Tensor:
    if config.shaping == "aas":
        return advantage_aware_weight(
            logprobs, advantages, config.c_max, config.advantage_bound, config.mask_below
        )
    if config.shaping == "luffy":
        return luffy_weight(logprobs)
    return unshaped_weight(logprobs)


def _clipped_loss(
    inputs: PolicyInputs, logprobs: Tensor, old: Tensor, own: Tensor, config: ObjectiveConfig
) -> tuple[Tensor, Tensor]:
    """PPO-clip of every token, and where its gradient is cut off: [B, T] each."""
    advantages = inputs.advantages[:, None]
    log_ratio = torch.where(own, logprobs - old, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    high = config.clip_eps if config.clip_eps_high is None else config.clip_eps_high
    plain = -ratio * advantages
    bounded = -ratio.clamp(1 - config.clip_eps, 1 + high) * advantages
    loss = torch.maximum(plain, bounded)
    clipped = bounded > plain
    if config.dual_clip is not None:
        limit = -config.dual_clip * advantages
        dual_clipped = (advantages < 0) & (loss > limit)
        loss = torch.where(dual_clipped, limit, loss)
        clipped = clipped | dual_clipped
    return loss, clipped


def _importance_weight(inputs: PolicyInputs, old: Tensor, config: ObjectiveConfig) -> Tensor:
    if config.importance == "none":
        return torch.ones_like(old)
    assert inputs.sampling_logprobs is not None, "an importance weight needs sampling_logprobs"
    sampled = inputs.completion_mask & ~inputs.injected_mask
    return importance_weight(
        old, inputs.sampling_logprobs, sampled, config.importance, config.importance_cap
    )
