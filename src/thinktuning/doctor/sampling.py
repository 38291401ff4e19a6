"""Checks of who samples: the student's engine, and the teacher."""

import math
import time
from collections.abc import Sequence

import torch

from thinktuning.doctor.finding import Finding, Status, failed, ok, skipped, warning
from thinktuning.doctor.setup import Setup
from thinktuning.objective import sampling_gap
from thinktuning.policy import completion_logprobs, rounded_weights, suitable
from thinktuning.teaching import Reply, parse_feedback, teacher_chat
from thinktuning.tensors import policy_inputs
from thinktuning.types import Prompt

_QUESTIONS = 3
# Mean distance in nats. In bfloat16 SmolLM2-135M is 0.08 from itself, in float32 1e-5.
_ROUNDING = 1e-3
_ROUNDING_16_BITS = 0.3


def engine(setup: Setup) -> Finding:
    """The engine samples, has room for the longest answer, and agrees with the trainer."""
    module, batch = setup.student, setup.rollouts
    longest = max(len(p.token_ids) for p in setup.prompts)
    limit = module.engine.context_length
    if limit is not None and longest + module.max_new_tokens > limit:
        return failed(
            f"a prompt of {longest} tokens and model.max_new_tokens={module.max_new_tokens} need "
            f"more than the {limit} positions of the model or its engine",
            "lower model.max_new_tokens or data.max_prompt_tokens",
        )
    inputs = policy_inputs(batch, module.device)
    scoring = suitable(module.policy, module.scoring)
    with torch.no_grad(), setup.computing(), rounded_weights(module.policy):
        scores = completion_logprobs(module.policy, inputs, module.temperature, scoring)
    assert inputs.sampling_logprobs is not None
    gap = sampling_gap(scores.logprobs, inputs.sampling_logprobs, inputs.completion_mask)
    mean = float(gap.mean.total) / float(gap.mean.weight)
    exact = setup.trainer.precision == "32-true"
    return agreement(mean, float(gap.maximum), int(gap.mean.weight), exact)


def agreement(mean: float, largest: float, tokens: int, exact: bool) -> Finding:
    """Judge the distance between the logprobs of engine and trainer.

    Args:
        mean: Of the absolute differences, nats.
        largest: Of them, nats.
        tokens: That were compared.
        exact: The trainer computes in float32.
    """
    found = f"logprobs of {tokens} tokens: {mean:.2g} nats apart on average, {largest:.2g} at most"
    if not math.isfinite(mean) or mean > _ROUNDING_16_BITS:
        return failed(
            f"{found}: the engine samples from another policy than the one that is trained",
            "see whether engine and trainer have the same model and temperature; report this model",
        )
    if exact and mean > _ROUNDING:
        return warning(
            f"{found}, more than what float32 rounds",
            "right for an engine in 16 bits: --model.objective.importance token weighs it out",
        )
    return ok(found)


def teacher(setup: Setup) -> Finding:
    """The teacher answers, and its replies parse."""
    guidance = setup.guidance
    if guidance.gamma.start == 0:
        return skipped("guidance.gamma.start is 0: no teacher is asked")
    asked = setup.prompts[:_QUESTIONS]
    chats = [teacher_chat(guidance.behaviors, p.question, _gold_answer(p)) for p in asked]
    start = time.monotonic()
    replies = setup.ask(chats)
    finding = parse_rate(replies, time.monotonic() - start)
    if finding.status is Status.OK and (cramped := guidance.cramped_behaviors()):
        return warning(
            f"{finding.found}, but they may not be as long as the worked examples of "
            f"{', '.join(cramped)}: a part ends in the middle of a word",
            f"more than guidance.max_new_tokens={guidance.max_new_tokens}",
        )
    return finding


def _gold_answer(prompt: Prompt) -> str:
    """What a good student would say: the check needn't wait for the real one."""
    return f"{prompt.solution}\nThe final answer is \\boxed{{{prompt.answer}}}.".strip()


def parse_rate(replies: Sequence[Reply], seconds: float) -> Finding:
    """Judge what the teacher has said.

    Args:
        replies: At least one.
        seconds: That they took.
    """
    skips = sorted({r.skipped for r in replies if r.skipped is not None})
    parsed = sum(r.skipped is None and parse_feedback(r.text) is not None for r in replies)
    found = f"{parsed} of {len(replies)} replies parse, in {seconds:.0f} s"
    if parsed == len(replies):
        return ok(found)
    if "unavailable" in skips:
        return failed(
            "the teacher doesn't answer",
            "see whether its server runs, and guidance.teacher's base_url",
        )
    shown = next((r.text for r in replies if r.text and parse_feedback(r.text) is None), "")
    if "prompt_too_long" in skips:
        advice = "raise guidance.max_prompt_tokens, or name fewer guidance.behaviors"
    else:
        advice = "--guidance.constrained true, more guidance.max_new_tokens, or a stronger teacher"
    if parsed:
        return warning(found, advice, shown)
    return failed(f"{found}: every rollout would stay unguided", advice, shown)
