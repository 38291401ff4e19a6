"""The weights that an engine is given, against peft's own merge."""

import copy

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model

from thinktuning.policy import named_weights

TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}


def adapted(family="llama", adapters=("default",), **options):
    """A tiny model with LoRA adapters whose matrices are all far from zero."""
    net = tiny.model(family, 64, eos_token_id=1)
    config = LoraConfig(r=4, lora_alpha=12, target_modules=TARGETS[family], **options)
    model = get_peft_model(net, config)
    for name in adapters[1:]:
        model.add_adapter(name, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    return model.eval()


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        assert not weight.requires_grad
        torch.testing.assert_close(weight, expected[name].detach(), rtol=0, atol=0)


def merged(model):
    return dict(copy.deepcopy(model).merge_and_unload().named_parameters())


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_of_a_plain_model_they_are_its_parameters(family):
    net = tiny.model(family, 64, eos_token_id=1)
    found = dict(named_weights(net))
    assert_equal(found, dict(net.named_parameters()))
    for name, weight in net.named_parameters():
        assert found[name].data_ptr() == weight.data_ptr(), "nothing is copied"


# gpt2 keeps its weights transposed.
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}], ids=str)
def test_of_an_adapted_model_they_are_the_merged_ones(family, options):
    model = adapted(family, **options)
    base = dict(tiny.model(family, 64, eos_token_id=1).named_parameters())
    found = dict(named_weights(model))
    assert_equal(found, merged(model))
    changed = {name for name, weight in found.items() if not torch.equal(weight, base[name])}
    assert len(changed) == sum(
        name.endswith(f"{t}.weight") for name in base for t in TARGETS[family]
    )


def test_their_logits_are_the_adapted_models_own():
    model = adapted()
    plain = tiny.model("llama", 64, eos_token_id=1, seed=9)
    plain.load_state_dict(dict(named_weights(model)), strict=False)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, model(ids).logits, rtol=0, atol=1e-5)


def test_with_the_adapter_disabled_they_are_the_base_weights():
    model = adapted()
    base = dict(tiny.model("llama", 64, eos_token_id=1).named_parameters())
    with model.disable_adapter():
        assert_equal(dict(named_weights(model)), base)
    assert_equal(dict(named_weights(model)), merged(model))


def test_of_several_adapters_the_active_one_counts():
    model = adapted(adapters=("default", "other"))
    first = dict(named_weights(model))
    model.set_adapter("other")
    second = dict(named_weights(model))
    assert_equal(second, merged(model))
    assert not torch.equal(*(w["model.layers.0.mlp.down_proj.weight"] for w in (first, second)))


def test_weights_keep_their_precision():
    model = adapted().to(torch.bfloat16)
    found = dict(named_weights(model))
    assert {weight.dtype for weight in found.values()} == {torch.bfloat16}
    assert_equal(found, merged(model))


def test_a_weight_is_there_once_more_under_its_tied_name_if_asked():
    for model in (tiny.model("llama", 64, eos_token_id=1), adapted()):
        once = [name for name, _ in named_weights(model)]
        twice = dict(named_weights(model, tied=True))
        assert len(once) == len(set(once))
        assert set(twice) - set(once) == {"lm_head.weight"}
        assert twice["lm_head.weight"].data_ptr() == twice["model.embed_tokens.weight"].data_ptr()


def test_reading_them_leaves_the_model_as_it_was():
    model = adapted()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    list(named_weights(model))
    assert_equal({name: w.detach() for name, w in model.state_dict().items()}, before)
