"""The splice: a teacher's continuation inside a student's rollout, on token ids."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from thinktuning.types import Feedback, Guidance, Rollout


def inject(
    rollout: Rollout,
    feedback: Feedback,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    separator: str = "\n\n",
    overlong: Literal["unguided", "cut"] = "unguided",
) -> Rollout:
    r"""Continue a rollout with the teacher's reflection and solution.

    The completion becomes: the student's own ids without the end-of-turn id, then
    ``separator + reason + separator + phrase``, then that same end-of-turn id. The student's ids
    are kept as sampled, never decoded and encoded again.

    Args:
        rollout: A finished, unguided rollout.
        feedback: What the teacher said.
        tokenizer: The student's.
        stop_ids: Every end-of-turn id.
        max_new_tokens: Length limit of a completion, end-of-turn token included.
        separator: Stands before the reflection and before the continuation.
        overlong: What becomes of a guided rollout past the length limit: it stays ``unguided``, or
            it is ``cut`` off there and unfinished, as in the authors' recipe.

    Returns:
        The guided rollout, with ``original`` set. Where nothing can be spliced, the unguided
        rollout with the reason in ``guidance.skipped``: ``too_long`` or ``special_token`` (the
        teacher's text has a control token of the student's chat).
    """
    assert rollout.finished, "only finished rollouts are eligible"
    assert not rollout.guided, "a rollout is guided once"
    text = separator + feedback.reason + separator + feedback.phrase
    guidance_ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    control = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    if not {*control, *tokenizer.all_special_ids, *stop_ids}.isdisjoint(guidance_ids):
        return _unguided(rollout, "special_token")
    *own_ids, end_of_turn = rollout.completion_ids
    # The student never chose to end its turn here, so the end-of-turn token is off-policy as well.
    injected_ids = [*guidance_ids, end_of_turn]
    fits = len(own_ids) + len(injected_ids) <= max_new_tokens
    if not fits:
        injected_ids = injected_ids[: max_new_tokens - len(own_ids)]
        if overlong == "unguided" or not injected_ids:
            return _unguided(rollout, "too_long")
        text = str(tokenizer.decode(injected_ids))
    return replace(
        rollout,
        completion_ids=(*own_ids, *injected_ids),
        # No sampling logprob exists for injected tokens: misuse must be loud.
        logprobs=(*rollout.logprobs[:-1], *(math.nan for _ in injected_ids)),
        injected_mask=(*(False for _ in own_ids), *(True for _ in injected_ids)),
        finished=fits,
        text=rollout.text + text,
        original=rollout,
    )


def _unguided(rollout: Rollout, reason: str) -> Rollout:
    return replace(rollout, guidance=replace(rollout.guidance or Guidance(()), skipped=reason))
