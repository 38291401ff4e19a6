"""The teacher's reply: three tagged parts, read strictly and, where wanted, written strictly."""

import re
from dataclasses import dataclass

from thinktuning.errors import InputError
from thinktuning.types import Feedback

OPINIONS = ("correct", "incorrect")

# A part may hold "<" (2 < 3) but none of the tags.
_PART = r"((?:(?!</?(?:opinion|reason|phrase)>).)*)"
_REPLY = re.compile(
    rf"\s*<opinion>{_PART}</opinion>\s*<reason>{_PART}</reason>\s*<phrase>{_PART}</phrase>\s*",
    re.DOTALL,
)
# A reply in its constrained form, as far as it was written before the limit.
_BEGUN = re.compile(
    r"(?P<reason><opinion>\w+</opinion>\n<reason>[^<]+)"
    r"(?P<phrase></reason>\n<phrase>[^<]+)?"
)
_UNCLOSED = re.compile(r"(\\?boxed\{[^{}]*|\ufffd+)$")  # a box, a character
_LONGEST_OPENING = len("<opinion>incorrect</opinion>\n<reason>…")


def parse_feedback(text: str) -> Feedback | None:
    """Read a teacher's reply.

    Args:
        text: The reply, decoded without special tokens.

    Returns:
        The feedback, its parts stripped; None unless the reply is exactly the three parts in their
        order, each once, none empty, with ``correct`` or ``incorrect`` as the opinion.
    """
    match = _REPLY.fullmatch(text)
    if match is None:
        return None
    opinion, reason, phrase = (part.strip() for part in match.groups())
    if opinion not in OPINIONS or not reason or not phrase:
        return None
    return Feedback(opinion, reason, phrase)


def format_feedback(feedback: Feedback) -> str:
    """The text that ``parse_feedback`` reads; used for the worked examples."""
    return (
        f"<opinion>{feedback.opinion}</opinion>\n"
        f"<reason>{feedback.reason}</reason>\n"
        f"<phrase>{feedback.phrase}</phrase>"
    )


@dataclass(frozen=True)
class FeedbackForm:
    r"""A form for constrained replies that every reply can be brought to within the limit.

    A reply is written under ``pattern`` with ``open_tokens``. One that is cut off there goes on
    from ``begun(reply)`` under ``closing_pattern`` with the ``closing_tokens`` kept back for it.
    That always ends: a token writes at least one of the closing pattern's characters.

    Attributes:
        max_new_tokens: Of the whole reply, the end-of-turn token included.
        boxed: The continuation ends with ``\boxed{…}``.
    """

    max_new_tokens: int
    boxed: bool = False

    def __post_init__(self) -> None:
        if self.open_tokens < _LONGEST_OPENING:
            raise InputError(
                f"guidance: constrained replies need max_new_tokens of at least "
                f"{self.max_new_tokens - self.open_tokens + _LONGEST_OPENING}, "
                f"got {self.max_new_tokens}"
            )

    @property
    def closing_tokens(self) -> int:
        """Kept back for replies that are cut off."""
        return max(64 if self.boxed else 32, self.max_new_tokens // 8)

    @property
    def open_tokens(self) -> int:
        """For a reply that closes by itself."""
        return self.max_new_tokens - self.closing_tokens

    @property
    def pattern(self) -> str:
        """A regular expression of replies that parse, and that fit at 4 characters a token."""
        phrase = f"[^< \\n\\t\\r][^<]{{0,{2 * self.max_new_tokens}}}"
        if self.boxed:
            phrase += r"\\boxed\{([^<{}\n]|\{[^<{}\n]{0,40}\}){1,40}\}\.?"
        return (
            f"<opinion>({'|'.join(OPINIONS)})</opinion>\\n"
            f"<reason>[^< \\n\\t\\r][^<]{{0,{self.max_new_tokens}}}</reason>\\n"
            f"<phrase>{phrase}</phrase>"
        )

    @property
    def closing_pattern(self) -> str:
        """A regular expression of what ends a reply that was cut off; ASCII only."""
        end = "</phrase>"
        characters = self.closing_tokens - len(end) - 2  # and the end-of-turn token
        if self.boxed:
            end = r"\\boxed\{[ -;=-z|~]{1,24}\}" + end
            characters -= len("\\boxed{}") + 24
        return f"[ -;=-~]{{0,{characters}}}[!-;=-~]{end}"

    def begun(self, reply: str) -> str | None:
        """Where a reply that was cut off goes on: inside its phrase.

        Returns:
            The beginning, or None where not even the reflection was begun.
        """
        match = _BEGUN.match(reply)
        if match is None:
            return None
        if match["phrase"] is None:
            return f"{_UNCLOSED.sub('', match['reason'])}</reason>\n<phrase>"
        return _UNCLOSED.sub("", match[0])
