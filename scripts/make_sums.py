"""Sums with worked solutions: ``python scripts/make_sums.py FOLDER``.

Writes ``train.jsonl`` and ``test.jsonl`` in GSM8K's format, of reasoning-gym's
``basic_arithmetic``; it gives the answers alone, and SFT needs solutions. No question is in both
files, or twice in one.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import reasoning_gym

SIZES = {"test": (100_000, 256), "train": (1, 2000)}  # seed of the first row, rows drawn
THREE_DIGITS: dict[str, Any] = {
    "operators": ("+",),
    "min_terms": 3,
    "max_terms": 3,
    "min_digits": 1,
    "max_digits": 1,
    "allow_parentheses": False,
    "allow_negation": False,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    written: set[str] = set()
    for name, (seed, size) in SIZES.items():
        rows = reasoning_gym.create_dataset("basic_arithmetic", seed=seed, size=size, **THREE_DIGITS)
        with (folder / f"{name}.jsonl").open("w") as file:
            for row in rows:
                if row["question"] not in written:
                    written.add(row["question"])
                    solution = f"{row['metadata']['expression']} = {row['answer']}."
                    answer = f"{solution}\n#### {row['answer']}"
                    file.write(json.dumps({"question": row["question"], "answer": answer}) + "\n")


if __name__ == "__main__":
    main()
