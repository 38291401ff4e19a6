"""The teacher's reply: three tagged parts, read strictly."""

import re

from thinktuning.types import Feedback

OPINIONS = ("correct", "incorrect")

# A part may hold "<" (2 < 3) but none of the tags.
_PART = r"((?:(?!</?(?:opinion|reason|phrase)>).)*)"
_REPLY = re.compile(
    rf"\s*<opinion>{_PART}</opinion>\s*<reason>{_PART}</reason>\s*<phrase>{_PART}</phrase>\s*",
    re.DOTALL,
)


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


def feedback_pattern(max_characters: int) -> str:
    """A regular expression of replies that parse, each part of at most ``max_characters``."""
    part = f"[^< \\n\\t][^<]{{0,{max_characters - 1}}}"
    return (
        f"<opinion>({'|'.join(OPINIONS)})</opinion>\\n"
        f"<reason>{part}</reason>\\n<phrase>{part}</phrase>"
    )


def format_feedback(feedback: Feedback) -> str:
    """The text that ``parse_feedback`` reads; used for the worked examples."""
    return (
        f"<opinion>{feedback.opinion}</opinion>\n"
        f"<reason>{feedback.reason}</reason>\n"
        f"<phrase>{feedback.phrase}</phrase>"
    )
