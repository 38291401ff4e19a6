"""Runs of experiments, what is put together from them, and tables."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import reflections
import reproduce
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

# Two seeds of one arm, one of the other, by hand.
ROWS = [
    ("a", 1, 0, "x", 0.0),
    ("a", 1, 2, "x", 0.5),
    ("a", 2, 0, "x", 0.0),
    ("a", 2, 2, "x", 1.0),
    ("a", 1, 3, "x", 0.75),
    ("b", 1, 2, "x", 0.125),
]


def experiment(**more: Any) -> reproduce.Experiment:
    settings = {
        "config": ["base.yaml"],
        "seeds": [1, 2],
        "arms": {"a": {}, "b": {}, "c": {}},
        "panels": {"x": "X"},
        "table": {"x": "X"},
    }
    return reproduce.Experiment(**(settings | more))


def test_a_table_has_the_last_values_of_every_seed():
    assert reproduce.table(experiment(), ROWS).splitlines() == [
        "| | seed | X |",
        "|---|---|---|",
        "| before training | any | 0.0 |",
        "| a | 1 | 0.8 |",
        "|  | 2 | 1.0 |",
        "|  | mean | 0.9 |",
        "| b | 1 | 0.1 |",
    ]
    assert reproduce.common(reproduce.series(ROWS, "a", "x")) == {0: [0.0, 0.0], 2: [0.5, 1.0]}


def test_an_arm_that_begins_otherwise_says_so():
    begun = [("a", 1, 0, "x", 0.1), ("b", 1, 0, "x", 0.4), ("c", 1, 0, "x", 0.4)]
    ended = [(arm, 1, 2, "x", 0.8) for arm in "abc"]
    assert reproduce.table(experiment(), [*begun, *ended]).splitlines()[2:] == [
        "| before training | any | 0.1 |",
        "| a | 1 | 0.8 |",
        "| b: before training | any | 0.4 |",
        "| b | 1 | 0.8 |",
        "| c | 1 | 0.8 |",
    ]


def test_a_seed_s_share_has_the_interval_of_its_questions():
    # Wilson's for 2 of 4: [0.1500, 0.8500]; for 4 of 4: [0.5101, 1]. A reward of 0.5 is shown as 1.
    rows = [("a", seed, 2, "x", value) for seed, value in ((1, 0.25), (2, 0.5))]
    made = experiment(scale={"x": 2}, shares=["x"], answers=4)
    assert reproduce.table(made, rows).splitlines()[2:] == [
        "| a | 1 | 0.50 [0.15, 0.85] |",
        "|  | 2 | 1.00 [0.51, 1.00] |",
        "|  | mean | 0.75 |",
    ]


def test_a_picture_tells_what_it_was_drawn_from(tmp_path):
    reproduce.save(reproduce.plot(experiment(), ROWS), tmp_path / "a.png", ROWS)
    drawn = Image.open(tmp_path / "a.png").text["Source"]
    assert drawn == reproduce.fingerprint(ROWS)
    assert drawn != reproduce.fingerprint(ROWS[1:])


def test_lines_are_drawn_over_another_scalar():
    minutes = [("a", seed, step, "m", 10.0 * seed * step) for seed in (1, 2) for step in (0, 2, 3)]
    figure = reproduce.plot(experiment(across="m"), [*ROWS, *minutes])
    one, two, together = [line.get_xydata().tolist() for line in figure.axes[0].lines[:3]]
    assert one == [[0, 0], [20, 0.5], [30, 0.75]]
    assert two == [[0, 0], [40, 1]]
    assert together == [[0, 0], [30, 0.75]]


def test_three_panels_are_two_above_one():
    made = experiment(panels={"x": "X", "y": "Y", "z": "Z"})
    axes = reproduce.plot(made, ROWS).axes
    assert [axis.get_title() for axis in axes] == ["X", "Y", "Z"]
    places = [axis.get_subplotspec() for axis in axes]
    assert [(place.rowspan.start, place.colspan.start) for place in places] == [
        (0, 0),
        (0, 1),
        (1, 0),
    ]


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
    found = reproduce.measured(run)
    assert found["x"] == {0: 0.0, 10: 0.125, 20: 0.5, 30: 1.0}
    assert found["y"] == {}


def test_minutes_are_those_of_steps_and_collections(tmp_path):
    made = reproduce.Run("a", 1, "0", tmp_path, ())
    write_scalars(tmp_path / "version_0", {0: 60.0, 1: 30.0, 2: 30.0}, "seconds/step")
    write_scalars(tmp_path / "version_0", {0: 30.0, 2: 60.0}, "seconds/collection")
    assert reproduce.measured(made)["minutes"] == {0: 0.0, 1: 1.5, 2: 2.0, 3: 3.5}


def test_tokens_are_counted_where_there_was_something_to_train_on(tmp_path):
    made = reproduce.Run("a", 1, "0", tmp_path, ())
    write_scalars(tmp_path / "version_0", {0: 2.0, 1: 2.0, 2: 4.0}, "seconds/update")
    write_scalars(tmp_path / "version_0", {0: 500.0, 1: 0.0, 2: 250.0}, "tokens_per_second/update")
    assert reproduce.measured(made)["thousand_tokens"] == {1: 1.0, 2: 1.0, 3: 2.0}


def test_a_run_is_validated_before_training_and_behind_its_last_step(
    tmp_path, student, questions, monkeypatch
):
    base = tmp_path / "base.yaml"
    base.write_text(f"""
method: sft
model:
  pretrained: {student()}
  max_new_tokens: 16
  optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 1.0e-3}}}}
data:
  source: {questions}
  val_size: 4
  batch_size: 4
  system_message: Add.
  instruction: Box it.
trainer: {{accelerator: cpu, max_steps: 3, val_check_interval: 2, check_val_every_n_epoch: null}}
checkpoint: {{every_n_train_steps: 1}}
""")
    made = experiment(config=[str(base)], seeds=[1], arms={"a": {}})
    (run,) = reproduce.all_runs(made, tmp_path / "runs", [])
    reproduce.make(run, at_once=2)
    assert sorted(reproduce.measured(run)["val/length"]) == [0, 2, 3]
    record = json.loads(run.record.read_text())
    assert record["command"].endswith(f"thinktuning fit --config={base} --seed_everything=1")
    assert record["resumed"] == []
    assert not list(run.root.glob("**/*.ckpt"))
    # It is finished: nothing is done again.
    monkeypatch.setattr(reproduce, "thinktuning", None)
    assert reproduce.make(run, at_once=2) == run


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
    made = reproduce.Experiment(
        [str(base)], [1, 2, 3], {"a": {}}, {"x": "X"}, {"x": "X"}, kept=["z"], reflection="I made"
    )
    unfinished, *finished = reproduce.all_runs(made, tmp_path / "runs", [])
    said = 'a "quoted", line\nand another'
    row = {"step": 0, "gold": "9", "student": said, "skipped": None}
    row |= {"before": {"outcome": "correct", "reward": 0.5}, "after": {"reward": 0.1}}
    for run in (unfinished, *finished):
        write_scalars(run.root / "version_0", {9: 0.5})
        write_scalars(run.root / "version_0", {9: 1.0}, "z")
        write_scalars(run.root / "version_0", {0: 60.0, 1: 30.0}, "seconds/step")
        write_scalars(run.root / "version_0", {0: 30.0}, "seconds/collection")
        (run.root / "version_0/config.yaml").write_text(f"seed_everything: {run.seed}\n")
        (run.root / "version_0/audit.jsonl").write_text(json.dumps(row) + "\n")
    for run in finished:
        run.record.write_text(json.dumps({"arm": "a", "seed": run.seed}))
    results = tmp_path / "results"
    reproduce.gather(made, [unfinished, *finished], results)
    assert json.loads((results / "runs.json").read_text()) == [
        {"arm": "a", "seed": seed, "minutes": 2.0} for seed in (2, 3)
    ]
    rows = reproduce.read_rows(results / "scalars.csv")
    assert rows == [("a", s, 10, x, v) for s in (2, 3) for x, v in (("x", 0.5), ("z", 1.0))]
    (config,) = (results / "config").iterdir()
    assert config.name == "a.yaml"
    assert config.read_text() == "seed_everything: 2\n", "the first seed that is finished"
    assert reflections.read_answers(results / "answers.csv") == [
        reflections.Answer("a", seed, 1, True, "9", said) for seed in (2, 3)
    ]
    assert reflections.read_rewards(results / "guided.csv") == [
        reflections.Guided("a", seed, 1, 0.5, 0.1) for seed in (2, 3)
    ]
    assert reflections.read_answers(results / "held_out.csv") == []
    plain = tmp_path / "plain"
    reproduce.gather(replace(made, reflection=""), finished, plain)
    assert {f.name for f in results.iterdir()} - {f.name for f in plain.iterdir()} == {
        "answers.csv"
    }
