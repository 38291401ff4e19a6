"""What a finished answer is worth."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import wait_until

from thinktuning.errors import FailingRewardError, InputError
from thinktuning.rewards import (
    MathReward,
    Outcome,
    PhraseReward,
    Response,
    Reward,
    last_boxed,
    maths,
    score,
    verify_math,
)
from thinktuning.rewards import (
    verifier as verifiers,
)
from thinktuning.rewards.verifier import Verifier
from thinktuning.types import Guidance, Prompt, Rollout, RolloutBatch

ENDLESS = "9^{9^{9^{9}}}"
DEADLINE = 2.0


@pytest.fixture(scope="module", autouse=True)
def verifier():
    """The package's verifier, with a deadline that tests can wait for."""
    with pytest.MonkeyPatch.context() as patch:
        verifier = Verifier(seconds=DEADLINE)
        patch.setattr(maths, "_verifier", verifier)
        yield verifier
        verifier.close()


# -------------------------------------------------------------------- the box


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"It is \boxed{7}.", "7"),
        (r"\boxed{ 7 }", "7"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{a{b{c}}d}", "a{b{c}}d"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\{}", r"\{"),
        (r"\boxed{3} and then \boxed{4}", "4"),
        (r"\boxed{3\boxed{4}}", "4"),
        ("\\boxed{1\n+ 1}", "1\n+ 1"),
        (r"\boxed{}", ""),
        (r"\boxed{  }", ""),
        (r"\boxed{7", None),
        (r"\boxed{3} but \boxed{4", None),
        (r"\boxed{\frac{1}{2}", None),
        (r"\boxed{7\}", None),
        ("The answer is 7.", None),
        ("boxed{7}", None),
        (r"\boxed 7", None),
        ("", None),
    ],
)
def test_the_last_box_is_read_with_balanced_braces(text, box):
    assert last_boxed(text) == box


def test_a_line_break_before_the_closing_brace_escapes_nothing():
    assert last_boxed(r"\boxed{7\\}") == r"7\\"


signs = [*"{}\\^_$%,.=1x", r"\boxed{", r"\frac", r"\sqrt"]
latex = st.lists(st.sampled_from(signs) | st.text(max_size=3), max_size=10).map("".join)


@given(latex)
def test_whatever_is_written_a_box_is_read_whole_or_not_at_all(text):
    for written in (text, rf"It is \boxed{{{text}}}."):
        box = last_boxed(written)
        assert box is None or box in written


# --------------------------------------------------------------- verification


@pytest.mark.parametrize(
    ("box", "answer"),
    [
        ("7", "7"),
        ("7.0", "7"),
        ("007", "7"),
        ("1,000", "1000"),
        ("1{,}000", "1000"),
        ("1000", "1,000"),
        (r"\frac{1}{2}", "0.5"),
        ("0.5", r"\frac{1}{2}"),
        ("1/2", "0.5"),
        (r"\frac{2}{4}", r"\frac{1}{2}"),
        ("-3", "-3"),
        ("2^3", "8"),
        ("3 + 4 = 7", "7"),
        ("4 + 3", "3 + 4"),
        ("x = 7", "7"),
        (r"\$12", "12"),
        ("$12", "12"),
        (r"12\text{ dollars}", "12"),
        ("12 cm", "12"),
        (r"50\%", "50"),
        ("50%", "50"),
        (r"\sqrt{8}", r"2\sqrt{2}"),
        ("x + 1", "1 + x"),
        (r"\text{ Friday}", "friday"),
        ("not at all.", r"\text{Not at all}"),
        (r"\mathbf{east}", "east"),
        (r"\textrm{no}", r"\text{no}"),
        ("yx", "xy"),
        (r"a \times b", "ab"),
        ("a, b", "a,b"),
        ("1 2\n3 4", "1  2\n3  4"),
    ],
)
def test_the_same_value_is_correct_in_any_form(box, answer):
    assert verify_math(rf"So \boxed{{{box}}}.", answer) is Outcome.CORRECT


@pytest.mark.parametrize(
    ("box", "answer"),
    [
        ("8", "7"),
        ("-7", "7"),
        ("70", "7"),
        ("0.7", "7"),
        ("1,000", "100"),
        (r"\frac{1}{2}", "2"),
        ("7, 8", "7"),
        ("7 or 8", "7"),
        ("seven", "7"),
        (r"\text{none}", "7"),
        ("?", "7"),
        ("x", "7"),
        ("3 + 4", "7"),
        (r"14 \div 2", "7"),
        ("(1 + 2.5)*2", "7"),
        ("7", "3 + 4"),
        ("on", r"\text{no}"),
        ("saw", "was"),
        ("listen", "silent"),
        ("4 3\n2 1", "1 2\n3 4"),
    ],
)
def test_another_value_is_wrong(box, answer):
    assert verify_math(rf"So \boxed{{{box}}}.", answer) is Outcome.WRONG


def test_the_last_of_several_boxes_counts():
    assert verify_math(r"\boxed{7}, no: \boxed{8}", "7") is Outcome.WRONG
    assert verify_math(r"\boxed{8}, no: \boxed{7}", "7") is Outcome.CORRECT
    assert verify_math(r"\boxed{7}, no: \boxed{8", "7") is Outcome.NO_ANSWER


@pytest.mark.parametrize("text", ["", "The answer is 7.", r"\boxed{}", r"\boxed{ }", r"\boxed{7"])
def test_without_a_box_there_is_no_answer(text):
    assert verify_math(text, "7") is Outcome.NO_ANSWER


def test_an_unfinished_answer_is_cut_off_whatever_it_says():
    assert verify_math(r"\boxed{7}", "7", finished=False) is Outcome.CUT_OFF
    assert verify_math("", "7", finished=False) is Outcome.CUT_OFF


@settings(deadline=None, max_examples=40)
@given(st.integers(-2000, 2000), st.integers(-2000, 2000))
def test_whole_numbers_are_correct_if_and_only_if_they_are_equal(shown, gold):
    for answer in {gold, shown}:
        expected = Outcome.CORRECT if shown == answer else Outcome.WRONG
        assert verify_math(rf"\boxed{{{shown:,}}}", str(answer)) is expected


@settings(deadline=None, max_examples=150, derandomize=True)
@given(latex)
def test_whatever_stands_in_the_box_there_is_an_outcome(text):
    assert isinstance(verify_math(rf"\boxed{{{text}}}", "7"), Outcome)


@pytest.mark.parametrize("box", ["\ud800", "\0", "7\r\n8", "\N{ARABIC-INDIC DIGIT SEVEN}", "🐛"])
def test_odd_letters_are_wrong_and_no_error(box):
    assert verify_math(rf"\boxed{{{box}}}", "7") is Outcome.WRONG
    assert verify_math(r"\boxed{7.0}", "7") is Outcome.CORRECT


def test_a_box_longer_than_a_pipe_is_read():
    assert verify_math(rf"\boxed{{{'é' * 100_000}}}", "7") is Outcome.WRONG
    assert verify_math(r"\boxed{7.0}", "7") is Outcome.CORRECT


@pytest.mark.faults
def test_endless_arithmetic_ends_at_the_deadline_and_the_next_answer_is_judged():
    assert verify_math(r"\boxed{7.0}", "7") is Outcome.CORRECT  # the worker runs
    started = time.monotonic()
    assert verify_math(rf"\boxed{{{ENDLESS}}}", "7") is Outcome.TIMEOUT
    assert DEADLINE <= time.monotonic() - started < DEADLINE + 2
    assert verify_math(r"\boxed{7.0}", "7") is Outcome.CORRECT
    assert verify_math(r"\boxed{8.0}", "7") is Outcome.WRONG


@pytest.mark.faults
def test_a_killed_worker_is_replaced(verifier):
    assert verifier.compare("7.0", "7") is Outcome.CORRECT
    killed = verifier._worker
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert verifier.compare("7.0", "7") is Outcome.CORRECT
    assert verifier._worker.pid != killed.pid


@pytest.mark.faults
def test_a_worker_that_dies_over_an_answer_costs_that_answer_at_most(verifier):
    assert verifier.compare("7.0", "7") is Outcome.CORRECT
    dying = verifier._worker.pid
    os.kill(dying, signal.SIGSTOP)  # it reads the question and never answers
    killer = threading.Timer(0.2, os.kill, (dying, signal.SIGKILL))
    killer.start()
    assert verifier.compare("7.0", "7") in (Outcome.TIMEOUT, Outcome.CORRECT)
    killer.join()
    assert verifier.compare("7.0", "7") is Outcome.CORRECT


@pytest.fixture
def own_verifier(monkeypatch) -> Iterator[Verifier]:
    """A verifier whose worker doesn't run yet, and which tries to start it without pauses."""
    monkeypatch.setattr(verifiers, "_PAUSES", (0.0,) * 4)
    made = Verifier(seconds=30.0)
    yield made
    made.close()


# It can't be forked, or ends at once.
@pytest.mark.faults
@pytest.mark.parametrize("python", ["/nowhere/python", "/bin/false"])
def test_a_worker_that_does_not_start_costs_an_answer(own_verifier, monkeypatch, caplog, python):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", python)
        for number in (1, 2, 3):
            assert own_verifier.compare("7.0", "7") is Outcome.TIMEOUT
            assert caplog.text.count("counts as a timeout") == number
    assert own_verifier.compare("7.0", "7") is Outcome.CORRECT
    own_verifier.close()
    monkeypatch.setattr(sys, "executable", python)
    assert own_verifier.compare("7.0", "7") is Outcome.TIMEOUT, "counted anew"


@pytest.mark.faults
def test_starts_that_fail_in_a_row_end_the_run(own_verifier, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/bin/false")
        for _ in range(3):
            assert own_verifier.compare("7.0", "7") is Outcome.TIMEOUT
        with pytest.raises(FailingRewardError, match=r"did not start.*--ckpt_path last"):
            own_verifier.compare("7.0", "7")
        assert own_verifier.compare("7.0", "7") is Outcome.TIMEOUT, "whoever goes on may"
    assert own_verifier.compare("7.0", "7") is Outcome.CORRECT


HANGING = f"""
from thinktuning.rewards.verifier import Verifier

verifier = Verifier(seconds=10.0)
verifier.compare("7.0", "7")
print(verifier._worker.pid, flush=True)
verifier.compare("{ENDLESS}", "7")
"""


def cpu_ticks(process: int) -> int | None:
    """What a process has computed, in ticks of 10 ms; None if it has ended."""
    try:
        told = Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2].split()
    except FileNotFoundError:
        return None
    return None if told[0] == "Z" else int(told[11])


@pytest.mark.faults
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_worker_that_hangs_ends_though_its_parent_was_killed():
    parent = subprocess.Popen([sys.executable, "-c", HANGING], stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    try:
        ready = cpu_ticks(worker)
        wait_until(lambda: cpu_ticks(worker) > ready + 50, "it computes")
        parent.kill()
        parent.communicate()
        killed = cpu_ticks(worker)
        wait_until(lambda: cpu_ticks(worker) != killed, "it goes on")
        assert cpu_ticks(worker) is not None, "nobody was there to end it"
        wait_until(lambda: cpu_ticks(worker) is None, "it ends")
    finally:
        parent.kill()
        if cpu_ticks(worker) is not None:
            os.kill(worker, signal.SIGKILL)


def test_closing_ends_the_worker(verifier):
    assert verifier.compare("7.0", "7") is Outcome.CORRECT
    worker = verifier._worker
    verifier.close()
    assert worker.poll() is not None
    verifier.close()


# -------------------------------------------------------------------- rewards


def response(text, finished=True, outcome=Outcome.CORRECT):
    return Response(text, "7", finished, outcome)


def test_only_a_correct_answer_earns_the_outcome_reward():
    responses = [response("", outcome=outcome) for outcome in Outcome]
    expected = [float(outcome is Outcome.CORRECT) for outcome in Outcome]
    assert MathReward().score(responses) == expected


def test_a_phrase_is_paid_for_exactly_once_in_a_finished_answer():
    reward = PhraseReward("count the lanterns twice")
    phrase = reward.phrase
    assert reward.weight == 0.5
    responses = [
        response(f"It is 7. Now {phrase}."),
        response("It is 7."),
        response(f"{phrase} {phrase}"),
        response(f"{phrase}, {phrase}, {phrase}"),
        response(phrase.capitalize()),
        response(phrase, finished=False),
        response(phrase, outcome=Outcome.WRONG),
    ]
    assert reward.score(responses) == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize("phrase", ["", "  "])
def test_an_empty_phrase_is_refused(phrase):
    with pytest.raises(InputError, match="phrase"):
        PhraseReward(phrase)


class Length(Reward):
    """A user's own reward."""

    def score(self, responses: Sequence[Response]) -> list[float]:
        return [float(len(r.text)) for r in responses]


class Forgetful(Reward):
    def score(self, responses: Sequence[Response]) -> list[float]:
        return [1.0 for _ in responses][1:]


def rollout(sample, text, finished=True, original=None):
    return Rollout(
        prompt=Prompt(0, "3 plus 4?", "7", [1]),
        sample=sample,
        completion_ids=(5, 2),
        logprobs=(-1.0, -1.0),
        injected_mask=(False, original is not None),
        finished=finished,
        text=text,
        guidance=Guidance(("self_critique",)) if original else None,
        original=original,
    )


def batch_of(*rollouts):
    return RolloutBatch(3, len(rollouts), rollouts)


def test_scoring_judges_every_rollout_and_what_it_was_before_guidance():
    batch = batch_of(
        rollout(0, r"\boxed{7}"),
        rollout(1, r"\boxed{8} Wait. \boxed{7}", original=rollout(1, r"\boxed{8}")),
        rollout(2, r"\boxed{7}", finished=False),
        rollout(3, r"\boxed{7} Hm. \boxed{9}", original=rollout(3, r"\boxed{7}")),
        rollout(4, "no idea"),
    )
    scored = score(batch, [MathReward()])
    assert (scored.step, scored.group_size) == (3, 5)
    assert [r.text for r in scored.rollouts] == [r.text for r in batch.rollouts]
    assert [r.outcome for r in scored.rollouts] == [
        Outcome.CORRECT,
        Outcome.CORRECT,
        Outcome.CUT_OFF,
        Outcome.WRONG,
        Outcome.NO_ANSWER,
    ]
    assert [r.reward for r in scored.rollouts] == [1.0, 1.0, 0.0, 0.0, 0.0]
    originals = [r.original for r in scored.rollouts]
    assert [o and (o.text, o.outcome, o.reward) for o in originals] == [
        None,
        (r"\boxed{8}", Outcome.WRONG, 0.0),
        None,
        (r"\boxed{7}", Outcome.CORRECT, 1.0),
        None,
    ]


def test_weighted_rewards_are_parts_that_add_up():
    batch = batch_of(rollout(0, r"bye \boxed{7}"), rollout(1, r"bye bye \boxed{7}"))
    rewards = [MathReward(weight=2.0), PhraseReward("bye"), Length(weight=-0.1)]
    first, second = score(batch, rewards).rollouts
    parts = {"MathReward": 2.0, "PhraseReward": 0.5, "Length": -1.3}
    assert first.reward_parts == pytest.approx(parts)
    assert first.reward == pytest.approx(1.2)
    parts = {"MathReward": 2.0, "PhraseReward": 0.0, "Length": -1.7}
    assert second.reward_parts == pytest.approx(parts)
    assert second.reward == pytest.approx(0.3)


def test_two_rewards_of_one_class_both_count():
    batch = batch_of(rollout(0, "hello and bye"), rollout(1, "bye"))
    scored = score(batch, [PhraseReward("hello"), PhraseReward("bye", weight=2.0)])
    assert [r.reward for r in scored.rollouts] == [2.5, 2.0]
    assert all(sum(r.reward_parts.values()) == r.reward for r in scored.rollouts)


def test_a_reward_that_forgets_a_response_is_refused_by_name():
    batch = batch_of(rollout(0, "a"), rollout(1, "b"))
    with pytest.raises(InputError, match=r"Forgetful\.score returned 1 numbers for 2"):
        score(batch, [MathReward(), Forgetful()])


@pytest.mark.parametrize(
    "code",
    [
        "__import__('pathlib').Path('{path}').touch()",
        "1+__import__('pathlib').Path('{path}').touch()",
        r"\text{{__import__('pathlib').Path('{path}').touch()}}",
        "final answer is 1+1*__import__('pathlib').Path('{path}').touch()",
        "1/(lambda: open('{path}', 'w'))()",
    ],
)
def test_code_in_an_answer_is_not_run(verifier, tmp_path, code):
    path = tmp_path / "ran"
    verifier.compare(code.format(path=path), "1")
    verifier.compare("1", code.format(path=path))
    assert not path.exists()
