"""Rollouts without an advantage are left out of the update, and nobody can tell."""

import pytest
import torch
from running import checkpoint, fit_arguments, scalars

from thinktuning.cli import main
from thinktuning.update import PolicyUpdate

pytestmark = pytest.mark.slow


def test_leaving_out_idle_rows_changes_nothing(student, questions, tmp_path, monkeypatch):
    # Plain gradient descent: Adam would blow up what rounding makes of small gradients.
    plain = ("--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.1")
    main(fit_arguments(student(), questions, tmp_path / "out", *plain))
    monkeypatch.setattr(PolicyUpdate, "trained_rows", lambda self, mini: mini)
    main(fit_arguments(student(), questions, tmp_path / "in", *plain))
    assert max(scalars(tmp_path / "in" / "version_0")["groups/zero_variance"]) > 0
    left_out, kept = (checkpoint(tmp_path / name)["state_dict"] for name in ("out", "in"))
    for name in kept:
        torch.testing.assert_close(left_out[name], kept[name], rtol=0, atol=1e-6)


def test_a_step_without_any_advantage_still_decays_the_weights(student, questions, tmp_path):
    # Nothing earns anything: every gradient is zero.
    rewards = "[{class_path: thinktuning.rewards.PhraseReward, init_args: {phrase: never said}}]"
    more = (f"--model.rewards={rewards}", "--model.optimizer.weight_decay=0.5")
    main(fit_arguments(student(), questions, tmp_path, *more))
    from transformers import AutoModelForCausalLM

    before = AutoModelForCausalLM.from_pretrained(student()).state_dict()
    after = checkpoint(tmp_path)["state_dict"]
    for name, weight in before.items():
        torch.testing.assert_close(after[f"policy.{name}"], weight * (1 - 1e-3 * 0.5) ** 3)
