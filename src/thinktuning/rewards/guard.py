"""Rewards that raise, hang or return nonsense cost a response its reward, and not the run."""

import logging
import math
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any

from thinktuning.errors import FailingRewardError, InputError
from thinktuning.rewards.base import Response, Reward

log = logging.getLogger(__name__)

Scores = Sequence[float | None]


class RewardGuard:
    """Asks rewards with a deadline.

    A reward that fails on some responses is asked about each of them alone, so that one bad
    response costs the others nothing.

    Args:
        seconds: Deadline of a call, > 0 and at most ``threading.TIMEOUT_MAX``. Code that never lets
            Python's other threads run can't be ended by it; run such code in a process of its own,
            as the verifier does.
        limit: The run ends behind so many responses in a row that one reward has failed on, >= 1.
    """

    def __init__(self, seconds: float = 60.0, limit: int = 16) -> None:
        self.seconds = seconds
        self.limit = limit
        self._in_a_row: Counter[int] = Counter()  # by id: users' classes needn't be hashable

    def scores(self, reward: Reward, responses: Sequence[Response]) -> Scores:
        """A reward's numbers, not weighted yet; None for a response that it failed on.

        Raises:
            FailingRewardError: Behind ``limit`` failures in a row, with the last response named.
            InputError: If the reward says that it can't work as it is set up.
        """
        if not responses:  # a rank's part of the last validation batch
            return []
        together = self._asked(reward, responses)
        scores = [_finite(s) for s in together] if isinstance(together, list) else [None]
        if None not in scores:
            self._in_a_row[id(reward)] = 0
            return scores
        return [self._alone(reward, response) for response in responses]

    def _alone(self, reward: Reward, response: Response) -> float | None:
        answer = self._asked(reward, [response])
        score = _finite(answer[0]) if isinstance(answer, list) else None
        if score is not None:
            self._in_a_row[id(reward)] = 0
            return score
        self._in_a_row[id(reward)] += 1
        reason = f"returned {answer[0]!r}" if isinstance(answer, list) else answer
        row = f"gold answer {response.answer!r}, response {response.text!r:.200}"
        log.warning("the reward %s failed (%s) and counts as 0: %s", reward.name, reason, row)
        if self._in_a_row[id(reward)] >= self.limit:
            raise FailingRewardError(
                f"the reward {reward.name} failed on {self.limit} responses in a row, the last "
                f"time it {reason}: {row}. Mend it, and go on with --ckpt_path last"
            )
        return None

    def _asked(self, reward: Reward, responses: Sequence[Response]) -> list[float] | str:
        """Its numbers, or why there are none."""
        answers: list[list[float] | BaseException] = []

        def ask() -> None:
            try:
                answers.append(list(reward.score(responses)))
            # Whatever a user's code raises, SystemExit too, is that response's failure; it is
            # logged, and counted.
            except BaseException as error:
                answers.append(error)

        # A daemon: it doesn't keep the process alive where it hangs.
        worker = threading.Thread(target=ask, daemon=True)
        worker.start()
        worker.join(self.seconds)
        if not answers:
            return f"took longer than {self.seconds} s"
        (answer,) = answers
        if isinstance(answer, InputError):
            raise answer
        if isinstance(answer, BaseException):
            return f"raised {type(answer).__name__}: {answer!s:.200}"
        if len(answer) != len(responses):
            raise InputError(
                f"{reward.name}.score returned {len(answer)} numbers for {len(responses)} responses"
            )
        return answer


def _finite(score: Any) -> float | None:
    """The number, if it is one: Python's, NumPy's, or a tensor of one element; no text."""
    if isinstance(score, str | bytes):
        return None
    try:
        number = float(score)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last is torch's
        return None
    return number if math.isfinite(number) else None
