"""What the trainer does to a model before it trains it; cutting over ranks is in test_sharded."""

import copy

import pytest
import tiny
import torch
from torch import nn
from transformers import DynamicCache

from thinktuning.errors import InputError
from thinktuning.policy import LoraSettings, is_frozen, with_adapters, without_adapters
from thinktuning.policy.parallel import recompute_activations, transformer_blocks

IDS = torch.arange(4, 36)[None]


def gradients_and_saved_bytes(model: nn.Module) -> tuple[list[torch.Tensor], int]:
    """Of a backward; bytes that the forward kept for it, weights excluded."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=IDS, use_cache=False).logits.logsumexp(-1).sum()
    loss.backward()
    return [p.grad for p in model.parameters() if p.grad is not None], sum(saved.values())


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_recomputing_keeps_less_and_changes_no_gradient(family):
    plain = tiny.model(family, 384, 1)
    lean = copy.deepcopy(plain)
    recompute_activations(lean)
    expected, much = gradients_and_saved_bytes(plain)
    found, little = gradients_and_saved_bytes(lean)
    assert little < 0.6 * much
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_recomputing_leaves_decoding_its_cache():
    model = tiny.model("llama", 384, 1)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits[:, -1]
        recompute_activations(model)
        cache = DynamicCache(config=model.config)
        model(input_ids=IDS[:, :-1], past_key_values=cache, use_cache=True)
        assert cache.get_seq_length() == IDS.shape[1] - 1
        found = model(input_ids=IDS[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1]
    torch.testing.assert_close(found, expected)


def test_a_model_that_does_not_name_its_blocks_is_refused():
    with pytest.raises(InputError, match="doesn't name its transformer blocks"):
        recompute_activations(nn.Linear(2, 2))
    assert len(transformer_blocks(with_adapters(tiny.model("gpt2", 384, 1), LoraSettings()))) == 2


def test_without_its_adapters_a_model_is_its_base_and_stays_trainable():
    base = tiny.model("llama", 384, 1)
    with torch.no_grad():
        expected = base(input_ids=IDS).logits
    model = with_adapters(copy.deepcopy(base), LoraSettings(rank=2))
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.1)
        assert not torch.equal(model(input_ids=IDS).logits, expected)
        with without_adapters(model):
            assert torch.equal(model(input_ids=IDS).logits, expected)
            assert is_frozen(model) and all(p.requires_grad for p in trained)
        assert not torch.equal(model(input_ids=IDS).logits, expected)
    assert not is_frozen(model) and not is_frozen(base)
    assert is_frozen(base.requires_grad_(False))
