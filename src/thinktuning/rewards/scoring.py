"""Rewards of a whole rollout batch."""

from collections.abc import Sequence
from dataclasses import replace

from thinktuning.rewards.base import Response, Reward
from thinktuning.rewards.guard import RewardGuard
from thinktuning.rewards.maths import verify_math
from thinktuning.types import Rollout, RolloutBatch


def score(
    batch: RolloutBatch, rewards: Sequence[Reward], guard: RewardGuard | None = None
) -> RolloutBatch:
    """Fill in outcome, reward and reward parts of every rollout and of every guided one's original.

    Args:
        batch: Rollouts, guided and unguided.
        rewards: Their weighted scores are added; one that fails on a response adds 0.
        guard: Asks them; null: one with its own defaults.

    Returns:
        The scored batch.
    """
    originals = [r.original for r in batch.rollouts if r.original is not None]
    scored = score_rollouts([*batch.rollouts, *originals], rewards, guard or RewardGuard())
    scored_originals = iter(scored[len(batch.rollouts) :])
    return batch.with_rollouts(
        tuple(
            r if r.original is None else replace(r, original=next(scored_originals))
            for r in scored[: len(batch.rollouts)]
        )
    )


def score_rollouts(
    rollouts: Sequence[Rollout], rewards: Sequence[Reward], guard: RewardGuard
) -> list[Rollout]:
    """Fill in outcome, reward and reward parts of every rollout; see ``score``."""
    responses = []
    for r in rollouts:
        outcome = verify_math(r.text, r.prompt.answer, r.finished)
        responses.append(Response(r.text, r.prompt.answer, r.finished, outcome))
    columns = {}
    for name, reward in zip(reward_names(rewards), rewards, strict=True):
        scores = guard.scores(reward, responses)
        columns[name] = [None if s is None else reward.weight * s for s in scores]
    scored = []
    for i, (rollout, response) in enumerate(zip(rollouts, responses, strict=True)):
        parts = {name: column[i] or 0.0 for name, column in columns.items()}
        scored.append(
            replace(
                rollout,
                outcome=response.outcome,
                reward=sum(parts.values()),
                reward_parts=parts,
                reward_failed=any(column[i] is None for column in columns.values()),
            )
        )
    return scored


def reward_names(rewards: Sequence[Reward]) -> list[str]:
    """How logs call them; of two with one name the second is numbered."""
    names: list[str] = []
    for reward in rewards:
        name, number = reward.name, 1
        while name in names:
            number += 1
            name = f"{reward.name}_{number}"
        names.append(name)
    return names
