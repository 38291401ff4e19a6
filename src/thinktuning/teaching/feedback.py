"""The teacher's reply: three tagged parts, read strictly and, where wanted, written strictly."""

import re
import unicodedata
from dataclasses import dataclass
from functools import cache

from thinktuning.errors import InputError
from thinktuning.types import Feedback

OPINIONS = ("correct", "incorrect")

# A part may hold "<" (2 < 3) but none of the tags.
_PART = r"((?:(?!</?(?:opinion|reason|phrase)>).)*)"
_REPLY = re.compile(
    rf"\s*<opinion>{_PART}</opinion>\s*<reason>{_PART}</reason>\s*<phrase>{_PART}</phrase>\s*",
    re.DOTALL,
)
# Neither what a terminal would obey, nor halves of characters, which no tokenizer encodes.
_CONTROLS = r"\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f"
_CONTROL = re.compile(rf"[{_CONTROLS}\ud800-\udfff]")
# A reply in its constrained form, as far as it was written before the limit.
_BEGUN = re.compile(
    r"(<opinion>\w+</opinion>\n<reason>)([^<]+)"
    r"(?:</reason>\n<phrase>([^<]+))?"
)
# What a part begins with: none of what str.strip takes away, else a part could be empty.
_VISIBLE = r"[^<\x00-\x20\x7f-\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
# Inside of a box, where an escaped brace is a letter.
_LETTER = rf"([^<{{}}\n\\{_CONTROLS}]|\\[^<\n{_CONTROLS}])"
_ANY = rf"[^<{_CONTROLS}]"
_TAG_TOKENS = 30  # about what the tags take
_LONGEST_OPENING = len("<opinion>incorrect</opinion>\n<reason>…")


def parse_feedback(text: str) -> Feedback | None:
    """Read a teacher's reply.

    Args:
        text: The reply, decoded without special tokens.

    Returns:
        The feedback, its parts stripped; None unless the reply is exactly the three parts in their
        order, each once, none empty, with ``correct`` or ``incorrect`` as the opinion, and without
        control characters.
    """
    match = _REPLY.fullmatch(text)
    if match is None or _CONTROL.search(text):
        return None
    opinion, reason, phrase = (part.strip() for part in match.groups())
    if opinion not in OPINIONS or not reason or not phrase:
        return None
    return Feedback(opinion, reason, phrase)


def in_script_of(feedback: Feedback, *texts: str) -> bool:
    """Whether most of the feedback's letters are of scripts (Latin, Han, …) that occur in texts.

    A teacher that falls into another language is mostly seen by that; one that writes French
    instead of English isn't.
    """
    known = {_script(letter) for text in texts for letter in text if letter.isalpha()}
    letters = [c for c in feedback.reason + feedback.phrase if c.isalpha()]
    return 2 * sum(_script(letter) in known for letter in letters) >= len(letters)


@cache
def _script(letter: str) -> str:
    """The first word of a letter's name, e.g. ``LATIN``."""
    return unicodedata.name(letter, "").partition(" ")[0]


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
    def _characters(self) -> tuple[int, int]:
        """For the reflection and for the continuation, behind the first of each."""
        characters = int(3.5 * (self.open_tokens - _TAG_TOKENS))
        reason = int(0.4 * characters)
        return reason, characters - reason

    def fits(self, feedback: Feedback) -> bool:
        """Whether its parts are short enough to be written before the form ends them."""
        reason, phrase = self._characters
        return len(feedback.reason) <= reason + 1 and len(feedback.phrase) <= phrase + 1

    @property
    def pattern(self) -> str:
        """A regular expression of replies that parse; most fit, at 3.5 characters a token."""
        reason, characters = self._characters
        phrase = f"{_VISIBLE}{_ANY}{{0,{characters}}}"
        if self.boxed:
            phrase += rf"\\boxed\{{({_LETTER}|\{{{_LETTER}{{0,40}}\}}){{1,40}}\}}\.?"
        return (
            f"<opinion>({'|'.join(OPINIONS)})</opinion>\\n"
            f"<reason>{_VISIBLE}{_ANY}{{0,{reason}}}</reason>\\n"
            f"<phrase>{phrase}</phrase>"
        )

    @property
    def closing_pattern(self) -> str:
        """A regular expression of what ends a reply that was cut off; ASCII only."""
        end = "</phrase>"
        characters = self.closing_tokens - len(end) - 2  # and the end-of-turn token
        if not self.boxed:
            return f"[ -;=-~]{{0,{characters}}}[!-;=-~]{end}"
        # One box and no other brace; a backslash in front of its last brace would escape it.
        box = r"\\boxed\{[ -;=-z|~]{0,23}[!-;=-\[\]-z|~]\}"
        characters -= len("\\boxed{}") + 23
        return rf"[ -;=-z|~]{{0,{characters}}}{box}{end}"

    def begun(self, reply: str) -> str | None:
        """Where a reply that was cut off goes on: inside its phrase.

        Returns:
            The beginning, or None where not even the reflection was begun.
        """
        match = _BEGUN.match(reply)
        if match is None:
            return None
        opening, reason, phrase = match.groups()
        if phrase is None:
            return f"{opening}{_rounded_off(reason) or reason}</reason>\n<phrase>"
        return f"{opening}{reason}</reason>\n<phrase>{_rounded_off(phrase)}"


def _rounded_off(part: str) -> str:
    r"""A part that was cut off, without half a character and a ``\boxed{`` that it leaves open."""
    part = part.rstrip("\ufffd")
    for box in re.finditer(r"\\boxed(?=\{|$)", part):
        if not _closes(part[box.end() :]):
            return part[: box.start()]
    return part


def _closes(text: str) -> bool:
    """Whether the brace that a text begins with is closed in it."""
    depth = 0
    # An escaped brace is a letter of LaTeX, not a bracket.
    for sign in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        if sign[0] in "{}":
            depth += 1 if sign[0] == "{" else -1
            if depth == 0:
                return True
    return False
