"""Rows of a local file.

Not by ``datasets``: it takes texts that look like dates or numbers for such, and None for nothing.
"""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet


def _json_rows(file: Path) -> list[dict[str, Any]]:
    text = file.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        rows = json.loads(text)
    else:
        # Not splitlines, which also splits at separators that JSON allows inside a text.
        lines = enumerate(text.split("\n"), start=1)
        rows = [_json_line(number, line) for number, line in lines if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("there are rows that are no JSON objects")
    return rows


def _json_line(number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number} is not JSON: {error.msg}, column {error.colno}") from error


def _csv_rows(file: Path) -> list[dict[str, Any]]:
    with file.open(encoding="utf-8-sig", newline="") as stream:
        rows = list(csv.DictReader(stream, strict=True))
    for number, row in enumerate(rows, start=1):
        if None in row:
            raise ValueError(f"row {number} has more cells than the header")
    return rows


def _parquet_rows(file: Path) -> list[dict[str, Any]]:
    return pyarrow.parquet.read_table(file).to_pylist()


READERS = {".jsonl": _json_rows, ".json": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
