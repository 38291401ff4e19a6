"""The numbers of a rollout batch, worked out by hand."""

from dataclasses import replace

import pytest

from thinktuning.metrics import rollout_means
from thinktuning.types import Feedback, Guidance, Outcome, Prompt, Rollout, RolloutBatch

CORRECT, WRONG = Outcome.CORRECT, Outcome.WRONG


def student(tokens: int, outcome: Outcome, phrase: float = 0.0) -> Rollout:
    """What the student wrote, scored with a maths reward and a phrase reward."""
    parts = {"MathReward": float(outcome is CORRECT), "PhraseReward": phrase}
    return Rollout(
        prompt=Prompt(0, "?", "1", [1]),
        sample=0,
        completion_ids=(5,) * tokens,
        logprobs=(-1.0,) * tokens,
        injected_mask=(False,) * tokens,
        finished=outcome is not Outcome.CUT_OFF,
        text="",
        outcome=outcome,
        reward=sum(parts.values()),
        reward_parts=parts,
    )


def reply(opinion: str, skipped: str | None = None) -> Guidance:
    return Guidance(("self_conflict",), "text", Feedback(opinion, "reason", "phrase"), skipped)


def guided(
    before: Rollout, opinion: str, injected: int, outcome: Outcome, phrase: float = 0.0
) -> Rollout:
    """``before`` without its last token, and ``injected`` tokens behind it."""
    own = len(before.completion_ids) - 1
    before = replace(before, guidance=reply(opinion))
    return replace(
        student(own + injected, outcome, phrase),
        injected_mask=(False,) * own + (True,) * injected,
        guidance=before.guidance,
        original=before,
    )


UNPARSED = Guidance(("self_conflict",), "gibberish", None, "unparsed")
NOT_ASKED = Guidance(("self_conflict",), skipped="prompt_too_long")

FIRST_GROUP = (
    guided(student(3, WRONG), "incorrect", injected=4, outcome=CORRECT, phrase=0.5),
    guided(student(4, CORRECT), "incorrect", injected=3, outcome=WRONG),
    replace(student(5, WRONG, phrase=0.5), guidance=UNPARSED),
    student(8, Outcome.CUT_OFF),
)
SECOND_GROUP = (
    replace(student(7, CORRECT), guidance=NOT_ASKED),
    replace(student(6, CORRECT), guidance=reply("correct", skipped="too_long")),
    guided(student(2, Outcome.NO_ANSWER), "incorrect", injected=2, outcome=CORRECT),
    guided(student(2, CORRECT), "correct", injected=5, outcome=CORRECT),
)
THIRD_GROUP = (
    student(3, Outcome.TIMEOUT),
    guided(student(5, WRONG), "correct", injected=4, outcome=Outcome.CUT_OFF),
    replace(student(4, WRONG), guidance=reply("incorrect", skipped="special_token")),
    replace(student(1, WRONG), guidance=UNPARSED),
)
BATCH = RolloutBatch(0, 4, FIRST_GROUP + SECOND_GROUP + THIRD_GROUP)


def test_every_number_of_a_batch():
    found = {name: tuple(value) for name, value in rollout_means(BATCH).items()}
    assert found == {
        # Rewards: 1.5, 0, 0.5, 0 | 1, 1, 1, 1 | 0, 0, 0, 0; guided: 1st, 2nd | 3rd, 4th | 2nd.
        "reward": (6.0, 12),
        "reward/guided": (3.5, 5),
        "reward/unguided": (2.5, 7),
        "reward/failed": (0, 12),
        "reward/MathReward": (5.0, 12),
        "reward/PhraseReward": (1.0, 12),
        # The student alone was right in: 2nd | 1st, 2nd, 4th | none.
        "accuracy/student": (4, 12),
        "accuracy/before_guidance": (2, 5),
        "accuracy/after_guidance": (3, 5),
        # The one without an answer was guided; what the student did counts.
        "accuracy/no_answer": (1, 12),
        "accuracy/timeout": (1, 12),
        "guidance/wrong_to_right": (2, 5),
        "guidance/right_to_wrong": (1, 5),
        # 6 + 6 + 5 + 8 | 7 + 6 + 3 + 6 | 3 + 8 + 4 + 1
        "length/completion": (63, 12),
        # 3 + 4 + 5 + 8 | 7 + 6 + 2 + 2 | 3 + 5 + 4 + 1
        "length/student": (50, 12),
        # 4 + 3 | 2 + 5 | 4
        "length/injected": (18, 5),
        # One by the student, one by the injection's cut.
        "length/cut_off": (2, 12),
        # The second group has 1 throughout, the third 0.
        "groups/zero_variance": (2, 3),
        "guidance/realised_gamma": (5, 12),
        # All finished but one; the one that the injection cut was finished before.
        "guidance/eligible": (11, 12),
        # Selected: 1st, 2nd, 3rd | all | 2nd, 3rd, 4th; one of them wasn't asked.
        "guidance/parsed": (7, 9),
        # Right about: 1st, not 2nd | 2nd, 3rd, 4th | not 2nd, 3rd.
        "guidance/verdict_agrees": (5, 7),
        "guidance/skipped_prompt_too_long": (1, 10),
        "guidance/closed": (0, 9),
        "guidance/cached": (0, 9),
        "guidance/skipped_unavailable": (0, 10),
        "guidance/skipped_unparsed": (2, 10),
        "guidance/skipped_other_script": (0, 10),
        "guidance/skipped_too_long": (1, 10),
        "guidance/skipped_special_token": (1, 10),
    }


def test_without_guidance_its_means_are_over_nothing():
    batch = RolloutBatch(0, 2, (student(2, CORRECT), student(4, WRONG)))
    found = rollout_means(batch)
    empty = {name for name, (_, weight) in found.items() if weight == 0}
    assert empty == {
        "reward/guided",
        "accuracy/before_guidance",
        "accuracy/after_guidance",
        "guidance/wrong_to_right",
        "guidance/right_to_wrong",
        "guidance/parsed",
        "guidance/verdict_agrees",
        "guidance/closed",
        "guidance/cached",
        "guidance/skipped_prompt_too_long",
        "guidance/skipped_unavailable",
        "guidance/skipped_unparsed",
        "guidance/skipped_other_script",
        "guidance/skipped_too_long",
        "guidance/skipped_special_token",
        "length/injected",
    }
    assert tuple(found["reward/unguided"]) == tuple(found["reward"]) == (1.0, 2)
    assert tuple(found["guidance/realised_gamma"]) == (0, 2)


@pytest.mark.parametrize("cut", [4, 8])
def test_numbers_of_two_ranks_add_up_to_those_of_both(cut):
    whole = rollout_means(BATCH)
    first = rollout_means(replace(BATCH, rollouts=BATCH.rollouts[:cut]))
    second = rollout_means(replace(BATCH, rollouts=BATCH.rollouts[cut:]))
    # Ranks add up tables without names: the same names in the same order everywhere.
    assert list(first) == list(second) == list(whole)
    for name, value in whole.items():
        added = [a + b for a, b in zip(first[name], second[name], strict=True)]
        assert added == pytest.approx(list(value)), name


def test_a_teacher_who_said_nothing_was_asked_all_the_same():
    silent = Guidance(("self_conflict",), "", None, "unparsed")
    batch = RolloutBatch(0, 2, (replace(student(2, WRONG), guidance=silent), student(2, WRONG)))
    assert tuple(rollout_means(batch)["guidance/parsed"]) == (0, 1)
