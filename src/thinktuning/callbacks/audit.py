"""An account of every rollout that was selected for guidance."""

import json
import logging
from itertools import takewhile
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from thinktuning.rewards import last_boxed
from thinktuning.types import Rollout, RolloutBatch

log = logging.getLogger(__name__)


class AuditLog(Callback):
    """Writes ``audit.jsonl`` into the run's folder: one row per rollout selected for guidance.

    On more than one rank each writes its own ``audit.rank<N>.jsonl``. What a full disk doesn't take
    is lost, which ends no run.
    """

    def __init__(self) -> None:
        self.folder: Path | None = None  # the run's; set by the command line
        self._path: Path | None = None
        self._bytes = 0  # of whole rows; what is behind them is cut off before the next
        self._lost = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Agree on rank 0's folder: others may have looked for a free one after it was made."""
        self.folder = trainer.strategy.broadcast(self.folder)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the file; rows of steps that a resumed run does again are taken out."""
        rank = f".rank{trainer.global_rank}" if trainer.world_size > 1 else ""
        folder = self.folder or Path(trainer.log_dir or trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"audit{rank}.jsonl"
        self._bytes = _bytes_before(trainer.global_step, self._path)
        self._append([])

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Append the rows of this step."""
        rollouts: RolloutBatch = outputs["rollouts"]
        rows = [audit_row(rollouts.step, r) for r in rollouts.rollouts if r.guidance is not None]
        self._append(rows)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say how much is missing."""
        self._tell_lost()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Say how much is missing."""
        self._tell_lost()

    def _tell_lost(self) -> None:
        if self._lost:
            self._append([])  # the end may be half a row
            log.warning("%s lacks %d rows that couldn't be written", self._path, self._lost)

    def _append(self, rows: list[dict[str, Any]]) -> None:
        assert self._path is not None, "on_train_start must come first"
        added = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        try:
            with self._path.open("ab") as file:
                file.truncate(self._bytes)
                file.write(added)
        except OSError as error:
            if rows and not self._lost:
                log.warning("rows of %s are lost (%s); training goes on", self._path, error)
            self._lost += len(rows)
        else:
            self._bytes += len(added)


def audit_row(step: int, rollout: Rollout) -> dict[str, Any]:
    """What is kept of a selected rollout; ``after`` is None where it stayed unguided."""
    guidance = rollout.guidance
    assert guidance is not None, "only selected rollouts are audited"
    student = (rollout.original or rollout).text
    return {
        "step": step,
        "prompt": rollout.prompt.index,
        "sample": rollout.sample,
        "behaviors": list(guidance.behaviors),
        "gold": rollout.prompt.answer,
        "before": _judged(rollout.original or rollout),
        "after": _judged(rollout) if rollout.guided else None,
        "advantage": rollout.advantage,
        "injected_span": rollout.injected_span,
        "skipped": guidance.skipped,
        "opinion": guidance.feedback.opinion if guidance.feedback else None,
        "teacher": guidance.text,
        "student": student,
        "injected": rollout.text[len(student) :].strip() if rollout.guided else None,
    }


def _judged(rollout: Rollout) -> dict[str, Any]:
    return {
        "answer": last_boxed(rollout.text),
        "outcome": rollout.outcome,
        "reward": rollout.reward,
        "tokens": len(rollout.completion_ids),
    }


def _bytes_before(step: int, path: Path) -> int:
    """Length of the whole rows of earlier steps; a killed run may have left half a row behind."""
    if not path.exists():
        return 0
    whole = path.read_bytes().split(b"\n")[:-1]
    kept = takewhile(lambda row: json.loads(row)["step"] < step, whole)
    return sum(len(row) + 1 for row in kept)
