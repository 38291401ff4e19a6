"""Which answer a response ends on, and whether it is right: tests/data/answers.yaml."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from thinktuning.rewards import LETTERS, extract_answer, judge, last_boxed, maths, verify_math
from thinktuning.rewards.verifier import Verifier
from thinktuning.types import AnswerKind, Outcome

TABLE = yaml.safe_load(Path(__file__).with_name("data").joinpath("answers.yaml").read_text("utf-8"))
KEYS = {"response", "answer", "outcome", "extracted"}


@pytest.fixture(scope="module", autouse=True)
def verifier():
    """The package's verifier, with a deadline that tests can wait for."""
    with pytest.MonkeyPatch.context() as patch:
        verifier = Verifier(seconds=2.0)
        patch.setattr(maths, "_verifier", verifier)
        yield verifier
        verifier.close()


def cases(*kinds):
    return [
        pytest.param(AnswerKind(kind), case, id=f"{kind}-{number}-{case['response'][:30]}")
        for kind in kinds
        for number, case in enumerate(TABLE[kind], start=1)
    ]


def judged(kind, case):
    finished, options = case.get("finished", True), case.get("options", 4)
    return judge(kind, case["response"], case["answer"], finished, options)


@pytest.mark.parametrize(("kind", "case"), cases(*AnswerKind))
def test_a_response_is_judged_as_a_person_would(kind, case):
    assert judged(kind, case) == (Outcome(case["outcome"]), case["extracted"]), case.get("why")


@pytest.mark.parametrize(("kind", "case"), cases(*AnswerKind))
def test_a_case_of_the_table_is_well_formed(kind, case):
    assert set(case) - {"finished", "options", "why"} == KEYS
    golds = {AnswerKind.CHOICE: set(LETTERS), AnswerKind.YES_NO: {"yes", "no"}}
    if kind in golds:
        assert case["answer"] in golds[kind]
    if case["outcome"] in ("correct", "wrong") and kind in golds:
        assert (case["outcome"] == "correct") == (case["extracted"] == case["answer"])
    assert (case["outcome"] == "cut_off") == (not case.get("finished", True))


def test_every_outcome_of_every_kind_is_in_the_table():
    for kind in AnswerKind:
        expected = set(Outcome) - ({Outcome.TIMEOUT} if kind is not AnswerKind.MATH else set())
        assert {case["outcome"] for case in TABLE[kind]} == expected


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(("kind", "case"), cases("math"))
def test_mathematics_is_judged_as_in_training(kind, case, finished):
    outcome, extracted = judge(kind, case["response"], case["answer"], finished)
    assert outcome is verify_math(case["response"], case["answer"], finished)
    assert extracted == (last_boxed(case["response"]) or None)


@pytest.mark.parametrize(("kind", "case"), cases("choice", "yes_no"))
def test_a_response_that_was_cut_off_is_never_right_but_its_answer_is_told(kind, case):
    unfinished = case | {"finished": False}
    assert judged(kind, unfinished) == (Outcome.CUT_OFF, case["extracted"])


@pytest.mark.parametrize("letter", LETTERS)
@pytest.mark.parametrize(
    "form",
    [r"\boxed{%s}", "The answer is %s.", "I choose %s.", "It's %s.", "%s", "%s. mine", "(%s)"],
)
def test_every_form_reads_each_letter_and_none_beyond_the_options(form, letter):
    place = LETTERS.index(letter)
    for options in range(2, len(LETTERS) + 1):
        expected = letter if place < options else None
        assert extract_answer(AnswerKind.CHOICE, form % letter, options) == expected


signs = [*"ABIJabi().:*_$\\{}\n -'’\"“#", r"\boxed{", r"\text{", r"\("]
words = [
    "answer is ",
    "Answer: ",
    "it's ",
    "not ",
    "n't ",
    "I choose ",
    "option ",
    "so ",
    "is correct",
]
pieces = st.sampled_from([*signs, *words, "yes", "No", "true ", "or ", "if "])
responses = st.lists(pieces | st.text(max_size=3), max_size=25).map("".join)


@settings(deadline=None, max_examples=300)
@given(responses, st.integers(2, len(LETTERS)))
def test_whatever_is_written_an_answer_is_one_of_those_allowed_or_none(text, options):
    assert extract_answer(AnswerKind.CHOICE, text, options) in {None, *LETTERS[:options]}
    assert extract_answer(AnswerKind.YES_NO, text) in {None, "yes", "no"}
    in_box = extract_answer(AnswerKind.MATH, text)
    assert in_box is None or (in_box and in_box in text)


@settings(deadline=None)
@given(responses)
def test_a_box_at_the_end_beats_whatever_is_written_before(text):
    assert extract_answer(AnswerKind.CHOICE, text + r" \boxed{C}") == "C"
    assert extract_answer(AnswerKind.YES_NO, text + r" \boxed{no}") == "no"
