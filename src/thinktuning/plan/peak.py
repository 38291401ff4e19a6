"""Which tensors are alive, and how many bytes they were when they were most."""

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Bytes = Counter[str]
"""Bytes by what they hold."""


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, by what they are for.

    Every storage that an operation returns belongs to the ``phase`` it was made in. What a kernel
    takes and gives back inside itself isn't seen.

    Attributes:
        phase: What new storages are for.
        live: Bytes alive now.
        peak: Bytes that were alive when they were most.
    """

    def __init__(self, phase: str) -> None:
        super().__init__()
        self.phase = phase
        self.live: Bytes = Counter()
        self.peak: Bytes = Counter()
        self._owner: dict[int, str] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and note what it made."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf, self.phase)
        if self.live.total() > self.peak.total():
            self.peak = self.live.copy()
        return result

    def hold(self, phase: str, tensors: Iterable[Tensor | None]) -> None:
        """Count these tensors, made before or under another phase, as ``phase``."""
        for tensor in tensors:
            if tensor is not None:
                self._note(tensor, phase, move=True)

    def _note(self, tensor: Tensor, phase: str, move: bool = False) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._owner:
            self._owner[key] = phase
            self.live[phase] += size
            weakref.finalize(storage, self._drop, key, size).atexit = False
        elif move:
            self.live[self._owner[key]] -= size
            self.live[phase] += size
            self._owner[key] = phase

    def _drop(self, key: int, size: int) -> None:
        self.live[self._owner.pop(key)] -= size
