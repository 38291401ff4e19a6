"""Where a run lives: ``<root>/version_<N>`` with its checkpoints, logs and configurations."""

import tempfile
from pathlib import Path

from thinktuning.checkpointing import META
from thinktuning.errors import InputError

CHECKPOINTS = "checkpoints"
CELLS = "cells.json"
_VERSION = "version_"


def versions(root: Path) -> list[Path]:
    """The runs under ``root``, oldest first."""
    found = [p for p in root.glob(f"{_VERSION}*") if p.name.removeprefix(_VERSION).isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix(_VERSION)))


def check_writable(folder: Path, option: str) -> None:
    """Refuse a folder, given by an option, that nothing can be put into."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(
            f"{option}: {str(folder)!r} can't be written into ({error.strerror}); give a folder "
            f"that you may write to"
        ) from error


def new_run(root: Path) -> Path:
    """The folder of the next run; it doesn't exist yet."""
    taken = [int(p.name.removeprefix(_VERSION)) for p in versions(root)]
    return root / f"{_VERSION}{max(taken, default=-1) + 1}"


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first, without links and folders that aren't finished."""
    found = [p for p in folder.glob("*.ckpt") if not p.is_symlink()]
    # A folder is as old as what was written into it last; without that it isn't finished.
    written = {p: p / META if p.is_dir() else p for p in found}
    finished = [p for p in found if written[p].is_file()]
    return sorted(finished, key=lambda p: written[p].stat().st_mtime_ns, reverse=True)


def last_checkpoint(root: Path) -> Path | None:
    """The newest checkpoint of the newest run that has one."""
    for run in reversed(versions(root)):
        if found := checkpoints(run / CHECKPOINTS):
            return found[0]
    return None


def run_of(checkpoint: Path) -> Path | None:
    """The run that a checkpoint belongs to; None for one that lies elsewhere."""
    folder = checkpoint.absolute().parent
    is_run = folder.name == CHECKPOINTS and folder.parent in versions(folder.parent.parent)
    return folder.parent if is_run else None


def newest_config(run: Path) -> Path | None:
    """The configuration of the run's last start, of which a resumed run has several."""
    return max(run.glob("config*.yaml"), key=lambda path: path.stat().st_mtime_ns, default=None)


def config_path(run: Path) -> Path:
    """Where to save a start's configuration: earlier ones of the same run stay."""
    path = run / "config.yaml"
    number = 1
    while path.exists():
        path = run / f"config.resumed_{number}.yaml"
        number += 1
    return path
