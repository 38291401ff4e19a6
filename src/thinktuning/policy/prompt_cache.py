"""Prompts that are read once and stand before several completions, with gradients."""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer


class PromptCache(Cache):
    """Takes the keys and values of U prompts of one width, as ``past_key_values`` of a forward."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(layers=[_Read() for _ in DynamicCache(config=config).layers])

    def before(self, owner: Tensor) -> Cache:
        """The ``past_key_values`` of completions.

        Args:
            owner: int64 [R]; the prompt of each completion.
        """
        return Cache(layers=[_Before(layer, owner) for layer in self.layers])


def can_share_prompts(config: PreTrainedConfig) -> bool:
    """Whether every layer sees all tokens, so that its keys and values are all that it keeps."""
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)


# A block that is computed again for the backward updates its layer again: neither kind may change
# by that.


class _Read(DynamicLayer):
    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.keys, self.values = key_states, value_states
        return key_states, value_states

    def get_seq_length(self) -> int:
        return 0


class _Before(DynamicLayer):
    def __init__(self, prompts: Any, owner: Tensor) -> None:
        super().__init__()
        self.keys, self.values = prompts.keys, prompts.values
        self.owner = owner
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        def joined(before: Tensor | None, behind: Tensor) -> Tensor:
            assert before is not None, "prompts must be read first"
            return torch.cat([before.index_select(0, self.owner), behind], dim=-2)

        return joined(self.keys, key_states), joined(self.values, value_states)
