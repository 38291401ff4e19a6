"""Weights that are rounded once, their gradients, and weights packed for the CPU."""

import copy

import naive
import pytest
import torch
from naive import FAMILIES, ids
from transformers import PreTrainedModel

from thinktuning.policy import packed_linears, rounded_weights
from thinktuning.policy.attention import GROUPED

ROW = torch.tensor([ids(12, seed=1)])


@pytest.fixture(params=FAMILIES)
def net(request) -> PreTrainedModel:
    return naive.decided_model(request.param)


def autocast(enabled: bool = True) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


def rounded(net: PreTrainedModel) -> PreTrainedModel:
    """A copy with weights in bfloat16, as loading in bfloat16 gives: buffers stay as they are."""
    other = copy.deepcopy(net)
    for parameter in other.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return other


def test_the_model_computes_as_one_in_bfloat16_and_is_left_as_it_was(net):
    before = {name: (p, p.detach().clone()) for name, p in net.named_parameters()}
    with autocast(), rounded_weights(net):
        found = net(input_ids=ROW).logits
        assert not torch.is_autocast_enabled("cpu")
        assert {p.dtype for p in net.parameters()} == {torch.bfloat16}
        assert net.get_output_embeddings().weight is net.get_input_embeddings().weight
    assert torch.equal(found, rounded(net)(input_ids=ROW).logits)
    for name, parameter in net.named_parameters():
        same, weight = before[name]
        assert parameter is same and torch.equal(parameter, weight)


def test_weights_come_back_when_something_fails(net):
    before = dict(net.named_parameters())
    with pytest.raises(KeyboardInterrupt), autocast(), rounded_weights(net):
        raise KeyboardInterrupt
    assert all(p is before[name] for name, p in net.named_parameters())


def test_without_autocast_nothing_is_rounded(net):
    with rounded_weights(net) as sums:
        assert {p.dtype for p in net.parameters()} == {torch.float32}
        assert not sums.needed


def test_the_sums_themselves_become_the_gradients(net):
    with autocast(), rounded_weights(net) as sums:
        net(input_ids=ROW).logits.float().sum().backward()
    places = {tensor.data_ptr() for tensor in sums.tensors}
    sums.deliver(torch.Tensor.backward)
    assert {p.grad.data_ptr() for p in net.parameters() if p.grad is not None} == places


def test_gradients_of_several_passes_add_up_in_float32(net):
    rows = [torch.tensor([ids(12, seed=n)]) for n in range(20)]
    with autocast(), rounded_weights(net) as sums:
        for row in rows:
            net(input_ids=row).logits.float().sum().backward()
    assert all(p.grad is None for p in net.parameters())
    calls = []
    sums.deliver(lambda loss: (calls.append(1), loss.backward()))
    assert len(calls) == 1
    expected = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for row in rows:
        other = rounded(net)
        other(input_ids=row).logits.float().sum().backward()
        for name, p in other.named_parameters():
            if p.grad is not None:
                expected[name] += p.grad.float()
    for name, parameter in net.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.dtype == torch.float32
            assert torch.equal(parameter.grad, expected[name]), name
        else:
            assert not expected[name].any()


def test_frozen_weights_are_rounded_and_get_no_gradient(net):
    frozen = net.get_input_embeddings().weight
    frozen.requires_grad_(False)
    with autocast(), rounded_weights(net) as sums:
        assert net.get_input_embeddings().weight.dtype == torch.bfloat16
        net(input_ids=ROW).logits.float().sum().backward()
    sums.deliver(torch.Tensor.backward)
    assert frozen.grad is None
    assert any(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_packed_layers_compute_the_same(net, dtype):
    net.to(dtype)
    expected = net(input_ids=ROW).logits
    with packed_linears(net):
        inside = net(input_ids=ROW).logits
    assert torch.equal(net(input_ids=ROW).logits, expected), "and are unpacked afterwards"
    tolerance = 1e-4 if dtype == torch.float32 else 0.15
    torch.testing.assert_close(inside, expected, rtol=0, atol=tolerance)


def test_weights_in_float64_are_not_packed(net):
    exact = naive.in_float64(net)
    with torch.no_grad(), packed_linears(exact):
        assert exact(input_ids=ROW).logits.dtype == torch.float64


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_grouped_attention_is_attention(family, padded):
    net = naive.in_float64(naive.decided_model(family))
    rows = torch.tensor([ids(12, seed=1), ids(12, seed=2)])
    mask = torch.ones_like(rows)
    if padded:
        mask[0, :5] = 0
    found = {}
    for attention in ("sdpa", GROUPED):
        net.set_attn_implementation(attention)
        start = net(input_ids=rows[:, :7], attention_mask=mask[:, :7], use_cache=True)
        more = net(
            input_ids=rows[:, 7:], attention_mask=mask, past_key_values=start.past_key_values
        )
        logits = torch.cat([start.logits, more.logits], dim=1)[mask.bool()]
        logits.square().sum().backward()
        found[attention] = logits.detach(), naive.gradients(net)
    torch.testing.assert_close(found[GROUPED][0], found["sdpa"][0], rtol=0, atol=1e-6)
    scale = max(float(g.abs().max()) for g in found["sdpa"][1].values())
    for name, gradient in found["sdpa"][1].items():
        torch.testing.assert_close(found[GROUPED][1][name], gradient, rtol=0, atol=1e-6 * scale)
