"""Reading the teacher's reply."""

from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinktuning.teaching import format_feedback, parse_feedback
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
near_tags = st.lists(
    st.sampled_from([*TAGS, *(tag[:-1] for tag in TAGS), "<", ">", "</", "2 < 3", "\n", "correct"])
    | st.text(max_size=4),
    max_size=12,
).map("".join)
parts = near_tags.map(str.strip).filter(lambda part: part and not any(t in part for t in TAGS))


@given(st.sampled_from(["correct", "incorrect"]), parts, parts)
def test_what_is_formatted_is_read_back(opinion, reason, phrase):
    feedback = Feedback(opinion, reason, phrase)
    assert parse_feedback(format_feedback(feedback)) == feedback


@given(near_tags | st.text())
def test_any_text_is_read_or_refused_and_never_an_error(text):
    feedback = parse_feedback(text)
    if feedback is not None:
        assert [text.count(tag) for tag in TAGS] == [1] * 6


def test_of_all_orders_of_the_six_tags_one_is_read():
    def reply(tags):
        return "".join(tag if tag.startswith("</") else f"{tag}correct" for tag in tags)

    read = [tags for tags in permutations(TAGS) if parse_feedback(reply(tags)) is not None]
    assert read == [tuple(TAGS)]
