"""Logprobs from hidden states, without logits of all tokens at any time."""

from typing import Any

import torch
from torch import Tensor

_TILE_BYTES = 32 * 2**20
"""Of a tile's float32 logits. Above it, glibc gets memory from the kernel anew for every tensor."""

_KEPT_BYTES = 256 * 2**20
"""Of logits, in the model's precision, that the backward needn't compute again."""


def linear_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Logprobs of tokens under softmax(hidden @ weight.T / temperature), and its entropies.

    Tiles of tokens are computed one after the other; of all but the first, the backward computes
    the logits once more, so that memory doesn't grow with tokens times vocabulary. Sums are
    float32.

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
        ctx.kept = []
        room = _KEPT_BYTES if differentiable else 0
        for tile in _tiles(len(targets), len(weight)):
            product = hidden[tile] @ weight.T
            room -= product.nbytes
            if room >= 0:
                ctx.kept.append(product)
            logits = _scaled(product, temperature, copy=room >= 0)
            highest = logits.amax(dim=-1)
            logits.sub_(highest[:, None])
            shares = logits.exp()
            total = shares.sum(dim=-1)
            logprobs[tile] = logits.gather(1, targets[tile, None])[:, 0] - total.log()
            entropies[tile] = total.log() - torch.linalg.vecdot(shares, logits) / total
            normalizers[tile] = highest + total.log()
        ctx.save_for_backward(hidden, weight, targets, normalizers)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, slope: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, normalizers = ctx.saved_tensors
        to_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        to_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        scale = slope / ctx.temperature
        ctx.kept.reverse()
        for tile in _tiles(len(targets), len(weight)):
            product = ctx.kept.pop() if ctx.kept else hidden[tile] @ weight.T
            logits = _scaled(product, ctx.temperature)
            shares = logits.sub_(normalizers[tile, None]).exp_()
            # The slope of a logit: 1 for the token itself, less its share.
            slopes = shares.mul_(-scale[tile, None])
            slopes.scatter_add_(1, targets[tile, None], scale[tile, None])
            slopes = slopes.to(hidden.dtype)
            if to_hidden is not None:
                torch.mm(slopes, weight, out=to_hidden[tile])
            if to_weight is not None:
                to_weight.addmm_(slopes.T, hidden[tile])
        return to_hidden, to_weight, None, None, None


def _scaled(product: Tensor, temperature: float, copy: bool = False) -> Tensor:
    logits = product.to(torch.float32, copy=copy)
    return logits if temperature == 1 else logits.div_(temperature)


def _tiles(tokens: int, vocabulary: int) -> list[slice]:
    size = max(1, _TILE_BYTES // (4 * vocabulary))
    return [slice(start, start + size) for start in range(0, tokens, size)]
