"""Make a run's record: ``python scripts/report_run.py RUN OUTPUT``.

RUN is a folder such as ``runs/first-run/version_0``. OUTPUT gets ``scalars.csv``, ``curves.png``,
``numbers.md``, ``samples.md`` (three guided rollouts), and the run's ``config.yaml``. The plot is
drawn from ``scalars.csv`` alone: ``python scripts/report_run.py --plot OUTPUT`` draws it again.
"""

import csv
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import lightning
import matplotlib
import torch
import transformers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Series = Mapping[str, Mapping[int, float]]

PANELS = {
    "reward": ["reward", "reward/guided", "reward/unguided"],
    "share of rollouts": ["length/cut_off", "accuracy/no_answer", "guidance/eligible"],
    "guidance": ["guidance/gamma", "guidance/realised_gamma", "guidance/parsed"],
    "AAS": ["shaping/weight", "shaping/masked", "shaping/gradient_share"],
    "entropy (nats)": ["objective/entropy"],
    "seconds a step": ["seconds/rollout", "seconds/guidance", "seconds/update"],
}
STAGES = ["rollout", "guidance", "injection", "reward", "logprobs", "update", "step"]


def read_events(run: Path) -> Series:
    """TensorBoard's scalars by tag and step; of a step done twice, the last."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    tags = events.Tags()["scalars"]
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in tags}


def write_csv(series: Series, path: Path) -> None:
    """One row per step, one column per tag, empty where nothing was logged."""
    steps = sorted({step for values in series.values() for step in values})
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *sorted(series)])
        for step in steps:
            cells = [series[tag].get(step) for tag in sorted(series)]
            writer.writerow([step, *("" if c is None else f"{c:.6g}" for c in cells)])


def read_csv(path: Path) -> Series:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    tags = [tag for tag in rows[0] if tag != "step"]
    return {tag: {int(r["step"]): float(r[tag]) for r in rows if r[tag]} for tag in tags}


def plot(series: Series, path: Path, title: str) -> None:
    """Small panels over rollout steps; dots are single steps, lines means of up to five points."""
    figure, axes = plt.subplots(2, 3, figsize=(13, 6.5), layout="constrained")
    figure.suptitle(title)
    for axis, (name, tags) in zip(axes.flat, PANELS.items(), strict=True):
        for tag in tags:
            points = sorted(series.get(tag, {}).items())
            if not points:
                continue
            steps, values = zip(*points, strict=True)
            smooth = [mean(values[max(0, i - 4) : i + 1]) for i in range(len(values))]
            (line,) = axis.plot(steps, smooth, linewidth=2, label=tag)
            axis.plot(steps, values, "o", markersize=2, alpha=0.5, color=line.get_color())
        axis.set_title(name)
        axis.set_xlabel("rollout step")
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def numbers(series: Series, rows: Sequence[Mapping[str, Any]]) -> str:
    """The record's figures as Markdown."""
    guided = [row for row in rows if row["after"] is not None]
    asked = [row for row in rows if row["skipped"] != "prompt_too_long"]
    parsed = [row for row in asked if row["opinion"] is not None]
    right = [row["before"]["outcome"] == "correct" for row in guided]
    right_after = [row["after"]["outcome"] == "correct" for row in guided]
    agree = sum(
        (r["opinion"] == "correct") == (r["before"]["outcome"] == "correct") for r in parsed
    )
    lines = [
        "| figure | value |",
        "|---|---|",
        f"| rollout steps | {len(series['reward'])} |",
        f"| student's accuracy, mean | {mean(series['accuracy/student'].values()):.3f} |",
        f"| rollouts that the teacher was asked about | {len(asked)} |",
        f"| of these, feedback that parsed | {len(parsed)} ({len(parsed) / len(asked):.0%}) |",
        f"| of the parsed, verdict agrees with the verifier | {agree} |",
        f"| rollouts guided | {len(guided)} |",
        f"| right before / after guidance | {sum(right)} / {sum(right_after)} |",
        "",
        "| stage | median seconds a step |",
        "|---|---|",
    ]
    for stage in STAGES:
        if values := list(series.get(f"seconds/{stage}", {}).values()):
            lines.append(f"| {stage} | {median(values):.2f} |")
    return "\n".join(lines)


def samples(rows: Sequence[Mapping[str, Any]], count: int = 3) -> str:
    """Guided rollouts as Markdown: the first, the middle and the last one, not the best ones."""
    guided = [row for row in rows if row["after"] is not None]
    places = sorted({round(i * (len(guided) - 1) / (count - 1)) for i in range(count)})
    parts = []
    for row in (guided[i] for i in places if guided):
        student, injected = (
            row[k].strip().replace("\n", "\n    ") for k in ("student", "injected")
        )
        parts.append(
            f"**Step {row['step']}, question {row['prompt']}, gold answer {row['gold']}.** "
            f"{row['before']['outcome']} before guidance, {row['after']['outcome']} after; "
            f"the teacher's verdict: {row['opinion']}; advantage {row['advantage']:+.2f}.\n\n"
            f"    {student}\n\n    [injected from the teacher]\n    {injected}"
        )
    return "\n\n".join(parts)


def setting() -> str:
    """Machine, versions and commit."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    return (
        f"{torch.get_num_threads()} threads, {platform.machine()}, "
        f"{'a GPU' if torch.cuda.is_available() else 'no GPU'}; "
        f"Python {platform.python_version()}, "
        f"torch {torch.__version__}, lightning {lightning.__version__}, "
        f"transformers {transformers.__version__}; commit {commit}"
    )


def main() -> None:
    if sys.argv[1] == "--plot":
        output = Path(sys.argv[2])
        plot(read_csv(output / "scalars.csv"), output / "curves.png", output.name)
        return
    run, output = Path(sys.argv[1]), Path(sys.argv[2])
    output.mkdir(parents=True, exist_ok=True)
    lines = (run / "audit.jsonl").read_text().split("\n")
    rows = [json.loads(line) for line in lines if line]
    series = read_events(run)
    write_csv(series, output / "scalars.csv")
    plot(series, output / "curves.png", output.name)
    (output / "numbers.md").write_text(f"{setting()}\n\n{numbers(series, rows)}\n")
    (output / "samples.md").write_text(samples(rows) + "\n")
    shutil.copy(run / "config.yaml", output / "config.yaml")


if __name__ == "__main__":
    main()
