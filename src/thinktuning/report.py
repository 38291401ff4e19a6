"""What a run says when it ends."""

import shlex
import sys
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from thinktuning import runs
from thinktuning.callbacks.audit import audit_files, parsed


def print_guidance(run: Path, console: Console) -> None:
    """Print what the teacher did, and a guided rollout."""
    found = [parsed(line) for line in _audit_lines(run)]
    rows = [row for row in found if row is not None]
    guided = [row for row in rows if row["after"] is not None]
    console.print(
        f"The teacher was to read {len(rows)} answers; {len(guided)} were continued with its "
        f"feedback."
    )
    if damaged := len(found) - len(rows):
        console.print(f"{damaged} damaged rows of {run}/audit*.jsonl aren't counted.")
    if guided:
        console.print(Panel(_sample(_most_telling(guided)), title="a guided rollout"))
    elif rows:
        reasons = sorted({str(row["skipped"]) for row in rows})
        console.print(f"No feedback could be used ({', '.join(reasons)}): see {run}/audit*.jsonl.")


def print_next_steps(trainer: Trainer, run: Path, console: Console) -> None:
    """Print what to do after a training run."""
    called = Path(sys.argv[0])
    command = called if called.name == "thinktuning" else Path("thinktuning")
    tensorboard = command.with_name("tensorboard")
    config = runs.newest_config(run)
    checkpoint = run / runs.CHECKPOINTS / "last.ckpt"
    more = ["--trainer.max_steps", str(2 * trainer.global_step)]
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        more += ["--trainer.max_epochs", str(2 * trainer.max_epochs)]
    next_steps: dict[str, list[Any]] = {
        "watch": [tensorboard, "--logdir", run.parent],
        "go on": [command, "fit", "--config", config, "--ckpt_path", checkpoint, *more],
        "export": [command, "export", "--ckpt_path", checkpoint, "--output", run / "exported"],
    }
    for what, line in next_steps.items():
        console.print(f"{what + ':':8}{shlex.join(map(str, line))}", soft_wrap=True, markup=False)


def _audit_lines(run: Path) -> list[bytes]:
    # Not splitlines, which also ends a line at separators that answers may have.
    lines = (line for path in audit_files(run) for line in path.read_bytes().split(b"\n"))
    return [line for line in lines if line]


def _most_telling(guided: list[dict[str, Any]]) -> dict[str, Any]:
    """A rollout that guidance put right, else one that stayed right, else the last one."""

    def worth(row: dict[str, Any]) -> tuple[bool, bool, int]:
        before, after = row["before"]["outcome"], row["after"]["outcome"]
        return after == "correct" and before != "correct", after == "correct", row["step"]

    return max(guided, key=worth)


def _sample(row: dict[str, Any]) -> Text:
    text = Text(f"question {row['prompt']}, gold answer {row['gold']}\n\n")
    text.append(row["student"].strip())
    text.append(f"\n\n{row['injected']}\n\n", style="bold green")
    text.append(
        f"{row['before']['outcome']} before guidance, {row['after']['outcome']} after; "
        f"advantage {row['advantage']:+.2f}; the green part is the teacher's",
        style="dim",
    )
    return text
