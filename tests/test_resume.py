"""Kill -9 at any moment, resume, and nothing differs from the run that was left alone."""

import json
import signal
import sys
from pathlib import Path

import pytest
import torch
from running import audit, fit_arguments, run

pytestmark = [pytest.mark.slow, pytest.mark.faults]

STEPS = 6


def command(student, questions, root: Path, *more: str) -> list[str]:
    arguments = fit_arguments(
        student,
        questions,
        root,
        f"--trainer.max_steps={STEPS}",
        "--model.num_mini_batches=2",
        "--model.warmup_steps=3",
        "--guidance.gamma.kind=linear",
        "--guidance.gamma.end=0.25",
        "--checkpoint.every_n_train_steps=2",
        "--trainer.callbacks+=tracing.Trace",
        *more,
    )
    return [sys.executable, "-m", "thinktuning.cli", *arguments]


def trace(root: Path) -> dict[int, dict]:
    """What every step saw and made; a step that was done twice counts as it was done last."""
    lines = (root / "version_0" / "trace.jsonl").read_text().splitlines()
    return {row["step"]: row for row in map(json.loads, lines)}


def weights(root: Path) -> dict[str, torch.Tensor]:
    path = root / "version_0" / "checkpoints" / "last.ckpt"
    saved = torch.load(path, weights_only=True)
    assert saved["global_step"] == STEPS
    return saved["state_dict"]


def assert_same(one: Path, other: Path) -> None:
    """Both runs saw and made the same, down to the last bit."""
    assert trace(one) == trace(other)
    assert audit(one / "version_0") == audit(other / "version_0")
    expected, found = weights(one), weights(other)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.fixture(scope="module")
def left_alone(student, questions, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("left-alone")
    done = run(command(student(), questions, root))
    assert done.returncode == 0, done.stderr[-3000:]
    return root


# Steps count from 0 and checkpoints follow steps 1, 3 and 5, so each kill loses work.
@pytest.mark.parametrize(
    "moment", ["rollout:2", "update:3", "checkpoint:3", "validation:3", "guidance:4"]
)
def test_a_killed_run_resumes_bit_for_bit(student, questions, tmp_path, left_alone, moment):
    killed = run(command(student(), questions, tmp_path), KILL_AT=moment)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    assert len(trace(tmp_path)) < STEPS

    resumed = run(command(student(), questions, tmp_path, "--ckpt_path=last"))
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert_same(tmp_path, left_alone)


# What the frozen reference says depends on every bit that it computes, and so on what it keeps.
OWN_TEACHER = [
    "--guidance.teacher=null",
    "--guidance.behaviors=[self_agreement,self_critique]",
    "--guidance.boxed=true",
    "--guidance.max_new_tokens=112",
    "--model.max_new_tokens=160",
    "--model.objective.kl_coef=0.05",
]


def test_a_run_that_is_its_own_teacher_resumes_bit_for_bit(student, questions, tmp_path):
    folder = student(max_position_embeddings=2048)
    alone, broken = tmp_path / "alone", tmp_path / "broken"
    done = run(command(folder, questions, alone, *OWN_TEACHER))
    assert done.returncode == 0, done.stderr[-3000:]
    killed = run(command(folder, questions, broken, *OWN_TEACHER), KILL_AT="guidance:3")
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    resumed = run(command(folder, questions, broken, *OWN_TEACHER, "--ckpt_path=last"))
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert any(row["after"] is not None for row in audit(alone / "version_0")), "it was guided"
    assert_same(broken, alone)


def test_a_run_resumed_with_more_steps_equals_one_planned_so(
    student, questions, tmp_path, left_alone
):
    constant = ("--guidance.gamma.kind=constant",)
    short, whole = tmp_path / "short", tmp_path / "whole"
    for root, more in ((short, "--trainer.max_steps=3"), (whole, f"--trainer.max_steps={STEPS}")):
        done = run(command(student(), questions, root, *constant, more))
        assert done.returncode == 0, done.stderr[-3000:]
    done = run(command(student(), questions, short, *constant, "--ckpt_path=last"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert trace(short).keys() == trace(whole).keys()
    assert trace(short) == trace(whole)
    assert "gamma's schedule goes on as it began" in done.stderr
