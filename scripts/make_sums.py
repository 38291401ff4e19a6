"""Sums with worked solutions: ``python scripts/make_sums.py FOLDER``.

Writes ``train.jsonl`` and ``test.jsonl`` in GSM8K's format: three numbers from 0 to 10, drawn by
reasoning-gym's ``basic_arithmetic``. No three numbers are in both files, in whatever order.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import reasoning_gym

THREE_NUMBERS: dict[str, Any] = {
    "operators": ("+",),
    "min_terms": 3,
    "max_terms": 3,
    "min_digits": 1,
    "max_digits": 1,
    "allow_parentheses": False,
    "allow_negation": False,
}
HELD_OUT = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    drawn = reasoning_gym.create_dataset("basic_arithmetic", seed=1, size=5000, **THREE_NUMBERS)
    questions = {row["question"]: row for row in drawn}
    test: dict[tuple[int, ...], dict[str, Any]] = {}
    for row in questions.values():
        if len(test) < HELD_OUT:
            test.setdefault(same_in_any_order(row), row)
    train = [row for row in questions.values() if same_in_any_order(row) not in test]
    for name, rows in (("train", train), ("test", list(test.values()))):
        lines = (json.dumps({"question": row["question"], "answer": solved(row)}) for row in rows)
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))


def numbers(row: dict[str, Any]) -> list[int]:
    return [int(number) for number in row["metadata"]["expression"].split(" + ")]


def same_in_any_order(row: dict[str, Any]) -> tuple[int, ...]:
    return tuple(sorted(numbers(row)))


def solved(row: dict[str, Any]) -> str:
    """``8 + 5 + 9`` as ``8 + 5 = 13, 13 + 9 = 22.`` and the answer, as GSM8K has it."""
    a, b, c = numbers(row)
    return f"{a} + {b} = {a + b}, {a + b} + {c} = {row['answer']}.\n#### {row['answer']}"


if __name__ == "__main__":
    main()
