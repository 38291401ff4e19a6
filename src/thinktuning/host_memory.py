"""Keeping the host's memory flat over a long run: libraries keep more and more of it.

Sequences of every step have other lengths, so that what is kept for a length is seldom used again.
"""

import ctypes
import os

_CACHED_SHAPES = "64"  # more than a pass and its gradients have; each keeps some 100 KiB
_CAPACITIES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # oneDNN's and torch's


def bound_shape_caches() -> None:
    """Let torch's matrix products on CPUs keep the code of few shapes, unless the user says more.

    To be called before the first of them.
    """
    for name in _CAPACITIES:
        os.environ.setdefault(name, _CACHED_SHAPES)


def return_freed_memory() -> None:
    """Give the system back what glibc keeps of freed memory; with other C libraries do nothing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
