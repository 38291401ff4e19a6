"""Checkpoint files that are whole or not there."""

import os
import struct
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from thinktuning.errors import InputError

# What torch.load was seen to raise on cut off, overwritten and foreign files.
_DAMAGED = (
    UnpicklingError,
    RuntimeError,
    EOFError,
    LookupError,
    TypeError,
    ValueError,
    struct.error,
)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, syncs, then renames; reads tensors and plain values only.

    Lightning builds the file in memory and moves it from ``TMPDIR``, which across file systems is
    a copy that a kill can cut short.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint to a local path."""
        assert storage_options is None, "local files take no storage options"
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".tmp")
        try:
            with unfinished.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)  # half a checkpoint on a full disk helps nobody

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint; nothing in it can run code."""
        try:
            checkpoint: dict[str, Any] = torch.load(
                path, map_location=map_location, weights_only=True
            )
        except _DAMAGED as error:
            raise InputError(
                f"the checkpoint {str(path)!r} is damaged, or was not written by `thinktuning fit`:"
                f" {(str(error) or repr(error)).splitlines()[0]}"
            ) from error
        return checkpoint
