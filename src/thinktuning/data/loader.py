"""A prompt loader whose position is two numbers."""

from collections.abc import Iterator, Sequence

import torch

from thinktuning.engines.seeding import derive_seed
from thinktuning.errors import InputError
from thinktuning.types import Prompt


class PromptLoader:
    """Serves rollout batches of prompts, reshuffled every epoch, and resumes at the row.

    The order is a function of (seed, epoch), and the position counts prompts over all ranks, so a
    run may resume on another number of ranks. An incomplete last batch of an epoch is left out.

    Args:
        prompts: All prompts, on every rank the same.
        batch_size: Prompts of a rollout batch over all ranks; a multiple of ``world_size``.
        seed: Of the shuffling; None always serves all prompts in their order, the incomplete batch
            included (validation).
        rank: This process.
        world_size: Processes.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        batch_size: int,
        seed: int | None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size % world_size:
            raise InputError(
                f"data: batch_size counts the prompts of all ranks and must be a multiple of their "
                f"number; got batch_size={batch_size} on {world_size} ranks"
            )
        if seed is not None and len(prompts) < batch_size:
            raise InputError(
                f"data: {len(prompts)} prompts don't fill a batch of {batch_size}; "
                f"give more data or a smaller batch_size"
            )
        self.prompts = prompts
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.position = 0

    def __len__(self) -> int:
        """Batches in an epoch."""
        if self.seed is None:
            return -(-len(self.prompts) // self.batch_size)
        return len(self.prompts) // self.batch_size

    def __iter__(self) -> Iterator[list[Prompt]]:
        if self.seed is None:
            self.position = 0
        # Lightning doesn't exhaust a sized iterator, so an epoch ends where the next one begins.
        elif self.position + self.batch_size > len(self.prompts):
            self.position = 0
            self.epoch += 1
        order = self._order()
        end = len(order) if self.seed is None else len(order) - self.batch_size + 1
        while self.position < end:
            rows = order[self.position : self.position + self.batch_size]
            self.position += self.batch_size
            yield [self.prompts[i] for i in rows[self.rank :: self.world_size]]

    def _order(self) -> list[int]:
        if self.seed is None:
            return list(range(len(self.prompts)))
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.epoch, "shuffle"))
        return torch.randperm(len(self.prompts), generator=generator).tolist()

    def state_dict(self) -> dict[str, int]:
        """Epoch and prompts served in it."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on behind the prompts that ``state`` counts."""
        self.epoch = state["epoch"]
        self.position = state["position"]
