"""What an update does about numbers that aren't finite, and about too little memory."""

import logging
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from thinktuning.errors import DivergedError, InputError
from thinktuning.types import PolicyInputs

if TYPE_CHECKING:
    from thinktuning.policy_module import PolicyModule

log = logging.getLogger(__name__)


class SkippedSteps:
    """Counts the optimizer steps that were skipped one after the other, and keeps their batches.

    Args:
        limit: The run ends behind so many.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_a_row = 0

    def note(self, finite: bool, mini: PolicyInputs, module: "PolicyModule") -> None:
        """Note an optimizer step, on all ranks alike.

        Args:
            finite: Loss and gradient were; else the step was skipped.
            mini: What it was computed on.
            module: Whose it is.

        Raises:
            DivergedError: Behind ``limit`` skipped steps in a row.
        """
        self.in_a_row = 0 if finite else self.in_a_row + 1
        if finite:
            return
        path = _dump(mini, module)
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


def _dump(mini: PolicyInputs, module: "PolicyModule") -> Path:
    """Write a batch as a dictionary of tensors, for ``torch.load``; see ``PolicyInputs``."""
    trainer = module.trainer
    folder = Path(trainer.log_dir or trainer.default_root_dir) / "skipped"
    path = folder / f"step={module.global_step:06d}.rank={trainer.global_rank}.pt"
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


def halve_micro_batches(module: "PolicyModule", reason: str) -> None:
    """Make micro-batches half as large, for the rest of the run.

    Raises:
        InputError: If they are single rollouts, or if other ranks wait in the midst of the pass.
    """
    if module.micro_batch_size == 1 or module.trainer.world_size > 1:
        raise InputError(too_little_memory(module, reason))
    module.micro_batch_size //= 2
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


def too_little_memory(module: "PolicyModule", reason: str) -> str:
    """What a user can do."""
    return (
        f"the update is out of memory with micro-batches of {module.micro_batch_size} rollouts "
        f"({reason}): lower model.micro_batch_size or model.max_new_tokens, set "
        f"model.micro_batch_tokens or model.activation_checkpointing true, or train model.lora; "
        f"`thinktuning plan` says what fits"
    )
