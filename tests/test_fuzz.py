"""What must hold whatever text, file or stop comes along.

Each property gets a few examples, always the same ones. ``THINKTUNING_FUZZ=10000`` draws that many
new ones of each.
"""

import io
import json
import math
import re
import tempfile
import unicodedata
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path

import datasets
import pytest
import tiny
from hypothesis import example, given, settings
from hypothesis import strategies as st

from thinktuning.data import PromptLoader, load_questions, parse_gold
from thinktuning.data.sources import Question, parse_solution
from thinktuning.errors import InputError
from thinktuning.policy import render_prompt
from thinktuning.rewards import LETTERS, extract_answer, last_boxed, maths, verify_math
from thinktuning.rewards.verifier import Verifier
from thinktuning.teaching import FeedbackForm, format_feedback, inject, parse_feedback
from thinktuning.types import AnswerKind, Feedback, Guidance, Outcome, Prompt, Rollout

fuzz = settings.get_profile("fuzz")

# ----------------------------------------------------------------------- texts

TAGS = [f"<{slash}{name}>" for name in ("opinion", "reason", "phrase") for slash in ("", "/")]
HALF_TAGS = ["<", "</", ">", "<reason", "reason>", "</phrase", "<opinion ", "<Reason>", "< phrase>"]
CONTROL = ["\0", "\x1b[0m", "\x7f", "\x85", "\xa0", "\u2028", "\u202e", "\ufeff", "\ufffd", "\r\n"]
HALF_CHARACTERS = ["\ud800", "\udbff", "\udc00", "\udfff"]  # a str can hold them, UTF-8 can't
SPECIAL = ["<|bos|>", "<|end|>", "<|start|>", "<|pad|>"]
HALF_SPECIAL = ["<|", "|>", "<|end", "end|>", "<<|end|>", "<|e<|end|>nd|>"]
BOXES = [r"\boxed{", r"\boxed", r"\boxed{7}", "{", "}", "\\", r"\{", r"\}", r"\text{", "$", "**"]
NUMBERS = ["7", "1,000", "-3", "+", ".", "####", "<<3+4=7>>", "<<", ">>", "#", "0.5", "٣", "²"]
WORDS = [
    "answer is ",
    "so ",
    "not ",
    "(B)",
    "(J)",
    "yes",
    "No",
    "wait",
    "2 < 3",
    " ",
    "\n",
    "é",
    "𝔸",
]
PIECES = [
    *(TAGS + HALF_TAGS + CONTROL + SPECIAL + HALF_SPECIAL + BOXES + NUMBERS + WORDS),
    "2024-01-02",
    "null",
    '"',
]
LONG = 100_000


def texts_of(pieces, characters):
    """Pieces and any characters between them; one text in twenty is of 100 kB."""
    piece = st.sampled_from(pieces) | st.text(characters, max_size=5)
    short = st.lists(piece, min_size=1, max_size=15).map("".join)
    long = st.builds(
        lambda begin, piece, end: begin + piece * (LONG // len(piece)) + end,
        short,
        st.sampled_from(pieces),
        short,
    )
    return st.sampled_from([short] * 19 + [long]).flatmap(lambda texts: texts)


unicode = st.characters(codec="utf-8")
unicode_texts = texts_of(PIECES, unicode)
texts = unicode_texts | texts_of(PIECES + HALF_CHARACTERS, st.characters())


def is_unicode(text):
    return not re.search("[\ud800-\udfff]", text)


# -------------------------------------------------------------------- feedback

opinions = st.sampled_from(["correct", "incorrect"])


def spoilt(text):
    """Whether a text has what no feedback may have: control characters or half characters."""
    return any(unicodedata.category(c) in ("Cc", "Cs") and c not in "\t\n\r" for c in text)


def unspoilt(text):
    return "".join(c for c in text if not spoilt(c))


parts = texts.map(lambda text: unspoilt(re.sub("|".join(TAGS), "", text)).strip()).filter(
    lambda part: part and not any(tag in part for tag in TAGS)
)


@st.composite
def almost_replies(draw):
    """The three parts with space around them, and perhaps one thing that doesn't belong there."""
    space = st.sampled_from(["", "\n", " \t"])
    reason, phrase = (draw(space) + draw(parts) + draw(space) for _ in range(2))
    reply = format_feedback(Feedback(draw(opinions), reason, phrase))
    place = draw(st.integers(0, len(reply)) | st.just(len(reply)))
    odd = st.just("") | st.sampled_from([*TAGS, *HALF_TAGS, *CONTROL, "x"])
    return reply[:place] + draw(odd) + reply[place:]


@fuzz
@given(texts | almost_replies())
def test_any_text_is_feedback_or_none_and_feedback_reads_back_as_itself(text):
    feedback = parse_feedback(text)
    if feedback is not None:
        assert not spoilt(text)
        assert feedback.opinion in ("correct", "incorrect")
        for part in (feedback.reason, feedback.phrase):
            assert part and part == part.strip() and part in text
            assert not any(tag in part for tag in TAGS)
        assert parse_feedback(format_feedback(feedback)) == feedback


@fuzz
@given(opinions, parts, parts)
def test_whatever_the_parts_are_what_is_formatted_is_read_back(opinion, reason, phrase):
    feedback = Feedback(opinion, reason, phrase)
    assert parse_feedback(format_feedback(feedback)) == feedback


FORMS = [FeedbackForm(70), FeedbackForm(300), FeedbackForm(102, True), FeedbackForm(300, True)]
every_form = pytest.mark.parametrize("form", FORMS, ids=str)


@st.composite
def replies(draw, form):
    """Whatever the form's pattern matches, with and without what is hard to close."""
    if draw(st.booleans()):
        return draw(st.from_regex(form.pattern, fullmatch=True, alphabet=unicode))
    awkward = texts_of([*BOXES, *WORDS, "\ufffd", "\u2028"], unicode).map(unspoilt)
    reason, phrase = (
        "W" + draw(awkward).replace("<", "")[: form.open_tokens // 4] for _ in range(2)
    )
    box = r"\boxed{7}" if form.boxed else ""
    reply = format_feedback(Feedback(draw(opinions), reason, phrase + box))
    assert re.fullmatch(form.pattern, reply)
    return reply


@every_form
@fuzz
@given(st.data())
def test_whatever_the_pattern_matches_is_feedback(form, data):
    reply = data.draw(replies(form))
    feedback = parse_feedback(reply)
    assert feedback is not None
    assert parse_feedback(format_feedback(feedback)) == feedback
    assert not form.boxed or last_boxed(feedback.phrase) is not None


@every_form
@fuzz
@given(st.data())
def test_a_reply_that_is_cut_off_at_any_byte_is_closed_by_any_closing(form, data):
    reply = data.draw(replies(form))
    whole = reply.encode("utf-8", "replace")
    first = whole.index(b"<reason>") + len(b"<reason>")
    cut = whole[: data.draw(st.integers(first + 1, len(whole)), label="bytes")]
    begun = form.begun(cut.decode("utf-8", "replace"))
    assert begun is not None
    phrase = begun.partition("<phrase>")[2]
    assert last_boxed(phrase) is not None or r"\boxed{" not in phrase, "no box is left open"
    closing = data.draw(st.from_regex(form.closing_pattern, fullmatch=True))
    feedback = parse_feedback(begun + closing)
    assert feedback is not None
    assert reply.startswith(f"<opinion>{feedback.opinion}</opinion>")
    if form.boxed:
        assert last_boxed(feedback.phrase), "the box has something in it, and it is closed"


@fuzz
@given(texts | almost_replies(), st.sampled_from(FORMS))
def test_any_text_can_be_asked_for_its_beginning(text, form):
    begun = form.begun(text)
    assert begun is None or begun.count("<phrase>") == begun.count("</reason>") == 1


# ------------------------------------------------------------------- injection

KINDS = ["own_pad", "pad_is_eos", "no_template"]
GUIDANCE = Guidance(("self_critique",), "the teacher's reply")
tokenizer = cache(tiny.tokenizer)


@st.composite
def end_of_turn_ids(draw, kind):
    """The tokenizer's own and, as Llama 3 has them, up to two others."""
    text = tokenizer(kind)
    return (text.eos_token_id, *draw(st.lists(st.integers(0, len(text) - 1), max_size=2)))


@st.composite
def rollouts(draw, kind, stop_ids):
    """A finished rollout of any ids: special tokens, halves of letters, what no text encodes to."""
    text = tokenizer(kind)
    own = st.integers(0, len(text) - 1).filter(lambda i: i not in stop_ids)
    ids = (*draw(st.lists(own, max_size=20)), draw(st.sampled_from(stop_ids)))
    logprobs = st.floats(-50, 0)
    return Rollout(
        prompt=Prompt(4, "3 plus 4?", "7", [5, 6]),
        sample=2,
        completion_ids=ids,
        logprobs=tuple(draw(st.lists(logprobs, min_size=len(ids), max_size=len(ids)))),
        injected_mask=(False,) * len(ids),
        finished=True,
        text=text.decode(list(ids), skip_special_tokens=True),
        guidance=GUIDANCE,
    )


def with_one(pieces):
    return st.tuples(unicode_texts, st.sampled_from(pieces), unicode_texts).map("".join)


spoken = unicode_texts | with_one(SPECIAL)


@pytest.mark.parametrize("overlong", ["unguided", "cut"])
@pytest.mark.parametrize("kind", KINDS)
@fuzz
@given(
    st.data(),
    st.builds(Feedback, opinions, spoken, spoken),
    st.sampled_from(["\n\n", "\n", " ", ""]),
)
def test_a_splice_keeps_the_students_ids_and_the_limit(kind, overlong, data, feedback, separator):
    text, stop_ids = tokenizer(kind), data.draw(end_of_turn_ids(kind))
    rollout = data.draw(rollouts(kind, stop_ids))
    own = len(rollout.completion_ids) - 1
    limit = own + data.draw(st.integers(1, 20) | st.just(10 * LONG), label="room")
    spliced = inject(rollout, feedback, text, stop_ids, limit, separator, overlong)

    ids, length = spliced.completion_ids, len(spliced.completion_ids)
    assert ids[:own] == rollout.completion_ids[:own]
    assert spliced.logprobs[:own] == rollout.logprobs[:own]
    assert len(spliced.logprobs) == len(spliced.injected_mask) == length <= limit
    assert sum(i in stop_ids for i in ids) == spliced.finished == (ids[-1] in stop_ids)

    written = separator + feedback.reason + separator + feedback.phrase
    if any(special in written for special in SPECIAL):
        assert spliced == replace(rollout, guidance=replace(GUIDANCE, skipped="special_token"))
    if spliced.guided:
        injected = ids[own : length - spliced.finished]
        assert not {*text.convert_tokens_to_ids(SPECIAL)} & {*injected}
        assert spliced.injected_mask == (False,) * own + (True,) * (length - own)
        assert tuple(map(math.isnan, spliced.logprobs)) == spliced.injected_mask
        assert spliced.original == rollout
        if spliced.finished:
            assert spliced.text == rollout.text + written
            assert text.decode(list(injected)) == written
    else:
        assert spliced == replace(rollout, guidance=spliced.guidance)
        assert spliced.guidance.skipped in ("special_token", "too_long")


# --------------------------------------------------------------------- answers


@pytest.fixture(scope="module", autouse=True)
def verifier():
    """The package's verifier, with a deadline that tests can wait for."""
    with pytest.MonkeyPatch.context() as patch:
        verifier = Verifier(seconds=2.0)
        patch.setattr(maths, "_verifier", verifier)
        yield verifier
        verifier.close()


@fuzz
@example("(J)", 2)
@given(texts, st.integers(2, len(LETTERS)))
def test_any_text_ends_on_an_allowed_answer_or_none(text, options):
    assert extract_answer(AnswerKind.CHOICE, text, options) in {None, *LETTERS[:options]}
    assert extract_answer(AnswerKind.YES_NO, text) in {None, "yes", "no"}
    box = last_boxed(text)
    assert extract_answer(AnswerKind.MATH, text) == (box or None)
    assert box is None or (box == box.strip() and box in text)


@fuzz
@given(texts, texts)
def test_the_last_box_counts_and_is_closed_or_none(text, more):
    behind = more.replace(r"\boxed{", "")
    assert last_boxed(text + r"\boxed{ \frac{1}{2} }" + behind) == r"\frac{1}{2}"
    assert last_boxed(text + r"\boxed{" + re.sub(r"[\\{}]", "", more)) is None


@fuzz
@given(texts, texts)
def test_what_has_no_box_or_no_end_is_judged_without_mathematics(text, answer):
    unboxed = text.replace("boxed", "")
    assert verify_math(unboxed, answer) is Outcome.NO_ANSWER
    assert verify_math(text, answer, finished=False) is Outcome.CUT_OFF


LATEX = [*r"{}\^_$%,.=<>|&~!()[]'", *"0179xyei+-*/ \n", r"\frac", r"\sqrt", r"\cup", r"\infty"]
boxes = st.lists(
    st.sampled_from(LATEX + CONTROL + HALF_CHARACTERS) | st.text(st.characters(), max_size=3),
    max_size=12,
).map("".join)


@fuzz
@example("1" * 5000, "7")
@example("7", "1" * 5000)
@example("{" * 2000 + "1" + "}" * 2000, "7")
@given(boxes, boxes | st.sampled_from(["7", r"\frac{1}{2}"]))
def test_any_box_gets_an_outcome(box, answer):
    outcome = verify_math(rf"It is \boxed{{{box}}}.", answer)
    assert isinstance(outcome, Outcome) and outcome is not Outcome.CUT_OFF


# --------------------------------------------------------------------- prompts


@fuzz
@given(st.sampled_from(KINDS), unicode_texts, unicode_texts, st.none() | unicode_texts)
def test_whatever_people_write_only_the_template_writes_control_tokens(kind, system, user, begun):
    text = tokenizer(kind)
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    if begun is not None:
        messages.append({"role": "assistant", "content": begun})
    ids = render_prompt(text, messages)

    asked = f"<|start|>system\n{system}<|end|><|start|>user\n{user}<|end|><|start|>assistant\n"
    expected = f"{system}\n\n{user}\n\n" if kind == "no_template" else asked
    opening = "<|bos|>" if kind == "own_pad" else ""
    assert text.decode(ids) == opening + expected + (begun or "")

    counts = {"own_pad": (1, 2, 3, 0), "pad_is_eos": (0, 2, 3, 0), "no_template": (0, 0, 0, 0)}
    special = text.convert_tokens_to_ids(SPECIAL)
    assert tuple(ids.count(i) for i in special) == counts[kind]


@fuzz
@given(st.sampled_from(KINDS), texts, texts)
def test_a_prompt_of_any_text_is_ids_or_bad_input(kind, system, user):
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    try:
        ids = render_prompt(tokenizer(kind), messages)
    except InputError:
        assert not (is_unicode(system) and is_unicode(user))
    else:
        assert all(isinstance(i, int) for i in ids)


# ------------------------------------------------------------------------ data


@pytest.fixture(scope="module", autouse=True)
def quiet():
    """No progress bar for every file."""
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def loaded(name, content, limit=None):
    """What comes of a file: its questions, or that it is bad input. Nothing is kept of it."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", Path(folder, "cache"))
        path = Path(folder, name)
        path.write_bytes(content)
        try:
            return load_questions(str(path), "train", limit=limit)
        except InputError as error:
            assert name in str(error)
            return None


def json_lines(rows, ascii_only):
    lines = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows)
    return lines.encode("utf-8", "surrogatepass")


scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
keys = st.sampled_from(["question", "answer", "Question", "level", ""]) | texts
any_rows = st.lists(
    st.dictionaries(keys, values, max_size=4)
    | st.fixed_dictionaries({"question": values, "answer": values})
    | st.fixed_dictionaries({"question": texts, "answer": texts}, optional={"level": values}),
    max_size=5,
)


@fuzz
@given(any_rows, st.booleans())
def test_any_rows_are_questions_or_bad_input(rows, ascii_only):
    questions = loaded("rows.jsonl", json_lines(rows, ascii_only))
    assert questions is None or len(questions) == len(rows) > 0


good_rows = st.lists(
    st.fixed_dictionaries(
        {
            "question": unicode_texts.filter(str.strip),
            "answer": unicode_texts.filter(lambda answer: parse_gold(answer) is not None),
        }
    ),
    min_size=1,
    max_size=4,
)


@fuzz
@example([{"question": "When did it begin?", "answer": "2024-01-02"}], True, None)
@given(good_rows, st.booleans(), st.none() | st.integers(1, 3))
def test_good_rows_of_any_text_are_read_as_they_stand(rows, ascii_only, limit):
    expected = [
        Question(
            i, row["question"].strip(), parse_gold(row["answer"]), parse_solution(row["answer"])
        )
        for i, row in enumerate(rows)
    ]
    assert loaded("rows.jsonl", json_lines(rows, ascii_only), limit) == expected[:limit]


GOOD_ROWS = [{"question": f"{n} plus 4?", "answer": f"#### {n + 4}"} for n in range(3)]
GOOD_LINES = json_lines(GOOD_ROWS, ascii_only=True)


@cache
def good_parquet():
    content = io.BytesIO()
    datasets.Dataset.from_list(GOOD_ROWS).to_parquet(content)
    return content.getvalue()


@st.composite
def damaged(draw, content):
    """A good file with some bytes replaced, lost or put in."""
    start = draw(st.integers(0, len(content)), label="start")
    stop = draw(st.integers(start, min(start + 20, len(content))), label="stop")
    return content[:start] + draw(st.binary(max_size=20)) + content[stop:]


@fuzz
@given(
    st.sampled_from(["rows.jsonl", "rows.json", "rows.parquet"]),
    st.binary()
    | damaged(GOOD_LINES)
    | st.deferred(lambda: damaged(good_parquet()))
    | texts.map(lambda text: text.encode("utf-8", "surrogatepass")),
)
def test_a_file_of_any_bytes_is_questions_or_bad_input(name, content):
    questions = loaded(name, content)
    assert questions is None or all(q.text and q.answer for q in questions)


@fuzz
@example("1" * LONG + "x")
@example("<<" * LONG)
@example("#### 1 #### 2")
@given(texts | texts_of(NUMBERS, st.characters()))
def test_any_gold_answer_is_read_and_stays_what_it_is_when_read_again(answer):
    gold = parse_gold(answer)
    if gold is None:
        assert not answer.rsplit("####", 1)[-1].strip()
    else:
        assert gold == gold.strip() and "####" not in gold
        assert parse_gold(gold) == parse_gold(f"{answer} #### {gold}") == gold
    assert ("####" in answer) or parse_solution(answer) == ""
    assert not re.search("<<[^<>]*>>", parse_solution(answer))


@st.composite
def journeys(draw):
    """A data set, its batches, and a run that stops and goes on, each time on other ranks."""
    ranks = draw(st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=4))
    batch_size = math.lcm(*ranks) * draw(st.integers(1, 3))
    count = batch_size + draw(st.integers(0, 30))
    legs = [(n, draw(st.integers(0, 2 * (count // batch_size) + 2))) for n in ranks]
    return count, batch_size, draw(st.integers()), legs


def stream(loader):
    """Batches for ever, as row numbers."""
    while True:
        for batch in loader:
            yield [prompt.index for prompt in batch]


@fuzz
@given(journeys())
def test_a_run_that_stops_anywhere_is_served_what_an_unbroken_one_is(journey):
    count, batch_size, seed, legs = journey
    prompts = [Prompt(i, f"q{i}", str(i), [i]) for i in range(count)]
    unbroken = stream(PromptLoader(prompts, batch_size, seed))
    state = PromptLoader(prompts, batch_size, seed).state_dict()
    for ranks, batches in legs:
        loaders = [PromptLoader(prompts, batch_size, seed, r, ranks) for r in range(ranks)]
        for loader in loaders:
            loader.load_state_dict(json.loads(json.dumps(state)))  # as it lies in a checkpoint
        served = [list(islice(stream(loader), batches)) for loader in loaders]
        for number, whole in enumerate(islice(unbroken, batches)):
            assert [share[number] for share in served] == [whole[r::ranks] for r in range(ranks)]
            assert len(set(whole)) == batch_size
        (state,) = {json.dumps(loader.state_dict()) for loader in loaders}
        state = json.loads(state)
