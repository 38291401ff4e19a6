"""Proof that a server samples from the trainer's weights: both are asked for the same logprobs."""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from thinktuning.errors import StaleWeightsError
from thinktuning.policy import device_of

_TOKENS = 256
# Mean distance in nats. SmolLM2-135M is 0.08 from itself in bfloat16, and 1e-5 in float32.
_TOLERANCE = 1e-3
_TOLERANCE_16_BITS = 0.3


class Probe(NamedTuple):
    """What the trainer says of a fixed text.

    Attributes:
        token_ids: Pseudorandom ids, the same in each sync, so that answers can be compared.
        logprobs: Float32 [tokens - 1] on the CPU, nats: of every token but the first.
        dtype: In which the trainer computed them.
    """

    token_ids: list[int]
    logprobs: Tensor
    dtype: torch.dtype


@torch.no_grad()
def take(model: PreTrainedModel, longest: int) -> Probe:
    """Score the text by the trainer's own forward; of a model cut over ranks all must call it.

    Args:
        model: A causal language model.
        longest: Tokens that the server takes in a prompt.
    """
    generator = torch.Generator().manual_seed(0)
    length = min(_TOKENS, longest)
    ids = torch.randint(model.config.vocab_size, (1, length), generator=generator)
    logits = model(input_ids=ids.to(device_of(model)), use_cache=False).logits[0, :-1]
    logprobs = torch.log_softmax(logits.float(), dim=-1).cpu()
    return Probe(ids[0].tolist(), logprobs.gather(1, ids[0, 1:, None])[:, 0], logits.dtype)


def check(
    probe: Probe, found: Tensor, stale: Tensor | None, dtype: torch.dtype, server: str
) -> None:
    """Compare a server's logprobs with the trainer's, and with those it gave for other weights.

    A server that kept its weights repeats itself exactly, which shows the smallest update: in
    bfloat16 ten weights of SmolLM2's 135M that move by their last bit change nearly every logprob.
    What this can't see is an update that arrived in part, while the missing part is worth less
    than the tolerance: 0.001 nats if both compute in float32 (an AdamW step of 1e-6 moves SmolLM2
    by that), else 0.3, since rounding alone is worth 0.08.

    Args:
        probe: The trainer's.
        found: Float32 [tokens - 1], nats: the server's, of the same tokens.
        stale: What the server said when it had other weights; None if it never had.
        dtype: Of the server's weights.
        server: Its address, for messages.

    Raises:
        StaleWeightsError: If the server doesn't hold the trainer's weights.
    """
    exact = probe.dtype == dtype == torch.float32
    tolerance = _TOLERANCE if exact else _TOLERANCE_16_BITS
    gap = (found - probe.logprobs).abs().mean().item()
    if not gap <= tolerance:
        raise StaleWeightsError(
            f"the server at {server} doesn't hold the trainer's weights: after the sync its "
            f"logprobs of {len(found)} tokens are {gap:.3g} nats from the trainer's on average, "
            f"where rounding explains {tolerance:g}; it would sample from another policy"
        )
    if stale is not None and torch.equal(found, stale):
        raise StaleWeightsError(
            f"the server at {server} doesn't hold the trainer's weights: they have changed since "
            f"the last sync, but its logprobs of {len(found)} tokens are exactly what they were; "
            f"it would sample from an older policy"
        )
