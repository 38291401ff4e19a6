"""What callbacks write into a run's folder, row by row."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from thinktuning.lossy_file import LossyFile


class RecordLog(Callback):
    """Writes rows of JSON into files of the run's folder, every rank into its own.

    What a full disk doesn't take is lost, which ends no run.
    """

    def __init__(self) -> None:
        self.folder: Path | None = None  # the run's; set by the command line
        self._file: LossyFile | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Agree on rank 0's folder: others may have looked for a free one after it was made."""
        self.folder = trainer.strategy.broadcast(self.folder)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Say how much is missing."""
        self._tell_lost()

    def _run_folder(self, trainer: Trainer) -> Path:
        return self.folder or Path(trainer.log_dir or trainer.default_root_dir)

    def _append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Write these at once, all or none of them."""
        assert self._file is not None, "a file must have been begun"
        self._file.append([f"{json.dumps(row, ensure_ascii=False)}\n".encode() for row in rows])

    def _tell_lost(self) -> None:
        if self._file is not None:
            self._file.tell_lost()


def ranked(stem: str, rank: int, ranks: int) -> str:
    """The name of a rank's file; with one rank the stem's alone."""
    return f"{stem}.rank{rank}.jsonl" if ranks > 1 else f"{stem}.jsonl"
