"""Every held-out answer, to be read."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from thinktuning.lossy_file import LossyFile
from thinktuning.types import Rollout

FOLDER = "answers"


class AnswerLog(Callback):
    """Writes ``answers/step=<N>.jsonl`` into a fit's folder: the held-out answers after N steps.

    A row per question. On more than one rank each writes its own ``step=<N>.rank<M>.jsonl``. What a
    full disk doesn't take is lost, which ends no run.
    """

    def __init__(self) -> None:
        self.folder: Path | None = None  # the run's; set by the command line
        self._file: LossyFile | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Agree on rank 0's folder: others may have looked for a free one after it was made."""
        self.folder = trainer.strategy.broadcast(self.folder)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take out the answers of steps that a resumed run does again."""
        folder = self._place(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        if trainer.global_rank == 0:
            for file in folder.glob("step=*.jsonl"):
                if int(file.name.removeprefix("step=").split(".")[0]) > trainer.global_step:
                    file.unlink()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a file."""
        self._file = None
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            rank = f".rank{trainer.global_rank}" if trainer.world_size > 1 else ""
            path = self._place(trainer) / f"step={trainer.global_step:06d}{rank}.jsonl"
            self._file = LossyFile(path, of="answers")
            self._file.append([])

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Append the answers to these questions."""
        if self._file is not None:
            rows = [json.dumps(answer_row(r), ensure_ascii=False) for r in outputs["rollouts"]]
            self._file.append([f"{row}\n".encode() for row in rows])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say how much is missing."""
        if self._file is not None:
            self._file.tell_lost()

    def _place(self, trainer: Trainer) -> Path:
        return (self.folder or Path(trainer.log_dir or trainer.default_root_dir)) / FOLDER


def answer_row(rollout: Rollout) -> dict[str, Any]:
    """What is kept of an answer; ``reward`` is None where a method has no rewards."""
    return {
        "prompt": rollout.prompt.index,
        "question": rollout.prompt.question,
        "gold": rollout.prompt.answer,
        "outcome": rollout.outcome,
        "reward": rollout.reward,
        "tokens": len(rollout.completion_ids),
        "text": rollout.text,
    }
