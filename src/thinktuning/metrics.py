"""What a rollout batch looks like in numbers."""

from collections.abc import Iterable

from thinktuning.objective import Mean
from thinktuning.types import Outcome, Rollout, RolloutBatch

SKIP_REASONS = ("prompt_too_long", "unparsed", "too_long", "special_token")


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
        "reward/all": mean(_reward(r) for r in rollouts),
        "reward/guided": mean(_reward(r) for r in guided),
        "reward/unguided": mean(_reward(r) for r in unguided),
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
    asked = [(r, g) for r, g in selected if g.skipped != "prompt_too_long"]
    verdicts = [
        (g.feedback.opinion == "correct") == _correct(r.original or r)
        for r, g in asked
        if g.feedback is not None
    ]
    means = {
        "guidance/realised_gamma": mean(r.guided for r in rollouts),
        "guidance/eligible": mean((r.original or r).finished for r in rollouts),
        "guidance/parsed": mean(g.feedback is not None for _, g in asked),
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
