"""What an update does about numbers that aren't finite, and about too little memory."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from thinktuning.errors import DivergedError, InputError
from thinktuning.types import PolicyInputs

if TYPE_CHECKING:
    from thinktuning.policy_module import PolicyModule

log = logging.getLogger(__name__)

_IN_MICRO_BATCHES = ("logprobs", "update")
_LESS = (
    "or train model.lora, or cut the model over ranks by trainer.strategy fsdp2; "
    "`thinktuning plan` says what fits"
)


class SkippedSteps:
    """Counts the optimizer steps that were skipped one after the other, and keeps their batches.

    Args:
        limit: The run ends behind so many.

    Attributes:
        folder: The run's; set by the command line.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_a_row = 0
        self.folder: Path | None = None

    def note(self, finite: bool, number: int, mini: PolicyInputs, module: "PolicyModule") -> None:
        """Note an optimizer step, on all ranks alike.

        Args:
            finite: Loss and gradient were; else the step was skipped.
            number: Of the mini-batch in its batch, from 1.
            mini: What it was computed on.
            module: Whose it is.

        Raises:
            DivergedError: Behind ``limit`` skipped steps in a row.
        """
        self.in_a_row = 0 if finite else self.in_a_row + 1
        if finite:
            return
        trainer = module.trainer
        folder = self.folder or Path(trainer.log_dir or trainer.default_root_dir)
        # Rank 0's: others may have looked for a free one after it was made.
        path = _dump(mini, number, module, trainer.strategy.broadcast(folder) / "skipped")
        log.warning(
            "step %d: the loss or its gradient isn't finite; the optimizer step is skipped (%d in "
            "a row, the run ends behind %d), its batch is in %s",
            module.global_step,
            self.in_a_row,
            self.limit,
            path,
        )
        if self.in_a_row >= self.limit:
            raise DivergedError(
                f"{self.limit} optimizer steps in a row had a loss or a gradient that isn't "
                f"finite; their batches are in {path.parent}. Go on from an older checkpoint with "
                f"a lower learning rate or model.max_grad_norm, or with trainer.precision 32-true"
            )


def _dump(mini: PolicyInputs, number: int, module: "PolicyModule", folder: Path) -> Path:
    """Write a batch as a dictionary of tensors, for ``torch.load``; see ``PolicyInputs``."""
    name = f"step={module.global_step:06d}.mini={number}.rank={module.global_rank}.pt"
    path = folder / name
    tensors = {f.name: getattr(mini, f.name) for f in fields(mini)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save({k: t.cpu() for k, t in tensors.items() if t is not None}, path)
    except (OSError, RuntimeError) as error:
        log.warning("the batch can't be written: %s", error)
    return path


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device or the host had no memory for a tensor."""
    on_host = "DefaultCPUAllocator: can't allocate memory" in str(error)
    return isinstance(error, torch.OutOfMemoryError) or on_host


def halve_micro_batches(module: "PolicyModule", rows: int, reason: str) -> None:
    """Make micro-batches half as large as one that didn't fit, for the rest of the run.

    Args:
        module: Whose limits they are.
        rows: Rollouts of the one that didn't fit.
        reason: What the device said.

    Raises:
        InputError: If it was a single rollout, or if other ranks wait in the midst of the pass.
    """
    if rows <= 1 or module.trainer.world_size > 1:
        raise InputError(too_little_memory("the update", rows, reason))
    module.micro_batch_size = rows // 2
    if module.micro_batch_tokens is not None:
        module.micro_batch_tokens = max(1, module.micro_batch_tokens // 2)
    if module.device.type == "cuda":
        torch.cuda.empty_cache()
    log.warning(
        "step %d: the update is out of memory (%s); from now on micro-batches have %d rollouts at "
        "most. Set model.micro_batch_size to that: a run that resumes begins with the "
        "configuration's",
        module.global_step,
        reason,
        module.micro_batch_size,
    )


@contextmanager
def memory_is_told(module: "PolicyModule", stage: str) -> Iterator[None]:
    """Say in a few words that a stage had too little memory.

    Raises:
        InputError: In place of the device's or the host's own error.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0]
        if stage in _IN_MICRO_BATCHES:
            message = too_little_memory(f"the stage {stage}", module.micro_batch_size, reason)
        else:
            message = (
                f"the stage {stage} is out of memory ({reason}): lower what the engine takes "
                f"(max_batch_size, memory_fraction) or model.max_new_tokens; {_LESS}"
            )
        raise InputError(message) from error


def too_little_memory(where: str, rows: int, reason: str) -> str:
    """What a user can do."""
    return (
        f"{where} is out of memory with micro-batches of {rows} rollouts ({reason}): lower "
        f"model.micro_batch_size or model.max_new_tokens, set model.micro_batch_tokens or "
        f"model.activation_checkpointing true; {_LESS}"
    )
