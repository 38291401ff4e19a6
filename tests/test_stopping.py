"""Runs that are told to stop, checkpoints that can't be written, and what a resumed run is told."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from running import checkpoint, fit_arguments, run, scalars
from test_resume import command, trace, weights
from test_resuming import Notes, Toy, fit

from thinktuning.callbacks import RolloutCheckpoint
from thinktuning.callbacks.resume import changes
from thinktuning.cli import main
from thinktuning.errors import InputError
from thinktuning.runs import checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.faults]


def started(arguments: list[str], **environment: str) -> subprocess.Popen[str]:
    paths = str(Path(__file__).parent)
    settings = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(arguments, env=settings, text=True, **pipes)


def saved(root: Path) -> list[Path]:
    return checkpoints(root / "version_0" / "checkpoints")


# ------------------------------------------------------------------- signals


@pytest.fixture(scope="module")
def left_alone(student, questions, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("left-alone")
    validated = "--trainer.val_check_interval=2"
    done = run(command(student(), questions, root, validated))
    assert done.returncode == 0, done.stderr[-3000:]
    return root


@pytest.mark.parametrize(
    ("number", "moment"),
    [
        (signal.SIGTERM, "rollout:4"),  # a validation is due behind this step
        (signal.SIGINT, "update:2"),
        (signal.SIGTERM, "validation:2"),
    ],
)
def test_a_signal_ends_the_run_behind_its_step(
    student, questions, tmp_path, left_alone, number, moment
):
    validated = "--trainer.val_check_interval=2"
    never = "--checkpoint.every_n_train_steps=100"
    arguments = command(student(), questions, tmp_path, validated)
    stopped = run([*arguments, never], KILL_AT=moment, KILL_BY=str(int(number)))
    assert stopped.returncode == 128 + number, stopped.stderr[-3000:]
    assert "Traceback" not in stopped.stderr
    assert number.name in stopped.stderr
    (path,) = saved(tmp_path)
    assert f"--ckpt_path {path}" in stopped.stderr

    resumed = run([*arguments, f"--ckpt_path={path}"])
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert trace(tmp_path) == trace(left_alone)
    found, expected = weights(tmp_path), weights(left_alone)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    there, here = (scalars(root / "version_0") for root in (left_alone, tmp_path))
    assert there.keys() == here.keys()
    for name in ("guidance/gamma", "val/accuracy", "objective/loss"):
        assert here[name] == there[name], "nothing is lost, nothing there twice"


def test_a_second_signal_ends_it_at_once(student, questions, tmp_path):
    process = started(command(student(), questions, tmp_path), KILL_AT="rollout:3", KILL_BY="hang")
    try:
        waited(lambda: bool(saved(tmp_path)))
        process.send_signal(signal.SIGTERM)
        assert "SIGTERM" in line_with(process, "again to stop at once")
        assert process.poll() is None, "the first one waits for the end of the step"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == -signal.SIGINT
    finally:
        process.kill()
        process.communicate()


RECEIVES = """
import json, signal, sys
from thinktuning.callbacks import signals
signals.StopSignals().listen()
for number, moment in json.loads(sys.argv[1]):
    signals.monotonic = lambda: moment
    signal.raise_signal(number)
"""


@pytest.mark.parametrize(
    ("received", "ended_by"),
    [
        ([(signal.SIGTERM, 9.0), (signal.SIGTERM, 9.01), (signal.SIGTERM, 10.9)], None),
        ([(signal.SIGINT, 9.0), (signal.SIGINT, 10.0), (signal.SIGINT, 11.1)], signal.SIGINT),
        ([(signal.SIGTERM, 9.0), (signal.SIGINT, 9.01)], signal.SIGINT),
    ],
)
def test_a_signal_that_comes_several_times_at_once_is_one(received, ended_by):
    ended = run([sys.executable, "-c", RECEIVES, json.dumps(received)])
    assert ended.returncode == -(ended_by or 0), ended.stderr[-3000:]
    assert ended.stderr.count("again to stop at once") == 1


def test_where_a_rank_dies_the_other_ends(student, questions, tmp_path):
    with two_ranks(command(student(), questions, tmp_path), dies="rollout:2") as ranks:
        ranks[1].communicate(timeout=300)
        assert ranks[1].returncode == -signal.SIGKILL
        _, said = ranks[0].communicate(timeout=150)
        assert ranks[0].returncode > 0, said[-3000:]
        assert saved(tmp_path), "what was saved is there"


# ---------------------------------------------------------------- early ends


class Ends(Callback):
    """Ends the run at a step, from one of its hooks."""

    def __init__(self, hook: str, step: int) -> None:
        self.hook, self.step = hook, step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self._end("batch", trainer)

    def on_validation_end(self, trainer, pl_module) -> None:
        self._end("validation", trainer)

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self._end("epoch", trainer)

    def _end(self, hook: str, trainer: Trainer) -> None:
        if (hook, trainer.global_step) == (self.hook, self.step):
            trainer.should_stop = True


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("hook", "asked", "settings", "last"),
    [
        ("batch", 4, {}, 4),
        ("batch", 4, {"min_steps": 5}, 5),
        ("batch", 4, {"min_epochs": 2}, 6),
        ("validation", 5, {"val_check_interval": 2}, 5),
        ("validation", 6, {"min_epochs": 2}, 6),
        ("epoch", 6, {}, 6),
        ("epoch", 6, {"limit_val_batches": 0}, 6),
    ],
)
def test_the_step_behind_which_a_callback_ends_the_run_is_saved(
    tmp_path, hook, asked, settings, last
):
    notes = Notes()
    rarely = RolloutCheckpoint(dirpath=tmp_path, every_n_train_steps=100)
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        max_epochs=4,
        callbacks=[rarely, notes, Ends(hook, asked)],
        **settings,
    )
    trainer.fit(Toy())
    (only,) = checkpoints(tmp_path)
    assert torch.load(only, weights_only=True)["global_step"] == len(notes.batches) == last

    whole = fit(tmp_path / "whole", max_epochs=4, **settings)
    resumed = fit(tmp_path / "resumed", only, max_epochs=4, **settings)
    assert notes.batches + resumed.batches == whole.batches


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("validation", [{}, {"limit_val_batches": 0}, {"val_check_interval": 2}])
def test_a_checkpoint_behind_an_epoch_gives_the_data_its_position_back(tmp_path, validation):
    settings = {"every": None, "max_epochs": 4, **validation}  # every epoch, then
    whole = fit(tmp_path / "whole", **settings)
    resumed_from = checkpoints(tmp_path / "whole")
    assert len(resumed_from) >= 4
    for path in resumed_from:
        step = torch.load(path, weights_only=True)["global_step"]
        resumed = fit(tmp_path / path.stem, path, **settings)
        assert resumed.batches == whole.batches[step:], path
        assert resumed.steps == whole.steps


def test_the_step_behind_which_the_time_is_up_is_saved(student, questions, tmp_path):
    rarely = ["--checkpoint.every_n_train_steps=100", "--trainer.max_steps=100"]
    main(fit_arguments(student(), questions, tmp_path, *rarely, "--trainer.max_time=00:00:00:01"))
    done = len(scalars(tmp_path / "version_0")["objective/loss"])
    assert 0 < done < 100
    assert checkpoint(tmp_path)["global_step"] == done


# --------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"every_n_train_steps": 0}, "every_n_train_steps=0 and every_n_epochs=None would save"),
        ({"every_n_epochs": 0}, "every_n_epochs=0 would save nothing"),
        ({"train_time_interval": timedelta(minutes=30)}, "train_time_interval isn't supported"),
        ({"save_on_exception": True, "keep": 0}, "keep must be .*; save_on_exception isn't"),
    ],
)
def test_settings_that_would_save_nothing_or_half_a_step_are_refused(settings, told):
    with pytest.raises(InputError, match=told):
        RolloutCheckpoint(**settings)


def test_checkpoints_by_the_clock_are_refused(student, questions, tmp_path):
    by_time = "--checkpoint.train_time_interval=0:30:00"
    with pytest.raises(SystemExit, match=r"checkpoint: train_time_interval isn't supported"):
        main(fit_arguments(student(), questions, tmp_path, by_time))


@pytest.mark.parametrize("damage", ["a bit", "its end", "all of it"])
def test_a_damaged_newest_checkpoint_is_told_and_the_one_before_offered(
    student, questions, tmp_path, capsys, damage
):
    main(fit_arguments(student(), questions, tmp_path))
    newest, before = saved(tmp_path)
    content = bytearray(newest.read_bytes())
    if damage == "a bit":
        content[len(content) // 2] ^= 1
    newest.write_bytes({"its end": content[:-1000], "all of it": b""}.get(damage, content))
    for last in ("last", str(newest), str(newest.with_name("last.ckpt"))):
        with pytest.raises(SystemExit) as exit_:
            main(fit_arguments(student(), questions, tmp_path, f"--ckpt_path={last}"))
        assert "is damaged" in str(exit_.value)
        assert f"--ckpt_path {before}" in str(exit_.value)
    main(fit_arguments(student(), questions, tmp_path, f"--ckpt_path={before}"))
    assert [p.name for p in saved(tmp_path)] == [newest.name, before.name]
    assert checkpoint(tmp_path)["global_step"] == 3


def test_a_flipped_bit_is_told_whatever_is_done_with_the_checkpoint(student, questions, tmp_path):
    main(fit_arguments(student(), questions, tmp_path))
    newest, before = saved(tmp_path)
    weight = next(iter(torch.load(newest, weights_only=True)["state_dict"].values()))
    content = bytearray(newest.read_bytes())
    content[content.index(weight.numpy().tobytes())] ^= 1
    newest.write_bytes(content)
    torch.load(newest, weights_only=True)  # which notices nothing
    _, *settings = fit_arguments(student(), questions, tmp_path, "--ckpt_path=last")
    exported = ["export", f"--ckpt_path={newest}", f"--output={tmp_path / 'exported'}"]
    for command_line in (["validate", *settings], ["test", *settings], exported):
        with pytest.raises(SystemExit) as exit_:
            main(command_line)
        assert "is damaged" in str(exit_.value), command_line
        assert f"--ckpt_path {before}" in str(exit_.value)
    assert not (tmp_path / "exported").exists()


def test_no_sound_checkpoint_is_told(student, questions, tmp_path):
    main(fit_arguments(student(), questions, tmp_path))
    for path in saved(tmp_path):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SystemExit, match=r"no older one .* that is sound"):
        main(fit_arguments(student(), questions, tmp_path, "--ckpt_path=last"))


def test_the_newest_checkpoints_stay(student, questions, tmp_path):
    main(fit_arguments(student(), questions, tmp_path, "--trainer.max_steps=5"))
    assert [p.name for p in saved(tmp_path)] == ["step=000005.ckpt", "step=000004.ckpt"]
    for steps in (6, 7):  # lives of a single checkpoint each
        limit = f"--trainer.max_steps={steps}"
        main(fit_arguments(student(), questions, tmp_path, limit, "--ckpt_path=last"))
    assert [p.name for p in saved(tmp_path)] == ["step=000007.ckpt", "step=000006.ckpt"]


def test_a_clock_that_goes_back_costs_no_new_checkpoint(student, questions, tmp_path):
    main(fit_arguments(student(), questions, tmp_path, "--trainer.max_steps=2"))
    for path in saved(tmp_path):
        tomorrow = path.stat().st_mtime_ns + 86400 * 10**9
        os.utime(path, ns=(tomorrow, tomorrow))
    main(fit_arguments(student(), questions, tmp_path, "--ckpt_path=last"))
    assert {p.name for p in saved(tmp_path)} == {"step=000002.ckpt", "step=000003.ckpt"}


ROOM = 200_000
"""Bytes: all that a run writes but its checkpoints is smaller."""


def full_disk(*steps: int) -> list[str]:
    return [
        "--trainer.callbacks+=running.FullDisk",
        f"--trainer.callbacks.steps={list(steps)}",
        f"--trainer.callbacks.room={ROOM}",
    ]


def test_a_full_disk_ends_no_run_and_costs_no_checkpoint(student, questions, tmp_path, caplog):
    every = "--checkpoint.every_n_train_steps=2"
    longer = "--trainer.max_steps=6"
    main(fit_arguments(student(), questions, tmp_path, every, longer, *full_disk(3, 4)))
    (said,) = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert "step=000004.ckpt' can't be written" in said and "make room" in said
    assert said.endswith("step=000002.ckpt"), "the newest that is whole"
    assert [p.name for p in saved(tmp_path)] == ["step=000006.ckpt", "step=000002.ckpt"]
    assert saved(tmp_path)[1].stat().st_size > 1.5 * ROOM


def test_where_the_disk_is_full_ranks_agree_and_the_last_step_is_an_error(
    student, questions, tmp_path
):
    # The first attempt and the last two fail.
    arguments = fit_arguments(student(), questions, tmp_path, "--trainer.max_steps=4")
    program = [sys.executable, "-m", "thinktuning.cli"]
    with two_ranks([*program, *arguments, *full_disk(1, 3, 4)]) as ranks:
        for process in ranks:
            _, said = process.communicate(timeout=300)
            assert process.returncode == 1, said[-3000:]
            assert "Traceback" not in said, said[-3000:]
            assert "error: " in said and "step=000004.ckpt" in said
    assert [p.name for p in saved(tmp_path)] == ["step=000002.ckpt"]
    assert checkpoint(tmp_path)["global_step"] == 2, "by its link"
    assert not list(tmp_path.rglob("*.tmp"))


MONITORED = ["--trainer.callbacks+=running.StepMetric", "--checkpoint.monitor=steps_done"]


def test_a_full_disk_costs_no_best_checkpoint(student, questions, tmp_path):
    rising = [*MONITORED, "--checkpoint.mode=max"]
    one, two = tmp_path / "one", tmp_path / "two"
    with pytest.raises(SystemExit, match=r"step=000003\.ckpt' can't be written"):
        main(fit_arguments(student(), questions, one, *rising, *full_disk(2, 3)))
    assert [p.name for p in saved(one)] == ["step=000001.ckpt"]

    best = "--checkpoint.save_top_k=2"
    main(fit_arguments(student(), questions, two, *rising, best, *full_disk(2)))
    assert [p.name for p in saved(two)] == ["step=000003.ckpt", "step=000001.ckpt"]
    (state,) = [s for s in checkpoint(two)["callbacks"].values() if "best_k_models" in s]
    assert {Path(p) for p in state["best_k_models"]} == set(saved(two)), "no others"


@pytest.mark.parametrize(
    ("last", "best"), [("link", 1), ("true", 1), ("false", 1), ("link", 0), ("false", 0)]
)
def test_the_last_step_is_saved_also_where_it_is_not_among_the_best(
    student, questions, tmp_path, last, best
):
    kept = ["--checkpoint.mode=min", f"--checkpoint.save_top_k={best}"]
    kept.append(f"--checkpoint.save_last={last}")
    main(fit_arguments(student(), questions, tmp_path, *MONITORED, *kept))
    newest, *older = saved(tmp_path)
    assert torch.load(newest, weights_only=True)["global_step"] == 3
    assert [p.name for p in older] == ["step=000001.ckpt"] * best
    if last != "false":
        assert checkpoint(tmp_path)["global_step"] == 3


def test_a_step_is_ranked_by_its_own_validation(student, questions, tmp_path):
    monitored = [
        "--trainer.callbacks+=running.ValidationStep",
        "--trainer.val_check_interval=1",
        "--checkpoint.monitor=val/steps_done",
        "--checkpoint.save_top_k=-1",
    ]
    main(fit_arguments(student(), questions, tmp_path, *monitored))
    (state,) = [s for s in checkpoint(tmp_path)["callbacks"].values() if "best_k_models" in s]
    ranked = {Path(path).name: score.item() for path, score in state["best_k_models"].items()}
    assert ranked == {f"step=00000{step}.ckpt": step for step in (1, 2, 3)}


def test_a_signals_step_is_saved_also_where_none_are_kept(
    student, questions, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("KILL_AT", "rollout:1")
    monkeypatch.setenv("KILL_BY", str(int(signal.SIGTERM)))
    none = ["--checkpoint.save_top_k=0", "--checkpoint.save_last=false"]
    traced = "--trainer.callbacks+=tracing.Trace"
    with pytest.raises(SystemExit) as exit_:
        main(fit_arguments(student(), questions, tmp_path, *none, traced))
    assert exit_.value.code == 128 + signal.SIGTERM
    (path,) = saved(tmp_path)
    assert capsys.readouterr().err.endswith(f"--ckpt_path {path}\n")
    assert torch.load(path, weights_only=True)["global_step"] == 2


# ------------------------------------------------------- what has changed


def test_changed_settings_are_listed_and_count(student, questions, tmp_path, caplog):
    main(fit_arguments(student(), questions, tmp_path))
    caplog.clear()
    more = ("--trainer.max_steps=4", "--model.optimizer.lr=5e-4", "--model.temperature=0.9")
    main(fit_arguments(student(), questions, tmp_path, "--ckpt_path=last", *more))
    (told,) = [r.getMessage() for r in caplog.records if "changed since" in r.getMessage()]
    assert told.splitlines()[1:] == [
        "  model.optimizer.init_args.lr: 0.001 -> 0.0005",
        "  model.temperature: 1.0 -> 0.9",
        "  trainer.max_steps: 3 -> 4",
    ]


def test_the_same_settings_are_not_listed(student, questions, tmp_path, caplog):
    main(fit_arguments(student(), questions, tmp_path))
    main(fit_arguments(student(), questions, tmp_path, "--ckpt_path=last"))
    assert not [r for r in caplog.records if "changed since" in r.getMessage()]


def test_changes_have_names_and_both_values():
    before, now = {"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "4", "d": "5"}
    assert changes(before, now) == ["b: 2 -> 4", "c: 3 -> (not set)", "d: (not set) -> 5"]


def test_other_questions_or_another_tokenizer_are_refused(student, questions, tmp_path):
    main(fit_arguments(student(), questions, tmp_path))
    rows = questions.read_text().splitlines()
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join([rows[1], rows[0], *rows[2:]]) + "\n")
    copied = tmp_path / "model"
    shutil.copytree(student(), copied)
    template = copied / "chat_template.jinja"
    template.write_text(template.read_text() + "{# another #}")
    again = "--ckpt_path=last"
    with pytest.raises(SystemExit, match=r"training questions aren't those of the checkpoint"):
        main(fit_arguments(student(), other, tmp_path, again))
    with pytest.raises(SystemExit) as both:
        main(fit_arguments(copied, other, tmp_path, again))
    assert "training questions" in str(both.value) and "its chat template" in str(both.value)


# -------------------------------------------------------------------- helpers


def waited(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def line_with(process: subprocess.Popen[str], words: str) -> str:
    return next(line for line in process.stderr if words in line)


@contextmanager
def two_ranks(arguments: list[str], dies: str = "never:0") -> Iterator[list[subprocess.Popen[str]]]:
    """A run on two processes, the second of which may be told when to die."""
    # By hand: torchrun would end the other one itself.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    arguments = [*arguments, "--trainer.devices=2", "--trainer.strategy=ddp"]
    there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0"}
    ranks = [
        started(arguments, **there, LOCAL_RANK=str(rank), KILL_AT=dies if rank else "never:0")
        for rank in (0, 1)
    ]
    try:
        yield ranks
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
