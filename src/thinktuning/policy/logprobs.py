"""Logprobs of completion tokens under a model."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from thinktuning.policy.attention import GROUPED
from thinktuning.policy.head import linear_logprobs
from thinktuning.policy.packing import pack
from thinktuning.policy.weights import base_of, replaced_forward
from thinktuning.tensors import Lengths, lengths_of
from thinktuning.types import PolicyInputs


class TokenScores(NamedTuple):
    """What a model says of the completion tokens.

    Attributes:
        logprobs: Float32 [B, T], nats; 0 outside the completion mask.
        entropy: Float32 [B, T], nats, without gradient; 0 outside the completion mask.
    """

    logprobs: Tensor
    entropy: Tensor


@dataclass(frozen=True)
class Scoring:
    """How logprobs are computed; what they are depends on neither.

    Attributes:
        tiled_head: Hold the logits of a limited number of tokens at a time: compute them tile by
            tile, and once more in the backward.
        packed: Read a micro-batch as one row without padding, in which a prompt stands once for
            all its rollouts. Needs ``grouped_sdpa`` attention.
    """

    tiled_head: bool = True
    packed: bool = True


_PIECE = 128
"""Tokens whose fp32 logits are held at a time by the plain way."""

PLAIN = Scoring(tiled_head=False, packed=False)


def completion_logprobs(
    model: nn.Module,
    inputs: PolicyInputs,
    temperature: float = 1.0,
    scoring: Scoring = PLAIN,
    lengths: Lengths | None = None,
) -> TokenScores:
    """Score every completion token given what stands before it.

    Args:
        model: A Transformers causal language model.
        inputs: Uses ``input_ids``, ``attention_mask`` and ``completion_mask``.
        temperature: The sampling temperature: the policy that sampled is softmax(logits / T).
        scoring: How; see ``suitable``.
        lengths: What ``lengths_of`` would find, where it's known.

    Returns:
        Logprobs with gradient (unless grad mode is off) and entropies.
    """
    score = _Scorer(model, temperature, scoring.tiled_head)
    wanted = inputs.completion_mask
    if scoring.packed:
        row = pack(inputs, lengths or lengths_of(inputs))
        found = score(
            row.targets[None],
            input_ids=row.ids,
            position_ids=row.places,
            # Models hand one with four dimensions to the attention as it is, and make none.
            attention_mask=row.ids.new_ones(1, 1, 1, 1, dtype=torch.bool),
            packing=row.packing,
            logits_to_keep=row.predicting,
        )
        scores = [x.new_zeros(wanted.numel()).index_copy(0, row.columns, x[0]) for x in found]
        scores = [x.view_as(wanted) for x in scores]
    else:
        ids, mask = inputs.input_ids, inputs.attention_mask
        places = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
        found = score(
            ids[:, -wanted.shape[1] :],
            input_ids=ids[:, :-1],
            attention_mask=mask[:, :-1],
            position_ids=places[:, :-1],
            logits_to_keep=wanted.shape[1],
        )
        scores = list(found)
    return TokenScores(*(values.masked_fill(~wanted, 0.0) for values in scores))


def possible(model: nn.Module, wanted: Scoring) -> Scoring:
    """What of ``wanted`` a model's parts allow."""
    base: Any = base_of(model)
    head = base.get_output_embeddings()
    tiled = type(head) is nn.Linear and head.bias is None
    return Scoring(wanted.tiled_head and tiled, wanted.packed and _can_pack(base.config))


@torch.no_grad()
def suitable(model: nn.Module, wanted: Scoring) -> Scoring:
    """What of ``wanted`` gives this model's logprobs: the rest of what it does with its logits, or
    with what stands before, may be unknown here. Asked of the model itself, with a few tokens.
    """
    base: Any = base_of(model)
    weight = base.get_output_embeddings().weight
    able = possible(model, wanted)
    probe = _probe(base.config.get_text_config().vocab_size, weight.device)
    expected = completion_logprobs(model, probe).logprobs
    tolerance = 1e-3 if weight.dtype == torch.float32 else 0.1
    for scoring in (able, replace(able, tiled_head=False), replace(able, packed=False)):
        found = completion_logprobs(model, probe, scoring=scoring).logprobs
        if torch.allclose(found, expected, rtol=0, atol=tolerance):
            return scoring
    return PLAIN


def _can_pack(config: Any) -> bool:
    """Whether the attention is ours, and every layer has one that sees all tokens."""
    layers = DynamicCache(config=config).layers
    ours: bool = config._attn_implementation == GROUPED
    return ours and all(type(layer) is DynamicLayer for layer in layers)


def _probe(vocabulary: int, device: torch.device) -> PolicyInputs:
    """Three rollouts of two prompts, of different lengths, one with a single token."""
    ids = torch.arange(1, 25, device=device).view(3, 8) * 7919 % vocabulary
    ids[1, :4] = ids[0, :4]
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[2, 0] = False
    mask[1, 5:] = False
    completion = mask[:, 4:]
    return PolicyInputs(ids, mask, completion, ~completion, ids.new_zeros(3))


@dataclass(frozen=True)
class _Scorer:
    """Calls a model, and scores the tokens that follow those whose logits it is to keep."""

    model: nn.Module
    temperature: float
    tiled: bool

    def __call__(self, targets: Tensor, **inputs: Any) -> TokenScores:
        """Logprobs and entropies.

        Args:
            targets: int64 [R, K].
            inputs: Of the model.
        """
        return (self._tiled if self.tiled else self._whole)(targets, inputs)

    def _whole(self, targets: Tensor, inputs: dict[str, Any]) -> TokenScores:
        logits = self.model(use_cache=False, **inputs).logits
        # Recomputed piece by piece in the backward: fp32 copies exist for some tokens at a time.
        pieces = zip(
            logits.flatten(0, 1).split(_PIECE), targets.flatten().split(_PIECE), strict=True
        )
        scores = [
            checkpoint(_score_tokens, some, tokens, self.temperature, use_reentrant=False)
            for some, tokens in pieces
        ]
        joined = (torch.cat(values).view_as(targets) for values in zip(*scores, strict=True))
        return TokenScores(*joined)

    def _tiled(self, targets: Tensor, inputs: dict[str, Any]) -> TokenScores:
        head: Any = base_of(self.model).get_output_embeddings()  # type: ignore[operator]
        entropies: list[Tensor] = []

        def in_place_of_logits(hidden: Tensor) -> Tensor:
            logprobs, entropy = linear_logprobs(
                hidden.flatten(0, 1), head.weight, targets.flatten(), self.temperature
            )
            entropies.append(entropy.view_as(targets))
            return logprobs.view_as(targets)[..., None]

        # Inside of the model's forward: FSDP2 gathers the head's weight there.
        with replaced_forward(head, in_place_of_logits):
            logprobs = self.model(use_cache=False, **inputs).logits[..., 0]
        return TokenScores(logprobs, entropies[0])


def _score_tokens(logits: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logprobs = torch.log_softmax(logits.float() / temperature, dim=-1)
    with torch.no_grad():
        entropy = -(logprobs.exp() * logprobs).nansum(dim=-1)
    return logprobs.gather(1, tokens[:, None])[:, 0], entropy
