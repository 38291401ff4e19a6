"""Rewards: what a finished answer is worth. They judge text only."""

from thinktuning.rewards.answers import LETTERS, extract_answer, judge, judge_version
from thinktuning.rewards.base import Response, Reward
from thinktuning.rewards.guard import RewardGuard
from thinktuning.rewards.maths import MathReward, is_calculation, last_boxed, verify_math
from thinktuning.rewards.phrase import PhraseReward
from thinktuning.rewards.scoring import reward_names, score, score_rollouts
from thinktuning.types import Outcome

__all__ = [
    "LETTERS",
    "MathReward",
    "Outcome",
    "PhraseReward",
    "Response",
    "Reward",
    "RewardGuard",
    "extract_answer",
    "is_calculation",
    "judge",
    "judge_version",
    "last_boxed",
    "reward_names",
    "score",
    "score_rollouts",
    "verify_math",
]
