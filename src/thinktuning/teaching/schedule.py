"""How much guidance there is, and when it ends."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from thinktuning.errors import InputError


@dataclass(frozen=True)
class GammaSchedule:
    """The guided fraction gamma over a run. Past ``fraction`` of the planned steps it is 0.

    With a ``fraction`` of 1 guidance doesn't end: a run that is resumed past its planned steps goes
    on with the last value.

    Attributes:
        kind: constant: start; linear, cosine, exponential: from start to end.
        start: Guided share of every group at the first step, up to 1; 0: plain GRPO, whatever end
            is.
        end: Guided share at the last guided step, 0 to 1; positive for exponential; unused by
            constant.
        fraction: Share of the planned rollout steps that are guided, above 0 up to 1.
    """

    kind: Literal["constant", "linear", "cosine", "exponential"] = "constant"
    start: float = 0.25
    end: float = 0.01
    fraction: float = 1.0

    def __post_init__(self) -> None:
        faults = []
        if self.kind not in ("constant", "linear", "cosine", "exponential"):
            faults.append(f"kind must be constant, linear, cosine or exponential, got {self.kind}")
        for name in ("start", "end"):
            if not 0 <= getattr(self, name) <= 1:
                faults.append(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        if not 0 < self.fraction <= 1:
            faults.append(f"fraction must be above 0 and at most 1, got {self.fraction}")
        if self.kind == "exponential" and self.start > 0 and self.end <= 0:
            faults.append(f"end must be positive for kind exponential, got {self.end}")
        if faults:
            raise InputError("guidance.gamma: " + "; ".join(faults))

    def at(self, step: int, planned_steps: int) -> float:
        """Gamma at a rollout step.

        Args:
            step: From 0.
            planned_steps: Rollout steps of the whole run.

        Returns:
            The guided fraction; 0 once guidance is over.
        """
        # Rounded first: a third of 12 steps must not become 5 steps for 4.000000000000001.
        guided_steps = math.ceil(round(self.fraction * planned_steps, 6))
        if self.start == 0 or (step >= guided_steps and self.fraction < 1):
            return 0.0
        progress = min(1.0, step / (guided_steps - 1)) if guided_steps > 1 else 0.0
        if self.kind == "linear":
            return self.start + (self.end - self.start) * progress
        if self.kind == "cosine":
            return self.end + (self.start - self.end) * (1 + math.cos(math.pi * progress)) / 2
        if self.kind == "exponential":
            return self.start * (self.end / self.start) ** progress
        return self.start


def guided_count(gamma: float, group_size: int) -> int:
    """Rollouts to guide in a group: ``max(1, floor(gamma * n))`` while gamma is positive, else 0.

    Source:
        RRV et al. 2025, arXiv 2508.07616, and the authors' recipe.
    """
    if gamma <= 0:
        return 0
    # Rounded first, since 0.29 * 100 is 28.999999999999996.
    return max(1, math.floor(round(gamma * group_size, 9)))


def select_guided(eligible: Sequence[int], count: int, seed: int) -> list[int]:
    """Draw the rollouts to guide, uniformly and without repetition.

    Args:
        eligible: Places of the eligible rollouts in their group.
        count: How many are wanted; all are taken where there are fewer.
        seed: Of this draw alone.

    Returns:
        The chosen places in ascending order.
    """
    return sorted(Random(seed).sample(list(eligible), min(count, len(eligible))))
