"""The right answers of a STaR round, and the loader that serves them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from thinktuning.engines import derive_seed
from thinktuning.errors import InputError
from thinktuning.types import Prompt


@dataclass  # not frozen: see Prompt
class Rationale:
    """A right answer that the student is trained on.

    Attributes:
        prompt: The question as the student is asked in the end, without a hint.
        token_ids: The answer as it was sampled, end-of-turn token included.
        hinted: The student had seen the gold answer.
    """

    prompt: Prompt
    token_ids: list[int]
    hinted: bool


class RationaleLoader:
    """Serves a round's rationales for some passes, each in an order of its own; resumes at the row.

    The passes follow each other without a gap, so that at most the round's last batch is smaller.
    On more than one rank it is cut to a multiple of them.

    Args:
        rationales: On every rank the same.
        passes: How often each is served.
        batch_size: Rationales of a batch over all ranks; a multiple of ``world_size``.
        seed: Of the order.
        rank: This process.
        world_size: Processes.
    """

    def __init__(
        self,
        rationales: Sequence[Rationale],
        passes: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        order = [i for number in range(passes) for i in _shuffled(len(rationales), seed, number)]
        self.rationales = rationales
        self.order = order[: len(order) - len(order) % world_size]
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.position = 0

    def __len__(self) -> int:
        """Batches of the round."""
        return -(-len(self.order) // self.batch_size)

    def __iter__(self) -> Iterator[list[Rationale]]:
        while self.position < len(self.order):
            rows = self.order[self.position : self.position + self.batch_size]
            self.position += len(rows)
            yield [self.rationales[i] for i in rows[self.rank :: self.world_size]]

    def state_dict(self) -> dict[str, int]:
        """Rationales served, and of how many."""
        return {"position": self.position, "number": len(self.order)}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on behind the rationales that ``state`` counts.

        Raises:
            InputError: If the round has become another one.
        """
        if state["number"] != len(self.order):
            raise InputError(
                f"the checkpoint's round serves {state['number']} rationales, this one "
                f"{len(self.order)}: give data.passes and the ranks that it was made with"
            )
        self.position = state["position"]


def _shuffled(count: int, *counters: int) -> list[int]:
    generator = torch.Generator().manual_seed(derive_seed(*counters, "shuffle"))
    return torch.randperm(count, generator=generator).tolist()
