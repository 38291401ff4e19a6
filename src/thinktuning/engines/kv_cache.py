"""Keys and values of a batch that is decoded: rows leave and join, a token is written once."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

_ROOM = 64
"""Tokens that there is room for when a layer's memory is made anew."""


class RoomyLayer(DynamicLayer):
    """Writes tokens into room that it has, where ``DynamicLayer`` copies all of them each time."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append tokens, [R, H, L, D] each."""
        new = key_states, value_states
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._hold([states[:, :, :0] for states in new], 0)
        length = self.get_seq_length()
        stop = length + key_states.shape[-2]
        stores = self._stores
        if stop > stores[0].shape[-2]:
            more = stop - length + _ROOM
            stores = [pad(states, (0, 0, 0, more)) for states in self._states()]
        for store, states in zip(stores, new, strict=True):
            store[:, :, length:stop] = states
        self._hold(stores, stop)
        return self._states()

    def keep(self, rows: Tensor, start: int = 0) -> None:
        """Take rows, some of them more than once, without their tokens before ``start``."""
        length = self.get_seq_length() - start
        self._hold([store[:, :, start:].index_select(0, rows) for store in self._stores], length)

    def join(self, other: "RoomyLayer") -> None:
        """Add the rows of another layer; the last tokens of both come to stand in one column."""
        length = max(self.get_seq_length(), other.get_seq_length())
        pairs = zip(self._states(), other._states(), strict=True)
        self._hold([torch.cat([_aligned(s, length) for s in pair]) for pair in pairs], length)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Take rows, some of them more than once."""
        self.keep(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Take every row ``repeats`` times, without room: how much there was is history."""
        states = [s.repeat_interleave(repeats, dim=0) for s in self._states()]
        self._hold(states, self.get_seq_length())

    def _states(self) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None, "nothing was read yet"
        return self.keys, self.values

    def _hold(self, stores: Sequence[Tensor], length: int) -> None:
        self._stores = stores
        self.keys, self.values = (store[:, :, :length] for store in stores)


def decoding_cache(config: PreTrainedConfig) -> DynamicCache:
    """A cache for decoding with a model; layers that don't see all tokens are Transformers' own."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(x) is DynamicLayer else x for x in cache.layers]
    return cache


def sees_all(cache: DynamicCache) -> bool:
    """Whether every layer sees all tokens, so that the cache can be cut, and joined by others."""
    return all(isinstance(layer, RoomyLayer) for layer in cache.layers)


def _aligned(states: Tensor, length: int) -> Tensor:
    """With zeros before the tokens, so that there are ``length``, and with room behind them."""
    return pad(states, (0, 0, length - states.shape[-2], _ROOM))
