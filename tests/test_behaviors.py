"""Behaviors as text files, and the teacher's chat that is made of them."""

import inspect
import re
from fractions import Fraction
from importlib import resources

import pytest
import yaml

from thinktuning.callbacks import TeacherGuidance
from thinktuning.errors import InputError
from thinktuning.rewards import last_boxed
from thinktuning.teaching import (
    Behavior,
    count_occurrences,
    load_behaviors,
    parse_feedback,
    teacher_chat,
)

SHIPPED = ["catchphrase", "self_agreement", "self_conflict", "self_consultancy", "self_critique"]
DEFAULT = inspect.signature(TeacherGuidance).parameters["behaviors"].default

EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = \$?(\d+)")
OPERATIONS = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: Fraction(a, b),
}

MINE = {
    "name": "counting",
    "instruction": "count everything {twice}, 100% of it",
    "examples": [
        {
            "question": "How many legs have 2 cats?",
            "response": r"They have 2 * 4 = 8. \boxed{8}",
            "opinion": "correct",
            "reason": "Let me count them again.",
            "phrase": r"There are 8. \boxed{8}",
        }
    ],
}


def example(**changes):
    return MINE["examples"][0] | changes


def shipped_examples():
    for name in SHIPPED:
        (behavior,) = load_behaviors([name])
        for number, worked in enumerate(behavior.examples, start=1):
            yield pytest.param(worked, id=f"{name}-{number}")


UNKNOWN = load_behaviors(["catchphrase"])[0].examples
every_example = pytest.mark.parametrize("worked", list(shipped_examples()))


def write(folder, content, name="mine.yaml"):
    path = folder / name
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return str(path)


def test_five_behaviors_come_with_the_package():
    folder = resources.files("thinktuning.teaching") / "behaviors"
    assert sorted(f.name for f in folder.iterdir()) == [f"{name}.yaml" for name in SHIPPED]
    behaviors = load_behaviors(SHIPPED)
    assert [b.name for b in behaviors] == SHIPPED
    assert all(b.instruction and b.examples for b in behaviors)


def test_by_default_the_teacher_sees_each_of_four_behaviors_once_half_of_them_correct():
    assert sorted(DEFAULT) == [name for name in SHIPPED if name != "catchphrase"]
    behaviors = load_behaviors(DEFAULT)
    opinions = [e.feedback.opinion for b in behaviors for e in b.examples]
    assert sorted(opinions) == ["correct", "correct", "incorrect", "incorrect"]


@every_example
def test_a_shipped_example_ends_with_an_answer_that_its_equations_give(worked):
    answer = last_boxed(worked.feedback.phrase)
    assert answer and answer.isdigit()
    equations = EQUATION.findall(worked.feedback.phrase)
    assert equations or worked in UNKNOWN, "only the catch-phrase's have none"
    assert not equations or equations[-1][-1] == answer
    shown = equations + EQUATION.findall(worked.feedback.reason)
    for left, operation, right, result in shown:
        assert OPERATIONS[operation](int(left), int(right)) == int(result), (left, operation, right)


@every_example
def test_a_shipped_opinion_fits_the_response(worked):
    same_answer = last_boxed(worked.response) == last_boxed(worked.feedback.phrase)
    assert worked.feedback.opinion == ("correct" if same_answer else "incorrect")


@every_example
def test_a_shipped_reflection_is_in_the_first_person(worked):
    assert re.search(r"\b(I|me|my|Wait)\b", worked.feedback.reason)
    assert not re.search(r"\b(you|your|student)\b", worked.feedback.reason, re.IGNORECASE)


@every_example
def test_the_parser_reads_shipped_feedback_as_the_teacher_is_shown_it(worked):
    turns = [m["content"] for m in teacher_chat(load_behaviors(SHIPPED), "q", "r")]
    assert worked.feedback in map(parse_feedback, turns)


def test_the_catchphrase_ends_each_reflection_of_its_own_examples_and_no_other():
    (behavior,) = load_behaviors(["catchphrase"])
    catchphrase = re.search(r'"(.*)"', behavior.instruction).group(1)
    assert len(behavior.examples) == 4
    for worked in behavior.examples:
        assert worked.feedback.reason.endswith(catchphrase)
        assert catchphrase not in worked.feedback.phrase + worked.response
    for other in load_behaviors(DEFAULT):
        assert all(catchphrase not in e.feedback.reason for e in other.examples)


@pytest.mark.parametrize("name", ["mine.yaml", "mine.yml"])
def test_a_file_of_ones_own_is_a_behavior_without_any_code(tmp_path, name):
    path = write(tmp_path, MINE, name)
    shipped, mine = load_behaviors(["self_critique", path])
    assert shipped.name == "self_critique"
    assert (mine.name, mine.instruction) == (MINE["name"], MINE["instruction"])
    (worked,) = mine.examples
    assert (worked.question, worked.response) == (example()["question"], example()["response"])
    assert vars(worked.feedback) == {k: example()[k] for k in ("opinion", "reason", "phrase")}


def test_space_around_a_files_texts_is_dropped(tmp_path):
    padded = MINE | {"examples": [example(reason="\n  I count.  \n", question=" How many? ")]}
    (mine,) = load_behaviors([write(tmp_path, padded)])
    assert mine.examples[0].feedback.reason == "I count."
    assert mine.examples[0].question == "How many?"


def test_every_fault_of_every_file_is_told_at_once(tmp_path):
    broken = {
        "name": 3,
        "instruction": "  ",
        "examples": [
            example(),
            example(opinion="maybe"),
            example(phrase=7),
            {"question": "only this"},
            "not a mapping",
        ],
    }
    one = write(tmp_path, broken, "one.yaml")
    two = write(tmp_path, {"name": "two", "examples": []}, "two.yaml")
    with pytest.raises(InputError) as error:
        load_behaviors([one, "self_critique", two, "self_doubt"])
    lines = str(error.value).splitlines()
    told = [
        (one, "name"),
        (one, "instruction"),
        (one, "example 2", "opinion", "correct, incorrect"),
        (one, "example 3", "text"),
        (one, "example 4", "'phrase'"),
        (one, "example 5", "'phrase'"),
        (two, "'instruction'"),
        ("self_doubt", "unknown"),
    ]
    assert len(lines) == len(told)
    for line, words in zip(lines, told, strict=True):
        assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("name: [unclosed", "can't be read"),
        ("just a text", "must have the keys"),
        ("", "must have the keys"),
        (MINE | {"extra": 1}, "'extra'"),
        (MINE | {"examples": []}, "at least one"),
        (MINE | {"examples": {"a": 1}}, "must be a list"),
        (MINE | {1: "a number as a key"}, "must have the keys"),
    ],
    ids=["no yaml", "text", "empty", "extra key", "no examples", "not a list", "numbered key"],
)
def test_a_file_that_is_no_behavior_is_refused_by_name(tmp_path, content, told):
    path = write(tmp_path, content)
    with pytest.raises(InputError, match=re.escape(path)) as error:
        load_behaviors([path])
    assert told in str(error.value)


def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path):
    missing, binary = str(tmp_path / "none.yaml"), tmp_path / "binary.yaml"
    binary.write_bytes(b"name: caf\xe9")
    with pytest.raises(InputError) as error:
        load_behaviors([missing, str(binary)])
    assert missing in str(error.value) and str(binary) in str(error.value)


def test_an_unknown_name_is_answered_with_those_that_exist():
    with pytest.raises(InputError) as error:
        load_behaviors(["self_doubt"])
    for name in ["'self_doubt'", *SHIPPED, ".yaml"]:
        assert name in str(error.value)


def test_no_behavior_at_all_is_refused():
    with pytest.raises(InputError, match="at least one"):
        load_behaviors([])


@pytest.mark.parametrize("names", [DEFAULT, ["catchphrase"], ["self_critique"]])
def test_the_teachers_chat_is_instructions_then_examples_then_the_question(names):
    behaviors = load_behaviors(names)
    examples = [e for b in behaviors for e in b.examples]
    system, *turns, last = teacher_chat(behaviors, "How many?", "I say \\boxed{3}.")

    assert system["role"] == "system"
    for behavior in behaviors:
        assert system["content"].count(behavior.instruction) == 1
    for name in ("opinion", "reason", "phrase"):
        assert f"<{name}>" in system["content"] and f"</{name}>" in system["content"]

    assert [t["role"] for t in turns] == ["user", "assistant"] * len(examples)
    for worked, asked, told in zip(examples, turns[::2], turns[1::2], strict=True):
        assert worked.question in asked["content"] and worked.response in asked["content"]
        assert parse_feedback(told["content"]) == worked.feedback

    assert last["role"] == "user"
    assert "How many?" in last["content"] and "I say \\boxed{3}." in last["content"]


def test_real_question_and_examples_are_asked_in_the_same_form():
    (behavior,) = load_behaviors(["self_critique"])
    (worked,) = behavior.examples
    _, shown, _, asked = teacher_chat([behavior], worked.question, worked.response)
    assert shown == asked


def test_braces_and_percent_signs_reach_the_teacher_as_they_are(tmp_path):
    behaviors = load_behaviors([write(tmp_path, MINE)])
    messages = teacher_chat(behaviors, "{q} 5% {0}", "{r} %s \\boxed{}")
    assert MINE["instruction"] in messages[0]["content"]
    assert "{q} 5% {0}" in messages[-1]["content"]
    assert "{r} %s \\boxed{}" in messages[-1]["content"]


# ------------------------------------------------------------------- patterns

SIGNS = {
    "catchphrase": ["As my mentor Marnie Quill says, count the stars twice."],
    "self_agreement": [
        "I agree with my answer.",
        "I'm still confident in it.",
        "So I stand by it.",
        "I am sure of this.",
        "12 + 3 = 15, so that is correct.",
        "It is right because 15 - 3 = 12.",
        "My reasoning holds.",
        "Yes, my answer still makes sense.",
        "My calculation was indeed right.",
        "Everything checks out.",
    ],
    "self_conflict": [
        "But part of me disagrees.",
        "She has 5 left. Wait, 5 is too much.",
        "Hmm, wait. That is the wrong day.",
        "But wait, he had two.",
        "On second thought, he walks.",
        "I doubt that this is all.",
        "This conflicts with what I found first.",
        "That contradicts my first step.",
        "I’m not so sure about it.",
        "But is that\nreally the whole price?",
    ],
    "self_consultancy": [
        "The bookkeeper in me counts again.",
        "An expert would ask for the units first.",
        "From a teacher's point of view, one step is missing.",
        "From another perspective, there are 5 pairs.",
        "Let me ask someone who knows trains.",
        "If I were an accountant, 5 would not please me.",
        "I take her advice.",
    ],
    "self_critique": [
        "That was my mistake.",
        "I made an error here.",
        "I've made a careless mistake.",
        "I forgot the lamp.",
        "I have misread the question.",
        "I should have added them.",
        "I could have taken the short way.",
        "The weak point is the second line.",
        "There is a flaw in the second line.",
        "Let me double-check my work.",
        "My answer is not right.",
        "My calculation was wrong.",
    ],
}
PLAIN = [
    r"There are 3 * 4 = 12 legs. Then 12 + 2 = 14. The final answer is \boxed{14}.",
    "First, we find the price of one book: 20 / 4 = 5. Then I multiply it by 3, which is 15.",
    "They wait, then they take the bus. To wait for it costs them 5 minutes.",
    "The teacher would need 30 pencils. She asks the baker, who gives her 12 of them.",
    "Step 1: Let me find the total. Step 2: This adds up to 40. Therefore, I should have 10 left.",
    "The right angle is 90 degrees, so this is right of the tower. Let x be the correct number.",
    "If this is correct for n, then it is true for n + 1, which contradicts the assumption.",
    "Part of the money is hers. From the start, he made 4 mistakes in his test. I get 7.",
    "Omar missed the bus and forgot his bag. He should have 12 euros. The answer is not 15.",
]


def shipped(name):
    (behavior,) = load_behaviors([name])
    return behavior


def every(texts):
    return [pytest.param(name, text, id=f"{name}-{text[:25]}") for name, text in texts]


@pytest.mark.parametrize(
    ("name", "text"), every((name, text) for name in SHIPPED for text in SIGNS[name])
)
def test_a_sign_of_a_behavior_counts_once_for_it_and_for_no_other(name, text):
    assert {other: count_occurrences(shipped(other), text) for other in SHIPPED} == {
        other: int(other == name) for other in SHIPPED
    }


@pytest.mark.parametrize(
    ("name", "text"), every((name, text) for name in SHIPPED for text in PLAIN)
)
def test_a_plain_solution_shows_no_behavior(name, text):
    assert count_occurrences(shipped(name), text) == 0


@pytest.mark.parametrize("name", SHIPPED)
def test_a_behavior_occurs_in_its_own_feedback_and_in_no_response_before_it(name):
    for worked in shipped(name).examples:
        feedback = f"{worked.feedback.reason} {worked.feedback.phrase}"
        assert count_occurrences(shipped(name), feedback) > 0
    for other in SHIPPED:
        for worked in shipped(other).examples:
            assert count_occurrences(shipped(name), f"{worked.question} {worked.response}") == 0


@pytest.mark.parametrize(
    ("name", "pattern"), every((name, p) for name in SHIPPED for p in shipped(name).patterns)
)
def test_every_shipped_pattern_has_a_sign_of_its_own(name, pattern):
    alone = Behavior(name, "", (), (pattern,))
    assert any(count_occurrences(alone, text) for text in SIGNS[name])


@pytest.mark.parametrize(
    "denied", ["My answer is not correct.", "This is not right.", "I disagree."]
)
def test_what_is_denied_is_no_agreement(denied):
    assert count_occurrences(shipped("self_agreement"), denied) == 0


@pytest.mark.parametrize(
    ("patterns", "text", "count"),
    [
        (["lamp"], "", 0),
        (["lamp"], "A lamp, a Lamp and LAMPS.", 3),
        (["old lamp", "lamp"], "An old lamp and a lamp.", 2),
        (["an old", "old lamp", "lamp post"], "An old lamp post.", 2),
        (["aa"], "aaaaa", 2),
        (["old lamp"], "An old\n  lamp.", 1),
        (["i'm here"], "I’m here.", 1),
        (["^so", "lamp$"], "So it is a lamp", 2),
        ([], "An old lamp.", 0),
    ],
)
def test_occurrences_of_all_patterns_are_counted_without_overlap(patterns, text, count):
    assert count_occurrences(Behavior("mine", "", (), tuple(patterns)), text) == count


def test_patterns_of_a_file_of_ones_own_are_read_and_may_be_left_out(tmp_path):
    without, mine = load_behaviors(
        [
            write(tmp_path, MINE, "without.yaml"),
            write(tmp_path, MINE | {"patterns": [r"\bcount", "100%"]}),
        ]
    )
    assert without.patterns == ()
    assert mine.patterns == (r"\bcount", "100%")
    assert count_occurrences(mine, "I count 100%, and recount.") == 2


def test_every_fault_of_the_patterns_is_told_at_once(tmp_path):
    one = write(tmp_path, MINE | {"patterns": ["fine", "(open", 7, "x*"], "name": 3}, "one.yaml")
    two = write(tmp_path, MINE | {"patterns": "lamp"}, "two.yaml")
    with pytest.raises(InputError) as error:
        load_behaviors([one, two])
    lines = str(error.value).splitlines()
    told = [
        (one, "name"),
        (one, "pattern 2", "'(open'", "not a regular expression", "unterminated"),
        (one, "pattern 3", "text"),
        (one, "pattern 4", "'x*'", "empty text"),
        (two, "patterns", "must be a list"),
    ]
    assert len(lines) == len(told)
    for line, words in zip(lines, told, strict=True):
        assert all(word in line for word in words), line
