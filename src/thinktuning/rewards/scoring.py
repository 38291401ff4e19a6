"""Rewards of a whole rollout batch."""

from collections.abc import Sequence
from dataclasses import replace

from thinktuning.errors import InputError
from thinktuning.rewards.base import Response, Reward
from thinktuning.rewards.maths import verify_math
from thinktuning.types import Rollout, RolloutBatch


def score(batch: RolloutBatch, rewards: Sequence[Reward]) -> RolloutBatch:
    """Fill in outcome, reward and reward parts of every rollout and of every guided one's original.

    Args:
        batch: Rollouts, guided and unguided.
        rewards: Their weighted scores are added.

    Returns:
        The scored batch.
    """
    originals = [r.original for r in batch.rollouts if r.original is not None]
    scored = _score([*batch.rollouts, *originals], rewards)
    scored_originals = iter(scored[len(batch.rollouts) :])
    return batch.with_rollouts(
        tuple(
            r if r.original is None else replace(r, original=next(scored_originals))
            for r in scored[: len(batch.rollouts)]
        )
    )


def _score(rollouts: Sequence[Rollout], rewards: Sequence[Reward]) -> list[Rollout]:
    responses = []
    for r in rollouts:
        outcome = verify_math(r.text, r.prompt.answer, r.finished)
        responses.append(Response(r.text, r.prompt.answer, r.finished, outcome))
    columns = {}
    for reward in rewards:
        scores = reward.score(responses)
        if len(scores) != len(responses):
            raise InputError(
                f"{reward.name}.score returned {len(scores)} numbers for {len(responses)} responses"
            )
        name, number = reward.name, 1
        while name in columns:
            number += 1
            name = f"{reward.name}_{number}"
        columns[name] = [reward.weight * s for s in scores]
    scored = []
    for i, (rollout, response) in enumerate(zip(rollouts, responses, strict=True)):
        parts = {name: column[i] for name, column in columns.items()}
        scored.append(
            replace(
                rollout, outcome=response.outcome, reward=sum(parts.values()), reward_parts=parts
            )
        )
    return scored
