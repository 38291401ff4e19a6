"""A student that can already do its task, shared by the tests that train."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))

import tiny

from thinktuning.policy import render_prompt

# Of each property in test_fuzz.py: a few examples, always the same, or as many new ones as asked.
asked = os.environ.get("THINKTUNING_FUZZ")
settings.register_profile(
    "fuzz", max_examples=int(asked or 50), derandomize=not asked, deadline=None, database=None
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slowest files first: begun as the last ones, they would keep one core of two."""
    items.sort(key=lambda item: not item.path.name.startswith("test_vllm"))


@pytest.fixture(autouse=True)
def no_ranks_are_left() -> Iterator[None]:
    """Ranks belong into processes of their own: those to come would find their port taken."""
    yield
    assert "MASTER_PORT" not in os.environ


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen one-digit sums as a JSONL file in GSM8K's form."""
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [
        {
            "question": f"{a} plus {b}?",
            "answer": f"{a}+{b}=<<{a}+{b}={a + b}>>{a + b}\n#### {a + b}",
        }
        for a in range(4)
        for b in range(4)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


SYSTEM, INSTRUCTION = "Add.", "Box it."


def prompt_ids(text, question: str) -> list[int]:
    user = {"role": "user", "content": f"{question}\n\n{INSTRUCTION}"}
    return render_prompt(text, [{"role": "system", "content": SYSTEM}, user])


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory, questions: Path):
    """A function that makes a folder with a student of a family and a kind of tokenizer.

    It answers ``It is \\boxed{n}.`` in the right form and with some uncertainty about n.
    """
    made: dict[tuple, Path] = {}

    def make(family: str = "llama", kind: str = "own_pad", **shape: int) -> Path:
        key = (family, kind, *sorted(shape.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("student") / f"{family}-{kind}"
            tiny.save(folder, family, kind, **shape)
            text = tiny.tokenizer(kind)
            pairs = []
            for line in questions.read_text().splitlines():
                row = json.loads(line)
                gold = int(row["answer"].split()[-1])
                prompt = prompt_ids(text, row["question"])
                # Right half of the time; now and then it goes on after its answer.
                for shown, more in ((gold, ""), ((gold + 1) % 7, ""), (gold, "\n\nThat is all.")):
                    answer = text.encode(
                        f"It is \\boxed{{{shown}}}.{more}", add_special_tokens=False
                    )
                    pairs.append((prompt, [*answer, text.eos_token_id]))
            tiny.train_on(folder, pairs, steps=120)
            made[key] = folder
        return made[key]

    return make
