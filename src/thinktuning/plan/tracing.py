"""The trainer's own computation on tensors without data, and what is alive at its peak."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache

from thinktuning.engines.decoding import draw_tokens
from thinktuning.engines.kv_cache import decoding_cache
from thinktuning.objective import policy_loss
from thinktuning.plan.job import Job
from thinktuning.plan.model import give_shapes, student, trained_parameters
from thinktuning.plan.peak import Bytes, PeakMemory
from thinktuning.policy import (
    base_of,
    completion_logprobs,
    possible,
    rounded_weights,
    transformer_blocks,
)
from thinktuning.tensors import Lengths
from thinktuning.types import PolicyInputs

WEIGHTS = "policy weights"
GRADIENTS = "gradients"
ACTIVATIONS = "activations"
LOGITS = "logits"
BACKWARD = "temporaries of the backward"
ROUNDED = "rounded weights"
PACKED = "weights packed for the CPU"
CACHE = "KV cache"
DECODING = "temporaries of decoding"


@contextmanager
def _computing(job: Job) -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16, enabled=job.mixed, cache_enabled=False):
        yield


def trace_update(job: Job, rollouts: int) -> Bytes:
    """Peak of a micro-batch's forward and backward, weights and gradients included.

    Gradients of earlier micro-batches are there, unless one is the whole mini-batch. With FSDP2 the
    whole weights are counted, and gradients outside of the blocks only: the others are reduced one
    block at a time. Rollouts of a micro-batch are of as few prompts as may be.

    Args:
        job: Lengths, model and objective.
        rollouts: Of the micro-batch.
    """
    model = student(job)
    with FakeTensorMode(), PeakMemory(WEIGHTS) as memory:
        give_shapes(model)
        memory.hold(WEIGHTS, model.parameters())
        shared = job.strategy == "fsdp2"
        reduced = {p for b in transformer_blocks(model) for p in b.parameters()} if shared else ()

        def arrived(parameter: Tensor) -> None:
            memory.hold(GRADIENTS, [parameter.grad])
            if parameter in reduced:
                parameter.grad = None

        for parameter in trained_parameters(model.parameters()):
            parameter.register_post_accumulate_grad_hook(arrived)
        head = base_of(model).get_output_embeddings()  # type: ignore[operator]
        head.register_forward_pre_hook(lambda *_: _enter(memory, LOGITS))
        memory.phase = ROUNDED
        with _computing(job), rounded_weights(model) as sums:
            # The first of several leaves its gradients to the others.
            for _ in range(1 if rollouts >= job.rows else 2):
                memory.hold(GRADIENTS, sums.tensors)
                memory.peak.clear()
                memory.phase = ACTIVATIONS
                micro = _inputs(job, rollouts)
                scoring = possible(model, job.scoring)
                lengths = _lengths(job, rollouts)
                scores = completion_logprobs(model, micro, 1.0, scoring, lengths)
                loss = policy_loss(replace(micro, logprobs=scores.logprobs), job.objective).loss
                memory.phase = BACKWARD
                loss.backward()
                del micro, scores, loss
    return memory.peak


def _enter(memory: PeakMemory, phase: str) -> None:
    memory.phase = phase


def _inputs(job: Job, rollouts: int) -> PolicyInputs:
    length = job.completion_tokens
    shape = (rollouts, job.prompt_tokens + length)
    logprobs = torch.zeros(rollouts, length)
    return PolicyInputs(
        input_ids=torch.zeros(shape, dtype=torch.long),
        attention_mask=torch.ones(shape, dtype=torch.bool),
        completion_mask=torch.ones(rollouts, length, dtype=torch.bool),
        injected_mask=torch.zeros(rollouts, length, dtype=torch.bool),
        advantages=torch.ones(rollouts),
        sampling_logprobs=logprobs,
        ref_logprobs=logprobs if job.objective.kl_coef > 0 else None,
        token_weights=torch.ones(rollouts, length),
    )


def _lengths(job: Job, rollouts: int) -> Lengths:
    owner = [i // job.group_size for i in range(rollouts)]
    prompts = owner[-1] + 1
    return Lengths(
        first=[u * job.group_size for u in range(prompts)],
        prompts=[job.prompt_tokens] * prompts,
        owner=owner,
        completions=[job.completion_tokens] * rollouts,
    )


@torch.no_grad()
def trace_sampling(
    job: Job, model: Any, prompts: int, completions: int, prompt_tokens: int, new_tokens: int
) -> Bytes:
    """Peak of the Transformers engine over one batch, without the weights that it is given.

    Args:
        job: Precision, and the kind of device.
        model: Without data.
        prompts: Read at a time.
        completions: Decoded at a time.
        prompt_tokens: Of every prompt.
        new_tokens: Of every completion.
    """
    with FakeTensorMode():
        give_shapes(model)
        with PeakMemory(ROUNDED) as memory, _computing(job), rounded_weights(model):
            memory.hold(WEIGHTS, model.parameters())
            rounded = memory.live[ROUNDED]
            memory.phase = DECODING
            linears = [m.weight for m in model.modules() if type(m) is nn.Linear]
            packed = 0 if job.gpu else sum(weight.nbytes for weight in linears)
            config: Any = base_of(model).config
            read: Any = DynamicCache(config=config)
            model(
                input_ids=torch.zeros(prompts, prompt_tokens, dtype=torch.long),
                attention_mask=torch.ones(prompts, prompt_tokens, dtype=torch.bool),
                past_key_values=read,
                use_cache=True,
                logits_to_keep=1,
            )
            one = [[t[:1, :, :1].clone() for t in (x.keys, x.values)] for x in read.layers]
            del read
            cache: Any = decoding_cache(config)
            length = prompt_tokens + new_tokens - 1
            for i, states in enumerate(one):
                keys, values = (state.repeat(completions, 1, length - 1, 1) for state in states)
                cache.update(keys, values, i)
            del keys, values
            logits = model(
                input_ids=torch.zeros(completions, 1, dtype=torch.long),
                attention_mask=torch.ones(completions, length, dtype=torch.bool),
                past_key_values=cache,
                use_cache=True,
            ).logits[:, -1]
            draw_tokens(logits.float(), [0.5] * completions)
            kept = sum(
                states.untyped_storage().nbytes()
                for layer in cache.layers
                for states in (layer.keys, layer.values)
            )
    decoding = memory.peak[DECODING] - kept
    return Bytes({ROUNDED: rounded, PACKED: packed, CACHE: kept, DECODING: decoding})


@dataclass(frozen=True)
class OptimizerCost:
    """Bytes of an optimizer.

    Attributes:
        state: For every trained parameter.
        step: During a step, for every trained parameter.
        step_largest: During a step, for every parameter of the largest tensor.
    """

    state: float
    step: float
    step_largest: float


def measure_optimizer(factory: Callable[[Iterable[Any]], Optimizer], gpu: bool) -> OptimizerCost:
    """Let the optimizer take a step on small tensors, and count what it keeps and what it borrows.

    Args:
        factory: Makes the optimizer.
        gpu: Where torch's optimizers work on all tensors at once unless told otherwise.
    """
    state, one = _optimizer_bytes(factory, 1, gpu)
    # From two to three: one tensor at a time, the last one's rest lives on into the next.
    step = _optimizer_bytes(factory, 3, gpu)[1] - _optimizer_bytes(factory, 2, gpu)[1]
    return OptimizerCost(state=state, step=step, step_largest=one - step)


def _optimizer_bytes(
    factory: Callable[[Iterable[Any]], Optimizer], tensors: int, gpu: bool
) -> tuple[float, float]:
    """Bytes of state, by parameters, and those borrowed in a step, by parameters of a tensor."""
    parameters = [nn.Parameter(torch.ones(256, 256)) for _ in range(tensors)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer = factory(parameters)
    for group in optimizer.param_groups:
        if gpu and "foreach" in group and group["foreach"] is None and not group.get("fused"):
            group["foreach"] = True
    optimizer.step()
    kept = [t for t in tree_leaves(optimizer.state_dict()["state"]) if isinstance(t, Tensor)]
    elements = parameters[0].numel()
    with PeakMemory("step") as memory:
        memory.hold("kept", [*kept, *parameters, *(p.grad for p in parameters)])
        optimizer.step()
    state = sum(t.nbytes for t in kept) / (tensors * elements)
    return state, memory.peak["step"] / elements
