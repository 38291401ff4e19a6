"""Without teacher tokens and dual clip, our loss is the one of TRL's GRPO trainer.

The numbers are TRL's own, recorded by ``scripts/record_trl_loss.py``.
"""

import json
from pathlib import Path

import pytest
import torch

from thinktuning.objective import ObjectiveConfig, policy_loss, token_weights
from thinktuning.types import PolicyInputs

RECORDED = json.loads((Path(__file__).parent / "data" / "trl_grpo_loss.json").read_text())
INPUTS = {name: torch.tensor(values) for name, values in RECORDED["inputs"].items()}
NORMALIZERS = {
    "bnpo": "token_mean",
    "dapo": "token_mean",
    "grpo": "sequence_mean",
    "dr_grpo": "fixed_length",
}


def case_name(case):
    policy = "on" if case["on_policy"] else "off"
    return f"{case['loss_type']}-{case['beta']}-{case['epsilon_high']}-{policy}"


def our_loss_and_gradient(case):
    mask = INPUTS["completion_mask"].bool()
    config = ObjectiveConfig(
        clip_eps=case["epsilon"],
        clip_eps_high=case["epsilon_high"],
        dual_clip=None,
        kl_coef=case["beta"],
        normalizer=NORMALIZERS[case["loss_type"]],
    )
    logprobs = INPUTS["logprobs"].clone().requires_grad_()
    inputs = PolicyInputs(
        input_ids=torch.zeros_like(mask, dtype=torch.long),
        attention_mask=mask,
        completion_mask=mask,
        injected_mask=torch.zeros_like(mask),
        advantages=INPUTS["advantages"],
        logprobs=logprobs,
        old_logprobs=None if case["on_policy"] else INPUTS["old_logprobs"],
        ref_logprobs=INPUTS["ref_logprobs"] if case["beta"] else None,
        token_weights=token_weights(
            mask, config.normalizer, max_tokens=RECORDED["max_completion_length"]
        ),
    )
    loss = policy_loss(inputs, config).loss
    (gradient,) = torch.autograd.grad(loss, logprobs)
    return loss, gradient


@pytest.mark.parametrize("case", RECORDED["cases"], ids=case_name)
def test_loss_and_gradient_are_trls(case):
    loss, gradient = our_loss_and_gradient(case)
    assert loss.item() == pytest.approx(case["loss"], rel=1e-5, abs=1e-7)
    torch.testing.assert_close(gradient, torch.tensor(case["gradient"]), rtol=1e-5, atol=1e-7)


def test_record_reaches_every_part_of_the_loss():
    mask = INPUTS["completion_mask"].bool()
    ratio = (INPUTS["logprobs"] - INPUTS["old_logprobs"]).exp()
    advantages = INPUTS["advantages"][:, None].expand_as(ratio)
    for sign in (-1, 1):
        for low, high in [(0, 0.8), (0.8, 1), (1, 1.2), (1.28, 9)]:
            assert (mask & (advantages * sign > 0) & (ratio > low) & (ratio < high)).any()
    assert (mask & (advantages > 0) & (ratio > 1.2) & (ratio < 1.28)).any(), "clip-higher"
    assert (mask & (advantages == 0)).any()
    assert {c["loss_type"] for c in RECORDED["cases"]} == set(NORMALIZERS)
    assert {c["beta"] for c in RECORDED["cases"]} == {0.0, 0.04}
    assert len({round(c["loss"], 6) for c in RECORDED["cases"]}) >= 10, "cases differ"
