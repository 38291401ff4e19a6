"""Weights of guidance tokens: advantage-aware shaping (AAS) and what it is compared with.

A weight ``w`` enters the loss as ``-w * A``. All have the form ``coefficient * pi / sg[pi]``: the
value that the loss sees is the coefficient, and so is the factor of ``A * grad(log pi)``.
"""

import math

import torch
from torch import Tensor

from thinktuning.errors import InputError

# exp(80) is finite in float32, and a token of log-probability -80 has no weight left to lose.
_MIN_LOGPROB = -80.0


def shaping_coefficient(
    advantages: Tensor, c_max: float = 1e-3, advantage_bound: float = 4.0
) -> Tensor:
    """``c(A) = c_max * A / A_bound``, clamped to ``[-c_max, +c_max]``.

    Args:
        advantages: Float, any shape.
        c_max: Bound of the coefficient, > 0.
        advantage_bound: The advantage at which the bound is reached, > 0.

    Returns:
        The coefficient, in the shape of ``advantages``; it has the sign of the advantage.

    Source:
        RRV et al. 2025, arXiv 2508.07616, the shaping of off-policy tokens.
    """
    return (advantages * (c_max / advantage_bound)).clamp(min=-c_max, max=c_max)


def advantage_aware_weight(
    logprobs: Tensor,
    advantages: Tensor,
    c_max: float = 1e-3,
    advantage_bound: float = 4.0,
    mask_below: float = 0.01,
) -> Tensor:
    """The AAS weight ``w = pi / (sg[pi] + c(A))`` of guidance tokens.

    Its gradient is ``pi / (pi + c(A)) * grad(log pi)``. Where ``A < 0`` and ``pi < mask_below`` the
    weight is 0, and so is its gradient: an unlikely token isn't destroyed, and the pole at
    ``pi = -c(A)`` lies inside the mask.

    Args:
        logprobs: Log-probabilities of the tokens in nats, with gradient; any shape.
        advantages: Broadcast against ``logprobs``.
        c_max: Bound of the coefficient; less than ``mask_below``.
        advantage_bound: The advantage at which the bound is reached.
        mask_below: Probability below which tokens of a negative advantage are masked.

    Returns:
        Weights in the broadcast shape; all finite and not negative.

    Raises:
        InputError: If ``c_max`` isn't below ``mask_below``.

    Source:
        RRV et al. 2025, arXiv 2508.07616, the shaping of off-policy tokens.
    """
    if not 0 < c_max < mask_below:
        raise InputError(
            f"c_max must be between 0 and mask_below, else the weight has a pole at pi = c_max; "
            f"got c_max={c_max}, mask_below={mask_below}"
        )
    frozen = logprobs.detach()
    c = shaping_coefficient(advantages, c_max, advantage_bound)
    masked = (advantages < 0) & (frozen < math.log(mask_below))
    coefficient = 1 / (1 + c * torch.exp(-frozen.clamp(min=_MIN_LOGPROB)))
    return torch.where(masked, 0.0, coefficient) * torch.exp(logprobs - frozen)


def luffy_weight(logprobs: Tensor, offset: float = 0.1) -> Tensor:
    """LUFFY's policy shaping ``w = pi / (pi + offset)``; the gradient goes through both ``pi``.

    Args:
        logprobs: Nats, with gradient; any shape.
        offset: LUFFY's gamma, > 0.

    Returns:
        Weights in ``[0, 1)``, in the shape of ``logprobs``.

    Source:
        Yan et al. 2025, arXiv 2504.14945, section 3.2.
    """
    return torch.sigmoid(logprobs - math.log(offset))


def unshaped_weight(logprobs: Tensor) -> Tensor:
    """``w = pi / sg[pi]``: value 1 and the gradient of plain policy gradient, ``grad(log pi)``."""
    return torch.exp(logprobs - logprobs.detach())
