"""What goes wrong in a step: who talks nonsense, stays away, raises, hangs; numbers; memory."""

import json
import resource
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scripted
import torch
from running import audit, checkpoint, fit_arguments, room, scalars
from scripted import REPLY, BrokenReward, MoodyReward

from thinktuning.callbacks import AuditLog
from thinktuning.cli import main
from thinktuning.engines import TransformersEngine
from thinktuning.errors import FailingRewardError, InputError
from thinktuning.host_memory import return_freed_memory
from thinktuning.module import ThinkTuningModule
from thinktuning.recovery import is_out_of_memory
from thinktuning.rewards import Response, Reward, RewardGuard
from thinktuning.rewards.verifier import Verifier
from thinktuning.types import Guidance, Outcome, Prompt, Rollout, RolloutBatch
from thinktuning.update import PolicyUpdate

pytestmark = [pytest.mark.slow, pytest.mark.faults]


def ended(arguments: list[str]) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    return str(exit_.value)


# ------------------------------------------------------------------- teacher

GOOD = REPLY.format(reason="Wait, let me check.", phrase=r"It is \boxed{3}.")
ODD = {
    "": "unparsed",
    "Sure! The answer looks right to me.": "unparsed",
    "<opinion>correct</opinion>\n<reason>Wait, le": "unparsed",
    GOOD.replace("</phrase>", ""): "unparsed",
    GOOD + GOOD: "unparsed",
    "x" * 100_000: "unparsed",
    REPLY.format(reason="so " * 30_000, phrase="It is 3."): "too_long",
    GOOD.replace("Wait", "\x1b[2J\x00Wait"): "unparsed",
    GOOD.replace("Wait, let me check.", "等一下，让我再检查一遍这个答案。"): "other_script",
    GOOD: None,
}


def test_a_teacher_s_nonsense_leaves_rollouts_unguided(student, questions, tmp_path, monkeypatch):
    monkeypatch.setattr(scripted.OddTeacher, "texts", tuple(ODD))
    odd = ("--guidance.teacher=scripted.OddTeacher", "--guidance.constrained=false")
    main(fit_arguments(student(), questions, tmp_path, *odd))
    rows = audit(tmp_path / "version_0")
    assert {row["teacher"] for row in rows} == set(ODD), "all were said"
    assert all(row["skipped"] == ODD[row["teacher"]] for row in rows)
    assert all((row["after"] is None) == (row["skipped"] is not None) for row in rows)
    counted = scalars(tmp_path / "version_0")
    for reason in ("unparsed", "too_long", "other_script"):
        share = sum(row["skipped"] == reason for row in rows) / len(rows)
        logged = counted[f"guidance/skipped_{reason}"]
        assert sum(logged) / len(logged) == pytest.approx(share, abs=0.05)
    assert checkpoint(tmp_path)["global_step"] == 3


NOBODY = (
    "--guidance.teacher=thinktuning.engines.OpenAIEngine",
    "--guidance.teacher.base_url=http://127.0.0.1:9/v1",
    "--guidance.teacher.model=nobody",
    "--guidance.teacher.max_retries=0",
)


def test_a_teacher_that_stays_away_ends_the_run_in_the_end(student, questions, tmp_path, caplog):
    patience = "--guidance.max_steps_without_teacher=2"
    said = ended(fit_arguments(student(), questions, tmp_path / "a", *NOBODY, patience))
    assert "hasn't replied for 2 steps in a row" in said
    assert "--ckpt_path last" in said
    assert "rollouts stay unguided until it does" in caplog.text
    endless = "--guidance.max_steps_without_teacher=null"
    main(fit_arguments(student(), questions, tmp_path / "b", *NOBODY, endless))
    assert checkpoint(tmp_path / "b")["global_step"] == 3
    assert scalars(tmp_path / "b" / "version_0")["guidance/realised_gamma"] == [0.0] * 3


def test_feedback_that_is_never_usable_is_told(student, questions, tmp_path, caplog):
    useless = ("--guidance.teacher=null", "--guidance.max_prompt_tokens=5", "--trainer.max_steps=7")
    main(fit_arguments(student(), questions, tmp_path, *useless))
    (told,) = [r.getMessage() for r in caplog.records if "plain GRPO" in r.getMessage()]
    assert "none of the teacher's feedback could be used for 5 steps" in told
    assert "prompt_too_long" in told


# ------------------------------------------------------------------- rewards


def responses(*answers: str) -> list[Response]:
    return [Response(f"It is {a}.", a, True, Outcome.CORRECT) for a in answers]


def test_a_reward_that_fails_costs_only_the_response_it_fails_on(caplog):
    guard = RewardGuard(seconds=0.5)
    scores = guard.scores(MoodyReward(), responses("0", "1", "5", "2", "3", "4", "6"))
    assert scores == [1.0, None, 1.0, None, None, None, 1.0]
    for reason in ("raised KeyError", "took longer than 0.5 s", "returned nan", "returned 'one'"):
        assert reason in caplog.text
    assert "'It is 2.'" in caplog.text


def test_failures_in_a_row_end_the_run_and_name_the_response():
    guard, broken, moody = RewardGuard(limit=3), BrokenReward(), MoodyReward()
    one_by_one = [guard.scores(broken, responses("7")) for _ in range(2)]
    assert one_by_one == [[None], [None]]
    assert guard.scores(moody, responses("7")) == [1.0], "which says nothing about the other"
    assert guard.scores(BrokenReward(), responses("7")) == [None], "the first of its own"
    with pytest.raises(FailingRewardError, match=r"BrokenReward failed on 3 responses.*'It is 8.'"):
        guard.scores(broken, responses("8", "9"))


def test_a_success_begins_a_new_row():
    guard, moody = RewardGuard(limit=3), MoodyReward()
    for _ in range(3):
        assert guard.scores(moody, responses("1", "1", "5")) == [None, None, 1.0]
    for _ in range(3):
        assert guard.scores(moody, responses("1", "1")) == [None, None]
        assert guard.scores(moody, responses("5")) == [1.0]


class Says(Reward):
    """Returns, or raises, always the same."""

    def __init__(self, what):
        super().__init__()
        self.what = what

    def score(self, responses):
        if isinstance(self.what, BaseException):
            raise self.what
        return [self.what for _ in responses]


@pytest.mark.parametrize(
    "number",
    [1, True, np.float32(1), np.int64(1), np.bool_(True), torch.tensor(1), torch.ones(1, 1)],
    ids=repr,
)
def test_any_number_is_a_reward(number):
    scores = RewardGuard().scores(Says(number), responses("1", "2"))
    assert scores == [1.0, 1.0] and {type(s) for s in scores} == {float}


@pytest.mark.parametrize(
    "odd",
    ["1", b"1", None, [1.0], 1j, 10**400, np.float32("nan"), torch.ones(2), torch.tensor(1j), {}],
    ids=lambda odd: repr(odd)[:20],
)
def test_what_is_no_number_is_a_failure(odd, caplog):
    assert RewardGuard().scores(Says(odd), responses("1", "2")) == [None, None]
    assert "failed (returned" in caplog.text


@pytest.mark.parametrize("stop", [SystemExit(3), KeyboardInterrupt("stop")], ids=repr)
def test_a_reward_that_ends_its_thread_is_told_as_what_it_raised(stop, caplog):
    assert RewardGuard().scores(Says(stop), responses("1")) == [None]
    assert f"raised {type(stop).__name__}: {stop}" in caplog.text


def test_no_responses_are_neither_asked_about_nor_a_success():
    guard = RewardGuard(limit=2)
    assert guard.scores(BrokenReward(), responses("7")) == [None]
    broken = BrokenReward()
    assert guard.scores(broken, responses("7")) == [None]
    assert guard.scores(broken, []) == []
    with pytest.raises(FailingRewardError):
        guard.scores(broken, responses("7"))


def test_a_reward_that_says_what_is_wrong_ends_the_run():
    class Misled(Reward):
        def score(self, responses):
            raise InputError("reward: give a phrase")

    with pytest.raises(InputError, match="give a phrase"):
        RewardGuard().scores(Misled(), responses("1"))


def test_failed_rewards_count_as_0_and_are_counted(student, questions, tmp_path):
    moody = "--model.rewards=[{class_path: scripted.MoodyReward, init_args: {weight: 2}}]"
    patient = ("--model.reward_seconds=0.3", "--model.max_failed_rewards=100")
    main(fit_arguments(student(), questions, tmp_path, moody, *patient))
    rows = audit(tmp_path / "version_0")
    judged = {row["gold"]: row["before"]["reward"] for row in rows}
    assert {0.0, 2.0} == set(judged.values())
    assert all((reward == 0) == (gold in ("1", "2", "3", "4")) for gold, reward in judged.items())
    assert max(scalars(tmp_path / "version_0")["reward/failed"]) > 0


def test_a_broken_reward_ends_the_run(student, questions, tmp_path):
    broken = "--model.rewards=[{class_path: scripted.BrokenReward}]"
    said = ended(fit_arguments(student(), questions, tmp_path, broken))
    assert "the reward BrokenReward failed on 16 responses in a row" in said
    assert "no such answer" in said and "gold answer" in said


def test_a_verifier_that_dies_of_an_answer_counts_as_a_timeout(caplog):
    class Dying(Verifier):
        def _running_worker(self):
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
            self._worker = subprocess.Popen([sys.executable, "-c", "input()"], **pipes)
            return self._worker

    assert Dying().compare("1", "2") is Outcome.TIMEOUT
    assert "died twice" in caplog.text


# ------------------------------------------------------------------- numbers


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_steps_that_are_not_finite_are_skipped_kept_and_end_the_run(
    student, questions, tmp_path, monkeypatch, where, caplog
):
    real = PolicyUpdate.loss

    def poisoned(self, micro):
        output = real(self, micro)
        infinite = float("inf")
        poison = infinite if where == "loss" else (micro.logprobs * infinite).sum()
        return output._replace(loss=output.loss + poison)

    monkeypatch.setattr(PolicyUpdate, "loss", poisoned)
    everywhere = ("--model.objective.kl_coef=0.01", "--model.num_mini_batches=2")
    everywhere += ("--trainer.logger=false",)  # which has no folder
    limit = "--model.max_skipped_steps=4"
    said = ended(fit_arguments(student(), questions, tmp_path, limit, *everywhere))
    assert "4 optimizer steps in a row" in said and "skipped" in said
    kept = sorted((tmp_path / "version_0" / "skipped").iterdir())
    assert [path.name for path in kept] == [
        f"step=00000{step}.mini={mini}.rank=0.pt" for step in (0, 1) for mini in (1, 2)
    ]
    first, second = (torch.load(path, weights_only=True) for path in kept[:2])
    assert first["input_ids"].shape[0] == 8 == first["advantages"].shape[0]
    assert not torch.equal(first["completion_mask"], second["completion_mask"])
    assert "the optimizer step is skipped (1 in a row" in caplog.text


def test_a_finite_step_begins_a_new_row(student, questions, tmp_path, monkeypatch):
    real = PolicyUpdate.loss

    def now_and_then(self, micro):
        output = real(self, micro)
        bad = self.module.global_step in (1, 3)
        return output._replace(loss=output.loss + float("inf")) if bad else output

    monkeypatch.setattr(PolicyUpdate, "loss", now_and_then)
    everywhere = "--model.objective.kl_coef=0.01"
    more = ("--model.max_skipped_steps=2", "--trainer.max_steps=5", everywhere)
    main(fit_arguments(student(), questions, tmp_path, *more))
    skipped = scalars(tmp_path / "version_0")["optimizer/skipped_steps"]
    assert skipped == [0.0, 1.0, 0.0, 1.0, 0.0]


def test_a_policy_that_has_diverged_ends_the_run_and_frees_its_engine(
    student, questions, tmp_path, monkeypatch
):
    """Its steps were finite; what they have made of it isn't."""
    real, closed = PolicyUpdate.run, []

    def too_far(self, inputs):
        work = real(self, inputs)
        self.module.policy.get_input_embeddings().weight.data.fill_(float("inf"))
        return work

    monkeypatch.setattr(PolicyUpdate, "run", too_far)
    monkeypatch.setattr(TransformersEngine, "close", lambda engine: closed.append(engine))
    said = ended(fit_arguments(student(), questions, tmp_path, "--data.val_size=0"))
    assert "the model's logits aren't finite" in said and "older checkpoint" in said
    assert len(closed) == 1


# --------------------------------------------------------------------- drift


class Drifting(TransformersEngine):
    """Samples, and says other logprobs than it has sampled by."""

    def sample(self, prompts, seeds, params):
        groups = super().sample(prompts, seeds, params)
        return [
            [replace(c, logprobs=tuple(x - 0.5 for x in c.logprobs)) for c in group]
            for group in groups
        ]


@pytest.mark.parametrize("limit", [0.2, None])
def test_a_gap_that_is_no_number_is_told_too(limit):
    module = SimpleNamespace(max_logprob_gap=limit)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        ThinkTuningModule._watch_drift(module, 3, {"engine/logprob_gap": float("nan")})
    assert len(told) == (limit is not None)


@pytest.mark.parametrize(("limit", "alarms"), [("0.4", 3), ("0.6", 0), ("null", 0)])
def test_drift_between_engine_and_trainer_is_told(
    student, questions, tmp_path, monkeypatch, limit, alarms
):
    monkeypatch.setattr(scripted, "Drifting", Drifting, raising=False)
    more = ("--engine=scripted.Drifting", f"--model.max_logprob_gap={limit}")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        main(fit_arguments(student(), questions, tmp_path, *more))
    assert sum("model.max_logprob_gap" in str(w.message) for w in told) == alarms
    assert scalars(tmp_path / "version_0")["engine/logprob_gap"] == pytest.approx([0.5] * 3)


# -------------------------------------------------------------------- memory

TOO_LITTLE = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def too_small(rows: int, error: Exception):
    """A device that has no memory for more than so many rollouts at a time."""
    real = PolicyUpdate._backward

    def backward(self, micro, deliver):
        loss = real(self, micro, deliver)  # late: what it has noted and added must be forgotten
        if micro.input_ids.shape[0] > rows:
            raise error
        return loss

    return backward


def test_too_little_memory_halves_micro_batches_once(
    student, questions, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(PolicyUpdate, "trained_rows", lambda self, mini: mini)  # all 16
    size = "--model.micro_batch_size={}".format
    main(fit_arguments(student(), questions, tmp_path / "small", size(8)))
    monkeypatch.setattr(PolicyUpdate, "_backward", too_small(8, TOO_LITTLE))
    main(fit_arguments(student(), questions, tmp_path / "halved", size(64)))
    assert caplog.text.count("micro-batches have 8 rollouts at most") == 1
    found, expected = (checkpoint(tmp_path / n)["state_dict"] for n in ("halved", "small"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    found, expected = (scalars(tmp_path / n / "version_0") for n in ("halved", "small"))
    for name in ("objective/loss", "objective/entropy", "optimizer/grad_norm"):
        assert found[name] == expected[name], "the first try isn't counted"


def test_freed_memory_goes_back_to_the_system():
    held = [torch.ones(2**14) for _ in range(4096)]  # 64 KiB each, all from glibc's heap
    del held[:-1]  # which can't shrink below the last one by itself
    before = resident_mib()
    return_freed_memory()
    assert before - resident_mib() > 200


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def test_too_little_memory_for_half_as_much_is_told(student, questions, tmp_path, monkeypatch):
    with pytest.raises(RuntimeError) as real:
        torch.empty(2**60)
    assert is_out_of_memory(real.value)
    assert not is_out_of_memory(RuntimeError("shapes don't fit"))
    monkeypatch.setattr(PolicyUpdate, "_backward", too_small(1, real.value))
    said = ended(fit_arguments(student(), questions, tmp_path, "--model.micro_batch_size=4"))
    assert "out of memory with micro-batches of 2 rollouts" in said
    assert "lower model.micro_batch_size" in said and "thinktuning plan" in said


@pytest.mark.parametrize(
    ("owner", "name", "stage"),
    [(torch.optim.AdamW, "step", "update"), (PolicyUpdate, "_frozen_logprobs", "logprobs")],
)
def test_too_little_memory_elsewhere_is_told(
    student, questions, tmp_path, monkeypatch, owner, name, stage
):
    def fails(*arguments, **options):
        raise TOO_LITTLE

    monkeypatch.setattr(owner, name, fails)
    said = ended(fit_arguments(student(), questions, tmp_path, "--model.objective.kl_coef=0.01"))
    assert f"the stage {stage} is out of memory" in said
    assert "Tried to allocate 2 GiB" in said and "thinktuning plan" in said


def test_too_little_memory_in_validation_is_told(student, questions, tmp_path, monkeypatch):
    def fails(*arguments, **options):
        raise TOO_LITTLE

    monkeypatch.setattr(TransformersEngine, "sample", fails)
    said = ended(["validate", *fit_arguments(student(), questions, tmp_path)[1:]])
    assert "the stage validation is out of memory" in said and "thinktuning plan" in said


# ---------------------------------------------------------------------- disk


def test_rows_of_the_audit_that_a_full_disk_does_not_take_are_lost_and_told(tmp_path, caplog):
    trainer = SimpleNamespace(world_size=1, global_rank=0, log_dir=tmp_path, global_step=0)
    log, path = AuditLog(), tmp_path / "audit.jsonl"
    log.on_train_start(trainer, None)

    def step(number: int) -> None:
        rollout = Rollout(
            prompt=Prompt(0, "3 plus 4?", "7", [1]),
            sample=0,
            completion_ids=(5,),
            logprobs=(-1.0,),
            injected_mask=(False,),
            finished=True,
            text="It is 7.",
            guidance=Guidance(("self_critique",)),
        )
        batch = RolloutBatch(number, 2, (rollout, rollout))
        log.on_train_batch_end(trainer, None, {"rollouts": batch}, None, number)

    def whole() -> list[int]:
        return [json.loads(line)["step"] for line in path.read_bytes().splitlines()]

    step(0)
    length = path.stat().st_size
    for number in (1, 2):
        with room(length + length // 4):  # half of a row
            step(number)
        assert path.stat().st_size == length + length // 4, "the test shows nothing"
    step(3)
    assert whole() == [0, 0, 3, 3]
    with room(2 * length + 1):
        step(4)
    log.on_exception(trainer, None, RuntimeError())  # Lightning's only call where a run stops
    assert whole() == [0, 0, 3, 3]
    assert caplog.text.count("training goes on") == 1
    assert "lacks 6 rows that couldn't be written" in caplog.text
