r"""Outcome reward of mathematics: the last ``\boxed{}`` against the gold answer."""

import re
from collections.abc import Sequence

from thinktuning.rewards.base import Response, Reward
from thinktuning.rewards.verifier import Verifier
from thinktuning.types import Outcome

_verifier = Verifier()


def last_boxed(text: str) -> str | None:
    r"""Content of the last ``\boxed{…}`` with balanced braces, stripped; None where there is none.

    A last box that is never closed counts as none, whatever was boxed before it.
    """
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    start += len(r"\boxed{")
    depth = 1
    # An escaped brace is a letter of LaTeX, not a bracket.
    for sign in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):
        if sign[0] in "{}":
            depth += 1 if sign[0] == "{" else -1
            if depth == 0:
                return text[start : start + sign.start()].strip()
    return None


def verify_math(response: str, answer: str, finished: bool = True) -> Outcome:
    r"""Compare a response's last ``\boxed{}`` with the gold answer, symbolically.

    The comparison runs in a worker process that is killed after a hard deadline.

    Args:
        response: The completion's text.
        answer: Gold answer: a number or LaTeX without ``$``.
        finished: False for an answer that hit the length limit: ``cut_off``, whatever it says.

    Returns:
        What was found.
    """
    if not finished:
        return Outcome.CUT_OFF
    boxed = last_boxed(response)
    if not boxed:
        return Outcome.NO_ANSWER
    if boxed == answer:
        return Outcome.CORRECT
    return _verifier.compare(boxed, answer)


class MathReward(Reward):
    """1 for a correct, finished answer, else 0.

    Args:
        weight: Factor of the score in the total reward.
    """

    def score(self, responses: Sequence[Response]) -> list[float]:
        """One number per response."""
        return [float(r.outcome is Outcome.CORRECT) for r in responses]
