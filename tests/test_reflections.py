"""What scripts/reflections.py says of reflections, on answers that are judged by hand."""

import json
from typing import Any

from reflections import (
    Answer,
    Count,
    Guided,
    count,
    held_out_table,
    plot,
    read_guided,
    read_held_out,
    read_students,
    table,
)

BEGINS = r"\bI made a mistake\b"


def says(text: str, right: bool, step: int = 1, seed: int = 1) -> Answer:
    return Answer("a", seed, step, right, "9", text)


MENDED = says(r"\boxed{8}. i made a mistake: \boxed{9}.", True)
SPOILED = says(r"\boxed{9}. I made a mistake: \boxed{8}.", False)
STAYS_RIGHT = says(r"\boxed{9}. I made a mistake: \boxed{8}. I made a mistake: \boxed{9}.", True)
NO_FIRST_ANSWER = says(r"I made a mistake: \boxed{9}.", True)
RIGHT_AT_ONCE = says(r"7 + 2 = \boxed{9}.", True)
WITHOUT_ANSWER = says("I don't know.", False)


def test_first_and_last_answers_are_counted_where_one_reflects():
    reflecting = [MENDED, SPOILED, STAYS_RIGHT, NO_FIRST_ANSWER]
    expected = Count(6, 4, first_right=2, last_right=3, mended=1, spoiled=1)
    assert count([*reflecting, RIGHT_AT_ONCE, WITHOUT_ANSWER], BEGINS) == expected


def test_a_window_is_ten_batches_of_a_seed():
    answers = [SPOILED, MENDED._replace(step=10), MENDED._replace(step=11), MENDED._replace(seed=2)]
    assert table(answers, BEGINS).splitlines()[2:] == [
        "| a | 1 | 1 to 10 | 2 | 2 | 1 | 1 | 1 | 1 |",
        "| a | 1 | 11 to 20 | 1 | 1 | 0 | 1 | 1 | 0 |",
        "| a | 2 | 1 to 10 | 1 | 1 | 0 | 1 | 1 | 0 |",
    ]
    bars = [bar.get_height() for bar in plot(answers, BEGINS).axes[0].patches]
    assert bars == [3, 1, 3, 1, 1, 0, 2, 1], "all, reflecting, first right, last right; by window"


def test_of_a_batch_that_was_made_twice_the_later_counts(tmp_path):
    lives = {"version_0": [(0, "x"), (1, "y"), (1, "z")], "version_1": [(1, "Y")]}
    for name, rows in lives.items():
        (tmp_path / name).mkdir()
        lines = [
            json.dumps(audited(step, text, number)) for number, (step, text) in enumerate(rows)
        ]
        (tmp_path / name / "audit.jsonl").write_text("\n".join(lines) + "\n")
    found = read_students("a", 1, [tmp_path / name for name in lives])
    assert found == [says("x", True), says("Y", True, step=2)]
    guided = read_guided("a", 1, [tmp_path / name for name in lives])
    assert guided == [Guided("a", 1, 1, 0.5, 0), Guided("a", 1, 2, 0.5, 0)]


def audited(step: int, text: str, after: float, skipped: str | None = None) -> dict[str, Any]:
    before = {"outcome": "correct", "reward": 0.5}
    row = {"step": step, "gold": "9", "before": before, "student": text, "skipped": skipped}
    return row | {"after": {"reward": after}}


def test_rewards_are_of_answers_that_the_teacher_added_to(tmp_path):
    rows = [audited(0, "x", 0.75), audited(0, "y", 0.5, "unparsed"), audited(1, "z", 0.25)]
    (tmp_path / "audit.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_guided("a", 1, [tmp_path]) == [
        Guided("a", 1, 1, 0.5, 0.75),
        Guided("a", 1, 2, 0.5, 0.25),
    ]


def test_held_out_answers_are_those_of_the_last_validation(tmp_path):
    for version, step, text in ((0, 10, "x"), (1, 100, "one\u2028"), (1, 90, "y")):
        folder = tmp_path / f"version_{version}/answers"
        folder.mkdir(parents=True, exist_ok=True)
        row = {"gold": "9", "outcome": "wrong", "text": text}
        line = json.dumps(row, ensure_ascii=False)
        (folder / f"step={step:06d}.jsonl").write_text(f"{line}\n")
    folders = [tmp_path / "version_0", tmp_path / "version_1"]
    found = read_held_out("a", 1, folders)
    assert found == [says("one\u2028", False, step=100)]
    assert held_out_table([*found, MENDED], BEGINS).splitlines()[2:] == [
        "| a | 1 | 2 | 1 | 0 | 1 | 1 | 0 |"
    ]
    assert read_held_out("a", 1, [tmp_path]) == []
