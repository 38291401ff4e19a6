"""What a rollout batch looks like in numbers."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from thinktuning.objective import Mean
from thinktuning.types import Outcome, Rollout, RolloutBatch

SKIP_REASONS = (
    "prompt_too_long",
    "unavailable",
    "unparsed",
    "other_script",
    "too_long",
    "special_token",
)


class StepMetrics:
    """The numbers of one rollout batch on one rank, until they are logged over all ranks."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._means: dict[str, Mean] = {}
        self._peaks: dict[str, Tensor] = {}

    def copy(self) -> "StepMetrics":
        """The numbers so far."""
        kept = StepMetrics()
        kept.restore(self)
        return kept

    def restore(self, kept: "StepMetrics") -> None:
        """Forget what came after ``kept`` was copied."""
        self.seconds = dict(kept.seconds)
        self._means = dict(kept._means)
        self._peaks = dict(kept._peaks)

    def add(self, means: Mapping[str, Mean]) -> None:
        """Add sums and weights to what is there under the same names."""
        for name, value in means.items():
            old = self._means.get(name, Mean(0.0, 0.0))
            self._means[name] = Mean(old.total + value.total, old.weight + value.weight)

    def peak(self, name: str, value: Tensor) -> None:
        """Keep the largest value; it is logged as ``<name>_max`` beside the mean ``name``."""
        old = self._peaks.get(name)
        self._peaks[name] = value if old is None else torch.maximum(old, value)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Measure the seconds of what is done inside."""
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def over_ranks(self, strategy: Strategy) -> dict[str, float]:
        """Means and peaks over all ranks, which must have the same names; a mean over nothing is
        left out, and so is the peak beside it.
        """
        device = strategy.root_device
        seconds = {f"seconds/{name}": Mean(s, 1) for name, s in self.seconds.items()}
        means = self._means | seconds
        table = torch.tensor(
            [[float(m.total), float(m.weight)] for m in means.values()],
            dtype=torch.float64,
            device=device,
        )
        sums = zip(means, strategy.reduce(table, reduce_op="sum").tolist(), strict=True)
        values = {name: total / weight for name, (total, weight) in sums if weight > 0}
        for name, peak in sorted(self._peaks.items()):
            highest = strategy.reduce(peak.to(device), reduce_op="max").item()
            if name in values:
                values[f"{name}_max"] = highest
        return values


def mean(values: Iterable[float]) -> Mean:
    """Sum and number of some values; booleans count as 0 and 1."""
    listed = [float(v) for v in values]
    return Mean(sum(listed), len(listed))


def rollout_means(batch: RolloutBatch) -> dict[str, Mean]:
    """Means over a scored batch, to be added over ranks; a mean over nothing has weight 0."""
    rollouts = batch.rollouts
    guided = [r for r in rollouts if r.guided]
    unguided = [r for r in rollouts if not r.guided]
    pairs = [(r.original, r) for r in rollouts if r.original is not None]
    means = {
        "reward": mean(_reward(r) for r in rollouts),
        "reward/guided": mean(_reward(r) for r in guided),
        "reward/unguided": mean(_reward(r) for r in unguided),
        "reward/failed": mean(r.reward_failed for r in rollouts),
        "accuracy/student": mean(_correct(r.original or r) for r in rollouts),
        "accuracy/before_guidance": mean(_correct(before) for before, _ in pairs),
        "accuracy/after_guidance": mean(_correct(after) for _, after in pairs),
        "guidance/wrong_to_right": mean(_correct(a) and not _correct(b) for b, a in pairs),
        "guidance/right_to_wrong": mean(_correct(b) and not _correct(a) for b, a in pairs),
        "length/completion": mean(len(r.completion_ids) for r in rollouts),
        "length/student": mean(len((r.original or r).completion_ids) for r in rollouts),
        "length/injected": mean(sum(r.injected_mask) for r in guided),
        "length/cut_off": mean(not r.finished for r in rollouts),
        "groups/zero_variance": mean(len({r.reward for r in g}) == 1 for g in batch.groups()),
    }
    for outcome in (Outcome.NO_ANSWER, Outcome.TIMEOUT):
        means[f"accuracy/{outcome}"] = mean((r.original or r).outcome is outcome for r in rollouts)
    for name in rollouts[0].reward_parts:
        means[f"reward/{name}"] = mean(r.reward_parts[name] for r in rollouts)
    return means | _guidance_means(rollouts)


def _guidance_means(rollouts: Iterable[Rollout]) -> dict[str, Mean]:
    rollouts = list(rollouts)
    selected = [(r, r.guidance) for r in rollouts if r.guidance is not None]
    asked = [(r, g) for r, g in selected if g.skipped not in ("prompt_too_long", "unavailable")]
    verdicts = [
        (g.feedback.opinion == "correct") == _correct(r.original or r)
        for r, g in asked
        if g.feedback is not None
    ]
    means = {
        "guidance/realised_gamma": mean(r.guided for r in rollouts),
        "guidance/eligible": mean((r.original or r).finished for r in rollouts),
        "guidance/parsed": mean(g.feedback is not None for _, g in asked),
        "guidance/closed": mean(g.closed for _, g in asked),
        "guidance/cached": mean(g.cached for _, g in asked),
        "guidance/verdict_agrees": mean(verdicts),
    }
    for reason in SKIP_REASONS:
        means[f"guidance/skipped_{reason}"] = mean(g.skipped == reason for _, g in selected)
    return means


def _reward(rollout: Rollout) -> float:
    assert rollout.reward is not None, "rollouts must be scored first"
    return rollout.reward


def _correct(rollout: Rollout) -> bool:
    return rollout.outcome is Outcome.CORRECT


HELD_OUT: Mapping[str, Callable[[Rollout], float]] = {
    "accuracy": _correct,
    "no_answer": lambda r: r.outcome is Outcome.NO_ANSWER,
    "length": lambda r: len(r.completion_ids),
    "cut_off": lambda r: not r.finished,
}
"""What is seen in every judged answer to a held-out question."""


def held_out_rewards(names: Iterable[str]) -> dict[str, Callable[[Rollout], float]]:
    """The same of rewards, in all and by their names."""
    seen: dict[str, Callable[[Rollout], float]] = {
        "reward": _reward,
        "reward/failed": lambda r: r.reward_failed,
    }
    for name in names:
        seen[f"reward/{name}"] = lambda r, name=name: r.reward_parts[name]  # type: ignore[misc]
    return seen
