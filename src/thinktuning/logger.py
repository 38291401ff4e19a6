"""TensorBoard's values, which a full disk may lose."""

import os
import socket
import time
from io import BytesIO
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import FileWriter, SummaryWriter

from thinktuning.lossy_file import LossyFile


class RunLogger(TensorBoardLogger):
    """Lightning's TensorBoardLogger into a run's folder. What a full disk doesn't take is lost.

    Dictionaries of scalars, which TensorBoard puts into folders of their own, aren't guarded so.

    Args:
        run: The folder.
    """

    def __init__(self, run: Path) -> None:
        super().__init__(run.parent, name="", version=run.name)

    @property
    @rank_zero_experiment
    def experiment(self) -> SummaryWriter:
        """TensorBoard's writer."""
        if self._experiment is None:
            self._experiment = _Writer(self.log_dir)
        return self._experiment

    def save(self) -> None:
        """Write ``hparams.yaml`` if it isn't there; without room for it a later call does."""
        try:
            super().save()
        except OSError:
            (Path(self.log_dir) / self.NAME_HPARAMS_FILE).unlink(missing_ok=True)


class _Writer(SummaryWriter):
    file_writer: Any
    all_writers: Any

    def _get_file_writer(self) -> "_FileWriter":
        if self.file_writer is None:
            self.file_writer = _FileWriter(self.log_dir)
            self.all_writers = {self.log_dir: self.file_writer}
        return self.file_writer


class _FileWriter(FileWriter):
    def __init__(self, folder: str) -> None:
        self.event_writer = _EventFile(Path(folder))


class _EventFile:
    """In place of TensorBoard's EventFileWriter, whose thread raises its first error for ever."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads a run's files in the order of their names.
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._file = LossyFile(folder / name, of="values")

    def get_logdir(self) -> str:
        return str(self._file.path.parent)

    def add_event(self, event: Event) -> None:
        record = _record(event)
        if self._file.length == 0:
            # Without it, readers drop values that stand before those of an earlier step.
            version = Event(wall_time=event.wall_time, file_version="brain.Event:2")
            record = _record(version) + record
        self._file.append([record])

    def flush(self) -> None:
        """Nothing waits."""

    def close(self) -> None:
        self._file.tell_lost()


def _record(event: Event) -> bytes:
    buffer = BytesIO()
    RecordWriter(buffer).write(event.SerializeToString())
    return buffer.getvalue()
