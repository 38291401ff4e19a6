"""The engine that samples and the trainer that learns give a token slightly different logprobs."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from thinktuning.objective.means import Mean, masked_mean

# Ratios beyond exp(20) are clipped in any case; without the bound, inf * 0 would poison gradients.
MAX_LOG_RATIO = 20.0


class SamplingGap(NamedTuple):
    """How far the trainer's policy is from the one that sampled, over some tokens.

    Attributes:
        mean: Mean of ``|difference of logprobs|``, nats.
        maximum: Scalar, the largest such difference.
        k3: Mean of ``r - 1 - log r`` with ``r = pi_trainer / pi_engine``: an estimate of
            KL(engine || trainer), nats.
    """

    mean: Mean
    maximum: Tensor
    k3: Mean


def sampling_gap(logprobs: Tensor, sampling_logprobs: Tensor, mask: Tensor) -> SamplingGap:
    """Compare the trainer's logprobs with the engine's.

    Args:
        logprobs: Float32 [B, T], the trainer's, at the weights that sampled.
        sampling_logprobs: Float32 [B, T], the engine's; anything outside the mask.
        mask: Bool [B, T]; the tokens that the student sampled.

    Source:
        joschu.net/blog/kl-approx.html (k3).
    """
    difference = torch.where(mask, logprobs.detach() - sampling_logprobs, 0.0)
    size = difference.abs()
    # Gaps are small, and r - 1 - log r would drown in float32's rounding of r.
    k3 = difference.clamp(max=MAX_LOG_RATIO).expm1() - difference
    return SamplingGap(masked_mean(size, mask), size.max(), masked_mean(k3, mask))


def importance_weight(
    old_logprobs: Tensor,
    sampling_logprobs: Tensor,
    mask: Tensor,
    level: Literal["token", "sequence"],
    cap: float,
) -> Tensor:
    """Truncated importance weight ``min(pi_old / pi_engine, cap)``, without gradient.

    It corrects that tokens were drawn from the engine's policy and not from the trainer's.

    Args:
        old_logprobs: Float32 [B, T], the trainer's, at the weights that sampled.
        sampling_logprobs: Float32 [B, T], the engine's; anything outside the mask.
        mask: Bool [B, T]; the tokens that the student sampled.
        level: ``token``: each token's ratio; ``sequence``: the product over the tokens of a
            rollout, the same for each of them.
        cap: Positive upper bound.

    Returns:
        Float32 [B, T], 1 outside the mask.

    Source:
        Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training".
    """
    log_ratio = torch.where(mask, old_logprobs.detach() - sampling_logprobs, 0.0)
    if level == "sequence":
        log_ratio = log_ratio.sum(dim=1, keepdim=True).expand_as(log_ratio)
    weight = log_ratio.clamp(max=MAX_LOG_RATIO).exp().clamp(max=cap)
    return torch.where(mask, weight, 1.0)
