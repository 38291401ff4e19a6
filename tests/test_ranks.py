"""Two processes train what one process trains on the same global batch."""

import sys
from pathlib import Path

import pytest
import torch
from running import checkpoint, fit_arguments, run, scalars

pytestmark = pytest.mark.slow


def fit(student, questions, root: Path, *more: str) -> None:
    arguments = fit_arguments(
        student, questions, root, "--model.num_mini_batches=2", "--data.val_size=0", *more
    )
    done = run([sys.executable, "-m", "thinktuning.cli", *arguments])
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_ranks_equal_one(student, questions, tmp_path):
    # One question a mini-batch and rank, so that token counts differ between the ranks. Plain
    # gradient descent: Adam would hide a wrong scale.
    plain = (
        "--model.optimizer=torch.optim.SGD",
        "--model.optimizer.lr=0.1",
        "--model.max_grad_norm=0.05",
    )
    fit(student(), questions, tmp_path / "one", *plain)
    fit(
        student(),
        questions,
        tmp_path / "two",
        *plain,
        "--trainer.devices=2",
        "--trainer.strategy=ddp",
    )
    one, two = (checkpoint(tmp_path / name)["state_dict"] for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-6)
    seen_one, seen_two = (scalars(tmp_path / n / "version_0") for n in ("one", "two"))
    for tag in ("objective/loss", "optimizer/grad_norm", "reward", "length/completion"):
        assert seen_two[tag] == pytest.approx(seen_one[tag], rel=1e-4, abs=1e-6), tag
    rows = [
        (tmp_path / "two" / "version_0" / f"audit.rank{rank}.jsonl").read_text() for rank in (0, 1)
    ]
    assert all(rows), "each rank has guided rollouts of its own questions"
