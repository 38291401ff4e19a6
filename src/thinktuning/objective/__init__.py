"""The mathematics of stage 3: advantages, shaping, loss. Pure functions on tensors."""

from thinktuning.objective.advantages import group_advantages
from thinktuning.objective.losses import (
    LossOutput,
    Mean,
    ObjectiveConfig,
    policy_loss,
    token_weights,
)
from thinktuning.objective.shaping import advantage_aware_weight, shaping_coefficient

__all__ = [
    "LossOutput",
    "Mean",
    "ObjectiveConfig",
    "advantage_aware_weight",
    "group_advantages",
    "policy_loss",
    "shaping_coefficient",
    "token_weights",
]
