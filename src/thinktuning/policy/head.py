"""Logprobs from hidden states, with the logits of a limited number of tokens at a time."""

from typing import Any

import torch
from torch import Tensor

_TILE_BYTES = 32 * 2**20
"""Of a tile's float32 logits. Above it, glibc gets memory from the kernel anew for every tensor."""

_BLOCK_BYTES = 256 * 2**20
"""Of a block's logits in the model's precision: the backward has one block at a time, and needn't
compute the first one again. Gradients of the weight are rounded once a block."""


def linear_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Logprobs of tokens under softmax(hidden @ weight.T / temperature), and its entropies.

    Memory doesn't grow with tokens times vocabulary: logits exist for a tile of tokens in float32,
    and for a block of tiles in the model's precision.

    Args:
        hidden: Float [N, H].
        weight: Float [V, H], of the language modelling head.
        targets: int64 [N].
        temperature: Positive.

    Returns:
        Float32 [N] each, nats; the entropies have no gradient.
    """
    logprobs, entropies = _LinearLogprobs.apply(
        hidden, weight, targets, temperature, torch.is_grad_enabled()
    )
    return logprobs, entropies


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        differentiable: bool,
    ) -> tuple[Tensor, Tensor]:
        logprobs = hidden.new_empty(len(targets), dtype=torch.float32)
        entropies, normalizers = torch.empty_like(logprobs), torch.empty_like(logprobs)
        kept = hidden[: _fitting(_BLOCK_BYTES, weight) if differentiable else 0] @ weight.T
        for tile in _runs(len(targets), _fitting(_TILE_BYTES, weight, torch.float32.itemsize)):
            known = kept[tile]
            product = known if len(known) == len(targets[tile]) else hidden[tile] @ weight.T
            logits = _scaled(product, temperature)
            highest = logits.amax(dim=-1)
            logits.sub_(highest[:, None])
            shares = logits.exp()
            total = shares.sum(dim=-1)
            logprobs[tile] = logits.gather(1, targets[tile, None])[:, 0] - total.log()
            entropies[tile] = total.log() - torch.linalg.vecdot(shares, logits) / total
            normalizers[tile] = highest + total.log()
        ctx.save_for_backward(hidden, weight, targets, normalizers)
        ctx.kept, ctx.temperature = kept, temperature
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, slope: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, normalizers = ctx.saved_tensors
        to_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        to_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        scale = slope / ctx.temperature
        slopes, ctx.kept = ctx.kept, None
        for block in _runs(len(targets), _fitting(_BLOCK_BYTES, weight)):
            if slopes is None:
                slopes = hidden[block] @ weight.T
            for tile in _runs(len(slopes), _fitting(_TILE_BYTES, weight, torch.float32.itemsize)):
                wanted, height = targets[block][tile, None], scale[block][tile, None]
                shares = _scaled(slopes[tile], ctx.temperature)
                shares.sub_(normalizers[block][tile, None]).exp_()
                # The slope of a logit: 1 for the token itself, less its share.
                shares.mul_(-height).scatter_add_(1, wanted, height)
                slopes[tile] = shares
            if to_hidden is not None:
                torch.mm(slopes, weight, out=to_hidden[block])
            if to_weight is not None:
                to_weight.addmm_(slopes.T, hidden[block])
            slopes = None
        return to_hidden, to_weight, None, None, None


def _scaled(product: Tensor, temperature: float) -> Tensor:
    """Logits in memory of their own."""
    logits = product.to(torch.float32, copy=True)
    return logits if temperature == 1 else logits.div_(temperature)


def _fitting(limit: int, weight: Tensor, itemsize: int | None = None) -> int:
    """Tokens whose logits take so many bytes, at least one."""
    return max(1, limit // ((itemsize or weight.itemsize) * len(weight)))


def _runs(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]
