"""From rollouts to the tensors of the update, and their cutting into mini- and micro-batches."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch

from thinktuning.objective import group_advantages
from thinktuning.types import PolicyInputs, RolloutBatch


def with_advantages(batch: RolloutBatch, scale: Literal["std", "none"]) -> RolloutBatch:
    """Fill in every rollout's group-relative advantage; rewards must be set."""
    # float64: the advantage of a rollout must not depend on how its rewards were rounded.
    rewards = torch.tensor(
        [[r.reward for r in group] for group in batch.groups()], dtype=torch.float64
    )
    advantages = group_advantages(rewards, scale).flatten().tolist()
    return batch.with_rollouts(
        tuple(replace(r, advantage=a) for r, a in zip(batch.rollouts, advantages, strict=True))
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
