"""Seeds from counters: a draw depends on what is drawn, never on what was drawn before."""

from hashlib import blake2b


def derive_seed(*counters: int | str) -> int:
    """A seed for one draw, e.g. ``derive_seed(seed, step, prompt_index, sample, "rollout")``.

    Args:
        counters: Whatever names the draw; ``1`` and ``"1"`` are different names.

    Returns:
        An integer in ``[0, 2**63)``, the same in every process and on every machine.
    """
    digest = blake2b(repr(counters).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
