"""FSDP2 over two and four real processes trains what one process trains, and its checkpoints are
read by any number of them.
"""

import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from running import CLOCKED, checkpoint, fit_arguments, run, run_on_ranks, scalars

from thinktuning.checkpointing import (
    CHECKSUMS,
    META,
    SIZES,
    AtomicCheckpointIO,
    fault,
    read_meta,
)
from thinktuning.cli import main
from thinktuning.errors import InputError
from thinktuning.runs import checkpoints

pytestmark = pytest.mark.slow

# Gradient descent: Adam would hide a wrong scale, and blow up the rounding of gradients near 0.
PLAIN = [
    "--model.optimizer=torch.optim.SGD",
    "--model.optimizer.lr=0.1",
    "--model.objective.kl_coef=0.05",
    "--model.max_grad_norm=0.05",  # all gradients are larger, and clipped
]
ADAM = ["--model.optimizer=torch.optim.AdamW", "--model.optimizer.lr=1e-3"]
STRATEGY = "--trainer.strategy=thinktuning.strategy.FSDP2Strategy"
FULL = [STRATEGY, "--trainer.strategy.save_distributed_checkpoint=false"]
RUNS = {
    # The last batch of the validation leaves the second rank without a question.
    "grpo": [
        *PLAIN,
        "--guidance.gamma.start=0",
        "--data.val_size=5",
        "--data.val_batch_size=4",
    ],
    "guided": [*PLAIN, "--guidance.teacher=scripted.PickyTeacher"],
    "reference": [
        *PLAIN,
        "--guidance.teacher=null",
        "--guidance.behaviors=[self_agreement]",
        "--model.max_new_tokens=160",
        "--trainer.max_steps=2",
    ],
    # Short answers only may be guided: now and then a rank has none, but helps to gather weights.
    "short": [
        *PLAIN,
        "--guidance.teacher=null",
        "--guidance.behaviors=[self_agreement]",
        "--data.batch_size=2",
        "--model.num_mini_batches=1",
        "--model.group_size=2",
        "--model.max_new_tokens=11",
        "--trainer.max_steps=6",
    ],
    # Without a KL term a rank whose rollouts have no advantage has nothing to train on.
    "idle": [
        *PLAIN,
        "--model.objective.kl_coef=0",
        "--guidance.gamma.start=0",
        "--data.batch_size=2",
        "--model.num_mini_batches=1",
        "--trainer.max_steps=5",
    ],
    "lora": [*PLAIN, "--model.lora.rank=4", "--trainer.max_steps=2"],
    "lean": [*PLAIN, "--trainer.max_steps=2"],
    "begun": [*ADAM, "--trainer.max_steps=2"],
    "whole": [*ADAM, "--trainer.max_steps=3"],
}
# The checkpoint of step 2 can't be written, that of step 4 not get its name.
UNSAVED = [
    *PLAIN,
    "--trainer.max_steps=5",
    "--trainer.callbacks+=running.NamesTaken",
    "--trainer.callbacks+=running.FullDisk",
    "--trainer.callbacks.steps=[2]",
    "--trainer.callbacks.room=100000",
]
LEAN = [STRATEGY, "--trainer.strategy.cpu_offload=true", "--model.activation_checkpointing=true"]


class Launch:
    """Runs that are made together, and where they are."""

    def __init__(self, student: Path, questions: Path, root: Path) -> None:
        self.student, self.questions, self.root = student, questions, root
        self.waiting: list[list[str]] = []

    def arguments(self, name: str, kind: str, *more: str) -> list[str]:
        options = ["--data.val_size=0", "--model.num_mini_batches=2", "--data.batch_size=8"]
        folder = self.root / f"{kind}-{name}"
        return fit_arguments(self.student, self.questions, folder, *options, *more)

    def on_ranks(self, number: int) -> None:
        """Run what waits, on this many processes."""
        ranks = f"--trainer.devices={number}"
        runs = [[*arguments, ranks] for arguments in self.waiting]
        run_on_ranks(number, runs, self.root)
        self.waiting = []

    def saved(self, name: str, kind: str) -> dict[str, Any]:
        path = self.root / f"{kind}-{name}" / "version_0" / "checkpoints" / "last.ckpt"
        return AtomicCheckpointIO().load_checkpoint(path)

    def scalars(self, name: str, kind: str) -> dict[str, list[float]]:
        return scalars(self.root / f"{kind}-{name}" / "version_0")

    def keep(self, name: str, kind: str) -> Path:
        """A copy of a checkpoint outside of its run, so that a resumed run gets a folder."""
        source = (self.root / f"{kind}-{name}" / "version_0/checkpoints/last.ckpt").resolve()
        target = self.root / f"{kind}-{name}.ckpt"
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copy(source, target)
        return target


@pytest.fixture(scope="module")
def launch(student, questions, tmp_path_factory) -> Launch:
    """All runs: on one process, on two, and on four; and runs that go on on others."""
    folder = student(max_position_embeddings=2048)
    made = Launch(folder, questions, tmp_path_factory.mktemp("sharded"))
    fsdp2 = "--trainer.strategy=fsdp2"
    for name, options in RUNS.items():
        main(made.arguments(name, "one", *options))
    for name in ("grpo", "guided", "reference", "short", "idle", "lora", "begun", "whole"):
        made.waiting.append(made.arguments(name, "two", *RUNS[name], fsdp2))
    made.waiting.append(made.arguments("lean", "two", *RUNS["lean"], *LEAN))
    made.waiting.append(made.arguments("begun", "full", *RUNS["begun"], *FULL))
    made.waiting.append(made.arguments("unsaved", "two", *UNSAVED, fsdp2))
    made.on_ranks(2)

    begun = {kind: f"--ckpt_path={made.keep('begun', kind)}" for kind in ("one", "two", "full")}
    for kind, path in begun.items():
        made.waiting.append(made.arguments(f"{kind}-to-four", "on", *RUNS["whole"], fsdp2, path))
    made.waiting.append(made.arguments("guided", "four", *RUNS["guided"], fsdp2))
    made.on_ranks(4)
    for kind in ("two", "full"):
        main(made.arguments(f"{kind}-to-one", "on", *RUNS["whole"], begun[kind]))
    made.waiting.append(made.arguments("two-to-two", "on", *RUNS["whole"], fsdp2, begun["two"]))
    ddp = "--trainer.strategy=ddp"
    made.waiting.append(made.arguments("two-to-ddp", "on", *RUNS["whole"], ddp, begun["two"]))
    made.on_ranks(2)
    return made


def assert_same(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    assert found["global_step"] == expected["global_step"]
    assert found["state_dict"].keys() == expected["state_dict"].keys()
    for name, weight in expected["state_dict"].items():
        torch.testing.assert_close(found["state_dict"][name], weight, rtol=0, atol=tolerance)
    (ours,), (theirs,) = found["optimizer_states"], expected["optimizer_states"]
    assert ours["state"].keys() == theirs["state"].keys()
    for number, state in theirs["state"].items():
        for key, value in state.items():
            torch.testing.assert_close(ours["state"][number][key], value, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["grpo", "guided", "reference", "short", "idle", "lora", "lean"])
def test_two_ranks_equal_one(launch, name):
    assert_same(launch.saved(name, "two"), launch.saved(name, "one"), tolerance=1e-6)
    seen, expected = launch.scalars(name, "two"), launch.scalars(name, "one")
    assert seen.keys() == expected.keys()
    for tag, values in expected.items():
        if not tag.startswith((*CLOCKED, "engine/")):
            assert seen[tag] == pytest.approx(values, rel=1e-4, abs=1e-6), tag
    assert max(seen["engine/logprob_gap_max"]) < 1e-5


def test_a_rank_had_nothing_to_train_on_and_the_other_had(launch):
    assert 0.5 in launch.scalars("idle", "two")["groups/zero_variance"], "one of two groups"


def test_four_ranks_equal_one(launch):
    assert_same(launch.saved("guided", "four"), launch.saved("guided", "one"), tolerance=1e-6)


def rows_of_ranks(run: Path, ranks: int) -> Iterator[tuple[int, dict[str, Any]]]:
    for rank in range(ranks):
        path = run / "version_0" / f"audit.rank{rank}.jsonl"
        yield from ((rank, json.loads(row)) for row in path.read_text().splitlines())


@pytest.mark.parametrize(("kind", "ranks"), [("two", 2), ("four", 4)])
def test_a_rank_held_no_guided_rollouts_and_another_some(launch, kind, ranks):
    held: dict[int, Counter[int]] = {}
    for rank, row in rows_of_ranks(launch.root / f"{kind}-guided", ranks):
        held.setdefault(row["step"], Counter())[rank] += row["after"] is not None
    assert any(0 < sum(n > 0 for n in step.values()) < ranks for step in held.values()), held


def test_a_rank_had_nothing_to_ask_the_teacher(launch):
    asked: dict[int, set[int]] = {}
    for rank, row in rows_of_ranks(launch.root / "two-short", 2):
        asked.setdefault(row["step"], set()).add(rank)
    assert any(len(ranks) == 1 for ranks in asked.values()), asked


@pytest.mark.parametrize(
    "name",
    ["one-to-four", "two-to-four", "full-to-four", "two-to-one", "full-to-one", "two-to-ddp"],
)
def test_a_run_goes_on_on_other_ranks(launch, name):
    # Two steps of Adam that began from equal state: rounding in, rounding out.
    assert_same(launch.saved(name, "on"), launch.saved("whole", "two"), tolerance=1e-4)


def test_a_run_goes_on_exactly(launch):
    assert_same(launch.saved("two-to-two", "on"), launch.saved("whole", "two"), tolerance=0)


def test_a_full_checkpoint_is_that_of_one_process(launch):
    path = launch.root / "full-begun" / "version_0" / "checkpoints" / "last.ckpt"
    assert path.resolve().is_file()
    full, sharded = checkpoint(launch.root / "full-begun"), launch.saved("begun", "two")
    assert_same(full, sharded, tolerance=0)
    assert not any(name.startswith("reference.") for name in full["state_dict"])
    assert set(full) == set(checkpoint(launch.root / "one-begun"))


def test_a_sharded_checkpoint_that_cannot_be_written_ends_no_run(launch):
    folder = launch.root / "two-unsaved" / "version_0" / "checkpoints"
    whole = ["step=000005.ckpt", "step=000003.ckpt"]
    assert [p.name for p in checkpoints(folder)] == whole
    assert not [p for p in folder.glob("*.tmp") if p.is_dir()]


def test_every_file_of_a_sharded_checkpoint_has_a_checksum(launch, tmp_path):
    folder = (launch.root / "two-begun" / "version_0" / "checkpoints" / "last.ckpt").resolve()
    written = {p.name for p in folder.iterdir()} - {META}
    assert read_meta(folder)[CHECKSUMS].keys() == read_meta(folder)[SIZES].keys() == written
    assert fault(folder) is None
    copied = tmp_path / "copied.ckpt"
    shutil.copytree(folder, copied)
    part = max(copied.glob("*.distcp"))
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    assert part.name in fault(copied)


def test_a_sharded_checkpoint_is_whole_or_not_there(launch, tmp_path):
    folder = (launch.root / "two-begun" / "version_0" / "checkpoints" / "last.ckpt").resolve()
    assert len(list(folder.glob("*.distcp"))) == 2, "each rank wrote its part"
    assert not list(folder.parent.glob("*.tmp")), "nothing unfinished stays"
    cut_off = tmp_path / "cut_off.ckpt"
    shutil.copytree(folder, cut_off)
    (cut_off / "meta.pt").unlink()
    with pytest.raises(InputError, match=r"isn't a checkpoint: it has no meta\.pt"):
        AtomicCheckpointIO().load_checkpoint(cut_off)
    shutil.copy(folder / "meta.pt", cut_off)
    part = next(cut_off.glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:1000])
    with pytest.raises(InputError, match="damaged"):
        AtomicCheckpointIO().load_checkpoint(cut_off)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--trainer.strategy=fsdp"], r"strategy fsdp isn't supported.*\n.*strategy: fsdp2"),
        (["--trainer.strategy=deepspeed"], "strategy deepspeed isn't supported"),
        (
            ["--trainer.strategy=lightning.pytorch.strategies.FSDPStrategy"],
            r"thinktuning\.strategy\.FSDP2Strategy",
        ),
        (["--trainer.precision=bf16-true"], "an update of 1e-6 rounds away"),
    ],
)
def test_what_cannot_be_done_is_refused(student, questions, tmp_path, options, message):
    with pytest.raises(SystemExit, match=rf"(?s){message}"):
        main(fit_arguments(student(), questions, tmp_path, *options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.optimizer=bitsandbytes.optim.AdamW8bit"], "AdamW8bit can't step weights that"),
        (["--model.lora.rank=4", "--model.lora.base=8bit"], "8bit can't be cut over ranks"),
    ],
)
def test_what_cannot_be_sharded_is_refused(student, questions, tmp_path, options, message):
    fsdp2 = "--trainer.strategy=fsdp2"
    arguments = fit_arguments(student(), questions, tmp_path, fsdp2, *options)
    done = run([sys.executable, "-m", "thinktuning.cli", *arguments])
    assert done.returncode != 0
    assert message in done.stderr and "Traceback" not in done.stderr, done.stderr[-3000:]
