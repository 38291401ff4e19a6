"""Runs that are told to stop, checkpoints that can't be written, and what a resumed run is told."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from running import checkpoint, fit_arguments, run, scalars
from test_resume import command, trace, weights

from thinktuning.callbacks.resume import changes
from thinktuning.cli import main
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
        (signal.SIGTERM, "rollout:2"),
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
        assert process.wait(timeout=20) == -signal.SIGINT
    finally:
        process.kill()
        process.communicate()


def test_where_a_rank_dies_the_other_ends(student, questions, tmp_path):
    # By hand: torchrun would end the other one itself.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    arguments = [*command(student(), questions, tmp_path), "--trainer.devices=2"]
    arguments += ["--trainer.strategy=ddp"]
    there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0"}
    ranks = [
        started(
            arguments, **there, LOCAL_RANK=str(rank), KILL_AT="rollout:2" if rank else "never:0"
        )
        for rank in (0, 1)
    ]
    try:
        ranks[1].communicate(timeout=120)
        assert ranks[1].returncode == -signal.SIGKILL
        _, said = ranks[0].communicate(timeout=60)
        assert ranks[0].returncode > 0, said[-3000:]
        assert saved(tmp_path), "what was saved is there"
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


# --------------------------------------------------------------- checkpoints


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


def test_a_full_disk_ends_no_run_and_costs_no_checkpoint(student, questions, tmp_path):
    # A limit of the size of files is the full disk that a test can have.
    size = checkpoint_size(student, questions, tmp_path / "free")
    program = [sys.executable, "-m", "thinktuning.cli"]
    room = {"FULL_BYTES": str(size // 2)}
    arguments = fit_arguments(
        student(),
        questions,
        tmp_path,
        "--trainer.max_steps=6",
        "--checkpoint.every_n_train_steps=2",
        "--trainer.callbacks+=running.FullDisk",
    )
    full = run([*program, *arguments], FULL_FROM="3", FULL_TO="5", **room)
    assert full.returncode == 0, full.stderr[-3000:]
    assert "step=000004.ckpt' can't be written" in full.stderr
    assert "the newest whole checkpoint is" in full.stderr and "step=000002.ckpt" in full.stderr
    assert [p.name for p in saved(tmp_path)] == ["step=000006.ckpt", "step=000002.ckpt"]

    never_room = fit_arguments(
        student(),
        questions,
        tmp_path / "full",
        "--checkpoint.every_n_train_steps=2",
        "--trainer.callbacks+=running.FullDisk",
    )
    full = run([*program, *never_room], FULL_FROM="3", FULL_TO="100", **room)
    assert full.returncode == 1
    assert "Traceback" not in full.stderr
    assert "error: the checkpoint" in full.stderr and "make room" in full.stderr
    assert [p.name for p in saved(tmp_path / "full")] == ["step=000002.ckpt"]
    assert not list(tmp_path.rglob("*.tmp"))


def checkpoint_size(student, questions, root: Path) -> int:
    main(fit_arguments(student(), questions, root, "--trainer.max_steps=1"))
    return saved(root)[0].stat().st_size


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
