"""Means in the making."""

from typing import NamedTuple

from torch import Tensor


class Mean(NamedTuple):
    """A mean in the making: add up over micro-batches and ranks, then divide."""

    total: Tensor | float
    weight: Tensor | float


def masked_mean(values: Tensor, mask: Tensor) -> Mean:
    """Sum and number of the values where the mask is True."""
    return Mean(values.float().masked_fill(~mask, 0.0).sum(), mask.sum())
