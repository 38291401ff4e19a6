"""The picture of docs/results/learning: ``python scripts/plot_learning.py`` (a minute or two).

Runs tests/test_learning.py, a 50-thousand-parameter student trained from scratch to add, and draws
how often its unguided answers have the phrase that only the teacher says. Writes
``docs/results/learning/shares.csv`` and ``curve.png``.
"""

import csv
import subprocess
import sys
from pathlib import Path

import matplotlib
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SCRATCH, OUTPUT = Path("build/learning"), Path("docs/results/learning")
RUNS = {"GRPO (γ = 0)": "grpo", "ThinkTuning (γ = 0.5, off after step 75)": "thinktuning"}


def shares(name: str) -> list[float]:
    """Share of unguided answers with the phrase, step by step."""
    (run,) = SCRATCH.glob(f"test_*0/{name}/version_0")
    events = EventAccumulator(str(run))
    events.Reload()
    return [e.value for e in events.Scalars("unguided_phrases")]


def main() -> None:
    SCRATCH.parent.mkdir(exist_ok=True)
    test = [sys.executable, "-m", "pytest", "-q", "tests/test_learning.py"]
    subprocess.run([*test, f"--basetemp={SCRATCH}"], check=True)
    columns = {label: shares(name) for label, name in RUNS.items()}
    OUTPUT.mkdir(parents=True, exist_ok=True)
    with (OUTPUT / "shares.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *columns])
        writer.writerows([i, *row] for i, row in enumerate(zip(*columns.values(), strict=True)))

    figure, axis = plt.subplots(figsize=(7.5, 3.6), layout="constrained")
    for label, values in columns.items():
        axis.plot(values, linewidth=2, label=label)
    axis.axvspan(0, 75, alpha=0.08, label="the teacher is there")
    axis.set_xlabel("rollout batch")
    axis.set_ylabel("unguided answers with the phrase")
    axis.set_ylim(-0.02, 1.02)
    axis.legend(loc="upper left")
    axis.grid(alpha=0.3)
    figure.savefig(OUTPUT / "curve.png", dpi=110)


if __name__ == "__main__":
    main()
