"""Reward of an unknown behavior: a fixed phrase."""

from collections.abc import Sequence

from thinktuning.errors import InputError
from thinktuning.rewards.base import Response, Reward


class PhraseReward(Reward):
    """1 for a finished response that has the phrase exactly once, else 0.

    Args:
        phrase: Compared letter by letter; not empty.
        weight: Factor of the score in the total reward.
    """

    def __init__(self, phrase: str, weight: float = 0.5) -> None:
        super().__init__(weight)
        if not phrase.strip():
            raise InputError("PhraseReward: phrase must not be empty")
        self.phrase = phrase

    def score(self, responses: Sequence[Response]) -> list[float]:
        """One number per response."""
        return [float(r.finished and r.text.count(self.phrase) == 1) for r in responses]
