"""Reading the teacher's reply, and the form that every constrained reply is brought to."""

import re
from itertools import permutations

import pytest
import tiny
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from thinktuning.engines import TransformersEngine
from thinktuning.errors import InputError
from thinktuning.rewards.maths import last_boxed
from thinktuning.teaching import (
    FeedbackForm,
    ReplyParams,
    ask_in_form,
    format_feedback,
    in_script_of,
    parse_feedback,
)
from thinktuning.types import Feedback

TAGS = [f"<{slash}{name}>" for name in ("opinion", "reason", "phrase") for slash in ("", "/")]
OPINION = "<opinion>incorrect</opinion>"
REASON = "<reason>Wait, I dropped a 2.</reason>"
PHRASE = r"<phrase>So it is \boxed{5}.</phrase>"
EXPECTED = Feedback("incorrect", "Wait, I dropped a 2.", r"So it is \boxed{5}.")


@pytest.mark.parametrize(
    "reply",
    [
        OPINION + REASON + PHRASE,
        "\n".join([OPINION, REASON, PHRASE]),
        f"  \n\t{OPINION}\n\n {REASON}\r\n{PHRASE}\n ",
        "<opinion>\nincorrect </opinion>"
        "<reason>  Wait, I dropped a 2.\n</reason>"
        "<phrase>\n\nSo it is \\boxed{5}. </phrase>",
    ],
    ids=["no space", "line by line", "space around", "space inside"],
)
def test_three_parts_in_order_are_read_and_stripped(reply):
    assert parse_feedback(reply) == EXPECTED


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "I think that this is right.",
        REASON + OPINION + PHRASE,
        OPINION + PHRASE + REASON,
        PHRASE + REASON + OPINION,
        REASON + PHRASE,
        OPINION + PHRASE,
        OPINION + REASON,
        OPINION + OPINION + REASON + PHRASE,
        OPINION + REASON + REASON + PHRASE,
        OPINION + REASON + PHRASE + PHRASE,
        OPINION + REASON + PHRASE + OPINION + REASON + PHRASE,
        OPINION + f"<reason>{PHRASE}</reason>",
        OPINION + f"<reason>a {PHRASE} b</reason>" + PHRASE,
        OPINION + f"<reason>{REASON}</reason>" + PHRASE,
        f"<reason>{OPINION}a</reason>" + PHRASE,
        OPINION + "<reason>a</phrase></reason>" + PHRASE,
        OPINION + "<reason>a<phrase>b</phrase>",
        OPINION + "reason>a</reason>" + PHRASE,
        OPINION + "<reason>a</reason" + PHRASE,
        OPINION + REASON + "<phrase>cut off at the lim",
        OPINION + REASON + "<phrase>cut off at the lim</phras",
        OPINION + "<reason >a</reason>" + PHRASE,
        OPINION + "<Reason>a</Reason>" + PHRASE,
        "Here it is: " + OPINION + REASON + PHRASE,
        OPINION + REASON + PHRASE + " I hope this helps.",
        OPINION + "then" + REASON + PHRASE,
        OPINION + REASON + "," + PHRASE,
    ],
)
def test_anything_but_three_parts_in_order_is_refused(reply):
    assert parse_feedback(reply) is None


@pytest.mark.parametrize("name", ["opinion", "reason", "phrase"])
@pytest.mark.parametrize("content", ["", " ", "\n\t"])
def test_an_empty_part_is_refused(name, content):
    parts = {"opinion": "correct", "reason": "a", "phrase": "b"} | {name: content}
    assert parse_feedback(format_feedback(Feedback(**parts))) is None


@pytest.mark.parametrize(
    "opinion",
    ["Correct", "CORRECT", "right", "correct.", "in correct", "correct or incorrect", "1"],
)
def test_only_the_two_opinions_are_accepted(opinion):
    assert parse_feedback(format_feedback(Feedback(opinion, "a", "b"))) is None


def test_a_part_may_hold_signs_that_are_no_tags():
    reason = "2 < 3 and 3 > 2,\n\nand <b> or </reasons> or <phrase is not ours"
    reply = OPINION + f"<reason>{reason}</reason>" + PHRASE
    assert parse_feedback(reply) == Feedback("incorrect", reason, EXPECTED.phrase)


# Text that comes as close to the tags as it can.
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
HALF_TAGS = [*(tag[:-1] for tag in TAGS), "<", ">", "</", "2 < 3", "\n", "correct"]


def near(pieces, letters):
    return st.lists(st.sampled_from(pieces) | st.text(letters, max_size=4), max_size=12).map(
        "".join
    )


near_tags = near([*TAGS, *HALF_TAGS], st.characters())
parts = (
    near(HALF_TAGS, st.characters(exclude_categories=["Cc", "Cs"]))
    .map(str.strip)
    .filter(lambda part: part and not any(t in part for t in TAGS) and not CONTROL.search(part))
)


@given(st.sampled_from(["correct", "incorrect"]), parts, parts)
def test_what_is_formatted_is_read_back(opinion, reason, phrase):
    feedback = Feedback(opinion, reason, phrase)
    assert parse_feedback(format_feedback(feedback)) == feedback


@given(near_tags | st.text())
def test_any_text_is_read_or_refused_and_never_an_error(text):
    feedback = parse_feedback(text)
    if feedback is not None:
        assert [text.count(tag) for tag in TAGS] == [1] * 6


@pytest.mark.parametrize("control", ["\x00", "\x1b[31m", "\x7f", "\x9b", "\b", "\ud800"])
@pytest.mark.parametrize("place", ["reason", "phrase"])
def test_control_characters_are_refused(control, place):
    parts = {"reason": "Let me see.", "phrase": "It is 7."}
    whole = format_feedback(Feedback("correct", **parts))
    assert parse_feedback(whole) is not None
    parts[place] = f"It {control} is"
    assert parse_feedback(format_feedback(Feedback("correct", **parts))) is None
    tabs = Feedback("correct", "one\ttwo\r\nthree", "four\nfive")
    assert parse_feedback(format_feedback(tabs)) == tabs


@pytest.mark.parametrize(
    ("reason", "same"),
    [
        ("Wait, 2 + 2 is 4.", True),
        ("等一下，我再检查一遍。", False),
        ("Подожди, проверю.", False),
        ("Let α be 4; then 等.", True),
        ("42 = 42", True),
    ],
)
def test_feedback_in_another_script_is_seen(reason, same):
    feedback = Feedback("correct", reason, "7")
    assert in_script_of(feedback, "How many are 6 of 7?", "It is 42.") is same
    assert in_script_of(feedback, "Сколько?", "等一下，我再检查一遍。 abc α"), "whatever occurs"


def test_of_all_orders_of_the_six_tags_one_is_read():
    def reply(tags):
        return "".join(tag if tag.startswith("</") else f"{tag}correct" for tag in tags)

    read = [tags for tags in permutations(TAGS) if parse_feedback(reply(tags)) is not None]
    assert read == [tuple(TAGS)]


# ---------------------------------------------------------------- the form

LEAST = {False: 70, True: 102}
FORMS = [
    FeedbackForm(tokens, boxed) for boxed in (False, True) for tokens in (LEAST[boxed], 250, 1024)
]
every_form = pytest.mark.parametrize("form", FORMS, ids=str)

# What breaks a part most easily: white space, boxes and what they are made of, half characters.
PIECES = [" ", "\n", "\x1f", "\x85", "\xa0", "\u3000", "\ufffd", "é", "𝔸", "7", ".", "/", ">", "\\"]
BRACED = ["{", "}", "\\{", "\\}", "\\boxed", "\\boxed{", "\\boxed{5}", "\\frac{1}{2"]
BALANCED = ["{1}", "{}", "{\\}}", "\\{", "\\}", "\\\\", "\\frac{1}{2}", "\\boxed{5}", "7", " ", "."]


def joined(pieces, **sizes):
    return st.lists(pieces, **sizes).map(lambda found: "".join(found).replace("<", ""))


awkward = joined(st.sampled_from(PIECES + BRACED) | st.text(max_size=3), max_size=8)
boxes = joined(st.sampled_from([*BALANCED, *BALANCED, "\\", "{"]), min_size=1, max_size=8)


@st.composite
def written(draw, form):
    """A whole reply that keeps to the form's pattern."""
    begun = st.sampled_from(["W", "W", "W", ""])
    reason, phrase = ((draw(begun) + draw(awkward))[: form.open_tokens // 4] for _ in range(2))
    box = f"\\boxed{{{draw(boxes)}}}" + draw(st.sampled_from(["", "."])) if form.boxed else ""
    opinion = draw(st.sampled_from(["correct", "incorrect"]))
    reply = format_feedback(Feedback(opinion, reason, phrase + box))
    assume(re.fullmatch(form.pattern, reply))
    return reply


@every_form
@given(st.data())
def test_whatever_keeps_to_the_pattern_is_read(form, data):
    feedback = parse_feedback(data.draw(written(form)))
    assert feedback is not None
    if form.boxed:
        assert last_boxed(feedback.phrase) is not None
        assert feedback.phrase.rstrip(".").endswith("}")


@every_form
@given(st.data())
def test_a_reply_that_is_cut_off_anywhere_in_its_parts_can_be_closed(form, data):
    reply = data.draw(written(form))
    first = reply.index("<reason>") + len("<reason>") + 1
    begun = form.begun(reply[: data.draw(st.integers(first, len(reply)))])
    assert begun is not None
    end = data.draw(st.from_regex(form.closing_pattern, fullmatch=True))
    feedback = parse_feedback(begun + end)
    assert feedback is not None
    assert reply.startswith(f"<opinion>{feedback.opinion}</opinion>")
    if form.boxed:
        assert feedback.phrase.endswith("}")
        assert last_boxed(feedback.phrase), "the box has something in it, and it is closed"


@every_form
def test_no_part_begins_with_what_stripping_takes_away(form):
    box = "\\boxed{5}" if form.boxed else ""
    spaces = [c for c in map(chr, range(0x110000)) if not c.strip()]
    assert len(spaces) > 20
    for character in [*spaces, "<"]:
        for parts in ((character, "b" + box), ("a", character + box)):
            reply = format_feedback(Feedback("correct", *parts))
            assert re.fullmatch(form.pattern, reply) is None, ascii(reply)


@every_form
def test_the_closing_has_something_to_see_and_no_box_but_its_own(form):
    box = "\\boxed{5}" if form.boxed else ""
    for taken in (f" So, {box}</phrase>", f"{box}</phrase>") if form.boxed else (" So.</phrase>",):
        assert re.fullmatch(form.closing_pattern, taken), taken
    for refused in ("</phrase>", "  </phrase>", f"So.{box}", f"{box}So. </phrase>"):
        assert re.fullmatch(form.closing_pattern, refused) is None, refused
    for inside in ("", " ", "5 ", "5\\", "{5}", "}"):
        two = f"So \\boxed{{{inside}}} \\boxed{{5}}</phrase>"
        odd = f"So \\boxed{{{inside}}}</phrase>"
        if form.boxed:
            assert re.fullmatch(form.closing_pattern, two) is None
            assert re.fullmatch(form.closing_pattern, odd) is None


@every_form
def test_the_closing_fits_if_each_token_writes_one_character(form):
    # A regular expression that Python has parsed knows its widths.
    _, longest = re._parser.parse(form.closing_pattern).getwidth()
    assert longest == form.closing_tokens - 1, "all but the end-of-turn token"
    assert form.open_tokens + form.closing_tokens == form.max_new_tokens


@every_form
@given(st.data())
def test_the_closing_is_ascii(form, data):
    # Only then is a character never more than a token.
    assert data.draw(st.from_regex(form.closing_pattern, fullmatch=True)).isascii()


@every_form
def test_parts_have_room_for_what_the_limit_allows(form):
    def fits(characters):
        box = "\\boxed{5}" if form.boxed else ""
        reply = format_feedback(Feedback("correct", "a" * characters, "b" * characters + box))
        return re.fullmatch(form.pattern, reply) is not None

    assert fits(form.open_tokens // 4)
    assert not fits(4 * form.max_new_tokens)


OPENED = "<opinion>correct</opinion>\n<reason>"
PHRASED = f"{OPENED}Wait.</reason>\n<phrase>"


@pytest.mark.parametrize(
    ("cut", "begun"),
    [
        (OPENED + "W", OPENED + "W</reason>\n<phrase>"),
        (OPENED + "Wait.<", PHRASED),
        (OPENED + "Wait.</reas", PHRASED),
        (OPENED + "Wait.</reason>\n<phra", PHRASED),
        (PHRASED, PHRASED),
        (PHRASED + "So it is ", PHRASED + "So it is "),
        (PHRASED + "So it is 5.</phr", PHRASED + "So it is 5."),
        # half a character
        (PHRASED + "10 \ufffd\ufffd", PHRASED + "10 "),
        (OPENED + "10 \ufffd", OPENED + "10 </reason>\n<phrase>"),
        # a box that was begun
        (PHRASED + r"It is \boxed", PHRASED + "It is "),
        (PHRASED + r"It is \boxed{", PHRASED + "It is "),
        (PHRASED + r"It is \boxed{12", PHRASED + "It is "),
        (PHRASED + r"It is \boxed{\frac{1}{2}", PHRASED + "It is "),
        (PHRASED + r"It is \boxed{\{1, 2\}", PHRASED + "It is "),
        (PHRASED + r"It is \boxed{5\}", PHRASED + "It is "),
        (OPENED + r"It is \boxed{12", OPENED + "It is </reason>\n<phrase>"),
        # a box that was closed
        (PHRASED + r"It is \boxed{12} or", PHRASED + r"It is \boxed{12} or"),
        (PHRASED + r"\boxed{\frac{1}{2}}, \boxed{3", PHRASED + r"\boxed{\frac{1}{2}}, "),
        # one in a part that is closed, and one that is all there is of a reflection
        (
            OPENED + "\\boxed{1</reason>\n<phrase>So it is 2",
            OPENED + "\\boxed{1</reason>\n<phrase>So it is 2",
        ),
        (OPENED + r"\boxed{1", OPENED + "\\boxed{1</reason>\n<phrase>"),
        (OPENED + "\ufffd", OPENED + "\ufffd</reason>\n<phrase>"),
        # nothing to go on from
        ("", None),
        ("<opinion>corr", None),
        (OPENED, None),
        ("I think that it is right.", None),
    ],
)
def test_a_reply_goes_on_where_it_was_cut_off(cut, begun):
    assert FeedbackForm(250).begun(cut) == begun


@pytest.mark.parametrize("boxed", [False, True])
@pytest.mark.parametrize("tokens", [-5, 0, 1, 31, 64, 69])
def test_a_limit_too_small_is_refused_and_the_least_one_is_named(boxed, tokens):
    with pytest.raises(InputError, match=f"at least {LEAST[boxed]}, got {tokens}"):
        FeedbackForm(tokens, boxed)


@pytest.mark.parametrize("boxed", [False, True])
def test_the_least_limit_that_is_named_is_the_least_that_works(boxed):
    with pytest.raises(InputError):
        FeedbackForm(LEAST[boxed] - 1, boxed)
    for tokens in range(LEAST[boxed], 3000):
        assert FeedbackForm(tokens, boxed).open_tokens >= len(OPENED + "in") + 1


@pytest.mark.parametrize("boxed", [False, True])
def test_what_fits_is_what_the_pattern_allows(boxed):
    form = FeedbackForm(200, boxed)
    box = "\\boxed{7}" if boxed else ""

    def allowed(reason: str, phrase: str) -> bool:
        return bool(
            re.fullmatch(form.pattern, format_feedback(Feedback("correct", reason, phrase)))
        )

    def fits(reason: str, phrase: str) -> bool:
        return form.fits(Feedback("correct", reason, phrase))

    longest = max(n for n in range(1, 1000) if fits("r" * n, "p"))
    assert allowed("r" * longest, "p" + box) and not allowed("r" * (longest + 1), "p" + box)
    longest = max(n for n in range(1, 1000) if fits("r", "p" * n))
    assert allowed("r", "p" * longest + box) and not allowed("r", "p" * (longest + 1) + box)


class Listening(TransformersEngine):
    """Notes what its model wrote, as tokens."""

    def sample(self, prompts, seeds, params):
        groups = super().sample(prompts, seeds, params)
        self.heard.append([completion for (completion,) in groups])
        return groups


@pytest.fixture(scope="module", params=["own_pad", "pad_is_eos"])
def teacher(request):
    """A model of random weights, sure of what it says: it repeats itself up to the limit."""
    text = tiny.tokenizer(request.param)
    net = tiny.model("llama", len(text), text.eos_token_id)
    with torch.no_grad():
        for weight in net.parameters():
            weight.mul_(10 if weight.ndim > 1 else 1)
    engine = Listening()
    engine.load_weights(net, text)
    return engine


CHATS = [
    [
        {"role": "system", "content": "Go on thinking for me."},
        {"role": "user", "content": f"Question: {a} plus {b}?\nMy answer: it is {a * b}. 𝔸"},
    ]
    for a in range(3)
    for b in range(4)
]


@pytest.mark.parametrize(
    ("tokens", "boxed"), [(70, False), (150, False), (102, True), (190, True)], ids=str
)
def test_even_random_weights_reply_in_form_and_within_the_limit(teacher, tokens, boxed):
    form = FeedbackForm(tokens, boxed)
    teacher.heard = []
    replies = ask_in_form(teacher, CHATS, form, max_prompt_tokens=800)
    written, closings = teacher.heard
    assert all(len(c.token_ids) <= form.open_tokens for c in written)
    assert all(len(c.token_ids) <= form.closing_tokens for c in closings)
    assert all(c.finish_reason == "stop" for c in closings)
    assert sum(r.closed for r in replies) == len(closings) > 0
    for reply in replies:
        assert reply.skipped is None and not reply.cut_off
        feedback = parse_feedback(reply.text)
        assert feedback is not None, reply.text
        if boxed:
            assert last_boxed(feedback.phrase) is not None, reply.text


def test_without_the_form_random_weights_reply_in_none(teacher):
    teacher.heard = []
    replies = teacher.reply(CHATS, ReplyParams(150, 800))
    assert [parse_feedback(r.text) for r in replies] == [None] * len(CHATS)
