"""A teacher who always says the same: its verdict is the truth, its continuation a fixed phrase."""

import re
import threading
import time
from collections.abc import Sequence
from itertools import cycle
from typing import ClassVar

from thinktuning.rewards import Response, Reward
from thinktuning.teaching import Chat, Reply, ReplyParams, Teacher

REPLY = "<opinion>correct</opinion>\n<reason>{reason}</reason>\n<phrase>{phrase}</phrase>"


class ScriptedTeacher(Teacher):
    """Writes a reply from a script: it reads the student's answer and repeats its last box.

    Args:
        reason: Its reflection.
        phrase: Ends every reply; ``{box}`` in it is the student's own box.
    """

    def __init__(
        self, reason: str = "Wait, let me check.", phrase: str = "It stays. {box}"
    ) -> None:
        self.reason = reason
        self.phrase = phrase

    @property
    def identity(self) -> str:
        return f"scripted {self.reason} {self.phrase}"

    def reply(self, chats: Sequence[Chat], params: ReplyParams) -> list[Reply]:
        return [Reply(self._answer(chat[-1]["content"])) for chat in chats]

    def _answer(self, question: str) -> str:
        boxes = re.findall(r"\\boxed{[^}]*}", question.rsplit("My answer:", 1)[-1])
        box = boxes[-1] if boxes else ""
        return REPLY.format(reason=self.reason, phrase=self.phrase.replace("{box}", box))


class PickyTeacher(ScriptedTeacher):
    """Replies to answers to some questions only; the others stay unguided.

    Args:
        word: What the questions contain.
    """

    def __init__(self, word: str = "0 plus") -> None:
        super().__init__()
        self.word = word

    def reply(self, chats: Sequence[Chat], params: ReplyParams) -> list[Reply]:
        replies = super().reply(chats, params)
        asked = [self.word in chat[-1]["content"].split("My answer:")[0] for chat in chats]
        return [r if a else Reply("No idea.") for r, a in zip(replies, asked, strict=True)]


class DistantTeacher(ScriptedTeacher):
    """Replies only when somebody has computed something meanwhile.

    Attributes:
        computed: To be set by who computes.
        waited: How often it had to wait for that in vain.
    """

    elsewhere = True

    def __init__(self) -> None:
        super().__init__()
        self.computed = threading.Event()
        self.waited = 0

    def reply(self, chats: Sequence[Chat], params: ReplyParams) -> list[Reply]:
        self.waited += not self.computed.wait(timeout=20)
        return super().reply(chats, params)


class OddTeacher(ScriptedTeacher):
    """Says something else to everybody, in turn.

    Attributes:
        texts: What it says.
    """

    texts: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        super().__init__()
        self._turns = cycle(self.texts)

    def reply(self, chats: Sequence[Chat], params: ReplyParams) -> list[Reply]:
        return [Reply(next(self._turns)) for _ in chats]


class MoodyReward(Reward):
    """1 for every response, but for those to questions whose gold answer is in a mood's list."""

    raises, hangs, returns = ("1",), ("2",), {"3": float("nan"), "4": "one"}

    def score(self, responses: Sequence[Response]) -> list[float]:
        answers = [r.answer for r in responses]
        if any(a in self.raises for a in answers):
            raise KeyError("no such answer")
        if any(a in self.hangs for a in answers):
            time.sleep(1000)
        return [self.returns.get(a, 1.0) for a in answers]


class BrokenReward(MoodyReward):
    """Raises always."""

    raises = tuple(map(str, range(10)))
