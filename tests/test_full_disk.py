"""TensorBoard's values on a full disk: those are lost, and none before or after."""

import re
import sys
from pathlib import Path

import pytest
from running import fit_arguments, room, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from thinktuning.logger import RunLogger

pytestmark = pytest.mark.faults


def logged(folder: Path) -> dict[str, list[int]]:
    """The steps of each scalar and text."""
    events = EventAccumulator(str(folder))
    events.Reload()
    tags = events.Tags()
    steps = {tag: [e.step for e in events.Scalars(tag)] for tag in tags["scalars"]}
    return steps | {tag: [e.step for e in events.Tensors(tag)] for tag in tags["tensors"]}


def events_file(folder: Path) -> Path:
    (path,) = folder.glob("events.out.tfevents.*")
    return path


@pytest.mark.slow
def test_a_disk_that_is_full_for_two_steps_and_a_validation_ends_no_run(
    student, questions, tmp_path
):
    full = ["--trainer.callbacks+=running.FullDisk", "--trainer.callbacks.steps=[2,3]"]
    arguments = fit_arguments(student(), questions, tmp_path, "--trainer.max_steps=6", *full)
    program = [sys.executable, "-m", "thinktuning.cli"]
    done = run([*program, *arguments, "--trainer.callbacks.room=1"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(re.findall(r"values of \S+tfevents\S+ are lost", done.stderr)) == 1
    assert re.search(r"tfevents\S+ lacks \d+ values that couldn't be written", done.stderr)
    steps = logged(tmp_path / "version_0")
    assert steps["reward"] == steps["objective/loss"] == [0, 3, 4, 5]
    assert len(steps["val/accuracy"]) == 1, "that behind step 3 is lost, that behind step 6 isn't"


def test_values_that_a_full_disk_does_not_take_are_lost_and_told(tmp_path, caplog):
    logger = RunLogger(tmp_path / "run")
    logger.log_metrics({"loss": 1.0}, step=0)
    length = events_file(tmp_path / "run").stat().st_size
    for step in (1, 2):
        with room(length + 9):  # a part of a record
            logger.log_metrics({"loss": 1.0, "reward": 1.0}, step)
            logger.experiment.add_text("rollout", "text", step)
            logger.save()
        assert events_file(tmp_path / "run").stat().st_size == length + 9, "the test shows nothing"
    logger.log_metrics({"loss": 1.0, "reward": 1.0}, step=3)
    assert logged(tmp_path / "run") == {"loss": [0, 3], "reward": [3]}
    with room(events_file(tmp_path / "run").stat().st_size + 9):
        logger.log_metrics({"loss": 1.0}, step=4)
        assert "lacks" not in caplog.text
        logger.finalize("success")
    assert logged(tmp_path / "run") == {"loss": [0, 3], "reward": [3]}
    assert caplog.text.count("training goes on") == 1
    assert "lacks 7 values that couldn't be written" in caplog.text


def test_a_step_that_is_done_again_hides_no_other_where_the_disk_was_full_at_first(tmp_path):
    logger = RunLogger(tmp_path)
    with room(0):
        logger.log_metrics({"loss": 1.0}, step=1)
    for step in (2, 3, 2):
        logger.log_metrics({"loss": 1.0}, step)
    assert logged(tmp_path) == {"loss": [2, 3, 2]}


def test_hyperparameters_are_written_when_there_is_room(tmp_path):
    logger = RunLogger(tmp_path)
    with room(2):
        logger.log_hyperparams({"rank": 4})
        logger.save()
    assert not (tmp_path / "hparams.yaml").exists()
    logger.save()
    assert (tmp_path / "hparams.yaml").read_text() == "rank: 4\n"


def test_a_second_logger_of_a_run_writes_a_file_that_is_read_after_the_first(tmp_path):
    for steps in ((0, 1), (1, 2)):
        logger = RunLogger(tmp_path)
        for step in steps:
            logger.log_metrics({"loss": 1.0}, step)
        logger.finalize("success")
    assert logged(tmp_path) == {"loss": [0, 1, 1, 2]}
