"""Rollouts without an advantage are left out of the update, and nobody can tell."""

import pytest
import scripted
import torch
from running import checkpoint, fit_arguments, scalars
from scripted import DistantTeacher

from thinktuning.cli import main
from thinktuning.update import PolicyUpdate

pytestmark = pytest.mark.slow

# Plain gradient descent: Adam would blow up what rounding makes of small gradients.
PLAIN = ("--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.1")


def test_leaving_out_idle_rows_changes_nothing(student, questions, tmp_path, monkeypatch):
    main(fit_arguments(student(), questions, tmp_path / "out", *PLAIN))
    monkeypatch.setattr(PolicyUpdate, "trained_rows", lambda self, mini: mini)
    main(fit_arguments(student(), questions, tmp_path / "in", *PLAIN))
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


def test_entropy_is_of_the_student_s_own_tokens(student, questions, tmp_path, monkeypatch):
    observe, seen = PolicyUpdate.observe, []

    def watched(self, micro, scores, output):
        own = [
            entropy
            for row in zip(scores.entropy, micro.completion_mask, micro.injected_mask, strict=True)
            for entropy, there, injected in zip(*(x.tolist() for x in row), strict=True)
            if there and not injected
        ]
        seen.append((own, int(micro.injected_mask.sum())))
        observe(self, micro, scores, output)

    monkeypatch.setattr(PolicyUpdate, "observe", watched)
    main(fit_arguments(student(), questions, tmp_path, *PLAIN, "--trainer.max_steps=1"))
    assert sum(injected for _, injected in seen) > 0
    own = [entropy for entropies, _ in seen for entropy in entropies]
    logged = scalars(tmp_path / "version_0")["objective/entropy"]
    assert logged == pytest.approx([sum(own) / len(own)], rel=1e-5)


FIXED = (
    "--model.objective.kl_coef=0.1",
    "--model.num_mini_batches=2",
    "--guidance.gamma.start=0.25",
)


def test_while_a_distant_teacher_writes_the_others_are_read(
    student, questions, tmp_path, monkeypatch
):
    frozen, sizes, teachers = PolicyUpdate._frozen_logprobs, [], []

    def watched(self, model, inputs, wanted):
        result = frozen(self, model, inputs, wanted)
        sizes.append(int(wanted.sum()))
        for teacher in teachers:
            teacher.computed.set()
        return result

    class Noted(DistantTeacher):
        def __init__(self):
            super().__init__()
            teachers.append(self)

        def reply(self, chats, params):
            replies = super().reply(chats, params)
            self.computed.clear()
            return replies

    monkeypatch.setattr(PolicyUpdate, "_frozen_logprobs", watched)
    monkeypatch.setattr(scripted, "Noted", Noted, raising=False)
    more = (*PLAIN, *FIXED)
    main(fit_arguments(student(), questions, tmp_path / "here", *more))
    assert sizes == [16] * 6, "old and reference, of three steps"
    sizes.clear()
    distant = "--guidance.teacher=scripted.Noted"
    main(fit_arguments(student(), questions, tmp_path / "there", *more, distant))
    (teacher,) = teachers
    assert teacher.waited == 0, "it waited for nobody who computed"
    assert sizes == [12, 12, 4, 4] * 3, "of four in a group one is guided"
    here, there = (checkpoint(tmp_path / name)["state_dict"] for name in ("here", "there"))
    for name in here:
        torch.testing.assert_close(there[name], here[name], rtol=0, atol=1e-6)
    here, there = (scalars(tmp_path / name / "version_0") for name in ("here", "there"))
    assert max(here["guidance/realised_gamma"]) == 0.25
    for name in ("objective/kl", "objective/loss", "engine/logprob_gap"):
        assert there[name] == pytest.approx(here[name], abs=1e-5)
