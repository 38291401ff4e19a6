"""From rollouts to the tensors of the update, and their cutting into mini- and micro-batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from thinktuning.objective import group_advantages
from thinktuning.types import PolicyInputs, RolloutBatch

_PASS = 64
"""What a pass through the model costs by itself, in tokens; roughly, as seen on a CPU."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of B rollouts of U prompts.

    Attributes:
        first: A rollout of each prompt.
        prompts: Of each prompt.
        owner: The prompt of each rollout.
        completions: Of each rollout.
    """

    first: Sequence[int]
    prompts: Sequence[int]
    owner: Sequence[int]
    completions: Sequence[int]


def with_advantages(
    batch: RolloutBatch,
    scale: Literal["std", "none"],
    cut_off: Literal["train", "ignore"] = "train",
) -> RolloutBatch:
    """Fill in every rollout's group-relative advantage; rewards must be set.

    Args:
        batch: Scored rollouts.
        scale: See ``group_advantages``.
        cut_off: ``ignore`` gives rollouts that didn't end the advantage 0; they still count in
            their group's mean.

    Source:
        ``ignore``: overlong filtering, DAPO, Yu et al. 2025, arXiv 2503.14476, section 3.4.
    """
    # float64: the advantage of a rollout must not depend on how its rewards were rounded.
    rewards = torch.tensor(
        [[r.reward for r in group] for group in batch.groups()], dtype=torch.float64
    )
    advantages = group_advantages(rewards, scale).flatten().tolist()
    return batch.with_rollouts(
        tuple(
            replace(r, advantage=a if r.finished or cut_off == "train" else 0.0)
            for r, a in zip(batch.rollouts, advantages, strict=True)
        )
    )


def policy_inputs(batch: RolloutBatch, device: torch.device) -> PolicyInputs:
    """Pad a batch into tensors: prompts on the left, completions on the right.

    Args:
        batch: Rollouts with advantages.
        device: Where the tensors are to be.

    Returns:
        Inputs of all B rollouts in their order, without the trainer's logprobs.
    """
    rollouts = batch.rollouts
    prompt_length = max(len(r.prompt.token_ids) for r in rollouts)
    completion_length = max(len(r.completion_ids) for r in rollouts)
    shape = (len(rollouts), prompt_length + completion_length)
    input_ids = torch.zeros(shape, dtype=torch.long)
    attention_mask = torch.zeros(shape, dtype=torch.bool)
    injected_mask = torch.zeros(len(rollouts), completion_length, dtype=torch.bool)
    sampling_logprobs = torch.zeros(len(rollouts), completion_length)
    for i, r in enumerate(rollouts):
        start = prompt_length - len(r.prompt.token_ids)
        stop = prompt_length + len(r.completion_ids)
        input_ids[i, start:stop] = torch.tensor([*r.prompt.token_ids, *r.completion_ids])
        attention_mask[i, start:stop] = True
        injected_mask[i, : len(r.completion_ids)] = torch.tensor(r.injected_mask)
        sampling_logprobs[i, : len(r.completion_ids)] = torch.tensor(r.logprobs)
    advantages = torch.tensor([r.advantage for r in rollouts], dtype=torch.float32)
    return PolicyInputs(
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
        completion_mask=attention_mask[:, prompt_length:].to(device),
        injected_mask=injected_mask.to(device),
        advantages=advantages.to(device),
        sampling_logprobs=sampling_logprobs.to(device),
    )


def split(inputs: PolicyInputs, size: int) -> Iterator[PolicyInputs]:
    """Cut into runs of ``size`` rollouts; the last run may be shorter."""
    for start in range(0, inputs.input_ids.shape[0], size):
        yield inputs.rows(slice(start, start + size))


def micro_batches(
    inputs: PolicyInputs, rows: int, tokens: int | None = None, packed: bool = False
) -> list[torch.Tensor]:
    """Which rollouts go through the model together.

    Those of a prompt stand together, so that it may be read once, and the short ones with the short
    ones: where padding would cost more than another pass, there is one.

    Args:
        inputs: The rollouts; those of a prompt are neighbours.
        rows: At most so many.
        tokens: At most so many, unless one rollout alone has more; None: any.
        packed: There is no padding, and a prompt counts once; else padding counts as well.

    Returns:
        The places of each micro-batch's rollouts, int64.
    """
    lengths = lengths_of(inputs)
    runs, behind = lengths.owner, lengths.completions
    before = [lengths.prompts[run] for run in runs]
    longest: dict[int, int] = {}
    for i, number in enumerate(runs):
        longest[number] = max(longest.get(number, 0), before[i] + behind[i])
    order = sorted(range(len(runs)), key=lambda i: (longest[runs[i]], runs[i], behind[i]))

    def size(batch: list[int]) -> int:
        if packed:
            prompts = {runs[k]: before[k] for k in batch}
            return sum(prompts.values()) + sum(behind[k] for k in batch)
        return len(batch) * (max(before[k] for k in batch) + max(behind[k] for k in batch))

    batches: list[list[int]] = []
    for i in order:
        grown = [*batches[-1], i] if batches else [i]
        padding = 0 if packed else sum(behind[i] - behind[k] for k in grown)
        fits = len(grown) <= rows and (tokens is None or size(grown) <= tokens)
        if not batches or (fits and padding <= before[i] + _PASS):
            batches[-1:] = [grown]
        else:
            batches.append([i])
    return [torch.tensor(batch, device=inputs.input_ids.device) for batch in batches]


def lengths_of(inputs: PolicyInputs) -> Lengths:
    """Of rollouts that stand beside those of the same prompt."""
    width = inputs.completion_mask.shape[1]
    ids, mask = inputs.input_ids[:, :-width], inputs.attention_mask[:, :-width]
    first, owner = distinct_prompts(ids, mask)
    return Lengths(
        first=first.tolist(),
        prompts=mask[first].sum(dim=1).tolist(),
        owner=owner.tolist(),
        completions=inputs.attention_mask[:, -width:].sum(dim=1).tolist(),
    )


def distinct_prompts(ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where neighbouring rows have one prompt.

    Args:
        ids: int64 [B, P].
        mask: bool [B, P].

    Returns:
        The first row of each of the U runs, int64 [U], and the run of each row, int64 [B].
    """
    other = (ids[1:] != ids[:-1]).logical_or(mask[1:] != mask[:-1]).any(dim=1)
    new = torch.cat([other.new_ones(min(len(ids), 1)), other])
    return new.nonzero()[:, 0], new.cumsum(dim=0) - 1


def trim(inputs: PolicyInputs) -> PolicyInputs:
    """Drop the columns that are padding in every row. What is left is computed as before."""
    width = inputs.completion_mask.shape[1]
    prompt_width = inputs.input_ids.shape[1] - width
    used = inputs.attention_mask.any(dim=0)
    start = prompt_width - int(used[:prompt_width].sum())
    length = int(used[prompt_width:].sum())
    columns = slice(start, prompt_width + length)

    def completion(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor[:, :length]

    return replace(
        inputs,
        input_ids=inputs.input_ids[:, columns],
        attention_mask=inputs.attention_mask[:, columns],
        completion_mask=inputs.completion_mask[:, :length],
        injected_mask=inputs.injected_mask[:, :length],
        logprobs=completion(inputs.logprobs),
        old_logprobs=completion(inputs.old_logprobs),
        ref_logprobs=completion(inputs.ref_logprobs),
        sampling_logprobs=completion(inputs.sampling_logprobs),
        token_weights=completion(inputs.token_weights),
    )
