"""Who is asked, what is asked, and how a reply is brought to its form."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

from thinktuning.teaching.behaviors import Behavior
from thinktuning.teaching.feedback import FeedbackForm, format_feedback, parse_feedback

Chat = list[dict[str, str]]

_TAG_TOKENS = 24  # more than what closing one part and opening the next takes
_SYSTEM = """\
You read a question and my answer to it, and you go on thinking for me, in the first person, as if \
you were me. In my reflection I {instructions}.
Reply with exactly three parts and nothing else:
<opinion>correct or incorrect</opinion>
<reason>my reflection on my answer</reason>
<phrase>how I go on from there to the solution, ending with the final answer in the format that my \
answer should have</phrase>"""


@dataclass(frozen=True)
class ReplyParams:
    """What a reply may be.

    Attributes:
        max_new_tokens: Length limit of a reply, end-of-turn token included.
        max_prompt_tokens: A chat that is longer isn't answered.
        pattern: Regular expression that replies keep to, unless the length limit ends them first;
            None lets the teacher write freely.
        spare_tokens: To be left free behind the reply, for a second request that goes on from it.
    """

    max_new_tokens: int
    max_prompt_tokens: int
    pattern: str | None = None
    spare_tokens: int = 0


@dataclass(frozen=True)
class Reply:
    """What came back for one chat.

    Attributes:
        text: The reply, decoded; empty where there is none.
        cut_off: The length limit ended it.
        skipped: Why there is none: ``prompt_too_long`` or ``unavailable``; else None.
        cached: It was read from the disk.
        closed: It was cut off, and a second request has closed it.
        tokens: That the teacher wrote for it, as far as it says.
    """

    text: str = ""
    cut_off: bool = False
    skipped: str | None = None
    cached: bool = False
    closed: bool = False
    tokens: int = 0


class Teacher(ABC):
    """Answers chats greedily. Every engine is one; a remote server is one that isn't an engine."""

    needs_weights: bool = False
    """Whether ``load_weights`` must give it the frozen reference before it can answer."""

    elsewhere: bool = False
    """Whether it computes on another machine, so that this one may go on meanwhile."""

    can_continue: bool = True
    """Whether a reply can go on from a beginning that is given."""

    def start(self) -> None:  # noqa: B027 (most teachers have nothing to do)
        """Load what the teacher has of its own, so that faults show before the first step."""

    @property
    @abstractmethod
    def identity(self) -> str:
        """What its replies depend on besides the question: kind, model, revision, precision."""

    @abstractmethod
    def reply(self, chats: Sequence[Chat], params: ReplyParams) -> list[Reply]:
        """Answer every chat.

        Args:
            chats: Messages with ``role`` and ``content``. A last message of the assistant's is the
                beginning of the reply, which goes on from there.
            params: What a reply may be.

        Returns:
            One reply per chat, without the beginning.
        """

    def sleep(self) -> None:  # noqa: B027
        """Give the device's memory to somebody else until ``wake``."""

    def wake(self) -> None:  # noqa: B027
        """Take the device's memory back."""

    def close(self) -> None:  # noqa: B027
        """Release everything; the last call."""


def teacher_chat(behaviors: Sequence[Behavior], question: str, response: str) -> Chat:
    """The teacher's chat: what it is to do, every worked example as a turn, then the real question.

    Args:
        behaviors: The behaviors to show; at least one.
        question: The student's question, without the student's instruction.
        response: What the student wrote.

    Returns:
        Messages with ``role`` and ``content``, the last one the user's.
    """
    instructions = ", or ".join(b.instruction for b in behaviors)
    messages = [{"role": "system", "content": _SYSTEM.format(instructions=instructions)}]
    for behavior in behaviors:
        for example in behavior.examples:
            messages.append(_turn(example.question, example.response))
            messages.append({"role": "assistant", "content": format_feedback(example.feedback)})
    messages.append(_turn(question, response))
    return messages


def ask_in_form(
    teacher: Teacher, chats: Sequence[Chat], form: FeedbackForm, max_prompt_tokens: int
) -> list[Reply]:
    """Ask for replies that all parse: those that are cut off are closed in a second request.

    Args:
        teacher: Whom to ask.
        chats: What to ask.
        form: The form, with its length limit.
        max_prompt_tokens: A chat that is longer isn't answered.

    Returns:
        One reply per chat.
    """
    if not teacher.can_continue:
        return teacher.reply(
            chats, ReplyParams(form.max_new_tokens, max_prompt_tokens, form.pattern)
        )
    spare = form.closing_tokens + _TAG_TOKENS
    params = ReplyParams(form.open_tokens, max_prompt_tokens, form.pattern, spare)
    replies = teacher.reply(chats, params)
    begun = {
        i: start
        for i, r in enumerate(replies)
        if r.cut_off and parse_feedback(r.text) is None and (start := form.begun(r.text))
    }
    if not begun:
        return replies
    longer = [[*chats[i], {"role": "assistant", "content": start}] for i, start in begun.items()]
    longest = max_prompt_tokens + form.open_tokens + _TAG_TOKENS
    params = ReplyParams(form.closing_tokens, longest, form.closing_pattern)
    for (i, start), end in zip(begun.items(), teacher.reply(longer, params), strict=True):
        tokens = replies[i].tokens + end.tokens
        replies[i] = replace(end, text=start + end.text, closed=True, tokens=tokens)
    return replies


def _turn(question: str, response: str) -> dict[str, str]:
    return {"role": "user", "content": f"Question: {question}\nMy answer: {response}"}
