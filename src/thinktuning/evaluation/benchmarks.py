"""Benchmarks by name: the rows of a hub set, or of a file, as items."""

import csv
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub.errors import GatedRepoError

from thinktuning.errors import InputError
from thinktuning.evaluation import upstream
from thinktuning.evaluation.files import READERS
from thinktuning.evaluation.records import Item
from thinktuning.evaluation.upstream import Fields, Row
from thinktuning.types import AnswerKind

log = logging.getLogger(__name__)

_UNIFORM_COLUMNS = ("id", "benchmark", "question", "choices", "answer")
_MAX_ROWS_SHOWN = 5


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark comes from, and how its rows are read.

    Attributes:
        name: How configurations and reports call it.
        hub_id: Data set on the hub.
        split: The split with answers that is held out.
        kind: What its answers are.
        columns: What ``read`` needs; upper and lower case don't matter.
        read: Takes an upstream row with its column names in lower case.
        config: Configuration of the hub's set.
    """

    name: str
    hub_id: str
    split: str
    kind: AnswerKind
    columns: tuple[str, ...]
    read: Callable[[Row], Fields]
    config: str = "default"


def parse_spec(spec: str) -> tuple[str, Path | None]:
    """Name and file of ``NAME=FILE``; the file is None for ``NAME`` alone, which is the hub."""
    name, given, file = spec.partition("=")
    return name, Path(file).expanduser() if given else None


def check_benchmarks(specs: Sequence[str]) -> None:
    """Look at the names and files of some benchmarks, before anything is read.

    Raises:
        InputError: Naming every fault: none given, an unknown name, a name given twice, a file that
            isn't there or whose kind is unknown.
    """
    faults = [] if specs else [f"at least one is needed, of {', '.join(BENCHMARKS)}"]
    counts = Counter(parse_spec(spec)[0] for spec in specs)
    faults += [f"{name!r} is given {count} times" for name, count in counts.items() if count > 1]
    faults += [fault for spec in specs for fault in _faults_of(spec)]
    if faults:
        raise InputError("benchmarks: " + "\n  ".join(faults))


def _faults_of(spec: str) -> Iterator[str]:
    name, file = parse_spec(spec)
    if name not in BENCHMARKS:
        yield f"{name!r} is unknown; expected NAME or NAME=FILE, NAME of {', '.join(BENCHMARKS)}"
    if file is None:
        return
    if file.suffix not in READERS:
        yield f"{spec!r}: expected a file that ends in {', '.join(READERS)}"
    elif not file.is_file():
        yield f"{spec!r}: there is no file {str(file)!r}"


def load_benchmark(spec: str, limit: int | None = None) -> list[Item]:
    """Read a benchmark.

    Rows without a single gold answer, as upstream has them (MMLU-Pro's letter and index disagree,
    AIME took two answers), are left out, counted and logged.

    Args:
        spec: ``NAME`` for the hub's set, or ``NAME=FILE``: a ``.jsonl``, ``.json``, ``.csv`` or
            ``.parquet`` file with upstream's columns, or with ``id``, ``benchmark``, ``question``,
            ``choices`` and ``answer``. CSV has no lists, so it can't hold choices.
        limit: Rows to read at most, the first ones.

    Returns:
        The items in the order of the source. Their ids are ``NAME/`` and upstream's id, or the
        row's number from 0 where there is none.

    Raises:
        InputError: If the spec is bad, the source can't be read, lacks columns, has no rows, or has
            rows without a question or a gold answer; the first faulty rows are named.
    """
    if limit is not None and limit < 1:
        raise InputError(f"benchmarks: limit must be at least 1 or null, got {limit}")
    check_benchmarks([spec])
    name, file = parse_spec(spec)
    benchmark = BENCHMARKS[name]
    rows = _hub_rows(benchmark) if file is None else _file_rows(name, file)
    return _items(benchmark, str(file or benchmark.hub_id), rows[:limit])


# --------------------------------------------------------------------------- rows of a source


def _hub_rows(benchmark: Benchmark) -> list[dict[str, Any]]:
    hub_id = benchmark.hub_id
    try:
        return list(datasets.load_dataset(hub_id, benchmark.config, split=benchmark.split))
    # A RuntimeError: a script, which datasets doesn't run any more.
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, datasets.exceptions.DatasetNotFoundError | GatedRepoError):
            remedy = (
                f"accept its terms on https://huggingface.co/datasets/{hub_id} and log in by "
                f"`hf auth login` or HF_TOKEN"
            )
        else:
            remedy = "look at this machine's network, HF_HUB_OFFLINE and HF_ENDPOINT"
        reason = str(error).strip().partition("\n")[0]
        if error.__cause__ is not None:
            reason += f" ({error.__cause__})"
        raise InputError(
            f"benchmark {benchmark.name!r}: cannot read {hub_id!r}: {reason}\n"
            f"{remedy}; or give a file: {benchmark.name}=FILE"
        ) from error


def _file_rows(name: str, file: Path) -> list[dict[str, Any]]:
    try:
        return READERS[file.suffix](file)
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(
            f"benchmark {name!r}: cannot read {str(file)!r}: {error}\n"
            f"expected UTF-8: JSON objects, one a line or in one list (.jsonl, .json), or a header "
            f"and rows (.csv); or Parquet"
        ) from error


# ------------------------------------------------------------------------------ rows to items


def _items(benchmark: Benchmark, source: str, rows: Sequence[dict[str, Any]]) -> list[Item]:
    where = f"benchmark {benchmark.name!r}: {source!r}"
    if not rows:
        raise InputError(f"{where} has no rows")
    rows = [_unnested(row) for row in rows]
    read = _row_reader(benchmark, where, list(dict.fromkeys(c for row in rows for c in row)))
    items: dict[str, Item] = {}
    faults, left_out = [], []
    for index, row in enumerate(rows):
        try:
            upstream_id, question, choices, answer = read({c.lower(): v for c, v in row.items()})
            item_id = f"{benchmark.name}/{index if upstream_id is None else upstream_id}"
            if item_id in items:
                raise upstream.FaultyRow(f"the id {item_id!r} belongs to an earlier row")
        except upstream.FaultyRow as fault:
            faults.append(f"row {index + 1}: {fault}")
        except upstream.UnusableRow as reason:
            left_out.append(f"row {index + 1}: {reason}")
        else:
            items[item_id] = Item(
                item_id, benchmark.name, benchmark.kind, question, choices, answer
            )
    if faults:
        raise InputError(f"{where} has {len(faults)} faulty rows:{_shown(faults)}")
    if not items:
        raise InputError(f"{where} has no usable rows:{_shown(left_out)}")
    if left_out:
        log.warning("%s: %d rows are left out:%s", where, len(left_out), _shown(left_out))
    return list(items.values())


def _shown(rows: Sequence[str]) -> str:
    return "".join(f"\n  {row}" for row in rows[:_MAX_ROWS_SHOWN])


def _unnested(row: dict[str, Any]) -> dict[str, Any]:
    """AI2's own files have text and choices inside ``question``; their hub sets don't."""
    nested = row.get("question")
    return row | nested | {"question": nested.get("stem")} if isinstance(nested, dict) else row


def _row_reader(
    benchmark: Benchmark, where: str, columns: Sequence[str]
) -> Callable[[Row], Fields]:
    found = {column.lower() for column in columns}
    is_uniform = "benchmark" in found
    missing = [
        column
        for column in (_UNIFORM_COLUMNS if is_uniform else benchmark.columns)
        if column.lower() not in found
    ]
    if missing:
        raise InputError(
            f"{where} has no column {' and '.join(map(repr, missing))}; its columns are "
            f"{', '.join(columns)}\nexpected {', '.join(benchmark.columns)} (as "
            f"{benchmark.hub_id} has them), or {', '.join(_UNIFORM_COLUMNS)}"
        )
    return partial(_uniform, benchmark) if is_uniform else benchmark.read


def _uniform(benchmark: Benchmark, row: Row) -> Fields:
    if row.get("benchmark") != benchmark.name:
        raise upstream.FaultyRow(
            f"'benchmark' must be {benchmark.name!r}, got {row.get('benchmark')!r}"
        )
    upstream_id = upstream.text_of(row, "id").removeprefix(f"{benchmark.name}/")
    question, answer = upstream.text_of(row, "question"), upstream.text_of(row, "answer")
    if benchmark.kind is AnswerKind.CHOICE:
        return upstream_id, question, *upstream.lettered(row.get("choices"), answer)
    if row.get("choices"):
        raise upstream.FaultyRow(f"'choices' must be null, got {row['choices']!r:.60}")
    if benchmark.kind is AnswerKind.YES_NO and answer not in ("yes", "no"):
        raise upstream.FaultyRow(f"'answer' must be yes or no, got {answer!r:.60}")
    return upstream_id, question, None, answer


_MATH, _CHOICE, _YES_NO = AnswerKind.MATH, AnswerKind.CHOICE, AnswerKind.YES_NO
_QUESTION = ("question", "answer")
_PROBLEM = ("problem", "answer")
_OPTIONS = ("question", "options", "answer")
_LABELLED = ("question", "choices", "answerKey")
_GPQA = ("Question", "Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3)))

_TABLE = (
    Benchmark("gsm8k", "openai/gsm8k", "test", _MATH, _QUESTION, upstream.gsm8k, "main"),
    Benchmark("math500", "HuggingFaceH4/MATH-500", "test", _MATH, _PROBLEM, upstream.math500),
    Benchmark("aime24", "Maxwell-Jia/AIME_2024", "train", _MATH, _PROBLEM, upstream.aime),
    Benchmark(
        "aime_1983_2024", "di-zhang-fdu/AIME_1983_2024", "train", _MATH, _QUESTION, upstream.aime
    ),
    Benchmark(
        "commonsense_qa", "tau/commonsense_qa", "validation", _CHOICE, _LABELLED, upstream.labelled
    ),
    Benchmark(
        "arc_challenge",
        "allenai/ai2_arc",
        "test",
        _CHOICE,
        _LABELLED,
        upstream.labelled,
        "ARC-Challenge",
    ),
    Benchmark(
        "gpqa_diamond", "Idavidrein/gpqa", "train", _CHOICE, _GPQA, upstream.gpqa, "gpqa_diamond"
    ),
    Benchmark("strategyqa", "ChilleD/StrategyQA", "test", _YES_NO, _QUESTION, upstream.strategyqa),
    Benchmark("mmlu_pro", "TIGER-Lab/MMLU-Pro", "test", _CHOICE, _OPTIONS, upstream.mmlu_pro),
)

BENCHMARKS: Mapping[str, Benchmark] = {benchmark.name: benchmark for benchmark in _TABLE}
