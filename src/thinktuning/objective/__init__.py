"""The mathematics of stage 3: advantages, shaping, loss. Pure functions on tensors."""

from thinktuning.objective.advantages import group_advantages
from thinktuning.objective.losses import (
    LossOutput,
    ObjectiveConfig,
    policy_loss,
    supervised_loss,
    token_weights,
)
from thinktuning.objective.means import Mean
from thinktuning.objective.mismatch import SamplingGap, importance_weight, sampling_gap
from thinktuning.objective.shaping import advantage_aware_weight, shaping_coefficient

__all__ = [
    "LossOutput",
    "Mean",
    "ObjectiveConfig",
    "SamplingGap",
    "advantage_aware_weight",
    "group_advantages",
    "importance_weight",
    "policy_loss",
    "sampling_gap",
    "shaping_coefficient",
    "supervised_loss",
    "token_weights",
]
