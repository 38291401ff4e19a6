"""docs/results says what its data say, and every experiment can be run."""

import csv
import sys
from pathlib import Path

import pytest
import yaml
from torch.utils.tensorboard import SummaryWriter

from thinktuning.cli import main

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))

import reproduce  # noqa: E402 (scripts aren't a package)

EXPERIMENTS = sorted((ROOT / "configs/experiments").glob("*.yaml"))
MADE = [path for path in EXPERIMENTS if (ROOT / "docs/results" / path.stem).exists()]
every_experiment = pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)


def experiment(path: Path) -> reproduce.Experiment:
    return reproduce.Experiment(**yaml.safe_load(path.read_text()))


@every_experiment
def test_every_arm_is_a_configuration_that_fit_takes(path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    made = experiment(path)
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
    for path in MADE:
        made, folder = experiment(path), ROOT / "docs/results" / path.stem
        rows = reproduce.read_rows(folder / "scalars.csv")
        table = reproduce.table(made, rows)
        assert (folder / "table.md").read_text() == table
        assert table in (ROOT / "docs/results/README.md").read_text()
        reproduce.plot(made, rows, tmp_path / "curves.png")
        assert (folder / "curves.png").exists()


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
    ("a", 2, 0, "x", 0.25),
    ("a", 2, 2, "x", 1.0),
    ("a", 1, 3, "x", 0.75),
    ("b", 1, 2, "x", 0.125),
]


def test_a_table_has_the_last_values_that_every_seed_has():
    arms = {"a": {}, "b": {}, "c": {}}
    made = reproduce.Experiment(["base.yaml"], [1, 2], arms, {"x": "X"}, {"x": "X"})
    assert reproduce.table(made, ROWS).splitlines() == [
        "| | seeds | X |",
        "|---|---|---|",
        "| before training | 2 | 0.12 (0.00, 0.25) |",
        "| a | 2 | 0.75 (0.50, 1.00) |",
        "| b | 1 | 0.12 (0.12) |",
        "| c | 0 |  |",
    ]
    assert reproduce.values_by_step(ROWS, "a", "x") == {0: [0.0, 0.25], 2: [0.5, 1.0]}


def test_a_share_has_the_interval_of_its_questions():
    # Wilson's for 3 of 4 and for 4 of 4: [0.3006, 0.9544] and [0.5101, 1].
    arms = {"a": {}}
    made = reproduce.Experiment(["base.yaml"], [1, 2], arms, {}, {"x": "X", "y": "Y"}, ["x"], 4)
    rows = [
        ("a", seed, 2, scalar, share) for seed, share in ((1, 0.75), (2, 1.0)) for scalar in "xy"
    ]
    # 0.875 - hypot(0.4494, 0.4899) / 2 and 0.875 + hypot(0.2044, 0) / 2
    shown = "| a | 2 | 0.88 [0.54, 0.98] (0.75, 1.00) | 0.88 (0.75, 1.00) |"
    assert reproduce.table(made, rows).splitlines()[-1] == shown


def write_scalars(folder: Path, values: dict[int, float]) -> None:
    writer = SummaryWriter(folder)
    for step, value in values.items():
        writer.add_scalar("x", value, step)
    writer.close()


def test_what_a_run_has_measured_is_put_together_from_its_lives(tmp_path):
    run = reproduce.Run("a", 1, "0", tmp_path, ())
    write_scalars(run.start / "version_0", {0: 0.0})
    write_scalars(tmp_path / "version_0", {9: 0.125, 19: 0.25})  # was killed, and did 19 again
    write_scalars(tmp_path / "version_1", {19: 0.5, 29: 1.0})
    assert reproduce.measured(run, "x") == {0: 0.0, 10: 0.125, 20: 0.5, 30: 1.0}
    assert reproduce.measured(run, "y") == {}


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


def test_what_was_made_elsewhere_is_kept_unless_its_configuration_is_another(tmp_path):
    base = tmp_path / "base.yaml"
    base.write_text("a: 1")
    made = reproduce.Experiment([str(base)], [1, 2], {"a": {}}, {"x": "X"}, {"x": "X"})
    elsewhere, here = reproduce.all_runs(made, tmp_path / "runs", [])
    other = reproduce.Run("a", 3, "other", tmp_path / "other", ())
    for run, value in ((elsewhere, 0.5), (other, 0.75), (here, 1.0)):
        write_scalars(run.root / "version_0", {9: value})
        write_scalars(run.start / "version_0", {})
        run.record.write_text(f'{{"arm": "a", "seed": {run.seed}, "digest": "{run.digest}"}}')
    folder = tmp_path / "results"
    assert not reproduce.Results.read(folder, [elsewhere, here]).records, "nothing is there yet"
    nothing = reproduce.Results([], [])
    reproduce.gather(made, [elsewhere, other], nothing).write(folder)
    earlier = reproduce.Results.read(folder, [elsewhere, here])
    assert earlier.digests == {elsewhere.digest}
    both = reproduce.gather(made, [here], earlier)
    assert both.digests == {elsewhere.digest, here.digest}
    assert both.rows == [("a", 1, 10, "x", 0.5), ("a", 2, 10, "x", 1.0)]
