"""Make a result of docs/results again: ``python scripts/reproduce.py catchphrase``.

Reads ``configs/experiments/NAME.yaml``, runs every arm with every seed, and writes into
``docs/results/NAME``:

    scalars.csv    what was measured: arm, seed, step, scalar, value
    runs.json      every run that was made: command, minutes, machine, versions, commit
    config/        the whole configuration of every arm, of the first seed
    guided.csv     rewards of answers before and after a teacher added to them
    curves.png     drawn from scalars.csv alone; ``--plot`` draws it again
    table.md       likewise
    answers.csv    where the experiment names a reflection: what students said of themselves
    reflections.*  what their reflections did, drawn from answers.csv alone
    held_out.csv   the answers of the last validation
    held_out.md    what reflections did in these

Runs that are finished are not made again, and one that was stopped goes on: they lie in --runs.
"""

import argparse
import csv
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib
import numpy as np
import reflections
import torch
import yaml
from report_run import read_events

from thinktuning import runs
from thinktuning.evaluation.statistics import accuracy_interval
from thinktuning.provenance import provenance

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Settings = Mapping[str, Any]
Row = tuple[str, int, int, str, float]
"""arm, seed, step, scalar, value"""

Measured = defaultdict[str, dict[int, float]]
"""Values by scalar, and by the number of rollout batches that were trained on before."""

BEFORE = "before training"


@dataclass(frozen=True)
class Experiment:
    """Runs that differ in a few settings.

    Attributes:
        config: Paths of the configurations that all arms share, laid over each other.
        files: Paths of whatever else the runs depend on; when one changes, they are other runs.
        seeds: Each is one run of every arm.
        arms: Settings by dotted names, by the arm's name.
        panels: Scalars that are drawn, with their titles. ``minutes`` is one besides the trainer's:
            of training, from its beginning.
        table: Scalars whose last values are the table's columns, with their titles.
        kept: Scalars that are kept besides, for the text.
        scale: What a scalar is shown multiplied by, e.g. a reward of 0.5 as a share.
        shares: Which of the table's scalars are shares of held-out answers: these have an interval.
        answers: Held-out answers of one run, that these are shares of.
        across: Scalar that they are drawn over, instead of the number of batches.
        reflection: Pattern of what a reflection begins with, to see what it does to answers.
    """

    config: Sequence[str]
    seeds: Sequence[int]
    arms: Mapping[str, Settings]
    panels: Mapping[str, str]
    table: Mapping[str, str]
    files: Sequence[str] = ()
    kept: Sequence[str] = ()
    scale: Mapping[str, float] = field(default_factory=dict)
    shares: Sequence[str] = ()
    answers: int = 0
    across: str = ""
    reflection: str = ""

    @property
    def scalars(self) -> list[str]:
        """What is kept of a run."""
        return sorted({*self.panels, *self.table, *self.kept} | {self.across} - {""})


@dataclass(frozen=True)
class Run:
    """One arm with one seed; another configuration is another run."""

    arm: str
    seed: int
    digest: str
    root: Path
    arguments: tuple[str, ...]

    @property
    def record(self) -> Path:
        """What is known of it; there when it is finished."""
        return self.root / "run.json"

    @property
    def starts(self) -> Path:
        """What it was made with, a line for every time that it was begun or went on."""
        return self.root / "starts.jsonl"

    @property
    def before(self) -> Path:
        """Where the policy was validated before training."""
        return self.root / "start"

    @property
    def after(self) -> Path:
        """Where it was behind the last step, if ``fit`` hasn't."""
        return self.root / "end"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="of a file in configs/experiments")
    parser.add_argument("--data", help="data.source instead of the configuration's")
    parser.add_argument("--runs", type=Path, default=Path("build/reproduce"))
    parser.add_argument("--at_once", type=int, default=1, help="runs that share the cores")
    parser.add_argument("--plot", action="store_true", help="draw what is there, run nothing")
    arguments = parser.parse_args()

    experiment = read_experiment(Path("configs/experiments") / f"{arguments.name}.yaml")
    output = Path("docs/results") / arguments.name
    if not arguments.plot:
        more = [f"--data.source={arguments.data}"] if arguments.data else []
        wanted = list(all_runs(experiment, arguments.runs / arguments.name, more))
        with ThreadPoolExecutor(arguments.at_once) as pool:
            for run in pool.map(lambda run: make(run, arguments.at_once), wanted):
                print(f"{run.arm}, seed {run.seed}: finished", flush=True)
        gather(experiment, wanted, output)
    rows = read_rows(output / "scalars.csv")
    save(plot(experiment, rows), output / "curves.png", [experiment, *rows])
    (output / "table.md").write_text(table(experiment, rows))
    if begins := experiment.reflection:
        answers = reflections.read_answers(output / "answers.csv")
        save(reflections.plot(answers, begins), output / "reflections.png", answers)
        (output / "reflections.md").write_text(reflections.table(answers, begins))
        held_out = reflections.read_answers(output / "held_out.csv")
        (output / "held_out.md").write_text(reflections.held_out_table(held_out, begins))


def read_experiment(path: Path) -> Experiment:
    """``like: NAME`` takes what the file doesn't say from NAME's, in the same folder."""
    settings = yaml.safe_load(path.read_text())
    if name := settings.pop("like", None):
        settings = vars(read_experiment(path.with_stem(name))) | settings
    return Experiment(**settings)


def all_runs(experiment: Experiment, root: Path, more: Sequence[str]) -> Iterator[Run]:
    """Every arm with the first seed, then with the second one, …"""
    shared = "".join(Path(path).read_text() for path in [*experiment.config, *experiment.files])
    for seed in experiment.seeds:
        for arm, settings in experiment.arms.items():
            flags = [f"--config={path}" for path in experiment.config]
            flags += [f"--{name}={value}" for name, value in settings.items()]
            flags += [*more, f"--seed_everything={seed}"]
            digest = sha256("\n".join([shared, *flags]).encode()).hexdigest()[:8]
            folder = root / f"{slug(arm)}.seed={seed}.{digest}"
            yield Run(arm, seed, digest, folder, tuple(flags))


def slug(arm: str) -> str:
    """An arm's name as that of a file."""
    return re.sub("[^a-z0-9]+", "-", arm.lower()).strip("-")


def make(run: Run, at_once: int) -> Run:
    """Train, unless that is done; a run that was stopped goes on."""
    if run.record.exists():
        return run
    threads = max(1, (os.cpu_count() or 1) // at_once)
    torch.set_num_threads(threads)  # as the run has; provenance tells it
    run.root.mkdir(parents=True, exist_ok=True)
    with run.starts.open("a") as file:
        file.write(json.dumps(provenance()) + "\n")
    if not (run.root / "started").exists():
        shutil.rmtree(run.before, ignore_errors=True)  # of a start that was stopped
        thinktuning("validate", run, run.before, threads)
        (run.root / "started").touch()
    thinktuning("fit", run, run.root, threads, "--ckpt_path=last")
    trained = read_fit(run)
    if max(trained["seconds/step"]) not in trained["val/accuracy"]:
        shutil.rmtree(run.after, ignore_errors=True)
        run.after.mkdir()
        checkpoint = runs.last_checkpoint(run.root)
        assert checkpoint is not None
        # What is validated in a run's folder is written into that run, as of its first step.
        elsewhere = run.after / "trained.ckpt"
        elsewhere.symlink_to(checkpoint.absolute())
        thinktuning("validate", run, run.after, threads, f"--ckpt_path={elsewhere}")
        elsewhere.unlink()
    first, *later = [json.loads(line) for line in run.starts.read_text().splitlines()]
    record = {
        "arm": run.arm,
        "seed": run.seed,
        "digest": run.digest,
        "command": f"OMP_NUM_THREADS={threads} "
        + shlex.join(["thinktuning", "fit", *run.arguments]),
        "runs_at_once": at_once,
        **first,
        "resumed": later,
    }
    unfinished = run.record.with_suffix(".tmp")
    unfinished.write_text(json.dumps(record) + "\n")
    unfinished.replace(run.record)
    for checkpoints in run.root.glob(f"*/{runs.CHECKPOINTS}"):
        shutil.rmtree(checkpoints)  # gigabytes that nobody asks for
    return run


def thinktuning(verb: str, run: Run, place: Path, threads: int, *more: str) -> None:
    flags = [*run.arguments, f"--trainer.default_root_dir={place}", *more]
    with (run.root / "output.log").open("a") as log:
        done = subprocess.run(
            [sys.executable, "-m", "thinktuning.cli", verb, *flags],
            stdout=log,
            stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )
    if done.returncode:
        raise RuntimeError(f"thinktuning {verb} ended with {done.returncode}: see {log.name}")


def gather(experiment: Experiment, made: Sequence[Run], folder: Path) -> None:
    """Write down what the finished runs have measured."""
    finished = {run: measured(run) for run in made if run.record.exists()}
    records = [
        json.loads(run.record.read_text()) | {"minutes": round(max(found["minutes"].values()), 1)}
        for run, found in finished.items()
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "runs.json").write_text(json.dumps(records, indent=1) + "\n")
    with (folder / "scalars.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["arm", "seed", "step", "scalar", "value"])
        for run, found in finished.items():
            for scalar in experiment.scalars:
                for step, value in sorted(found.get(scalar, {}).items()):
                    writer.writerow([run.arm, run.seed, step, scalar, f"{value:.6g}"])
    copy_configs(list(finished), folder / "config")
    gather_rows(reflections.Guided, reflections.read_guided, finished, folder / "guided.csv")
    gather_rows(reflections.Answer, reflections.read_held_out, finished, folder / "held_out.csv")
    if experiment.reflection:
        gather_rows(reflections.Answer, reflections.read_students, finished, folder / "answers.csv")


def copy_configs(made: Sequence[Run], folder: Path) -> None:
    """What each arm's first run was configured with, whole."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for arm, run in {run.arm: run for run in reversed(made)}.items():
        shutil.copy(runs.versions(run.root)[0] / "config.yaml", folder / f"{slug(arm)}.yaml")


def gather_rows(
    kind: type[reflections.Answer] | type[reflections.Guided],
    read: Callable[[str, int, list[Path]], Sequence[tuple[object, ...]]],
    made: Iterable[Run],
    path: Path,
) -> None:
    """Write down what the runs' folders have of a kind."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(kind._fields)
        for run in made:
            writer.writerows(read(run.arm, run.seed, runs.versions(run.root)))


def measured(run: Run) -> Measured:
    """What ``fit`` and the validations around it have measured, and what training took."""
    found = read_fit(run)
    for scalar, value in read_validation(run.before).items():
        found[scalar][0] = value
    last = max(found["seconds/step"], default=0)
    for scalar, value in read_validation(run.after).items():
        found[scalar][last] = value
    found["minutes"] = minutes(found)
    found["thousand_tokens"] = thousand_tokens(found)
    return found


def minutes(found: Measured) -> dict[int, float]:
    """What training took up to a step, for STaR with its collections; validations come on top."""
    steps, collections = found["seconds/step"], found["seconds/collection"]
    taken = [steps[step] + collections.get(step, 0) for step in sorted(steps)]
    return {0: 0.0} | dict(zip(sorted(steps), np.cumsum(taken) / 60, strict=True))


def thousand_tokens(found: Measured) -> dict[int, float]:
    """Of completions that were trained on up to a step: those of groups with any advantage."""
    rates, seconds = found["tokens_per_second/update"], found["seconds/update"]
    trained = [rates[step] * seconds[step] for step in sorted(rates)]
    return dict(zip(sorted(rates), np.cumsum(trained) / 1000, strict=True))


def read_fit(run: Run) -> Measured:
    """Scalars by the number of batches; of a step that was made twice, the last."""
    found: Measured = defaultdict(dict)
    for folder in runs.versions(run.root):
        for scalar, values in read_events(folder).items():
            found[scalar] |= {step + 1: value for step, value in values.items()}
    return found


def read_validation(root: Path) -> dict[str, float]:
    """The newest value of every scalar; none if there was no validation."""
    return {
        scalar: value
        for folder in runs.versions(root)
        for scalar, values in read_events(folder).items()
        for value in values.values()
    }


def read_rows(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return [
            (r["arm"], int(r["seed"]), int(r["step"]), r["scalar"], float(r["value"]))
            for r in csv.DictReader(file)
        ]


def plot(experiment: Experiment, rows: Sequence[Row]) -> Figure:
    """A panel per scalar, two in a row; a thin line for every seed, a thick one for their mean."""
    rows = scaled(rows, experiment.scale)
    across = min(2, len(experiment.panels))
    down = math.ceil(len(experiment.panels) / across)
    width = 4.6 * across
    figure, axes = plt.subplots(
        down, across, figsize=(width, 3.6 * down), layout="constrained", squeeze=False
    )
    panels = len(experiment.panels)
    for axis in axes.flat[panels:]:
        axis.remove()
    for axis, (scalar, title) in zip(axes.flat[:panels], experiment.panels.items(), strict=True):
        for number, arm in enumerate(experiment.arms):
            draw(axis, experiment, rows, arm, scalar, number)
        if scalar in experiment.shares:
            axis.set_ylim(-0.05, 1.05)
        axis.set_title(title)
        axis.set_xlabel(experiment.across or "rollout batch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axis.grid(alpha=0.3)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    letters = max(map(len, labels), default=0) + 4  # of a column; an inch has some 13
    columns = max(1, int(13 * width / letters))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    return figure


def draw(
    axis: Axes, experiment: Experiment, rows: Sequence[Row], arm: str, scalar: str, number: int
) -> None:
    """The lines of one arm; ``number`` is its place among the arms."""
    by_seed = series(rows, arm, scalar)
    across = series(rows, arm, experiment.across)
    for seed, values in by_seed.items():
        places = [across[seed][step] if across else step for step in values]
        axis.plot(places, list(values.values()), color=f"C{number}", linewidth=0.7, alpha=0.5)
    if together := common(by_seed):
        at = common(across)
        axis.plot(
            [mean(at[step]) if across else step for step in together],
            [mean(values) for values in together.values()],
            color=f"C{number}",
            linestyle=_dashes(number),
            linewidth=2,
            label=arm,
        )


def _dashes(number: int) -> Any:
    """Gaps let lines behind be seen; dots where colors begin anew."""
    if number >= 10:
        return ":"
    return (0, (4, min(number, 5))) if number else "-"


def save(figure: Figure, path: Path, data: Sequence[object]) -> None:
    """Write a picture that tells what it was drawn from."""
    figure.savefig(path, dpi=110, metadata={"Source": fingerprint(data)})
    plt.close(figure)


def fingerprint(data: Sequence[object]) -> str:
    return sha256(repr(list(data)).encode()).hexdigest()


def scaled(rows: Sequence[Row], scale: Mapping[str, float]) -> list[Row]:
    return [(*row[:4], row[4] * scale.get(row[3], 1)) for row in rows]


def series(rows: Sequence[Row], arm: str, scalar: str) -> dict[int, dict[int, float]]:
    """Values by seed and step, both ascending."""
    found: dict[int, dict[int, float]] = {}
    for row_arm, seed, step, row_scalar, value in sorted(rows, key=lambda row: row[1:3]):
        if (row_arm, row_scalar) == (arm, scalar):
            found.setdefault(seed, {})[step] = value
    return found


def common(by_seed: Mapping[int, Mapping[int, float]]) -> dict[int, list[float]]:
    """What the seeds have measured, by step; steps at which one hasn't are left out."""
    steps = set.intersection(*map(set, by_seed.values())) if by_seed else set()
    return {step: [values[step] for values in by_seed.values()] for step in sorted(steps)}


def table(experiment: Experiment, rows: Sequence[Row]) -> str:
    """The last values as Markdown: every seed's, a share's with its interval, and their mean."""
    rows = scaled(rows, experiment.scale)
    lines = ["| | seed | " + " | ".join(experiment.table.values()) + " |"]
    lines.append("|---|---|" + "---|" * len(experiment.table))
    starts: list[dict[str, float]] = []
    for arm in experiment.arms:
        # All runs of an arm begin with the same weights and answer greedily; most arms do, too.
        begun = {row[3]: row[4] for row in rows if row[0] == arm and row[2] == 0}
        begun.pop("minutes", None)
        if begun and not any(agree(begun, start) for start in starts):
            name = f"{arm}: {BEFORE}" if starts else BEFORE
            lines.append(line(experiment, name, "any", {k: [v] for k, v in begun.items()}))
            starts.append(begun)
        last = {
            scalar: {seed: found[max(found)] for seed, found in series(rows, arm, scalar).items()}
            for scalar in experiment.table
        }
        seeds = sorted(set().union(*last.values()))
        for seed in seeds:
            own = {scalar: [found[seed]] for scalar, found in last.items() if seed in found}
            lines.append(line(experiment, arm if seed == seeds[0] else "", str(seed), own))
        if len(seeds) > 1:
            own = {scalar: list(found.values()) for scalar, found in last.items()}
            lines.append(line(experiment, "", "mean", own))
    return "\n".join(lines) + "\n"


def agree(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    """Whether two arms began alike, as far as both were measured."""
    return all(one[scalar] == other[scalar] for scalar in one.keys() & other.keys())


def line(experiment: Experiment, arm: str, seed: str, found: Mapping[str, Sequence[float]]) -> str:
    """A row of the table: of the values that were found of a scalar, the mean."""
    cells = []
    for scalar in experiment.table:
        answers = experiment.answers if scalar in experiment.shares else 0
        cells.append(cell(found.get(scalar, []), answers))
    return f"| {arm} | {seed} | " + " | ".join(cells) + " |"


def cell(values: Sequence[float], answers: int) -> str:
    """``0.50 [0.31, 0.69]``: the mean, and of one seed's share of answers the 95 % interval.

    The interval (Wilson's) is of the questions. A mean over seeds has none: all are asked the same
    questions, and how far seeds are apart is seen in their rows.
    """
    if not values:
        return ""
    if not answers:
        return f"{mean(values):.1f}"
    if len(values) > 1:
        return f"{mean(values):.2f}"
    hits = round(values[0] * answers)
    share = accuracy_interval(np.repeat([1.0, 0.0], [hits, answers - hits]))
    return f"{values[0]:.2f} [{share.low:.2f}, {share.high:.2f}]"


if __name__ == "__main__":
    main()
