"""Logprobs from hidden states, without logits of all tokens at any time."""

from typing import Any

import torch
from torch import Tensor

_TILE_BYTES = 32 * 2**20
"""Of a tile's float32 logits. Above it, glibc gets memory from the kernel anew for every tensor."""


def linear_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Logprobs of tokens under softmax(hidden @ weight.T / temperature), and its entropies.

    Tiles of tokens are computed one after the other; the backward computes each tile's logits once
    more, so that memory doesn't grow with tokens times vocabulary. Sums are float32.

    Args:
        hidden: Float [N, H].
        weight: Float [V, H], of the language modelling head.
        targets: int64 [N].
        temperature: Positive.

    Returns:
        Float32 [N] each, nats; the entropies have no gradient.
    """
    logprobs, entropies = _LinearLogprobs.apply(hidden, weight, targets, temperature)
    return logprobs, entropies


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        logprobs = hidden.new_empty(len(targets), dtype=torch.float32)
        entropies, normalizers = torch.empty_like(logprobs), torch.empty_like(logprobs)
        for tile in _tiles(len(targets), len(weight)):
            logits = _logits(hidden[tile], weight, temperature)
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
        for tile in _tiles(len(targets), len(weight)):
            logits = _logits(hidden[tile], weight, ctx.temperature)
            shares = logits.sub_(normalizers[tile, None]).exp_()
            # The slope of a logit: 1 for the token itself, less its share.
            slopes = shares.mul_(-scale[tile, None])
            slopes.scatter_add_(1, targets[tile, None], scale[tile, None])
            slopes = slopes.to(hidden.dtype)
            if to_hidden is not None:
                torch.mm(slopes, weight, out=to_hidden[tile])
            if to_weight is not None:
                to_weight.addmm_(slopes.T, hidden[tile])
        return to_hidden, to_weight, None, None


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    logits = (hidden @ weight.T).float()
    return logits if temperature == 1 else logits.div_(temperature)


def _tiles(tokens: int, vocabulary: int) -> list[slice]:
    size = max(1, _TILE_BYTES // (4 * vocabulary))
    return [slice(start, start + size) for start in range(0, tokens, size)]
