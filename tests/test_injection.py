"""The splice, with real tokenizers."""

import math
from dataclasses import replace
from functools import cache

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from thinktuning.teaching import inject
from thinktuning.types import Feedback, Guidance, Prompt, Rollout

KINDS = ["own_pad", "pad_is_eos", "no_template"]
SPECIAL = ["<|bos|>", "<|end|>", "<|start|>", "<|pad|>"]
ROOMY = 10_000
FEEDBACK = Feedback("incorrect", "Wait, let me check.", r"It is 3 + 4, so \boxed{7}.")
GUIDANCE = Guidance(("self_critique",), "the teacher's reply", FEEDBACK)

tokenizer = cache(tiny.tokenizer)


def rollout_of(text, own_ids, end_of_turn=None, guidance=GUIDANCE):
    end_of_turn = text.eos_token_id if end_of_turn is None else end_of_turn
    ids = (*own_ids, end_of_turn)
    return Rollout(
        prompt=Prompt(4, "3 plus 4?", "7", [5, 6]),
        sample=2,
        completion_ids=ids,
        logprobs=tuple(-0.5 - i for i in range(len(ids))),
        injected_mask=(False,) * len(ids),
        finished=True,
        text=text.decode(list(own_ids), skip_special_tokens=True),
        guidance=guidance,
    )


def spliced(rollout, feedback, text, **changes):
    arguments = {"stop_ids": (text.eos_token_id,), "max_new_tokens": ROOMY} | changes
    return inject(rollout, feedback, text, **arguments)


@st.composite
def answers(draw, kind):
    """A rollout as sampled: any ids but the end-of-turn one, so rarely what ``encode`` would give;
    some are special tokens, some are half a letter.
    """
    text = tokenizer(kind)
    ids = st.integers(0, len(text) - 1).filter(lambda i: i != text.eos_token_id)
    return rollout_of(text, draw(st.lists(ids, max_size=30)))


words = st.sampled_from([*" ".join(tiny.CORPUS).split(), "2 < 3", r"\boxed{1}", "\n\n", "é", "…"])
parts = (
    st.lists(words | st.text(st.characters(exclude_categories=["Cs"]), max_size=5), max_size=12)
    .map(lambda pieces: " ".join(pieces).strip())
    .filter(lambda part: part and not any(s in part for s in SPECIAL))
)
feedbacks = st.builds(Feedback, st.sampled_from(["correct", "incorrect"]), parts, parts)
separators = st.sampled_from(["\n\n", "\n", " "])

many_splices = pytest.mark.parametrize("kind", KINDS)
modest = settings(max_examples=60, deadline=None)


@many_splices
@modest
@given(st.data(), feedbacks, separators)
def test_the_students_ids_stay_and_the_teachers_text_follows(kind, data, feedback, separator):
    text, rollout = tokenizer(kind), data.draw(answers(kind))
    own_ids = rollout.completion_ids[:-1]
    guided = spliced(rollout, feedback, text, separator=separator)

    assert guided.completion_ids[: len(own_ids)] == own_ids
    assert guided.logprobs[: len(own_ids)] == rollout.logprobs[:-1]
    written = separator + feedback.reason + separator + feedback.phrase
    assert text.decode(list(guided.completion_ids[len(own_ids) : -1])) == written
    assert guided.text == rollout.text + written

    assert guided.completion_ids.count(text.eos_token_id) == 1
    assert guided.completion_ids[-1] == text.eos_token_id
    assert guided.finished

    length = len(guided.completion_ids)
    assert len(guided.logprobs) == len(guided.injected_mask) == length
    assert guided.injected_mask == tuple(i >= len(own_ids) for i in range(length))
    assert tuple(map(math.isnan, guided.logprobs)) == guided.injected_mask
    assert guided.injected_span == (len(own_ids), length)
    assert guided.guided and guided.original == rollout
    assert (guided.prompt, guided.sample, guided.guidance) == (
        rollout.prompt,
        rollout.sample,
        rollout.guidance,
    )


@many_splices
@modest
@given(st.data(), feedbacks)
def test_one_token_too_many_leaves_the_rollout_unguided(kind, data, feedback):
    text, rollout = tokenizer(kind), data.draw(answers(kind))
    needed = len(spliced(rollout, feedback, text).completion_ids)
    assert spliced(rollout, feedback, text, max_new_tokens=needed).guided
    unguided = spliced(rollout, feedback, text, max_new_tokens=needed - 1)
    assert unguided == replace(rollout, guidance=replace(GUIDANCE, skipped="too_long"))
    assert not unguided.guided and unguided.injected_span is None


@many_splices
@modest
@given(st.data(), feedbacks)
def test_cutting_goes_exactly_to_the_limit_and_leaves_the_answer_unfinished(kind, data, feedback):
    text, rollout = tokenizer(kind), data.draw(answers(kind))
    whole = spliced(rollout, feedback, text)
    own = len(rollout.completion_ids) - 1
    limit = data.draw(st.integers(own + 1, len(whole.completion_ids) - 1), label="limit")
    cut = spliced(rollout, feedback, text, max_new_tokens=limit, overlong="cut")

    assert cut.completion_ids == whole.completion_ids[:limit]
    assert text.eos_token_id not in cut.completion_ids
    assert not cut.finished
    assert cut.injected_mask == whole.injected_mask[:limit]
    assert tuple(map(math.isnan, cut.logprobs)) == cut.injected_mask
    assert cut.injected_span == (own, limit)
    assert cut.text == rollout.text + text.decode(list(cut.completion_ids[own:]))
    assert cut.original == rollout
    assert cut.guidance.skipped is None


def test_cutting_changes_nothing_where_the_text_fits():
    text = tokenizer("own_pad")
    rollout = rollout_of(text, [60, 61])
    limit = len(spliced(rollout, FEEDBACK, text).completion_ids)
    cut = spliced(rollout, FEEDBACK, text, max_new_tokens=limit, overlong="cut")
    assert cut.finished
    assert cut.completion_ids == spliced(rollout, FEEDBACK, text).completion_ids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["reason", "phrase"])
def test_a_named_control_token_in_the_text_is_refused(kind, where):
    text = tokenizer(kind)
    rollout = rollout_of(text, [60, 61])
    for control in text.all_special_tokens:
        feedback = replace(FEEDBACK, **{where: f"I say {control} and go on."})
        unguided = spliced(rollout, feedback, text)
        assert unguided == replace(rollout, guidance=replace(GUIDANCE, skipped="special_token"))


@pytest.mark.parametrize("control", SPECIAL)
def test_a_control_token_without_a_role_is_refused_too(control):
    # As Llama 3's <|start_header_id|>: special in the vocabulary, but neither bos, eos nor pad.
    text = tokenizer("pad_is_eos")
    feedback = replace(FEEDBACK, reason=f"I say {control} and go on.")
    unguided = spliced(rollout_of(text, [60, 61]), feedback, text)
    assert not unguided.guided
    assert unguided.guidance.skipped == "special_token"


def test_an_end_of_turn_token_that_is_an_ordinary_one_is_refused_as_well():
    text = tokenizer("own_pad")
    (ordinary,) = text.encode("~", add_special_tokens=False)
    feedback = replace(FEEDBACK, phrase="It is ~7.")
    stop_ids = (text.eos_token_id, ordinary)
    unguided = spliced(rollout_of(text, [60, 61]), feedback, text, stop_ids=stop_ids)
    assert unguided.guidance.skipped == "special_token"
    assert spliced(rollout_of(text, [60, 61]), feedback, text).guided


@pytest.mark.parametrize("kind", KINDS)
def test_the_end_of_turn_token_that_the_student_chose_comes_back(kind):
    text = tokenizer(kind)
    stop_ids = (text.eos_token_id, text.convert_tokens_to_ids("<|start|>"))
    for chosen in stop_ids:
        rollout = rollout_of(text, [60, 61], chosen)
        guided = spliced(rollout, FEEDBACK, text, stop_ids=stop_ids)
        ends = [i for i in guided.completion_ids if i in stop_ids]
        assert ends == [chosen]
        assert guided.completion_ids[-1] == chosen


def test_a_student_that_said_nothing_is_continued():
    text = tokenizer("own_pad")
    guided = spliced(rollout_of(text, []), FEEDBACK, text)
    assert guided.text == f"\n\n{FEEDBACK.reason}\n\n{FEEDBACK.phrase}"
    assert guided.injected_span == (0, len(guided.completion_ids))


def test_a_rollout_without_a_record_of_guidance_gets_one_when_it_is_skipped():
    text = tokenizer("own_pad")
    rollout = rollout_of(text, [60], guidance=None)
    unguided = spliced(rollout, FEEDBACK, text, max_new_tokens=2)
    assert unguided.guidance == Guidance((), skipped="too_long")


def test_only_finished_rollouts_that_have_no_guidance_yet_are_taken():
    text = tokenizer("own_pad")
    rollout = rollout_of(text, [60])
    with pytest.raises(AssertionError, match="finished"):
        spliced(replace(rollout, finished=False), FEEDBACK, text)
    with pytest.raises(AssertionError, match="once"):
        spliced(spliced(rollout, FEEDBACK, text), FEEDBACK, text)
