"""Rows of the hub's sets, as upstream has them, into the fields of an item."""

import re
from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any

from thinktuning.data.sources import parse_gold
from thinktuning.engines.seeding import derive_seed
from thinktuning.rewards import LETTERS

Row = Mapping[str, Any]
# Upstream's id, question, choices, answer.
Fields = tuple[str | None, str, tuple[str, ...] | None, str]


class FaultyRow(ValueError):
    """The row is not what its columns promise."""


class UnusableRow(ValueError):
    """The row is as upstream has it, and has no single gold answer."""


def text_of(row: Row, column: str) -> str:
    """A text that must be there, without outer whitespace."""
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        raise FaultyRow(f"{column!r} must be a text, got {value!r:.60}")
    return value.strip()


def row_id(row: Row, column: str) -> str | None:
    """Upstream's id, as text; None where the row has none."""
    value = row.get(column)
    return None if value is None or value == "" else str(value)


def lettered(texts: object, answer: str) -> tuple[tuple[str, ...], str]:
    """Choices without labels of their own: the answer is the letter of a position."""
    labels = ascii_uppercase[: len(texts)] if isinstance(texts, list) else ""
    return lettered_by(texts, list(labels), answer)


def lettered_by(
    texts: object, labels: Sequence[object], answer: object
) -> tuple[tuple[str, ...], str]:
    """The choices, and the letter of the one labelled ``answer``.

    Only a place tells choices apart: two may have the same text. ``N/A`` is MMLU-Pro's filler.
    """
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise FaultyRow(f"the choices must be a list of texts, got {texts!r:.60}")
    if len(texts) != len(labels):
        raise FaultyRow(f"there are {len(texts)} choices and {len(labels)} labels for them")
    kept = [i for i, text in enumerate(texts) if text.strip() != "N/A"]
    if not 2 <= len(kept) <= len(LETTERS):
        raise FaultyRow(f"there must be 2 to {len(LETTERS)} choices, got {len(kept)}")
    kept_labels = [labels[i] for i in kept]
    if answer not in kept_labels:
        shown = ", ".join(map(str, kept_labels))
        raise FaultyRow(f"the answer must be one of {shown}, got {answer!r:.60}")
    letter = ascii_uppercase[kept_labels.index(answer)]
    return tuple(texts[i].strip() for i in kept), letter


def gsm8k(row: Row) -> Fields:
    """The gold answer follows the last ``####``."""
    answer = parse_gold(text_of(row, "answer"))
    if answer is None:
        raise FaultyRow(f"'answer' has no gold answer, got {row['answer']!r:.60}")
    return None, text_of(row, "question"), None, answer


def math500(row: Row) -> Fields:
    """The gold answer is LaTeX."""
    return row_id(row, "unique_id"), text_of(row, "problem"), None, text_of(row, "answer")


def aime(row: Row) -> Fields:
    """Integers from 0 to 999; some copies write 025 for 25."""
    answer = str(row.get("answer")).strip()
    if re.match(r"\d+ or \d+", answer):
        raise UnusableRow(f"it has two gold answers, {answer!r:.60}")
    if not re.fullmatch(r"\d+", answer):
        raise FaultyRow(f"'answer' must be an integer, got {row.get('answer')!r:.60}")
    question = "problem" if "problem" in row else "question"
    return row_id(row, "id"), text_of(row, question), None, str(int(answer))


def labelled(row: Row) -> Fields:
    """ARC and CommonsenseQA: choices with labels, which may be digits."""
    match row.get("choices"):
        case {"label": list(labels), "text": list(texts)}:
            pass
        case [*options] if all(isinstance(option, dict) for option in options):
            labels, texts = [[option.get(key) for option in options] for key in ("label", "text")]
        case other:
            raise FaultyRow(f"'choices' must have 'label' and 'text', got {other!r:.60}")
    choices, answer = lettered_by(texts, labels, text_of(row, "answerkey"))
    return row_id(row, "id"), text_of(row, "question"), choices, answer


def gpqa(row: Row) -> Fields:
    """Four answers without an order."""
    question = text_of(row, "question")
    columns = ["correct answer", *(f"incorrect answer {i}" for i in (1, 2, 3))]
    # Upstream has no order: each row gets its own, whatever stands around it.
    columns.sort(key=lambda column: derive_seed(question, column))
    choices, answer = lettered_by([text_of(row, c) for c in columns], columns, "correct answer")
    return row_id(row, "record id"), question, choices, answer


def strategyqa(row: Row) -> Fields:
    """True or false."""
    words = {"true": "yes", "yes": "yes", "false": "no", "no": "no"}
    answer = words.get(str(row.get("answer")).strip().lower())
    if answer is None:
        raise FaultyRow(f"'answer' must be true or false, got {row.get('answer')!r:.60}")
    return row_id(row, "qid"), text_of(row, "question"), None, answer


def mmlu_pro(row: Row) -> Fields:
    """Up to ten options without labels; the letter and the index of the right one."""
    letter, index = text_of(row, "answer"), row.get("answer_index")
    choices, answer = lettered(row.get("options"), letter)
    if index is not None and index != ascii_uppercase.index(letter):
        raise UnusableRow(f"its answer is {letter!r}, but its answer_index is {index!r}")
    return row_id(row, "question_id"), text_of(row, "question"), choices, answer
