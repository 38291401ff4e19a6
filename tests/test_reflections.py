"""What scripts/reflections.py says of reflections, on answers that are judged by hand."""

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "scripts"))

from reflections import Answer, Share, read_answers, read_audit, share, table, write_answers

BEGINS = r"\bI made a mistake\b"


def says(text: str, step: int = 1, gold: str = "9") -> Answer:
    return Answer("a", 1, step, gold, text)


MENDED = says(r"\boxed{8}. I made a mistake: \boxed{9}.")
SPOILED = says(r"\boxed{9}. I made a mistake: \boxed{8}.")
STAYS_RIGHT = says(r"\boxed{9}. I made a mistake: \boxed{8}. I made a mistake: \boxed{9}.")
RIGHT_AT_ONCE = says(r"7 + 2 = \boxed{9}.")
NO_ANSWER_BEFORE = says(r"I made a mistake: \boxed{9}.")
WITHOUT_ANSWER = says("I don't know.")


def test_answers_are_judged_before_their_first_reflection_and_in_the_end():
    answers = [MENDED, SPOILED, STAYS_RIGHT, RIGHT_AT_ONCE, NO_ANSWER_BEFORE, WITHOUT_ANSWER]
    expected = Share(
        6, reflected=4 / 6, right_before=3 / 6, right=4 / 6, mended=2 / 6, spoiled=1 / 6
    )
    assert share(answers, BEGINS) == pytest.approx(expected)


def test_a_window_is_five_batches():
    answers = [SPOILED, MENDED._replace(step=5), MENDED._replace(step=6, seed=2)]
    assert table(answers, BEGINS).splitlines()[2:] == [
        "| a | 1 to 5 | 2 | 1.00 | 0.50 | 0.50 | 0.50 | 0.50 |",
        "| a | 6 to 10 | 1 | 1.00 | 0.00 | 1.00 | 1.00 | 0.00 |",
    ]


def test_of_a_batch_that_was_made_twice_the_later_counts(tmp_path):
    lives = {"version_0": [(0, "x"), (1, "y"), (1, "z")], "version_1": [(1, "Y")]}
    for name, rows in lives.items():
        (tmp_path / name).mkdir()
        lines = [json.dumps({"step": s, "gold": "9", "student": text}) for s, text in rows]
        (tmp_path / name / "audit.jsonl").write_text("\n".join(lines) + "\n")
    found = read_audit("a", 1, [tmp_path / name for name in lives])
    assert found == [says("x"), says("Y", step=2)]


def test_answers_are_read_as_they_were_written(tmp_path):
    answers = [says('a "quoted", line\nand another'), MENDED]
    write_answers(answers, tmp_path / "answers.csv")
    assert read_answers(tmp_path / "answers.csv") == answers
