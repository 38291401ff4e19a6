"""What walks through evaluation: a row of a benchmark, and what the model made of it."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from thinktuning.rewards import LETTERS, judge
from thinktuning.types import AnswerKind, Outcome


@dataclass(frozen=True)
class Item:
    r"""A row of a benchmark.

    Attributes:
        id: Unique within its benchmark, e.g. ``"gsm8k/17"``.
        benchmark: Name of the benchmark, e.g. ``"gsm8k"``.
        kind: What the answer is.
        question: Its text, without the choices.
        choices: Texts of the lettered options, ``A`` first; None unless ``kind`` is ``choice``.
        answer: Gold: a number or LaTeX without ``$``, the letter of a choice, ``yes`` or ``no``.
    """

    id: str
    benchmark: str
    kind: AnswerKind
    question: str
    choices: tuple[str, ...] | None
    answer: str


@dataclass(frozen=True)
class Turn:
    """One thing that a model wrote.

    Attributes:
        prompt: What it read, as decoded text with control tokens.
        response: What it wrote, without control tokens.
    """

    prompt: str
    response: str


@dataclass(frozen=True)
class Sample:
    """One answer of a model to an item.

    Attributes:
        turns: All that was said on the way, in order; at least one.
        response: The text that was judged.
        extracted: The answer found in it, normalised; None where there is none.
        outcome: What the verifier found.
        tokens: Generated on the way, over all turns; what a strategy put in itself counts too.
    """

    turns: tuple[Turn, ...]
    response: str
    extracted: str | None
    outcome: Outcome
    tokens: int


@dataclass(frozen=True)
class ItemResult:
    """An item with all its samples: a line of ``items.jsonl``.

    Attributes:
        id: The item's.
        question: The item's text, without the choices.
        answer: Gold.
        samples: One, or ``k`` at a temperature.
        choices: The item's.
    """

    id: str
    question: str
    answer: str
    samples: tuple[Sample, ...]
    choices: tuple[str, ...] | None = None

    def answers(self, item: Item) -> bool:
        """Whether it is a result of this very item."""
        own = (self.id, self.question, self.answer, self.choices)
        return own == (item.id, item.question, item.answer, item.choices)

    def judged(self, kind: AnswerKind) -> "ItemResult":
        """The same responses, judged again."""
        options = len(self.choices or LETTERS)
        samples = []
        for sample in self.samples:
            finished = sample.outcome is not Outcome.CUT_OFF
            outcome, extracted = judge(kind, sample.response, self.answer, finished, options)
            samples.append(replace(sample, outcome=outcome, extracted=extracted))
        return replace(self, samples=tuple(samples))

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @staticmethod
    def from_json(line: str) -> "ItemResult":
        """The result that ``to_json`` wrote.

        Raises:
            ValueError, KeyError, TypeError: If the line is anything else.
        """
        row = json.loads(line)
        samples = tuple(_sample(sample) for sample in row["samples"])
        choices = None if row["choices"] is None else tuple(row["choices"])
        return ItemResult(row["id"], row["question"], row["answer"], samples, choices)


def _sample(row: Mapping[str, Any]) -> Sample:
    turns = tuple(Turn(**turn) for turn in row["turns"])
    return Sample(turns, row["response"], row["extracted"], Outcome(row["outcome"]), row["tokens"])
