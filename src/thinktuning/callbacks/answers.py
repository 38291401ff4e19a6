"""Every held-out answer, to be read."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from thinktuning.callbacks.records import RecordLog, ranked
from thinktuning.lossy_file import LossyFile
from thinktuning.types import Rollout

_FOLDER = "answers"


class AnswerLog(RecordLog):
    """Writes ``answers/step=<N>.jsonl`` into a fit's folder: the held-out answers after N steps.

    A row per question. On more than one rank each writes its own ``step=<N>.rank<M>.jsonl``.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take out the answers of steps that a resumed run does again."""
        run = self._run_folder(trainer)
        (run / _FOLDER).mkdir(parents=True, exist_ok=True)
        if trainer.global_rank == 0:
            for step, files in answer_files(run).items():
                for file in files if step > trainer.global_step else ():
                    file.unlink()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a file."""
        self._file = None
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            stem = f"step={trainer.global_step:06d}"
            name = ranked(stem, trainer.global_rank, trainer.world_size)
            self._file = LossyFile(self._run_folder(trainer) / _FOLDER / name, of="answers")
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
            self._append(map(answer_row, outputs["rollouts"]))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say how much is missing."""
        self._tell_lost()
        self._file = None


def answer_files(run: Path) -> dict[int, list[Path]]:
    """The files of all ranks of a run, by the step that they were written after."""
    found: dict[int, list[Path]] = {}
    for file in sorted((run / _FOLDER).glob("step=*.jsonl")):
        step = int(file.name.removeprefix("step=").split(".")[0])
        found.setdefault(step, []).append(file)
    return found


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
