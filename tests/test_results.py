"""docs/results says what its data say, and every experiment can be run."""

import csv
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from thinktuning.cli import main

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))

import reproduce  # noqa: E402 (scripts aren't a package)

EXPERIMENTS = sorted((ROOT / "configs/experiments").glob("*.yaml"))
MADE = [path for path in EXPERIMENTS if (ROOT / "docs/results" / path.stem).exists()]
every_experiment = pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)


@every_experiment
def test_every_arm_is_a_configuration_that_fit_takes(path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    made = reproduce.read_experiment(path)
    runs = list(reproduce.all_runs(made, Path("build"), ["--data.source=questions.jsonl"]))
    assert len({run.root for run in runs}) == len(made.arms) * len(made.seeds)
    printed = set()
    for run in runs[: len(made.arms)]:
        with pytest.raises(SystemExit) as ended:
            main(["fit", *run.arguments, "--print_config"])
        assert not ended.value.code, run.arm
        printed.add(capsys.readouterr().out)
    assert len(printed) == len(made.arms), "two arms are the same"


def test_tables_and_pictures_come_from_the_data(tmp_path):
    assert MADE
    for path in MADE:
        made, folder = reproduce.read_experiment(path), ROOT / "docs/results" / path.stem
        rows = reproduce.read_rows(folder / "scalars.csv")
        table = reproduce.table(made, rows)
        assert (folder / "table.md").read_text() == table
        assert table in (ROOT / "docs/results/README.md").read_text()
        reproduce.plot(made, rows, tmp_path / "curves.png")
        assert (folder / "curves.png").exists()
        if made.reflection:
            answers = reproduce.reflections.read_answers(folder / "answers.csv")
            table = reproduce.reflections.table(answers, made.reflection)
            assert (folder / "reflections.md").read_text() == table
            assert table in (ROOT / "docs/results/README.md").read_text()
            reproduce.reflections.plot(answers, made.reflection, tmp_path / "reflections.png")
            assert (folder / "reflections.png").exists()


def on_the_page(sentence: str) -> bool:
    page = (ROOT / "docs/results/README.md").read_text()
    return sentence in " ".join(page.replace("**", "").split())


class Results:
    """What was measured in the runs of an experiment, for what the page says of them."""

    def __init__(self, name: str) -> None:
        folder = ROOT / "docs/results" / name
        self.rows = reproduce.read_rows(folder / "scalars.csv")
        self.runs = json.loads((folder / "runs.json").read_text())

    def of(self, arm: str, scalar: str, steps: range) -> list[list[float]]:
        """Values of every seed, at those of the steps that have one."""
        seeds = sorted({seed for a, seed, *_ in self.rows if a == arm})
        return [
            [
                v
                for a, s, step, x, v in self.rows
                if (a, s, x) == (arm, seed, scalar) and step in steps
            ]
            for seed in seeds
        ]

    def minutes(self, *arms: str) -> str:
        found = [run["minutes"] for run in self.runs if run["arm"] in arms]
        return f"{min(found):.0f} to {max(found):.0f}"


def span(values: Iterable[float], digits: int) -> str:
    values = list(values)
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"


def with_gradient(made: Results, arm: str, steps: range) -> list[int]:
    """Batches of every seed with a group whose answers were rewarded differently."""
    return [sum(v < 1 for v in seed) for seed in made.of(arm, "groups/zero_variance", steps)]


def test_what_the_page_says_of_the_phrase_is_in_the_data():
    made = Results("catchphrase")
    grpo, first, last = "GRPO (γ = 0)", range(1, 11), range(19, 26)

    def rewards(who: str, steps: range, digits: int) -> str:
        seeds = made.of("ThinkTuning", f"reward/{who}", steps)
        return span([mean(values) for values in seeds], digits)

    assert on_the_page(
        f"Guided answers earn {rewards('guided', first, 1)} on average in the first ten batches, "
        f"unguided ones {rewards('unguided', first, 2)}; in the last seven "
        f"{rewards('guided', last, 1)} and {rewards('unguided', last, 1)}"
    )
    assert not np.any(made.of(grpo, "reward/PhraseReward", range(1, 26)))
    one, three, six = with_gradient(made, grpo, range(1, 26))
    assert on_the_page(f"{one}, {three} and {six} batches of 25 had any gradient")
    early = made.of("no shaping", "val/behavior/catchphrase", range(10, 11))
    assert on_the_page(f"{span(np.ravel(early), 2)} of the answers after ten batches")
    guided = made.minutes("ThinkTuning", "plain clipped ratio", "LUFFY's shaping", "no shaping")
    assert on_the_page(f"{guided} for guided runs and {made.minutes(grpo)} for GRPO")

    longer = Results("same_minutes")
    assert not np.any(longer.of(grpo, "reward/PhraseReward", range(1, 141)))
    fewest, _, most = sorted(with_gradient(longer, grpo, range(1, 141)))
    assert on_the_page(f"{fewest} to {most} of the 140 batches had any gradient")


def test_what_was_tried_by_hand_ended_as_the_page_says():
    with (ROOT / "docs/results/tried.csv").open(newline="") as file:
        rows = [
            (r["settings"], int(r["step"]), r["scalar"], r["value"]) for r in csv.DictReader(file)
        ]
    said = {
        (settings, step): float(value)
        for settings, step, scalar, value in rows
        if scalar == "val/behavior/catchphrase"
    }
    page = (ROOT / "docs/results/README.md").read_text()
    assert "all 32 held-out answers after 20 batches" in page
    assert said["lr 2e-5, reward for ending", 20] == 1
    assert "never said the phrase in 30" in page
    alone = {step: v for (settings, step), v in said.items() if settings.endswith("γ = 0")}
    assert max(alone) == 30
    assert not any(alone.values())


# Two seeds of one arm, one of the other, by hand.
ROWS = [
    ("a", 1, 0, "x", 0.0),
    ("a", 1, 2, "x", 0.5),
    ("a", 2, 0, "x", 0.0),
    ("a", 2, 2, "x", 1.0),
    ("a", 1, 3, "x", 0.75),
    ("b", 1, 2, "x", 0.125),
]


def test_a_table_has_the_last_values_of_every_seed():
    arms = {"a": {}, "b": {}, "c": {}}
    made = reproduce.Experiment(["base.yaml"], [1, 2], arms, {"x": "X"}, {"x": "X"})
    rows = [*ROWS, ("b", 2, 0, "x", 0.0)]
    assert reproduce.table(made, rows).splitlines() == [
        "| | seeds | X |",
        "|---|---|---|",
        "| before training | 1 | 0.00 |",
        "| a | 2 | 0.88 (0.75, 1.00) |",
        "| b | 2 | 0.06 (0.12, 0.00) |",
        "| c | 0 |  |",
    ]
    assert reproduce.values_by_step(rows, "a", "x") == {0: [0.0, 0.0], 2: [0.5, 1.0]}


def test_more_seeds_do_not_narrow_the_interval_of_the_same_questions():
    # Wilson's for 3 of 4: [0.3006, 0.9544]; the reward of 0.5 is shown as a share.
    arms = {"a": {}}
    columns = {"x": "X", "y": "Y"}
    made = reproduce.Experiment(
        ["base.yaml"], [1, 2], arms, {}, columns, scale={"x": 2}, shares=["x"], answers=4
    )
    rows = [
        ("a", seed, 2, scalar, value) for seed, value in ((1, 0.25), (2, 0.5)) for scalar in "xy"
    ]
    shown = "| a | 2 | 0.75 [0.30, 0.95] (0.50, 1.00) | 0.38 (0.25, 0.50) |"
    assert reproduce.table(made, rows).splitlines()[-1] == shown


def write_scalars(folder: Path, values: dict[int, float], name: str = "x") -> None:
    writer = SummaryWriter(folder)
    for step, value in values.items():
        writer.add_scalar(name, value, step)
    writer.close()


def test_what_a_run_has_measured_is_put_together_from_its_lives(tmp_path):
    run = reproduce.Run("a", 1, "0", tmp_path, ())
    write_scalars(run.before / "version_0", {0: 0.0})
    write_scalars(tmp_path / "version_0", {9: 0.125, 19: 0.25})  # was killed, and did 19 again
    write_scalars(tmp_path / "version_1", {19: 0.5, 29: 1.0})
    assert reproduce.measured(run, "x") == {0: 0.0, 10: 0.125, 20: 0.5, 30: 1.0}
    assert reproduce.measured(run, "y") == {}


def test_what_was_measured_behind_the_last_step_counts_for_it(tmp_path):
    run = reproduce.Run("a", 1, "0", tmp_path, ())
    write_scalars(tmp_path / "version_0", {9: 0.125})
    write_scalars(tmp_path / "version_1", {step: 1.0 for step in range(13)}, "seconds/step")
    write_scalars(run.after / "version_0", {0: 0.5})
    assert reproduce.measured(run, "x") == {10: 0.125, 13: 0.5}


def test_an_experiment_is_like_another_where_it_says_nothing(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "{config: [base.yaml], seeds: [1, 2], arms: {x: {}}, panels: {p: P}, table: {t: T}}"
    )
    (tmp_path / "b.yaml").write_text("{like: a, seeds: [3], arms: {y: {}}}")
    expected = reproduce.Experiment(["base.yaml"], [3], {"y": {}}, {"p": "P"}, {"t": "T"})
    assert reproduce.read_experiment(tmp_path / "b.yaml") == expected


def test_another_configuration_is_another_run(tmp_path):
    base = tmp_path / "base.yaml"
    folders = set()
    for content, value in (("a: 1", 1), ("a: 2", 1), ("a: 2", 2)):
        base.write_text(content)
        made = reproduce.Experiment([str(base)], [1], {"an arm (γ)": {"b": value}}, {}, {})
        (run,) = reproduce.all_runs(made, tmp_path, [])
        assert run.root.name.startswith("an-arm.seed=1.")
        folders.add(run.root)
    assert len(folders) == 3


def test_a_file_that_an_experiment_names_makes_other_runs(tmp_path):
    base, behavior = tmp_path / "base.yaml", tmp_path / "behavior.yaml"
    base.write_text("a: 1")
    folders = set()
    for content in ("name: x", "name: y"):
        behavior.write_text(content)
        made = reproduce.Experiment([str(base)], [1], {"an arm": {}}, {}, {}, files=[str(behavior)])
        (run,) = reproduce.all_runs(made, tmp_path, [])
        folders.add(run.root)
    assert len(folders) == 2


def test_finished_runs_are_gathered(tmp_path):
    base = tmp_path / "base.yaml"
    base.write_text("a: 1")
    made = reproduce.Experiment([str(base)], [1, 2], {"a": {}}, {"x": "X"}, {"x": "X"}, kept=["z"])
    finished, unfinished = reproduce.all_runs(made, tmp_path / "runs", [])
    for run, value in ((finished, 0.5), (unfinished, 0.75)):
        write_scalars(run.root / "version_0", {9: value})
        write_scalars(run.root / "version_0", {9: 2 * value}, "z")
        write_scalars(run.root / "version_0", {0: 60.0, 1: 30.0}, "seconds/step")
        write_scalars(run.root / "version_0", {0: 30.0}, "seconds/collection")
    finished.record.write_text('{"arm": "a", "seed": 1}')
    reproduce.gather(made, [finished, unfinished], tmp_path / "results")
    assert json.loads((tmp_path / "results/runs.json").read_text()) == [
        {"arm": "a", "seed": 1, "minutes": 2.0}
    ]
    rows = reproduce.read_rows(tmp_path / "results/scalars.csv")
    assert rows == [("a", 1, 10, "x", 0.5), ("a", 1, 10, "z", 1.0)]
