"""The obvious, slow way: one row at a time, no padding, no cache, float64."""

import copy
from collections.abc import Sequence

import tiny
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from thinktuning.policy import GROUPED

FAMILIES = ["llama", "qwen2", "gpt2"]


def decided_model(family: str, vocab_size: int = 48, seed: int = 0) -> PreTrainedModel:
    """A tiny model whose predictions differ clearly from token to token and place to place.

    Freshly made models are close to uniform; ten times the weights brings the likeliest tokens to
    probabilities of 0.1 to 0.9.
    """
    net = tiny.model(family, vocab_size, eos_token_id=0, seed=seed)
    net.set_attn_implementation(GROUPED)
    with torch.no_grad():
        for weight in net.parameters():
            if weight.ndim > 1:
                weight.mul_(10)
    return net


def ids(length: int, seed: int, vocab_size: int = 48) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (length,), generator=generator).tolist()


def token_distributions(
    net: nn.Module, prompt: Sequence[int], completion: Sequence[int], temperature: float = 1.0
) -> Tensor:
    """Log-softmax over the vocabulary before each completion token, float64 [T, V].

    ``net`` is scored as it is, with gradient; give it in float64.
    """
    row = torch.tensor([[*prompt, *completion]])
    logits = net(input_ids=row, use_cache=False).logits[0, len(prompt) - 1 : -1]
    assert logits.dtype == torch.float64
    return torch.log_softmax(logits / temperature, dim=-1)


def token_logprobs(
    net: nn.Module, prompt: Sequence[int], completion: Sequence[int], temperature: float = 1.0
) -> Tensor:
    """Logprob of each completion token, float64 [T]."""
    scores = token_distributions(net, prompt, completion, temperature)
    return scores[torch.arange(len(completion)), torch.tensor(completion)]


def in_float64(net: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model in float64."""
    return copy.deepcopy(net).double()


def gradients(net: nn.Module) -> dict[str, Tensor]:
    """Copies of all gradients by name; clears them."""
    found = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    return found
