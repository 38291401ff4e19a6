"""Results on disk: a folder for each cell, a line for each item."""

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path

from thinktuning.errors import InputError
from thinktuning.evaluation.benchmarks import BENCHMARKS
from thinktuning.evaluation.records import Item, ItemResult
from thinktuning.evaluation.summary import Cell
from thinktuning.rewards import judge_version

log = logging.getLogger(__name__)

SETTINGS = "cell.json"
RESULTS = "items.jsonl"
JUDGE = "judge"


@dataclass(frozen=True)
class CellSettings:
    """What the results of a cell depend on, beside its items.

    Attributes:
        model: Name, revision and precision of the weights; of a checkpoint its path and time.
        engine: Kind and settings of the engine, and the trainer's precision.
        strategy: Name of the prompting strategy.
        benchmark: Name of the benchmark.
        max_new_tokens: Length limit of a turn.
        temperature: 0 decodes greedily.
        samples: Answers to each item.
        seed: Of the draws; None where nothing is drawn.
        budget: Of a strategy that has one; else None.
        texts: What stands around a question, and what the strategy says after it.
    """

    model: str
    engine: str
    strategy: str
    benchmark: str
    max_new_tokens: int
    temperature: float
    samples: int
    seed: int | None
    budget: int | None
    texts: Mapping[str, str]


class CellStore:
    """The results of one cell, from which an evaluation that was killed goes on.

    Every rank appends to a file of its own; ``merge`` makes one of them, in the items' order. A
    result is used again for an item with the same id, question, choices and gold answer.

    Args:
        root: Where the cells are.
        title: Begins the folder's name.
        settings: Another folder for each.
        items: The benchmark's, in their order.
    """

    def __init__(
        self, root: Path, title: str, settings: CellSettings, items: Sequence[Item]
    ) -> None:
        self.settings = settings
        self.items = {item.id: item for item in items}
        written = json.dumps(asdict(settings), indent=2, ensure_ascii=False)
        digest = blake2b(written.encode(), digest_size=4).hexdigest()
        self.folder = root / f"{title}.{settings.strategy}.{settings.benchmark}-{digest}"
        self._written = written

    def merge(self) -> None:
        """Bring what all ranks wrote into one file; for one process, while none is writing.

        Raises:
            InputError: If the folder can't be written, or a line isn't a result.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / SETTINGS).write_text(self._written + "\n", encoding="utf-8")
            parts = sorted(self.folder.glob("items.*.jsonl"))
            found = {r.id: r for path in [*self._merged(), *parts] for r in _read(path)}
            found = self._judged(found)
            order = {name: i for i, name in enumerate(self.items)}
            results = sorted(found.values(), key=lambda r: (order.get(r.id, len(order)), r.id))
            _write(self.folder / RESULTS, results)
            for path in parts:
                path.unlink()
        except OSError as error:
            raise InputError(f"cannot write results into {str(self.folder)!r}: {error}") from error

    def _judged(self, found: dict[str, ItemResult]) -> dict[str, ItemResult]:
        """The results, judged again where that was done by other code than today's."""
        path, today = self.folder / JUDGE, judge_version()
        before = path.read_text(encoding="utf-8") if path.is_file() else today
        if before != today:
            log.warning("the answers in %s are judged again: the judge has changed", self.folder)
            kind = BENCHMARKS[self.settings.benchmark].kind
            found = {name: result.judged(kind) for name, result in found.items()}
        path.write_text(today, encoding="utf-8")
        return found

    def read(self) -> dict[str, ItemResult]:
        """Merged results of this cell's items, by id; may lack some, or all."""
        results = [result for path in self._merged() for result in _read(path)]
        return {r.id: r for r in results if r.id in self.items and r.answers(self.items[r.id])}

    def append(self, results: Sequence[ItemResult], rank: int) -> None:
        """Add results, all in one go, so that a kill leaves all of them or none."""
        lines = "".join(result.to_json() + "\n" for result in results)
        try:
            with (self.folder / f"items.{rank}.jsonl").open("ab", buffering=0) as file:
                file.write(lines.encode())
                os.fsync(file.fileno())
        except OSError as error:
            raise InputError(f"cannot write results into {str(self.folder)!r}: {error}") from error

    def _merged(self) -> list[Path]:
        path = self.folder / RESULTS
        return [path] if path.is_file() else []


def read_cell(label: str, folder: Path, items: int) -> Cell:
    """A finished cell from its folder.

    Args:
        label: How reports call its model.
        folder: The cell's.
        items: Of how many items it is, the first ones in the folder.

    Raises:
        InputError: If there are fewer.
    """
    settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    results = tuple(_read(folder / RESULTS)[:items])
    if len(results) < items:
        raise InputError(
            f"{str(folder)!r} has {len(results)} of {items} results: the evaluation was limited or "
            f"cut short, or another process wrote there at the same time; run it again, and it "
            f"goes on"
        )
    shown = {name: str(value) for name, value in settings.items()}
    return Cell(label, settings["strategy"], settings["benchmark"], results, shown)


def _read(path: Path) -> list[ItemResult]:
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    if lines[-1]:
        log.warning("the last line of %s was cut off by a kill: its item is asked again", path)
    results = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            results.append(ItemResult.from_json(line))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"line {number} of {str(path)!r} isn't a result of an evaluation: {error!r}; "
                f"delete the line, and its item is asked again"
            ) from error
    return results


def _write(path: Path, results: Iterable[ItemResult]) -> None:
    """Beside the target first, so that a kill leaves the old file or the new one."""
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("w", encoding="utf-8") as file:
        file.writelines(result.to_json() + "\n" for result in results)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
