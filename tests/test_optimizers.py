"""Optimizers of bitsandbytes by name: states of 8 bits, saved and resumed bit for bit."""

import pytest
import torch
from running import checkpoint, fit_arguments
from transformers import AutoModelForCausalLM

from thinktuning.cli import main

pytestmark = pytest.mark.slow

OPTIMIZERS = {
    "bitsandbytes.optim.AdamW8bit": torch.uint8,
    "bitsandbytes.optim.PagedAdamW8bit": torch.uint8,
    "bitsandbytes.optim.PagedAdamW32bit": torch.float32,
    "bitsandbytes.optim.PagedAdamW": torch.float32,
}
WIDE = {"width": 64, "heads": 2}  # bitsandbytes keeps states below 4096 numbers in float32


def arguments(student, questions, root, name="torch.optim.AdamW", *more):
    return fit_arguments(
        student(**WIDE),
        questions,
        root,
        f"--model.optimizer={name}",
        "--model.optimizer.lr=1e-3",
        "--model.num_mini_batches=2",
        *more,
    )


def equal(found, expected):
    """Whether nested states are the same, bit for bit."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(equal(found[k], expected[k]) for k in found)
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(map(equal, found, expected))
    if isinstance(expected, torch.Tensor):
        return found.dtype == expected.dtype and torch.equal(found, expected)
    return found == expected


def moments(saved):
    """First and second moments of every trained weight."""
    (optimizer,) = saved["optimizer_states"]
    states = [s.get("__bnb_optimizer_quant_state__", s) for s in optimizer["state"].values()]
    return [state[name] for state in states for name in ("state1", "state2")]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_has_the_weights_and_the_state_of_one_left_alone(
    student, questions, tmp_path, name
):
    two, whole = tmp_path / "two", tmp_path / "whole"
    main(arguments(student, questions, whole, name, "--trainer.max_steps=4"))
    main(arguments(student, questions, two, name, "--trainer.max_steps=2"))
    halfway = checkpoint(two)
    main(arguments(student, questions, two, name, "--trainer.max_steps=4", "--ckpt_path=last"))
    found, expected = checkpoint(two), checkpoint(whole)
    assert found["global_step"] == 4
    assert equal(found["state_dict"], expected["state_dict"])
    assert equal(found["optimizer_states"], expected["optimizer_states"])
    assert not equal(halfway["optimizer_states"], expected["optimizer_states"])
    large = [m for m in moments(expected) if m.numel() >= 4096]
    assert len(large) > 10 and {m.dtype for m in large} == {OPTIMIZERS[name]}
    assert {m.dtype for m in moments(expected) if m.numel() < 4096} == {torch.float32}
    step = {s["step"] for s in expected["optimizer_states"][0]["state"].values()}
    assert step == {2 * 4}


def weights(state):
    return torch.cat([weight.flatten() for weight in state.values()])


def test_in_mixed_precision_steps_are_those_of_torch(student, questions, tmp_path):
    moved = {}
    begin = weights(AutoModelForCausalLM.from_pretrained(student(**WIDE)).state_dict())
    # Eight bits are an approximation.
    limits = {"bitsandbytes.optim.PagedAdamW32bit": 1e-3, "bitsandbytes.optim.AdamW8bit": 0.2}
    for name in ("torch.optim.AdamW", *limits):
        more = ("--trainer.precision=bf16-mixed", "--trainer.max_steps=1")
        main(arguments(student, questions, tmp_path / name, name, *more))
        saved = checkpoint(tmp_path / name)["state_dict"]
        assert {weight.dtype for weight in saved.values()} == {torch.float32}
        moved[name] = weights(saved) - begin
    expected = moved["torch.optim.AdamW"]
    for name, limit in limits.items():
        off = (moved[name] - expected).norm() / expected.norm()
        assert 0 < off < limit, name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bitsandbytes.optim.AdamW9bit", "has no attribute 'AdamW9bit'"),
        ("bytesandbits.optim.AdamW", "No module named 'bytesandbits'"),
    ],
)
def test_an_optimizer_that_is_not_there_is_a_short_error(name, message):
    with pytest.raises(SystemExit) as ended:
        main(["fit", f"--model.optimizer={name}"])
    said = str(ended.value.code)
    assert said.startswith("error: ") and message in said
    assert len(said.splitlines()) < 15
