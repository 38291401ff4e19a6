r"""Step times of our trainer and TRL's GRPOTrainer on the same work, taking turns.

    python3 -m venv /tmp/trl-venv
    /tmp/trl-venv/bin/pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
    /tmp/trl-venv/bin/pip install transformers==5.19.0 trl==1.16.0
    python scripts/bench/versus.py --data gsm8k/train.jsonl --trl /tmp/trl-venv/bin/python \
        --work "--model /path/of/SmolLM2-135M-Instruct" \
        "ours:" "TRL:trl" "TRL, no checkpointing:trl --no_checkpointing"

All sides have the same questions in the same order, drawn from the first 64 of the file, and it is
checked that they read and write as many tokens. Each side is NAME:OPTIONS, of
``ours.py`` or, behind the word trl, of ``trl_side.py``; both say what options there are. Sides are
processes of their own that wait while another one takes its step. The first steps of each warm up.
The table compares with the last side; a ratio is one of medians, with the lowest and highest of the
ratios in one turn behind it. --out gets a JSON line per step.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from thinktuning.engines import derive_seed
from thinktuning.provenance import provenance

HERE = Path(__file__).parent


class Side:
    """A process that takes steps."""

    def __init__(self, described: str, arguments: argparse.Namespace, work: Path) -> None:
        self.name, _, text = described.partition(":")
        words = shlex.split(text)
        other = not ours(described)
        python = arguments.trl if other else sys.executable
        script = "trl_side.py" if other else "ours.py"
        command = [python, str(HERE / script), "--data", str(work / "data.jsonl")]
        command += ["--work", str(work)]
        command += shlex.split(arguments.work) + words[other:]
        self._log = (work / "log").open("w")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=HERE,
        )
        self._read()

    def step(self) -> dict[str, float]:
        """Figures of one step."""
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        figures = self._read()
        self._read()
        return figures

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            end = Path(self._log.name).read_text()[-2000:]
            sys.exit(f"{self.name} has ended:\n{end}")
        read: dict[str, float] = json.loads(line)
        return read


def ours(described: str) -> bool:
    """Whether a side is."""
    return shlex.split(described.partition(":")[2])[:1] != ["trl"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="questions in GSM8K's form")
    parser.add_argument("--trl", help="the python of TRL's environment")
    parser.add_argument("--work", default="", help="options for all sides, one string")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warmups", type=int, default=2)
    parser.add_argument("--out", type=Path, help="gets a JSON line per step")
    parser.add_argument("sides", nargs="+", metavar="NAME:OPTIONS")
    arguments = parser.parse_args()
    questions = Path(arguments.data).read_text().splitlines(keepends=True)[:64]
    drawn = torch.Generator().manual_seed(derive_seed(1, 0, "shuffle"))
    order = torch.randperm(len(questions), generator=drawn)  # our loader's, with seed 1
    rows: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        sides = []
        for i, described in enumerate(arguments.sides):
            (work := Path(folder) / str(i)).mkdir()
            own = range(len(questions)) if ours(described) else order
            (work / "data.jsonl").write_text("".join(questions[i] for i in own))
            sides.append(Side(described, arguments, work))
        for repeat in range(-arguments.warmups, arguments.repeats):
            read = set()
            for side in sides:
                figures = side.step()
                read.add(figures["prompt_tokens"])
                print(side.name, repeat, json.dumps(figures), file=sys.stderr)
                if repeat >= 0:
                    rows.setdefault(side.name, []).append(figures)
            if len(read) > 1:
                sys.exit(f"the sides had prompts of different lengths: {read}")
        for side in sides:
            side.close()
    if arguments.out is not None:
        with arguments.out.open("a") as file:
            for name, steps in rows.items():
                for figures in steps:
                    file.write(json.dumps({"side": name, **figures, **provenance()}) + "\n")
    show(rows)


def show(rows: dict[str, list[dict[str, float]]]) -> None:
    """Print medians, and ratios to the last side."""
    *_, base = rows.values()
    names = list(dict.fromkeys(k for steps in rows.values() for k in steps[0]))
    table = Table("", *names, "ratio of steps (lowest to highest)")
    for name, steps in rows.items():
        cells = [_median(steps, key) for key in names]
        ratios = [mine["step"] / theirs["step"] for mine, theirs in zip(steps, base, strict=True)]
        ratio = statistics.median(s["step"] for s in steps) / statistics.median(
            s["step"] for s in base
        )
        table.add_row(name, *cells, f"{ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    Console(width=200).print(table)


def _median(steps: list[dict[str, Any]], key: str) -> str:
    found = [step[key] for step in steps if key in step]
    return f"{statistics.median(found):.2f}" if found else ""


if __name__ == "__main__":
    main()
