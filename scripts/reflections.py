"""What guidance does to answers; scripts/reproduce.py calls this.

What a teacher's words do to rewards, and what reflections do to a student's own answers: held-out
ones, and those that the teacher was given to read, as they were before it added to them. (These are
drawn uniformly from those that ended, each on a question that the student wasn't trained on
before.) Where an answer reflects: was the answer that it gives first right, and is the one that it
ends on?
"""

import csv
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from thinktuning.callbacks.answers import answer_files
from thinktuning.callbacks.audit import audit_files
from thinktuning.rewards.maths import last_boxed

WINDOW = 10
"""Batches that are taken together."""


class Answer(NamedTuple):
    """What a student said of itself, in batch ``step`` (from 1)."""

    arm: str
    seed: int
    step: int
    right: bool  # as it was rewarded
    gold: str
    text: str


class Guided(NamedTuple):
    """What a teacher's words made of the reward of an answer, in batch ``step`` (from 1)."""

    arm: str
    seed: int
    step: int
    before: float
    after: float


def read_audit(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """The rows of a run's folders, a row for each answer that the teacher was given to read.

    Of a batch that was made twice, the later.
    """
    batches: dict[int, list[dict[str, Any]]] = {}
    for folder in folders:
        found: dict[int, list[dict[str, Any]]] = {}
        for file in audit_files(folder):
            for row in read_json_lines(file):
                found.setdefault(row["step"], []).append(row)
        batches |= found
    return [row for step in sorted(batches) for row in batches[step]]


def read_students(arm: str, seed: int, folders: Iterable[Path]) -> list[Answer]:
    """The students' answers, as they were before the teacher added to them."""
    return [
        Answer(
            arm,
            seed,
            row["step"] + 1,
            row["before"]["outcome"] == "correct",
            row["gold"],
            row["student"],
        )
        for row in read_audit(folders)
    ]


def read_guided(arm: str, seed: int, folders: Iterable[Path]) -> list[Guided]:
    """The rewards of the answers that the teacher added to."""
    return [
        Guided(arm, seed, row["step"] + 1, row["before"]["reward"], row["after"]["reward"])
        for row in read_audit(folders)
        if row["skipped"] is None
    ]


def read_held_out(arm: str, seed: int, folders: Iterable[Path]) -> list[Answer]:
    """The answers of the last validation in a run's folders; none of a run that kept none."""
    validations: dict[int, list[Path]] = {}
    for folder in folders:
        validations |= answer_files(folder)
    if not validations:
        return []
    last = max(validations)
    return [
        Answer(arm, seed, last, row["outcome"] == "correct", row["gold"], row["text"])
        for file in validations[last]
        for row in read_json_lines(file)
    ]


def read_json_lines(file: Path) -> Iterator[dict[str, Any]]:
    """Not by ``splitlines``, which takes separators apart that answers have."""
    return map(json.loads, file.read_text().split("\n")[:-1])


def read_answers(path: Path) -> list[Answer]:
    with path.open(newline="") as file:
        return [
            Answer(arm, int(seed), int(step), right == "True", gold, text)
            for arm, seed, step, right, gold, text in list(csv.reader(file))[1:]
        ]


def read_rewards(path: Path) -> list[Guided]:
    with path.open(newline="") as file:
        return [
            Guided(arm, int(seed), int(step), float(before), float(after))
            for arm, seed, step, before, after in list(csv.reader(file))[1:]
        ]


class Count(NamedTuple):
    """How many answers; those behind the second are of answers that reflect."""

    answers: int
    reflecting: int
    first_right: int
    last_right: int
    mended: int
    spoiled: int


def count(answers: Sequence[Answer], begins: str) -> Count:
    """Args: answers; begins, the pattern of what a reflection begins with, in any case."""
    judged = [found for answer in answers if (found := judge(answer, begins)) is not None]
    return Count(
        len(answers),
        len(judged),
        sum(first is True for first, _ in judged),
        sum(last for _, last in judged),
        sum(first is False and last for first, last in judged),
        sum(first is True and not last for first, last in judged),
    )


def judge(answer: Answer, begins: str) -> tuple[bool | None, bool] | None:
    """Whether the first answer is right, None if there is none before the reflection; and the last.

    None if it doesn't reflect.
    """
    before, *reflections = re.split(begins, answer.text, maxsplit=1, flags=re.IGNORECASE)
    if not reflections:
        return None
    first = last_boxed(before)
    return (None if first is None else first == answer.gold), answer.right


def windows(answers: Sequence[Answer]) -> dict[str, list[Answer]]:
    """By batches, ``1 to 10`` and so on."""
    found: dict[str, list[Answer]] = {}
    for answer in sorted(answers, key=lambda answer: answer.step):
        before = (answer.step - 1) // WINDOW * WINDOW
        found.setdefault(f"{before + 1} to {before + WINDOW}", []).append(answer)
    return found


def by_arm_and_seed(answers: Sequence[Answer]) -> dict[tuple[str, int], list[Answer]]:
    found: dict[tuple[str, int], list[Answer]] = {}
    for answer in answers:
        found.setdefault((answer.arm, answer.seed), []).append(answer)
    return found


COUNTS = ["answers", "that reflect", "of these, first answer right", "last answer right"]
COUNTS += ["wrong, then right", "right, then wrong"]


def table(answers: Sequence[Answer], begins: str) -> str:
    """Markdown: a row per arm, seed and window of batches."""
    rows = [["arm", "seed", "batches", *COUNTS]]
    for (arm, seed), own in by_arm_and_seed(answers).items():
        for batches, some in windows(own).items():
            rows.append([arm, str(seed), batches, *map(str, count(some, begins))])
    return markdown(rows)


def held_out_table(answers: Sequence[Answer], begins: str) -> str:
    """Markdown: a row per arm and seed."""
    rows = [["arm", "seed", *COUNTS]]
    for (arm, seed), own in by_arm_and_seed(answers).items():
        rows.append([arm, str(seed), *map(str, count(own, begins))])
    return markdown(rows)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    return "".join(f"| {' | '.join(row)} |\n" for row in [head, ["---"] * len(head), *body])


def plot(answers: Sequence[Answer], begins: str) -> Figure:
    """First and last answers that are right, of those that reflect: bars for windows, all seeds."""
    arms = list(dict.fromkeys(answer.arm for answer in answers))
    figure, axes = plt.subplots(
        1, len(arms), figsize=(8.0 * len(arms), 3.6), layout="constrained", squeeze=False
    )
    for axis, arm in zip(axes.flat, arms, strict=True):
        some = windows([answer for answer in answers if answer.arm == arm])
        counts = [count(own, begins) for own in some.values()]
        places = range(len(counts))
        for shift, color, label, values in (
            (-0.3, "0.9", "all", [c.answers for c in counts]),
            (-0.1, "0.7", "those that reflect", [c.reflecting for c in counts]),
            (0.1, "C1", "… whose first answer is right", [c.first_right for c in counts]),
            (0.3, "C0", "… whose last answer is right", [c.last_right for c in counts]),
        ):
            axis.bar([p + shift for p in places], values, 0.19, color=color, label=label)
        axis.set_xticks(list(places), list(some))
        axis.set_xlabel("rollout batches")
        axis.set_ylabel("answers")
        axis.set_title(f"{arm}: the student's own answers")
        axis.legend(bbox_to_anchor=(1, 1), loc="upper left", frameon=False)
    return figure
