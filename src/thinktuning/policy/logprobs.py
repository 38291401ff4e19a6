"""Logprobs of completion tokens under a model."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from thinktuning.policy.head import linear_logprobs
from thinktuning.policy.prompt_cache import PromptCache, can_share_prompts
from thinktuning.policy.weights import base_of
from thinktuning.tensors import distinct_prompts
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
        tiled_head: Never hold the logits of all tokens: compute them tile by tile, and once more
            in the backward.
        shared_prompts: Read a prompt once for all its rollouts in a micro-batch.
    """

    tiled_head: bool = True
    shared_prompts: bool = True


PLAIN = Scoring(tiled_head=False, shared_prompts=False)


def completion_logprobs(
    model: nn.Module,
    inputs: PolicyInputs,
    temperature: float = 1.0,
    scoring: Scoring = PLAIN,
    prompts: tuple[Tensor, Tensor] | None = None,
) -> TokenScores:
    """Score every completion token given what stands before it.

    Args:
        model: A Transformers causal language model.
        inputs: Uses ``input_ids``, ``attention_mask`` and ``completion_mask``.
        temperature: The sampling temperature: the policy that sampled is softmax(logits / T).
        scoring: How; see ``suitable``.
        prompts: What ``distinct_prompts`` would find, where it's known.

    Returns:
        Logprobs with gradient (unless grad mode is off) and entropies.
    """
    score = _Scorer(model, temperature, scoring.tiled_head)
    ids, mask, wanted = inputs.input_ids, inputs.attention_mask, inputs.completion_mask
    places = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    start = ids.shape[1] - wanted.shape[1]
    if not scoring.shared_prompts:
        scores = score(
            ids[:, start:],
            input_ids=ids[:, :-1],
            attention_mask=mask[:, :-1],
            position_ids=places[:, :-1],
            use_cache=False,
        )
    else:
        first, owner = prompts or distinct_prompts(ids[:, :start], mask[:, :start])
        config: Any = base_of(model).config
        cache = PromptCache(config)
        begun = score(
            ids[:, start : start + 1],
            owner,
            input_ids=ids[first, :start],
            attention_mask=mask[first, :start],
            position_ids=places[first, :start],
            past_key_values=cache,
            use_cache=True,
        )
        # At least one column, though nothing follows it: sharded ranks must take the same passes.
        stop = max(ids.shape[1] - 1, start + 1)
        rest = score(
            ids[:, start + 1 :],
            input_ids=ids[:, start:stop],
            attention_mask=mask[:, :stop],
            position_ids=places[:, start:stop],
            past_key_values=cache.before(owner),
            use_cache=True,
        )
        scores = TokenScores(*(torch.cat(pair, dim=1) for pair in zip(begun, rest, strict=True)))
    return TokenScores(*(values.masked_fill(~wanted, 0.0) for values in scores))


@torch.no_grad()
def suitable(model: nn.Module, wanted: Scoring) -> Scoring:
    """What of ``wanted`` gives this model's logprobs: the rest of what it does with its logits, or
    with what stands before, may be unknown here. Asked of the model itself, with a few tokens.
    """
    base = base_of(model)
    config: Any = base.config
    head = base.get_output_embeddings()  # type: ignore[operator]
    tiled = wanted.tiled_head and type(head) is nn.Linear and head.bias is None
    shared = wanted.shared_prompts and can_share_prompts(config)
    probe = _probe(config.get_text_config().vocab_size, head.weight.device)
    expected = completion_logprobs(model, probe).logprobs
    tolerance = 1e-3 if head.weight.dtype == torch.float32 else 0.1
    for scoring in (Scoring(tiled, shared), Scoring(False, shared), Scoring(tiled, False)):
        found = completion_logprobs(model, probe, scoring=scoring).logprobs
        if torch.allclose(found, expected, rtol=0, atol=tolerance):
            return scoring
    return PLAIN


def _probe(vocabulary: int, device: torch.device) -> PolicyInputs:
    """Three rollouts of two prompts, of different lengths."""
    ids = torch.arange(1, 25, device=device).view(3, 8) * 7919 % vocabulary
    ids[1, :4] = ids[0, :4]
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[2, 0] = mask[1, 7] = False
    completion = mask[:, 4:]
    return PolicyInputs(ids, mask, completion, ~completion, ids.new_zeros(3))


@dataclass(frozen=True)
class _Scorer:
    """Calls a model, and scores the tokens that follow its last columns."""

    model: nn.Module
    temperature: float
    tiled: bool

    def __call__(self, targets: Tensor, owner: Tensor | None = None, **inputs: Any) -> TokenScores:
        """Logprobs and entropies.

        Args:
            targets: int64 [R, K], the tokens that follow the last K columns of the inputs.
            owner: int64 [R], where the inputs are rows that several targets follow; else None.
            inputs: Of the model.
        """
        return (self._tiled if self.tiled else self._whole)(targets, owner, inputs)

    def _whole(self, targets: Tensor, owner: Tensor | None, inputs: dict[str, Any]) -> TokenScores:
        columns = targets.shape[1]
        logits = self.model(logits_to_keep=max(columns, 1), **inputs).logits
        logits = logits[:, logits.shape[1] - columns :]
        if owner is not None:
            logits = logits[owner]
        # Recomputed row by row in the backward: fp32 copies of [T, V] exist for one row at a time.
        rows = [
            checkpoint(_score_row, row, tokens, self.temperature, use_reentrant=False)
            for row, tokens in zip(logits, targets, strict=True)
        ]
        return TokenScores(*(torch.stack(values) for values in zip(*rows, strict=True)))

    def _tiled(self, targets: Tensor, owner: Tensor | None, inputs: dict[str, Any]) -> TokenScores:
        head: Any = base_of(self.model).get_output_embeddings()  # type: ignore[operator]
        entropies: list[Tensor] = []

        def in_place_of_logits(hidden: Tensor) -> Tensor:
            hidden = hidden[:, hidden.shape[1] - targets.shape[1] :]
            if owner is not None:
                hidden = hidden.index_select(0, owner)
            logprobs, entropy = linear_logprobs(
                hidden.flatten(0, 1), head.weight, targets.flatten(), self.temperature
            )
            entropies.append(entropy.view_as(targets))
            return logprobs.view_as(targets)[..., None]

        # Inside of the model's forward: FSDP2 gathers the head's weight there.
        head.forward = in_place_of_logits
        try:
            logprobs = self.model(**inputs).logits[..., 0]
        finally:
            del head.forward
        return TokenScores(logprobs, entropies[0])


def _score_row(logits: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logprobs = torch.log_softmax(logits.float() / temperature, dim=-1)
    with torch.no_grad():
        entropy = -(logprobs.exp() * logprobs).nansum(dim=-1)
    return logprobs.gather(1, tokens[:, None])[:, 0], entropy
