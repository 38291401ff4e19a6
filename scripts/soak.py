"""A run that is killed again and again, beside the same run left alone: ``python scripts/soak.py``.

    python scripts/soak.py --config configs/word_problems.yaml --steps 150 --kill_after 240 \
        -- --data.source path/to/gsm8k/train.jsonl --data.val_size 8

Runs ``thinktuning fit`` with as many steps as are asked for, twice at the same time, on half of
the cores each: left alone, and with ``kill -9`` at random moments, after which it goes on with
``--ckpt_path last``. Compares the last weights and optimizer states bit by bit, and how much
memory the run left alone takes early and late. Writes ``soak.json``, ``memory.csv`` and
``memory.png`` into --output; what follows ``--`` goes to fit.
"""

import argparse
import csv
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from rich.console import Console

from thinktuning import runs
from thinktuning.provenance import provenance

matplotlib.use("Agg")
from matplotlib import pyplot as plt

_EVERY = 5.0  # seconds between two looks at the memory
_MIB = 2**10  # KiB
_WARM_UP = 0.25  # of the run left alone
_GROWTH = 0.02  # of memory behind it that is allowed


@dataclass
class Life:
    """One process of a run.

    Attributes:
        seconds: From its start to its end.
        killed: By this script.
        memory: (seconds, MiB of resident set) pairs.
    """

    seconds: float
    killed: bool
    memory: list[tuple[float, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/word_problems.yaml")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--kill_after", type=float, default=240.0, help="seconds, on average")
    parser.add_argument("--seed", type=int, default=1, help="of the moments")
    parser.add_argument("--runs", type=Path, default=Path("build/soak"))
    parser.add_argument("--output", type=Path, default=Path("docs/results/soak"))
    arguments, more = parser.parse_known_args()
    more = [word for word in more if word != "--"]
    console = Console(highlight=False)
    if arguments.runs.exists():
        parser.error(f"{arguments.runs} is there already: delete it, or name another as --runs")

    command = [sys.executable, "-m", "thinktuning.cli", "fit", "--config", arguments.config]
    command += [f"--trainer.max_steps={arguments.steps}", *more]
    moments = random.Random(arguments.seed)
    killed: list[Life] = []
    with ThreadPoolExecutor() as pool:
        left_alone = pool.submit(live, command, arguments.runs / "alone", limit=None)
        while not killed or killed[-1].killed:
            # Not exponential: a life that is too short for a checkpoint would only repeat itself.
            limit = arguments.kill_after * moments.uniform(0.5, 1.5)
            killed.append(live([*command, "--ckpt_path=last"], arguments.runs / "killed", limit))
            console.print(f"life {len(killed)}: {killed[-1].seconds:.0f} s")
        alone = left_alone.result()
    console.print(f"left alone: {alone.seconds:.0f} s")

    differing = differences(*(last_checkpoint(arguments.runs / n) for n in ("alone", "killed")))
    early, late = early_and_late(alone.memory)
    report = {
        "kills": sum(life.killed for life in killed),
        "steps": arguments.steps,
        "minutes_with_kills": sum(life.seconds for life in killed) / 60,
        "minutes_left_alone": alone.seconds / 60,
        "tensors_that_differ": len(differing),
        "of_them": differing[:3],
        "memory_mib_early": early,
        "memory_mib_late": late,
        "memory_growth": late / early - 1,
        "lives": [{k: v for k, v in asdict(life).items() if k != "memory"} for life in killed],
        "command": command[1:],
        "seed": arguments.seed,
    } | provenance()
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "soak.json").write_text(json.dumps(report, indent=1) + "\n")
    write_memory(arguments.output, alone, killed)
    console.print(report)
    kept = report["kills"] > 0 and not differing and report["memory_growth"] < _GROWTH
    sys.exit(0 if kept else 1)


def live(command: list[str], root: Path, limit: float | None) -> Life:
    """Run a process to its end, or kill it after ``limit`` seconds."""
    root.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    memory: list[tuple[float, float]] = []
    threads = max(1, (os.cpu_count() or 1) // 2)
    with (root / "output.log").open("a") as log:
        process = subprocess.Popen(
            [*command, f"--trainer.default_root_dir={root}"],
            stdout=log,
            stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )
        while process.poll() is None:
            seconds = time.monotonic() - start
            if limit is not None and seconds > limit:
                process.send_signal(signal.SIGKILL)
                process.wait()
                return Life(seconds, True, memory)
            if (resident := resident_mib(process.pid)) is not None:
                memory.append((seconds, resident))
            time.sleep(_EVERY)
    if process.returncode:
        raise RuntimeError(f"the run ended with {process.returncode}: see {root / 'output.log'}")
    return Life(time.monotonic() - start, False, memory)


def resident_mib(process: int) -> float | None:
    """The resident set of a process; None for one that has just ended."""
    status = Path(f"/proc/{process}/status").read_text()
    lines = [line for line in status.splitlines() if line.startswith("VmRSS")]
    return int(lines[0].split()[1]) / _MIB if lines else None


def last_checkpoint(root: Path) -> dict[str, Any]:
    """The newest one under ``root``; a life without a checkpoint leaves an empty run behind."""
    path = runs.last_checkpoint(root)
    assert path is not None, f"there is no checkpoint under {root}"
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    return checkpoint


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of the weights and optimizer states that aren't the same bits."""
    first, second = tensors(one), tensors(other)
    names = sorted(first.keys() | second.keys())
    same = (n in first and n in second and torch.equal(first[n], second[n]) for n in names)
    return [name for name, equal in zip(names, same, strict=True) if not equal]


def tensors(checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint by name, and its step."""
    found = dict(checkpoint["state_dict"])
    found["global_step"] = torch.tensor(checkpoint["global_step"])
    for number, optimizer in enumerate(checkpoint["optimizer_states"]):
        for parameter, state in optimizer["state"].items():
            for key, value in state.items():
                found[f"optimizer {number}, {parameter}, {key}"] = torch.as_tensor(value)
    return found


def early_and_late(memory: list[tuple[float, float]]) -> tuple[float, float]:
    """Medians of the first and the last third behind the warm-up, MiB."""
    warm = [mib for _, mib in memory[int(_WARM_UP * len(memory)) :]]
    third = max(1, len(warm) // 3)
    return statistics.median(warm[:third]), statistics.median(warm[-third:])


def write_memory(output: Path, alone: Life, killed: list[Life]) -> None:
    """Write the resident sets over time as a table and a picture."""
    lives = {"left alone": [alone], "with kills": killed}
    figure, axis = plt.subplots(figsize=(7.5, 3.2), layout="constrained")
    with (output / "memory.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["run", "life", "minutes", "mib"])
        for color, (name, parts) in zip(("C0", "C1"), lives.items(), strict=True):
            begun = 0.0
            for number, life in enumerate(parts):
                points = [((begun + s) / 60, mib) for s, mib in life.memory]
                writer.writerows([name, number, f"{m:.2f}", f"{mib:.0f}"] for m, mib in points)
                axis.plot(*zip(*points, strict=True), color=color, label="" if number else name)
                begun += life.seconds
    axis.set_xlabel("minutes")
    axis.set_ylabel("resident set, MiB")
    axis.set_ylim(bottom=0)
    axis.legend(loc="lower right")
    axis.grid(alpha=0.3)
    figure.savefig(output / "memory.png", dpi=110)


if __name__ == "__main__":
    main()
