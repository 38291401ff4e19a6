"""Draws what ``versus.py --out`` has written: ``plot_versus.py PICTURE.png TITLE=FILE.jsonl …``.

A bar is the median step of a side, cut into its stages. Behind it stands the ratio to the last side
of its file.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

STAGES = {
    "rollout": "rollouts",
    "sync": "weights to vLLM",
    "guidance": "teacher",
    "logprobs": "logprobs of the reference",
    "update": "update",
}


def sides(path: str) -> dict[str, dict[str, float]]:
    """Medians by side."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for line in Path(path).read_text().splitlines():
        row = json.loads(line)
        rows.setdefault(row["side"], []).append(row)
    for step in (step for steps in rows.values() for step in steps):
        step["rest"] = step["step"] - sum(step.get(stage, 0.0) for stage in STAGES)
    names = ["step", "rest", *STAGES]
    return {
        side: {name: statistics.median(s.get(name, 0.0) for s in steps) for name in names}
        for side, steps in rows.items()
    }


def main(picture: str, *files: str) -> None:
    bars: list[tuple[str, dict[str, float], float]] = []
    for described in files:
        title, _, path = described.rpartition("=")
        found = sides(path)
        *_, base = found.values()
        for side, medians in found.items():
            bars.append((f"{side}\n{title}", medians, medians["step"] / base["step"]))
    figure, axis = plt.subplots(figsize=(8, 1.3 + 0.52 * len(bars)), layout="constrained")
    places = range(len(bars), 0, -1)
    left = [0.0] * len(bars)
    for stage, label in [*STAGES.items(), ("rest", "everything else")]:
        widths = [medians[stage] for _, medians, _ in bars]
        axis.barh(places, widths, left=left, height=0.7, label=label)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for place, stop, (_, medians, ratio) in zip(places, left, bars, strict=True):
        axis.annotate(
            f" {medians['step']:.1f} s, {ratio:.2f}",
            (stop, place),
            va="center",
            fontsize=9,
        )
    axis.set_yticks(list(places), [name for name, _, _ in bars], fontsize=9)
    axis.set_xlim(0, 1.17 * max(medians["step"] for _, medians, _ in bars))
    axis.set_xlabel("seconds a step (median), ratio to the last side of the same run")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
