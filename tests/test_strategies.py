r"""Prompting strategies, on tiny real models, and by hand with an engine that follows a script."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import naive
import pytest
import tiny
import torch
from transformers import GenerationConfig

from thinktuning.engines import Completion, Engine, SamplingParams, TransformersEngine, derive_seed
from thinktuning.errors import InputError
from thinktuning.evaluation import strategies
from thinktuning.evaluation.prompts import PromptTexts
from thinktuning.evaluation.records import Item
from thinktuning.evaluation.sampling import SamplingSettings, run_strategy
from thinktuning.evaluation.strategies import (
    FIND_MISTAKES,
    STRATEGIES,
    VERIFY,
    check_strategies,
)
from thinktuning.types import AnswerKind, Outcome

TEXTS = PromptTexts("Add.", "Box it.", "Box a letter.", "Box yes or no.")
TOKENIZER = tiny.tokenizer("own_pad")
END = TOKENIZER.eos_token_id
SETTINGS = SamplingSettings(max_new_tokens=40, texts=TEXTS)


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def item(name: str = "sums/0", question: str = "3 plus 4?", answer: str = "7") -> Item:
    return Item(name, "sums", AnswerKind.MATH, question, None, answer)


ITEM = item()
OPENING = (
    "<|bos|><|start|>system\nAdd.<|end|><|start|>user\n3 plus 4?\n\nBox it.<|end|>"
    "<|start|>assistant\n"
)


class ScriptedEngine(Engine):
    """Writes what a script says: ids that it would write without a limit, for a prompt and the
    number of the call; it stops after an end of turn, and at the limit.
    """

    def __init__(
        self, script: Callable[[list[int], int], list[int]], context_length: int | None = None
    ) -> None:
        super().__init__()
        self.script = script
        self.room = context_length
        self.calls: list[tuple[list[list[int]], list[list[int]], SamplingParams]] = []

    def load_weights(self, model, tokenizer=None) -> None:
        raise AssertionError("a script needs no weights")

    @property
    def context_length(self) -> int | None:
        return self.room

    def sample(self, prompts, seeds, params) -> list[list[Completion]]:
        prompts, seeds = [list(p) for p in prompts], [list(own) for own in seeds]
        number = len(self.calls)
        self.calls.append((prompts, seeds, params))
        for prompt in prompts:
            assert self.room is None or len(prompt) + params.max_new_tokens <= self.room
        return [
            [self._write(self.script(prompt, number), params)] * len(own)
            for prompt, own in zip(prompts, seeds, strict=True)
        ]

    @staticmethod
    def _write(written: list[int], params: SamplingParams) -> Completion:
        ends = [i + 1 for i, token in enumerate(written) if token in params.stop_ids]
        written = written[: min([params.max_new_tokens, *ends])]
        stopped = written[-1] in params.stop_ids
        return Completion(tuple(written), (-0.5,) * len(written), "stop" if stopped else "length")


def in_turn(*written: list[int], context_length: int | None = None) -> ScriptedEngine:
    """An engine that writes the first of these at its first call, and so on."""
    return ScriptedEngine(lambda _, call: written[call], context_length)


def said(*texts: str, context_length: int | None = None) -> ScriptedEngine:
    """The same with texts, each with an end of turn."""
    return in_turn(*([*ids(text), END] for text in texts), context_length=context_length)


def run(strategy: str, engine: Engine, items: Sequence[Item] = (ITEM,), **changes):
    settings = replace(SETTINGS, **changes)
    return run_strategy(strategy, items, engine, TOKENIZER, (END,), settings)


def only_sample(strategy: str, engine: Engine, items: Sequence[Item] = (ITEM,), **changes):
    (result,) = run(strategy, engine, items, **changes)
    (sample,) = result.samples
    return sample


# ---------------------------------------------------------------- what is asked

ASKED = {
    AnswerKind.MATH: "Sky?\n\nBox it.",
    AnswerKind.CHOICE: "Sky?\n\nA. blue\nB. green\nC. red\n\nBox a letter.",
    AnswerKind.YES_NO: "Sky?\n\nBox yes or no.",
}


@pytest.mark.parametrize("kind", list(AnswerKind))
def test_a_question_is_followed_by_its_options_and_its_instruction(kind):
    choices = ("blue", "green", "red") if kind is AnswerKind.CHOICE else None
    assert TEXTS.question(Item("0", "sky", kind, "Sky?", choices, "A")) == ASKED[kind]


def test_a_choice_is_judged_by_its_letters():
    sky = Item("0", "sky", AnswerKind.CHOICE, "Sky?", ("blue", "green"), "B")
    results = [run("zero_shot", said(f"\\boxed{{{letter}}}"), [sky])[0] for letter in "ABC"]
    assert all(result.answers(sky) for result in results)
    samples = [result.samples[0] for result in results]
    assert [s.extracted for s in samples] == ["A", "B", None]  # there are two options
    outcomes = [Outcome.WRONG, Outcome.CORRECT, Outcome.NO_ANSWER]
    assert [s.outcome for s in samples] == outcomes


def test_unknown_strategies_are_named_together_with_the_known_ones():
    check_strategies(list(STRATEGIES))
    with pytest.raises(InputError) as error:
        check_strategies(["zero_shoot", "s1_budget", "vote"])
    known = "zero_shot, self_verify, self_correct, s1_budget"
    assert known in str(error.value) and "'zero_shoot', 'vote'" in str(error.value)
    assert "'s1_budget'" not in str(error.value)
    with pytest.raises(InputError, match="got none"):
        check_strategies([])
    with pytest.raises(InputError, match="'vote'"):
        run("vote", said("It is 7."))


def test_all_faulty_settings_are_named_together():
    with pytest.raises(InputError) as error:
        SamplingSettings(max_new_tokens=0, temperature=-1.0, samples=0, budget=0)
    for fault in ("max_new_tokens", "temperature", "samples", "budget"):
        assert fault in str(error.value)
    with pytest.raises(InputError, match="samples=4 at temperature 0"):
        SamplingSettings(samples=4)
    with pytest.raises(InputError, match="temperature"):
        SamplingSettings(temperature=float("nan"))
    assert SamplingSettings(samples=4, temperature=0.7).samples == 4


# ---------------------------------------------------------------- chats


def test_zero_shot_judges_its_one_answer():
    engine = said("It is \\boxed{7}.")
    (result,) = run("zero_shot", engine)
    assert (result.id, result.question, result.answer) == ("sums/0", "3 plus 4?", "7")
    (sample,) = result.samples
    ((prompts, _, params),) = engine.calls
    assert prompts == [ids(OPENING)]
    assert params == SamplingParams(40, (END,), 0.0)
    assert [(t.prompt, t.response) for t in sample.turns] == [(OPENING, "It is \\boxed{7}.")]
    assert sample.response == "It is \\boxed{7}."
    assert (sample.extracted, sample.outcome) == ("7", Outcome.CORRECT)
    assert sample.tokens == len(ids("It is \\boxed{7}.")) + 1


def test_an_answer_without_an_end_of_turn_is_cut_off():
    sample = only_sample("zero_shot", in_turn(ids("It is \\boxed{7}. So")))
    assert (sample.outcome, sample.extracted) == (Outcome.CUT_OFF, "7")


def chat_after(first: str, asked: str) -> str:
    return OPENING + f"{first}<|end|><|start|>user\n{asked}<|end|><|start|>assistant\n"


def test_self_correct_asks_again_in_the_same_chat_and_judges_the_second_answer():
    first, second = "It is \\boxed{6}.", "Sorry, it is \\boxed{7}."
    engine = said(first, second)
    sample = only_sample("self_correct", engine)
    followed_up = chat_after(first, FIND_MISTAKES)
    assert [prompts for prompts, _, _ in engine.calls] == [[ids(OPENING)], [ids(followed_up)]]
    bos = TOKENIZER.bos_token_id
    assert engine.calls[1][0][0].count(bos) == 1 and engine.calls[1][0][0][0] == bos
    assert [(t.prompt, t.response) for t in sample.turns] == [
        (OPENING, first),
        (followed_up, second),
    ]
    assert (sample.response, sample.extracted, sample.outcome) == (second, "7", Outcome.CORRECT)
    assert sample.tokens == len(ids(first)) + 1 + len(ids(second)) + 1


def test_self_correct_counts_only_the_second_answer():
    sample = only_sample("self_correct", said("It is \\boxed{7}.", "I see no mistake."))
    assert (sample.response, sample.outcome) == ("I see no mistake.", Outcome.NO_ANSWER)


FIRST = "It is \\boxed{7}."
OVERTURNED, STANDS = "8", "7"
VERDICTS = [
    ("Verdict: incorrect\nIt is \\boxed{8}.", OVERTURNED),
    ("**Verdict: Incorrect.** It is \\boxed{8}.", OVERTURNED),
    ("It is \\boxed{8}.\nVERDICT: **incorrect**", OVERTURNED),
    ("Verdict: correct. No, wait.\nVerdict: incorrect\n\\boxed{8}", OVERTURNED),
    ("3 plus 4 is 8, so \\boxed{8}.", OVERTURNED),
    ("Verdict: correct", STANDS),
    ("The verdict is correct: not \\boxed{8}", STANDS),
    ("Verdict: incorrect. No.\nVerdict: correct\n\\boxed{8}", STANDS),
    ("Verdict: incorrect\nI don't know better.", STANDS),
    ("Verdict: incorrect\n\\boxed{", STANDS),
    ("All is well.", STANDS),
]


@pytest.mark.parametrize(("verification", "answer"), VERDICTS)
def test_self_verify_judges_the_verification_only_where_it_overturns(verification, answer):
    engine = said(FIRST, verification)
    sample = only_sample("self_verify", engine, max_new_tokens=80)
    assert engine.calls[1][0] == [ids(chat_after(FIRST, VERIFY))]
    assert [t.response for t in sample.turns] == [FIRST, verification]
    assert sample.response == (verification if answer == OVERTURNED else FIRST)
    assert sample.extracted == answer
    assert sample.outcome is (Outcome.CORRECT if answer == STANDS else Outcome.WRONG)
    assert sample.tokens == len(ids(FIRST)) + len(ids(verification)) + 2


def test_a_verification_that_was_cut_off_overturns_nothing():
    unfinished = ids("Verdict: incorrect\nIt is \\boxed{8}. And")
    sample = only_sample("self_verify", in_turn([*ids(FIRST), END], unfinished))
    assert (sample.extracted, sample.outcome) == ("7", Outcome.CORRECT)


def test_a_first_answer_that_stands_stays_cut_off():
    engine = in_turn(ids(FIRST), [*ids("Verdict: correct"), END])
    sample = only_sample("self_verify", engine)
    assert (sample.response, sample.outcome) == (FIRST, Outcome.CUT_OFF)


def test_loose_words_overturn_a_yes_only_behind_a_verdict():
    dog = Item("0", "dogs", AnswerKind.YES_NO, "Is a dog a pet?", None, "yes")
    loose, clear = "No, that was right.", "Verdict: incorrect\nThe answer is no."
    found = [
        only_sample("self_verify", said("\\boxed{yes}", second), [dog]).extracted
        for second in (loose, clear)
    ]
    assert found == ["yes", "no"]


# ---------------------------------------------------------------- budget forcing

WAIT = ids("Wait")
FORCED = ids("\n\nThe final answer is \\boxed{")
CLOSED = [*ids("7"), *ids("}"), *ids(" or \\boxed{8"), END]
A, B, C, D, E = ids("3") + ids("4") + ids("5") + ids("6") + ids("7")


def test_s1_thinks_for_exactly_its_budget_and_then_answers():
    engine = in_turn([A, B, END], [C, END], [D, D, D, D, D, D, D, D, D], CLOSED)
    sample = only_sample("s1_budget", engine, budget=10)
    opening = ids(OPENING)
    assert len(WAIT) == 1
    thoughts = [[], [A, B, *WAIT], [A, B, *WAIT, C, *WAIT], [A, B, *WAIT, C, *WAIT, D, D, D, D, D]]
    assert [len(thought) for thought in thoughts] == [0, 3, 5, 10]
    assert [call[0] for call in engine.calls] == [
        *([[*opening, *thought]] for thought in thoughts[:-1]),
        [[*opening, *thoughts[-1], *FORCED]],
    ]
    assert [call[2].max_new_tokens for call in engine.calls] == [10, 7, 5, 32]
    written = "34Wait5Wait66666\n\nThe final answer is \\boxed{7}"
    assert [(t.prompt, t.response) for t in sample.turns] == [(OPENING, written)]
    assert (sample.response, sample.extracted, sample.outcome) == (written, "7", Outcome.CORRECT)
    assert sample.tokens == 10 + len(FORCED) + 2


def test_s1_ends_with_a_model_that_only_ends_its_turn():
    engine = ScriptedEngine(lambda _, call: [END] if call < 6 else [*ids("7}"), END])
    sample = only_sample("s1_budget", engine, budget=6)
    assert sample.response == "Wait" * 6 + "\n\nThe final answer is \\boxed{7}"
    assert len(engine.calls) == 7


def test_s1_meets_its_budget_in_the_middle_of_what_it_puts_in(monkeypatch):
    monkeypatch.setattr(strategies, "WAIT", "Wait, let me")
    wait = ids("Wait, let me")
    assert len(wait) >= 3
    engine = in_turn([A, END], [B, END], ids("7}"))
    only_sample("s1_budget", engine, budget=len(wait) + 3)
    (prompt,) = engine.calls[-1][0]
    assert prompt == [*ids(OPENING), A, *wait, B, wait[0], *FORCED]


def test_s1_takes_back_an_end_of_turn_at_its_last_token():
    engine = in_turn([A, B, END], ids("7}"))
    only_sample("s1_budget", engine, budget=3)
    assert engine.calls[-1][0] == [[*ids(OPENING), A, B, *WAIT, *FORCED]]


def test_s1_keeps_ids_that_no_encoding_would_give():
    spelled = [token for letter in "answer" for token in ids(letter)]
    assert ids("answer") != spelled
    engine = in_turn([*spelled, END], [A] * 50, ids("7}"))
    only_sample("s1_budget", engine, budget=len(spelled) + 3)
    assert engine.calls[1][0] == [[*ids(OPENING), *spelled, *WAIT]]
    assert engine.calls[2][0] == [[*ids(OPENING), *spelled, *WAIT, A, A, *FORCED]]


@pytest.mark.parametrize(
    ("written", "kept", "outcome", "extracted"),
    [
        (ids("8}"), ids("8}"), Outcome.WRONG, "8"),
        ([*ids("}"), END], ids("}"), Outcome.NO_ANSWER, None),
        ([*ids("7"), END], [*ids("7"), END], Outcome.CUT_OFF, None),
        ([A] * 40, [A] * 32, Outcome.CUT_OFF, None),
        ([*[A] * 31, *ids("}")], [*[A] * 31, *ids("}")], Outcome.WRONG, "3" * 31),
    ],
    ids=["closed", "empty", "ended open", "too long", "closed by its last token"],
)
def test_s1_closes_the_box_or_is_cut_off(written, kept, outcome, extracted):
    sample = only_sample("s1_budget", in_turn([A] * 9, written), budget=4)
    assert (sample.outcome, sample.extracted) == (outcome, extracted)
    text = TOKENIZER.decode([*FORCED, *kept], skip_special_tokens=True)
    assert sample.response == "3333" + text
    assert sample.tokens == 4 + len(FORCED) + len(kept)


# ---------------------------------------------------------------- calls of the engine

THREE = [item("sums/0"), item("sums/1", "1 plus 1?", "2"), item("sums/2", "2 plus 2?", "4")]


def test_the_samples_of_an_item_share_its_prompt_and_have_seeds_of_their_own():
    engine = said(FIRST, FIRST)
    run("self_correct", engine, THREE, samples=4, temperature=0.7, seed=5)
    prompts, seeds, params = engine.calls[0]
    assert len(prompts) == 3 and [len(own) for own in seeds] == [4, 4, 4]
    assert params.temperature == 0.7
    assert seeds == [
        [derive_seed(5, "sums", asked.id, sample, 0, "self_correct") for sample in range(4)]
        for asked in THREE
    ]
    later = [seed for own in engine.calls[1][1] for seed in own]
    assert later[0] == derive_seed(5, "sums", "sums/0", 0, 1, "self_correct")
    assert len({*later, *(seed for own in seeds for seed in own)}) == 24


def after(prompt: list[int]) -> list[int]:
    """What stands in the model's turn already."""
    start = max(i for i, t in enumerate(prompt) if t == ids("<|start|>")[0])
    return prompt[start + len(ids("<|start|>assistant\n")) :]


def test_similar_budgets_go_together_and_nobody_gets_more_than_its_own():
    first = {ids("3")[0]: 1, ids("1")[0]: 3, ids("2")[0]: 9}  # tokens until the first end of turn

    def script(prompt: list[int], _: int) -> list[int]:
        thought = after(prompt)
        if thought[-len(FORCED) :] == FORCED:
            return ids("7}")
        spoken = next(
            n for digit, n in first.items() if f"{TOKENIZER.decode([digit])} plus" in text(prompt)
        )
        return [A] * 100 if thought else [*[A] * spoken, END]

    def text(prompt: list[int]) -> str:
        return TOKENIZER.decode(prompt)

    engine = ScriptedEngine(script)
    results = run("s1_budget", engine, THREE, budget=13)
    calls = [(len(prompts), params.max_new_tokens) for prompts, _, params in engine.calls]
    # 13 less 1 + Wait, 3 + Wait, 9 + Wait: 11, 9 and 3 tokens are left.
    assert calls == [(3, 13), (2, 11), (1, 3), (3, 32)]
    for result, spoken in zip(results, first.values(), strict=True):
        thought = "3" * spoken + "Wait" + "3" * (12 - spoken)
        assert result.samples[0].response == thought + "\n\nThe final answer is \\boxed{7}"


def test_nobody_is_taken_past_the_end_of_the_context():
    short, long = item("sums/0", "3?"), item("sums/1", "3 plus 4 plus 5 plus 6 plus 7?")

    def script(prompt: list[int], _: int) -> list[int]:
        thought = after(prompt)
        if thought[-len(FORCED) :] == FORCED:
            return ids("7}")
        if thought:
            return [A] * 100
        return [A, END] if "3?" in TOKENIZER.decode(prompt) else [A, A, A, END]

    def calls(context_length: int | None) -> list[tuple[int, int]]:
        engine = ScriptedEngine(script, context_length)
        run("s1_budget", engine, [short, long], budget=40)
        return [(len(prompts), params.max_new_tokens) for prompts, _, params in engine.calls]

    longest = len(ids(OPENING.replace("3 plus 4?", long.question)))
    assert calls(None) == [(2, 40), (2, 38), (2, 32)]
    assert calls(longest + 40 + len(FORCED) + 32) == [(2, 40), (1, 38), (1, 36), (2, 32)]


def test_a_prompt_that_leaves_no_room_is_refused_before_anything_is_sampled():
    prompt = len(ids(OPENING))
    engine = said(FIRST, context_length=prompt + 40)
    assert only_sample("zero_shot", engine).outcome is Outcome.CORRECT
    engine = said(FIRST, context_length=prompt + 39)
    with pytest.raises(InputError, match=rf"{prompt + 39} .* 1 of 2 items.*sums/0.* {prompt} .*40"):
        run("zero_shot", engine, [ITEM, item("sums/1", "1?")], samples=2, temperature=1.0)
    assert not engine.calls

    needed = prompt + 10 + len(FORCED) + 32
    script = [[A] * 99, ids("7}")]
    assert only_sample("s1_budget", in_turn(*script, context_length=needed), budget=10)
    engine = in_turn(*script, context_length=needed - 1)
    with pytest.raises(InputError, match="budget"):
        run("s1_budget", engine, budget=10)
    assert not engine.calls


@pytest.mark.parametrize("strategy", ["self_correct", "self_verify"])
def test_a_later_turn_without_room_is_empty_and_unfinished(strategy):
    asked = {"self_correct": FIND_MISTAKES, "self_verify": VERIFY}[strategy]
    needed = len(ids(chat_after(FIRST, asked))) + 40
    engine = said(FIRST, "Verdict: correct", context_length=needed)
    assert len(only_sample(strategy, engine).turns) == len(engine.calls) == 2
    engine = said(FIRST, context_length=needed - 1)
    sample = only_sample(strategy, engine)
    assert len(engine.calls) == 1
    assert [t.response for t in sample.turns] == [FIRST, ""]
    assert sample.turns[1].prompt == chat_after(FIRST, asked)
    if strategy == "self_correct":
        assert (sample.response, sample.extracted, sample.outcome) == ("", None, Outcome.CUT_OFF)
    else:  # only a finished verification overturns the first answer
        assert (sample.response, sample.outcome) == (FIRST, Outcome.CORRECT)
    assert sample.tokens == len(ids(FIRST)) + 1


# ---------------------------------------------------------------- a real model

STOP_IDS = (END, *range(40, 384, 12))  # so that turns of a random model end soon


@cache
def real_engine() -> TransformersEngine:
    engine = TransformersEngine()
    engine.load_weights(naive.decided_model("llama", len(TOKENIZER)), TOKENIZER)
    return engine


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_samples_depend_neither_on_the_items_beside_them_nor_on_their_order(strategy):
    settings = SamplingSettings(24, 1.0, samples=3, seed=1, budget=60, texts=TEXTS)

    def answered(items: Sequence[Item]):
        return run_strategy(strategy, items, real_engine(), TOKENIZER, STOP_IDS, settings)

    a, b, c = answered(THREE)
    assert [*answered(THREE[2:]), *answered(THREE[:2])] == [c, a, b]
    assert answered(THREE[::-1]) == [c, b, a]
    samples = [sample for result in (a, b, c) for sample in result.samples]
    assert len({sample.turns[0].response for sample in samples}) == 9, "draws differ"
    assert len({sample.tokens for sample in samples}) > 1, "and end at different places"


def test_temperature_0_is_greedy_decoding():
    settings = SamplingSettings(24, texts=TEXTS)
    results = run_strategy("zero_shot", THREE, real_engine(), TOKENIZER, STOP_IDS, settings)
    config = GenerationConfig(
        do_sample=False, max_new_tokens=24, eos_token_id=list(STOP_IDS), pad_token_id=0
    )
    net = naive.decided_model("llama", len(TOKENIZER))
    for asked, result in zip(THREE, results, strict=True):
        row = torch.tensor([ids(OPENING.replace("3 plus 4?", asked.question))])
        out = net.generate(row, attention_mask=torch.ones_like(row), generation_config=config)
        expected = out[0, row.shape[1] :].tolist()
        (sample,) = result.samples
        assert sample.response == TOKENIZER.decode(expected, skip_special_tokens=True)
        assert sample.tokens == len(expected)
