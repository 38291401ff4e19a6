"""Logprobs of completion tokens under a model."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from thinktuning.types import PolicyInputs


class TokenScores(NamedTuple):
    """What a model says of the completion tokens.

    Attributes:
        logprobs: Float32 [B, T], nats; 0 outside the completion mask.
        entropy: Float32 [B, T], nats, without gradient; 0 outside the completion mask.
    """

    logprobs: Tensor
    entropy: Tensor


def completion_logprobs(
    model: nn.Module, inputs: PolicyInputs, temperature: float = 1.0
) -> TokenScores:
    """Score every completion token given what stands before it.

    Args:
        model: A Transformers causal language model.
        inputs: Uses ``input_ids``, ``attention_mask`` and ``completion_mask``.
        temperature: The sampling temperature: the policy that sampled is softmax(logits / T).

    Returns:
        Logprobs with gradient (unless grad mode is off) and entropies.
    """
    mask = inputs.attention_mask
    length = inputs.completion_mask.shape[1]
    logits = model(
        input_ids=inputs.input_ids,
        attention_mask=mask,
        position_ids=(mask.long().cumsum(dim=1) - 1).clamp(min=0),
        use_cache=False,
        logits_to_keep=length + 1,
    ).logits[:, :-1]
    tokens = inputs.input_ids[:, -length:]
    # Recomputed row by row in the backward: fp32 copies of [T, V] exist for one row at a time.
    rows = [
        checkpoint(_score_row, row_logits, row_tokens, temperature, use_reentrant=False)
        for row_logits, row_tokens in zip(logits, tokens, strict=True)
    ]
    outside = ~inputs.completion_mask
    return TokenScores(
        torch.stack([row[0] for row in rows]).masked_fill(outside, 0.0),
        torch.stack([row[1] for row in rows]).masked_fill(outside, 0.0),
    )


def _score_row(logits: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logprobs = torch.log_softmax(logits.float() / temperature, dim=-1)
    with torch.no_grad():
        entropy = -(logprobs.exp() * logprobs).nansum(dim=-1)
    return logprobs.gather(1, tokens[:, None])[:, 0], entropy
