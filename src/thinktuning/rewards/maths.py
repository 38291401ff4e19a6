r"""Outcome reward of mathematics: the last ``\boxed{}`` against the gold answer."""

import re
from collections.abc import Sequence

from thinktuning.rewards.base import Response, Reward
from thinktuning.rewards.verifier import Verifier
from thinktuning.types import Outcome

_verifier = Verifier()

_TEXT_COMMAND = re.compile(r"\\(?:text|math|m)(?:rm|bf|it|sf|tt|box)?\{([^{}]*)\}")
# Two letters are a product: ``xy`` is ``yx``.
_WORDS = re.compile(r"(?=.*[^\W\d_]{3})[^\W\d_](?:[^\W\d_]|[\s,.'\-])*[^\W\d_]")
_ARITHMETIC = re.compile(r"(?:[\d.,\s()$+*/\-]|\\(?:times|cdot|div)\b)+")
_OPERATION = re.compile(r"[\d)]\s*(?:[+*\-]|\\(?:times|cdot|div)\b)")


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

    The comparison runs in a worker process that is killed after a hard deadline. Gold answers of
    words or of several lines are compared as text: mathematics would take ``was`` and ``saw`` for
    the same product. A calculation isn't its result: else "3 + 8 + 2" would answer what that makes.

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
    if is_text(answer):
        same = _plain(boxed) == _plain(answer)
        return Outcome.CORRECT if same else Outcome.WRONG
    if is_calculation(boxed) != is_calculation(answer):
        return Outcome.WRONG
    return _verifier.compare(boxed, answer)


def is_text(answer: str) -> bool:
    """Whether an answer is words, or has several lines."""
    if "\n" in answer or _TEXT_COMMAND.fullmatch(answer):
        return True
    return _WORDS.fullmatch(_TEXT_COMMAND.sub(r"\1", answer)) is not None


def is_calculation(answer: str) -> bool:
    """Whether an answer is numbers with operations between them; ``1/2`` and ``-3`` are numbers."""
    return _ARITHMETIC.fullmatch(answer) is not None and _OPERATION.search(answer) is not None


def _plain(answer: str) -> str:
    """Without commands, spaces, capitals and a full stop."""
    return "".join(_TEXT_COMMAND.sub(r"\1", answer).split()).casefold().removesuffix(".")


class MathReward(Reward):
    """1 for a correct, finished answer, else 0.

    Args:
        weight: Factor of the score in the total reward.
    """

    def score(self, responses: Sequence[Response]) -> list[float]:
        """One number per response."""
        return [float(r.outcome is Outcome.CORRECT) for r in responses]
