"""What reflections do to a student's own answers; scripts/reproduce.py calls this.

Looks at the answers that the teacher was given to read, as they were before it added to them: drawn
uniformly from those that ended, on questions that the student hasn't seen before. Was an answer
right before its reflection began, and is it in the end?
"""

import csv
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from matplotlib import pyplot as plt

from thinktuning.callbacks.audit import audit_files
from thinktuning.rewards.maths import last_boxed

WINDOW = 5
"""Batches that are taken together."""


class Answer(NamedTuple):
    """What a student said of itself, in batch ``step`` (from 1)."""

    arm: str
    seed: int
    step: int
    gold: str
    text: str


def read_audit(arm: str, seed: int, folders: Iterable[Path]) -> list[Answer]:
    """The students' answers in a run's folders; of a batch that was made twice, the later."""
    batches: dict[int, list[Answer]] = {}
    for folder in folders:
        found: dict[int, list[Answer]] = {}
        for file in audit_files(folder):
            for row in map(json.loads, file.read_text().splitlines()):
                answer = Answer(arm, seed, row["step"] + 1, row["gold"], row["student"])
                found.setdefault(answer.step, []).append(answer)
        batches |= found
    return [answer for step in sorted(batches) for answer in batches[step]]


def write_answers(answers: Iterable[Answer], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Answer._fields)
        writer.writerows(answers)


def read_answers(path: Path) -> list[Answer]:
    with path.open(newline="") as file:
        return [
            Answer(row["arm"], int(row["seed"]), int(row["step"]), row["gold"], row["text"])
            for row in csv.DictReader(file)
        ]


class Share(NamedTuple):
    """What became of some answers; shares in [0, 1] of all of them."""

    answers: int
    reflected: float
    right_before: float
    right: float
    mended: float
    spoiled: float


def share(answers: Sequence[Answer], begins: str) -> Share:
    """Args: answers, at least one; begins, the pattern of what a reflection begins with."""
    judged = [judge(answer, begins) for answer in answers]
    return Share(
        len(answers),
        mean(re.search(begins, answer.text) is not None for answer in answers),
        mean(before for before, _ in judged),
        mean(after for _, after in judged),
        mean(after and not before for before, after in judged),
        mean(before and not after for before, after in judged),
    )


def judge(answer: Answer, begins: str) -> tuple[bool, bool]:
    """Whether it is right before the first reflection, and in the end; the same without one."""
    before = re.split(begins, answer.text, maxsplit=1)[0]
    return last_boxed(before) == answer.gold, last_boxed(answer.text) == answer.gold


def windows(answers: Sequence[Answer]) -> dict[int, list[Answer]]:
    """By the last batch of every window."""
    found: dict[int, list[Answer]] = {}
    for answer in answers:
        found.setdefault(-(-answer.step // WINDOW) * WINDOW, []).append(answer)
    return dict(sorted(found.items()))


def table(answers: Sequence[Answer], begins: str) -> str:
    """Markdown: a row per arm and window of batches, all seeds together."""
    titles = ["answers", "with a reflection", "right before it", "right in the end"]
    lines = ["| | batches | " + " | ".join([*titles, "mended", "spoiled"]) + " |"]
    lines.append("|---|---|" + "---|" * 6)
    for arm in dict.fromkeys(answer.arm for answer in answers):
        for last, some in windows([a for a in answers if a.arm == arm]).items():
            count, *shares = share(some, begins)
            cells = [f"{last - WINDOW + 1} to {last}", str(count), *(f"{x:.2f}" for x in shares)]
            lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(answers: Sequence[Answer], begins: str, path: Path) -> None:
    """For every arm: right before the reflection and in the end; the mean and range of seeds."""
    arms = list(dict.fromkeys(answer.arm for answer in answers))
    figure, axes = plt.subplots(
        1, len(arms), figsize=(5.2 * len(arms), 3.6), layout="constrained", squeeze=False
    )
    for axis, arm in zip(axes.flat, arms, strict=True):
        seeds = sorted({answer.seed for answer in answers if answer.arm == arm})
        by_seed = [windows([a for a in answers if (a.arm, a.seed) == (arm, s)]) for s in seeds]
        steps = sorted(set.intersection(*(set(found) for found in by_seed)))
        lines = {"right_before": "right before the reflection", "right": "right in the end"}
        for number, (field, label) in enumerate(lines.items()):
            values = [
                [getattr(share(found[step], begins), field) for found in by_seed] for step in steps
            ]
            axis.plot(steps, [mean(v) for v in values], color=f"C{1 - number}", label=label)
            lowest, highest = [min(v) for v in values], [max(v) for v in values]
            axis.fill_between(steps, lowest, highest, color=f"C{1 - number}", alpha=0.15)
        axis.set_ylim(-0.05, 1.05)
        axis.set_title(f"{arm}: the student's own answers")
        axis.set_xlabel("rollout batch")
        axis.grid(alpha=0.3)
        axis.legend(loc="upper left", frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
