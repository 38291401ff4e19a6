"""What the trainer asks of a reward."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from thinktuning.types import Outcome


@dataclass(frozen=True)
class Response:
    """An answer to be judged.

    Attributes:
        text: The completion without special tokens.
        answer: The gold answer.
        finished: The student ended its turn within the length limit.
        outcome: What the mathematics verifier found.
    """

    text: str
    answer: str
    finished: bool
    outcome: Outcome


class Reward(ABC):
    """Scores responses. A reward of one's own is a subclass, named in YAML by ``class_path``.

    Args:
        weight: Factor of the score in the total reward.
    """

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight

    @property
    def name(self) -> str:
        """How logs and audit rows call this reward."""
        return type(self).__name__

    @abstractmethod
    def score(self, responses: Sequence[Response]) -> list[float]:
        """One number per response, before weighting."""
