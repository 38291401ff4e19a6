"""Checkpoints that are whole or not there: files, and the folders that ranks write together."""

import os
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from io import BytesIO
from pathlib import Path, PurePosixPath
from pickle import Unpickler, UnpicklingError
from typing import Any

import torch
import torch.distributed.checkpoint as distributed_checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch.distributed.checkpoint import (
    CheckpointException,
    DefaultLoadPlanner,
    FileSystemReader,
    Metadata,
)
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.serialization import _get_layout

from thinktuning.errors import InputError, UnsavedError

PARTS = ".metadata"
"""torch's list of a folder's tensors and other values, with where they are: a pickle."""

META = "meta.pt"
"""What a folder holds beside its tensors; written last."""

SIZES = "file_sizes"
"""Key in it: the sizes of the folder's other files."""

CHECKSUMS = "file_checksums"
"""Key in it: their checksums; folders of older versions have none."""

# What torch.load was seen to raise on cut off, overwritten and foreign files.
DAMAGED = (
    UnpicklingError,
    RuntimeError,
    EOFError,
    LookupError,
    TypeError,
    ValueError,
    struct.error,
    OSError,
    CheckpointException,
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
        save_file(checkpoint, Path(path))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint; nothing in a file can run code.

        A folder is read whole, with its optimizer's state as one process has it.
        """
        if not Path(path).is_dir():
            return read_file(Path(path), map_location)
        return _read_folder(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint; a folder that a kill leaves half deleted isn't taken for one."""
        path = Path(path)
        if path.is_dir():
            shutil.rmtree(_set_aside(path))
        else:
            path.unlink(missing_ok=True)


def save_file(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a file that appears under its name when it is whole, on the disk.

    Raises:
        UnsavedError: If that can't be done; what had the name is still there.
    """
    unfinished = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        put(unfinished, path)
    except (OSError, RuntimeError) as error:  # torch's own writer has the latter for a full disk
        raise UnsavedError(unsaved(path, error)) from error
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)  # half a checkpoint on a full disk helps nobody


def unsaved(path: Path, error: BaseException) -> str:
    """Why a checkpoint isn't there."""
    return (
        f"the checkpoint {str(path)!r} can't be written: {_in_one_line(error)}; make room on the "
        f"disk, or give another trainer.default_root_dir"
    )


def is_whole(path: Path) -> bool:
    """Whether nothing of a checkpoint is missing, by sizes; ``fault`` reads every byte."""
    if not path.is_dir():
        return zipfile.is_zipfile(path)
    return zipfile.is_zipfile(path / META) and _first_other(path, SIZES, _size) is None


def fault(path: Path) -> str | None:
    """What is wrong with a checkpoint by the checksums and sizes in it."""
    file = path / META if path.is_dir() else path
    try:
        with zipfile.ZipFile(file) as archive:
            wrong = archive.testzip()
        if wrong is None and path.is_dir():
            wrong = _first_other(path, SIZES, _size) or _first_other(path, CHECKSUMS, checksum)
    except (zipfile.BadZipFile, *DAMAGED) as error:
        return damaged(path, error)
    if wrong is not None:
        return damaged(path, ValueError(f"{wrong} in it isn't what was written"))
    return None


def file_sizes(folder: Path) -> dict[str, int]:
    """The sizes in bytes of a folder's files, for ``is_whole``."""
    return {file.name: file.stat().st_size for file in folder.iterdir()}


def checksum(file: Path) -> int:
    """CRC-32 of a file: it tells accidents, several times faster than a hash against attacks."""
    value = 0
    with file.open("rb") as content:
        while part := content.read(1 << 20):
            value = zlib.crc32(part, value)
    return value


def _first_other(folder: Path, key: str, now: Callable[[Path], int | None]) -> str | None:
    """The first of a folder's files that differs from what is noted under a key."""
    noted = read_meta(folder).get(key, {})
    return next((name for name in noted if now(folder / name) != noted[name]), None)


def _size(file: Path) -> int | None:
    return file.stat().st_size if file.is_file() else None


def put(finished: Path, path: Path) -> None:
    """Give a finished file or folder its name; what had it goes.

    A kill leaves the old one or the new one under the name; where both are folders, it may leave
    neither for the moment between two renames, and the old one beside it as ``.old``.
    """
    if not path.is_dir():
        if finished.is_dir():
            path.unlink(missing_ok=True)
        os.replace(finished, path)
        return
    old = _set_aside(path)
    os.replace(finished, path)
    shutil.rmtree(old)


def _set_aside(folder: Path) -> Path:
    """Take a folder's name from it; returns where it is now."""
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)  # left by a kill
    os.replace(folder, old)
    return old


def read_meta(folder: Path) -> dict[str, Any]:
    """What a folder holds beside its tensors.

    Raises:
        InputError: If the folder isn't a checkpoint.
    """
    if not (folder / META).is_file():
        raise InputError(f"the folder {str(folder)!r} isn't a checkpoint: it has no {META}")
    return read_file(folder / META)


def sharded_names(folder: Path) -> list[str]:
    """Names of the weights in a folder.

    Raises:
        InputError: If its list of parts is damaged or names code.
    """
    names = _read_parts(folder).state_dict_metadata
    prefix = "state_dict."
    return [n.removeprefix(prefix) for n in names if n.startswith(prefix)]


def load_shards(state: dict[str, Any], folder: Path) -> None:
    """Fill a state from a folder, tensors in place; all ranks must do it together.

    Args:
        state: What is wanted, under the folder's names; every rank has its part of the tensors.
        folder: Of a checkpoint that any number of ranks wrote.

    Raises:
        InputError: If the folder's list of parts is damaged or names code.
        CheckpointException: On all ranks, if one can't read its part.
    """
    reader, planner = _FolderReader(folder), _PlainLoadPlanner()
    distributed_checkpoint.load(state, storage_reader=reader, planner=planner)


def _read_folder(folder: Path) -> dict[str, Any]:
    meta, reader = read_meta(folder), _FolderReader(folder)
    checkpoint: dict[str, Any] = {}
    try:
        # torch's public one fills no state that is empty.
        _load_state_dict(checkpoint, reader, no_dist=True, planner=_WholeLoadPlanner())
        optimizers = [name for name in checkpoint if name.startswith("optimizer_")]
        states = [by_index(checkpoint.pop(name)) for name in sorted(optimizers)]
    except DAMAGED as error:
        raise InputError(damaged(folder, error)) from error
    return {**checkpoint, **meta, "optimizer_states": states}


class _FolderReader(FileSystemReader):
    """torch's, but for the list of parts: torch calls whatever that pickle names."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._parts = _read_parts(folder)

    # Without torch's `rank`, by which it would look for a list of this rank's own.
    def read_metadata(self) -> Metadata:
        return self._parts


class _PlainLoadPlanner(DefaultLoadPlanner):
    """torch's, but values that aren't tensors are plain as well: torch lets them be code."""

    def load_bytes(self, read_item: ReadItem, value: BytesIO) -> None:
        name = read_item.dest_index.fqn
        try:
            plain = torch.load(value, weights_only=True)
        except UnpicklingError as error:  # which advises to trust the file
            raise UnpicklingError(f"its value {name} isn't plain data") from error
        set_element(self.original_state_dict, self.mappings[name], plain)


class _WholeLoadPlanner(_PlainLoadPlanner, _EmptyStateDictLoadPlanner):
    """The same for all that a folder has."""


def _read_parts(folder: Path) -> Metadata:
    try:
        with (folder / PARTS).open("rb") as file:
            parts = _PartsUnpickler(file).load()
        if not isinstance(getattr(parts, "state_dict_metadata", None), dict):
            raise UnpicklingError(f"its {PARTS} isn't a list of its parts")
    except (*DAMAGED, AttributeError, ArithmeticError, MemoryError) as error:
        raise InputError(damaged(folder, error)) from error
    return parts


class _PartsUnpickler(Unpickler):
    """Knows no names but those that torch writes into a list of parts."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _WRITTEN:
            raise UnpicklingError(f"its {PARTS} names {module}.{name}, which may be code")
        return _WRITTEN[module, name]


def _encoding(_: type, name: str) -> _MEM_FORMAT_ENCODING:
    return _MEM_FORMAT_ENCODING[name]


_KINDS = (
    Metadata,
    TensorStorageMetadata,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    TensorProperties,
    MetadataIndex,
    StorageMeta,
    _StorageInfo,
    _MEM_FORMAT_ENCODING,
    torch.Size,
    _get_layout,
)
_WRITTEN: dict[tuple[str, str], Any] = {
    **{(kind.__module__, kind.__name__): kind for kind in _KINDS},
    **{("torch", name): each for name, each in vars(torch).items() if type(each) is torch.dtype},
    ("pathlib", "PosixPath"): PurePosixPath,  # where it was written
    ("pathlib._local", "PosixPath"): PurePosixPath,  # by Python 3.13
    ("builtins", "getattr"): _encoding,  # some Pythons get a member of an enumeration by its name
}


def by_index(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state with its parameters numbered in their order, as torch does."""
    names = [name for group in state["param_groups"] for name in group["params"]]
    return _renamed(state, {name: i for i, name in enumerate(names)})


def by_name(state: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The opposite of ``by_index``: ``names`` are those of the parameters in their order."""
    return _renamed(state, dict(enumerate(names)))


def _renamed(state: dict[str, Any], new: dict[Any, Any]) -> dict[str, Any]:
    return {
        # A folder has no empty dictionaries: that of plain SGD is missing.
        "state": {new[key]: value for key, value in state.get("state", {}).items()},
        "param_groups": [
            {**group, "params": [new[key] for key in group["params"]]}
            for group in state["param_groups"]
        ],
    }


def read_file(path: Path, map_location: Any = "cpu", mmap: bool = False) -> dict[str, Any]:
    """Read a file; with ``mmap`` the ranks of a machine share its pages.

    Raises:
        InputError: If it is damaged or foreign.
    """
    try:
        checkpoint: dict[str, Any] = torch.load(
            path, map_location=map_location, weights_only=True, mmap=mmap
        )
    except DAMAGED as error:
        raise InputError(damaged(path, error)) from error
    return checkpoint


def damaged(path: Path, error: BaseException) -> str:
    """Why a checkpoint can't be read."""
    return (
        f"the checkpoint {str(path)!r} is damaged, was not written by `thinktuning fit`, or has "
        f"the state of another optimizer: {_in_one_line(cause(error))}"
    )


def cause(error: BaseException) -> BaseException:
    """What went wrong on the first rank where something did; torch tells of all at length."""
    if isinstance(error, CheckpointException):
        first, _ = next(iter(error.failures.values()))
        return first
    return error


def _in_one_line(error: BaseException) -> str:
    return (str(error) or repr(error)).splitlines()[0]
