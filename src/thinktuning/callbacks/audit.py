"""An account of every rollout that was selected for guidance."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from thinktuning.rewards import last_boxed
from thinktuning.types import Rollout, RolloutBatch


class AuditLog(Callback):
    """Writes ``audit.jsonl`` into the run's folder: one row per rollout selected for guidance.

    On more than one rank each writes its own ``audit.rank<N>.jsonl``.
    """

    def __init__(self) -> None:
        self.folder: Path | None = None  # the run's; set by the command line
        self._path: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Agree on rank 0's folder: others may have looked for a free one after it was made."""
        self.folder = trainer.strategy.broadcast(self.folder)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the file; rows of steps that a resumed run does again are taken out."""
        rank = f".rank{trainer.global_rank}" if trainer.world_size > 1 else ""
        folder = self.folder or Path(trainer.log_dir or trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"audit{rank}.jsonl"
        if self._path.exists():
            kept = [line for line in _rows(self._path) if line["step"] < trainer.global_step]
            rewritten = self._path.with_suffix(".tmp")
            _write(rewritten, kept, "w")
            rewritten.replace(self._path)

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
        assert self._path is not None, "on_train_start must come first"
        _write(self._path, rows, "a")


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


def _rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a file; a killed run may have left half a line at its end."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def _write(path: Path, rows: list[dict[str, Any]], mode: str) -> None:
    with path.open(mode, encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
