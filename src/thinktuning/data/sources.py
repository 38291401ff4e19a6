"""Where questions come from: a hub id, a local file in upstream's format, or reasoning-gym."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import datasets
import yaml

from thinktuning.engines.seeding import derive_seed
from thinktuning.errors import InputError
from thinktuning.rewards import is_calculation

REASONING_GYM = "reasoning-gym:"
_MAX_FAULTS_SHOWN = 5
_CALCULATION = re.compile(r"<<[^<>]*>>")  # GSM8K's notes for a calculator
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # a JSON escape can write one
_NUMBER = re.compile(r"[-+]?\s*(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)")


@dataclass(frozen=True)
class Question:
    """A row of the source: its number, its text, its normalised gold answer, and how that is found.

    The solution is empty where the source has none.
    """

    index: int
    text: str
    answer: str
    solution: str = ""


def parse_gold(answer: str) -> str | None:
    """The gold answer of a GSM8K row: what follows its last ``####``, normalised.

    ``#### $1,000.`` gives ``1000``, ``#### +7`` gives ``7``, ``#### - 3`` gives ``-3``. An answer
    that isn't a number (a fraction, LaTeX) is kept as it is. A row without ``####`` counts as the
    final answer alone.

    Returns:
        The answer, or None where nothing is left.
    """
    final = answer.rsplit("####", 1)[-1].strip()
    number = final.replace("$", "").rstrip(".").replace("\N{MINUS SIGN}", "-")
    if _NUMBER.fullmatch(number):
        return re.sub(r"[,\s]", "", number).removeprefix("+")
    return final or None


def parse_solution(answer: str) -> str:
    r"""The worked solution of a GSM8K row: what stands before its last ``####``, for people.

    ``3+4=<<3+4=7>>7\n#### 7`` gives ``3+4=7``; a row without ``####`` has none.
    """
    solution, mark, _ = answer.rpartition("####")
    return _CALCULATION.sub("", solution).strip() if mark else ""


def load_questions(
    source: str, split: str, seed: int = 0, limit: int | None = None
) -> list[Question]:
    """Read a source.

    Args:
        source: A ``.jsonl``, ``.json`` or ``.parquet`` file with ``question`` and ``answer``
            columns; ``reasoning-gym:NAME?SETTING=VALUE&…`` for a generator of that package; else a
            hub id.
        split: Split of a hub data set, ``train`` or ``test``; unused by files.
        seed: Of the generator.
        limit: Rows to read at most; a generator makes this many.

    Returns:
        The questions in the order of the source.

    Raises:
        InputError: If the source can't be read, has no rows, or has rows without a question or a
            gold answer; the first faulty rows are named.
    """
    if limit is not None and limit < 1:
        raise InputError(f"data: limit must be at least 1 or null, got {limit}")
    if not source:
        raise InputError("data: source is empty; give a file, a hub id or reasoning-gym:NAME")
    if source.startswith(REASONING_GYM):
        rows = _generated(source.removeprefix(REASONING_GYM), split, seed, limit or 1000)
    else:
        rows = _stored(source, split, limit)
    return _questions(source, rows)


def _stored(source: str, split: str, limit: int | None) -> Iterable[Mapping[str, Any]]:
    path = Path(source).expanduser()
    if path.suffix in (".jsonl", ".json", ".parquet") and not path.is_file():
        raise InputError(f"data: there is no file {str(path)!r}")
    try:
        if path.suffix in (".jsonl", ".json"):
            rows = _json_rows(path)
            columns = list(dict.fromkeys(key for row in rows for key in row))
            read = [dict.fromkeys(columns) | row for row in rows]
        else:
            table = _loaded(source, split)
            table = table if limit is None else table.select(range(min(limit, len(table))))
            columns, read = table.column_names, list(table)
    except StopIteration as error:  # what datasets says of an empty file
        raise InputError(f"data: {source!r} has no rows") from error
    # A RuntimeError: scripts, which datasets doesn't run any more, and what is nested too deep.
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        cause = error.__cause__ or error.__context__
        detail = f" ({cause})" if cause is not None else ""
        raise InputError(
            f"data: cannot read {source!r}: {reason}{detail}\n"
            f"expected a .jsonl or .parquet file with the columns 'question' and 'answer', "
            f"'{REASONING_GYM}NAME', or a hub id that this machine can reach"
        ) from error
    if not read:
        raise InputError(f"data: {source!r} has no rows")
    missing = {"question", "answer"} - set(columns)
    if missing:
        raise InputError(
            f"data: {source!r} has no column {' and '.join(map(repr, sorted(missing)))}; "
            f"its columns are {columns}"
        )
    return read[:limit]


def _loaded(source: str, split: str) -> datasets.Dataset:
    if Path(source).suffix == ".parquet":
        path = str(Path(source).expanduser())
        return datasets.load_dataset("parquet", data_files=path, split="train")
    # GSM8K has two configurations with the same questions; others mostly have one.
    name = "main" if source == "openai/gsm8k" else None
    return datasets.load_dataset(source, name, split=split)


def _json_rows(path: Path) -> list[dict[str, Any]]:
    """Rows as they stand: ``datasets`` makes dates of texts that look like some."""
    content = path.read_bytes().decode("utf-8-sig")
    if content.lstrip().startswith("["):
        rows = json.loads(content)
    else:
        # Not splitlines: a text may hold other signs that end a line.
        lines = enumerate(content.split("\n"), start=1)
        rows = [_json_row(number, line) for number, line in lines if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("every row must be an object with the keys 'question' and 'answer'")
    return rows


def _json_row(number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number} isn't JSON: {error}") from error


def _generated(called: str, split: str, seed: int, size: int) -> Iterable[Mapping[str, Any]]:
    import reasoning_gym

    name, _, query = called.partition("?")
    # Generators draw row i from seed + i: seeds must be far apart, or splits and runs share rows.
    far = derive_seed(seed, split, "questions") % 2**31
    try:
        settings = {k: yaml.safe_load(v) for k, v in parse_qsl(query, strict_parsing=bool(query))}
        made = reasoning_gym.create_dataset(name, seed=far, size=size, **settings)
    # A generator's settings are of its own class, which checks them by assertions.
    except (ValueError, TypeError, AssertionError, yaml.YAMLError) as error:
        if name not in reasoning_gym.factory.DATASETS:
            raise InputError(f"data: reasoning-gym has no generator {name!r}: {error}") from error
        raise InputError(
            f"data: reasoning-gym's {name} doesn't take the settings {query!r}: {error}; expected "
            f"e.g. {REASONING_GYM}chain_sum?max_terms=3&max_digits=2"
        ) from error
    rows = list(made)
    if calculation := next((a for row in rows if is_calculation(a := str(row["answer"]))), None):
        raise InputError(
            f"data: reasoning-gym's {name} asks for a calculation, such as {calculation!r}: many "
            f"would be right, and this one alone would be rewarded; take a generator with one "
            f"right answer"
        )
    return rows


def _questions(source: str, rows: Iterable[Mapping[str, Any]]) -> list[Question]:
    questions, faults = [], []
    for index, row in enumerate(rows):
        text, answer = row["question"], row["answer"]
        gold = parse_gold(str(answer))
        if not isinstance(text, str) or not text.strip():
            faults.append(f"row {index + 1}: 'question' must be a text, got {text!r:.60}")
        elif not isinstance(answer, str):
            faults.append(f"row {index + 1}: 'answer' must be a text, got {answer!r:.60}")
        elif _HALF_CHARACTER.search(f"{text}{answer}"):
            faults.append(f"row {index + 1}: has half a character (a lone surrogate): {text!r:.60}")
        elif gold is None:
            faults.append(f"row {index + 1}: 'answer' has no gold answer, got {answer!r:.60}")
        else:
            questions.append(Question(index, text.strip(), gold, parse_solution(answer)))
    if faults:
        shown = "\n  ".join(faults[:_MAX_FAULTS_SHOWN])
        raise InputError(f"data: {source!r} has {len(faults)} faulty rows:\n  {shown}")
    if not questions:
        raise InputError(f"data: {source!r} has no rows")
    return questions
