"""An account of every rollout that was selected for guidance."""

import json
import logging
import math
import os
from itertools import takewhile
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from thinktuning.callbacks.records import RecordLog, ranked
from thinktuning.lossy_file import LossyFile
from thinktuning.rewards import last_boxed
from thinktuning.types import Rollout, RolloutBatch

log = logging.getLogger(__name__)


class AuditLog(RecordLog):
    """Writes ``audit.jsonl`` into the run's folder: one row per rollout selected for guidance.

    On more than one rank each writes its own ``audit.rank<N>.jsonl``.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the file; rows of steps that a resumed run does again are taken out."""
        folder = self._run_folder(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        ranks = trainer.world_size
        present = [ranked("audit", rank, ranks) for rank in range(ranks)]
        path = folder / present[trainer.global_rank]
        self._file = LossyFile(path, of="rows", length=_bytes_before(trainer.global_step, path))
        self._file.append([])
        if trainer.global_rank == 0:
            # Not those of the ranks that are there: they may have begun to write.
            for other in audit_files(folder):
                if other.name not in present:
                    os.truncate(other, _bytes_before(trainer.global_step, other))

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
        self._append(
            audit_row(rollouts.step, r) for r in rollouts.rollouts if r.guidance is not None
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say how much is missing."""
        self._tell_lost()


def audit_files(run: Path) -> list[Path]:
    """The files of all ranks that a run has had."""
    return sorted([*run.glob("audit.jsonl"), *run.glob("audit.rank*.jsonl")])


def parsed(line: bytes) -> dict[str, Any] | None:
    """A row as ``audit_row`` made it; None if the line is damaged."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


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
    """Length of the whole rows of earlier steps up to the first that is damaged.

    A killed run may have left half a row behind.
    """
    if not path.exists():
        return 0
    whole = path.read_bytes().split(b"\n")[:-1]
    kept = list(takewhile(lambda row: _step(row) < step, whole))
    lost = sum(_step(row) < step for row in whole[len(kept) :])
    if lost:
        log.warning(
            "row %d of %s is damaged: it and %d rows of earlier steps behind it are cut off",
            len(kept) + 1,
            path,
            lost,
        )
    return sum(len(row) + 1 for row in kept)


def _step(line: bytes) -> float:
    """A row's step; that of a damaged one is later than all others."""
    row = parsed(line)
    return math.inf if row is None else row["step"]
