"""Group-relative advantages."""

from typing import Literal

from torch import Tensor

from thinktuning.errors import InputError


def group_advantages(
    rewards: Tensor, scale: Literal["std", "none"] = "std", eps: float = 1e-6
) -> Tensor:
    """How much better each rollout did than its group.

    ``A = (r - mean(r)) / (std(r) + eps)`` over each row, std with Bessel's correction.
    A group whose rewards are all equal gets exactly 0.

    Args:
        rewards: Float [P, G], guided and unguided rollouts together.
        scale: ``std`` as in GRPO; ``none`` leaves the division out.
        eps: Added to the standard deviation.

    Returns:
        Advantages [P, G], in the dtype of ``rewards``.

    Raises:
        InputError: If a group has fewer than two rollouts or ``scale`` is unknown.

    Source:
        GRPO: Shao et al. 2024, arXiv 2402.03300, section 4.1. ``none``: Dr. GRPO, Liu et al. 2025,
        arXiv 2503.20783.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise InputError(
            f"rewards must be [prompts, group] with a group of at least 2, "
            f"got shape {tuple(rewards.shape)}"
        )
    if scale not in ("std", "none"):
        raise InputError(f"scale must be 'std' or 'none', got {scale!r}")
    advantages = rewards - rewards.mean(dim=1, keepdim=True)
    if scale == "std":
        advantages = advantages / (rewards.std(dim=1, keepdim=True) + eps)
    # The mean of equal floats can miss them by a rounding error, which eps would then blow up.
    equal = rewards.amax(dim=1, keepdim=True) == rewards.amin(dim=1, keepdim=True)
    return advantages.masked_fill(equal, 0.0)
