"""Weights as files, for engines in other processes that read them."""

import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from thinktuning.errors import InputError

_PREFIX = "thinktuning-weights-"
_FILE_BYTES = 2**30  # as much of the weights is in host memory at a time
_BITS = {2: torch.int16, 4: torch.int32}


@contextmanager
def new_folder(parent: Path) -> Iterator[Path]:
    """A folder of a name that was never there before, gone afterwards with those of killed runs.

    A shared file system may keep showing a folder as it was under a name that it knows.
    """
    folder = parent / f"{_PREFIX}{uuid.uuid4().hex}"
    try:
        for left in parent.glob(f"{_PREFIX}*"):
            shutil.rmtree(left)
        folder.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"engine.weights_folder {parent} can't be used: {error}") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_weights(
    weights: Iterable[tuple[str, Tensor]], folder: Path, dtype: torch.dtype
) -> list[int]:
    """Write weights as safetensors; returns a sum over the bits of each."""
    sums: list[int] = []
    batch: dict[str, Tensor] = {}
    size = files = 0
    for name, weight in weights:
        rounded = weight.to(dtype).contiguous()
        sums.append(int(rounded.view(_BITS[dtype.itemsize]).sum(dtype=torch.int64)))
        batch[name] = rounded.cpu()
        size += rounded.nbytes
        if size >= _FILE_BYTES:
            _save(batch, folder, files)
            batch, size, files = {}, 0, files + 1
    if batch:
        _save(batch, folder, files)
    return sums


def _save(batch: dict[str, Tensor], folder: Path, number: int) -> None:
    path = folder / f"model-{number:05}.safetensors"
    try:
        save_file(batch, path)
        # Safetensors lets nobody else read it, and a server may belong to another user.
        path.chmod(folder.stat().st_mode & 0o666)
    except (OSError, SafetensorError) as error:
        raise InputError(f"the weights can't be written into {folder.parent}: {error}") from error
