"""Memory of a device at each moment of a step, and the largest micro-batch that fits it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from thinktuning.plan.job import GIB, Guidance, Job, Sampler
from thinktuning.plan.model import (
    Sizes,
    measure_model,
    named_model,
    read_config,
    reference,
    student,
)
from thinktuning.plan.peak import Bytes
from thinktuning.plan.tracing import (
    GRADIENTS,
    WEIGHTS,
    OptimizerCost,
    measure_optimizer,
    trace_sampling,
    trace_update,
)

REFERENCE = "reference weights"
BUCKETS = "gradient buckets"
OPTIMIZER = "optimizer state"
GATHERED = "gathered weights"
REDUCED = "gradients before they are reduced"
ENGINE = "vLLM's own weights"
TEACHER = "teacher's own weights"
STEPPING = "temporaries of the optimizer"

ROLLOUT, GUIDANCE, BACKWARD, STEP = "rollout", "guidance", "backward", "optimizer step"


@dataclass(frozen=True)
class Plan:
    """What a device needs.

    Attributes:
        job: What it was made for.
        sizes: Of the student.
        moments: Bytes by what they hold, for each moment of a step that may be the peak.
        largest_micro_batch: Rollouts that a forward and backward pass may have; 0: none fits.
    """

    job: Job
    sizes: Sizes
    moments: dict[str, Bytes]
    largest_micro_batch: int

    @property
    def peak(self) -> int:
        """Bytes at the moment that needs most."""
        return max(moment.total() for moment in self.moments.values())

    @property
    def limit(self) -> str:
        """The moment that needs most."""
        return max(self.moments, key=lambda name: self.moments[name].total())


def make_plan(job: Job) -> Plan:
    """Compute a device's memory from shapes alone."""
    sizes, cost = measure_model(job.pretrained, job), measure_optimizer(job.optimizer, job.gpu)
    kept = _kept(job, sizes, cost)
    backward = _Backward(job, sizes, kept)
    between = _without(kept, GRADIENTS)  # they live in the update only
    moments = {ROLLOUT: between + _decoding(job, sizes, job.sampler, None)}
    if job.guidance is not None:
        moments[GUIDANCE] = between + _decoding(job, sizes, job.guidance.sampler, job.guidance)
    moments[BACKWARD] = backward.bytes(job.micro_batch_size)
    moments[STEP] = kept + Bytes({STEPPING: _stepping(job, sizes, cost)})
    others = max(m.total() for name, m in moments.items() if name != BACKWARD)
    largest = 0
    if others <= job.device_memory:
        largest = largest_fitting(
            lambda size: backward.bytes(size).total(),
            job.device_memory,
            known=min(job.micro_batch_size, job.rows),
            most=job.rows,
        )
    return Plan(job, sizes, moments, largest)


def largest_fitting(need: Callable[[int], int], limit: int, known: int, most: int) -> int:
    """The largest size from 1 to ``most`` whose need is within ``limit``; 0 if none is.

    Args:
        need: Grows with the size, by as much or more with every step, but for the last one.
        limit: In what ``need`` counts.
        known: A size whose need costs nothing to ask for.
        most: At least ``known``.
    """
    if need(most) <= limit:
        return most
    low, high = (known, most) if need(known) <= limit else (1, known)
    if need(low) > limit:
        return 0
    while high - low > 1:
        rise = (need(high) - need(low)) / (high - low)
        guess = low + int((limit - need(low)) / rise)
        guess = min(max(guess, low + 1), high - 1)
        if need(guess) > limit:
            high = guess
            continue
        # The next step is at least as high as those before it.
        if need(guess) + (need(guess) - need(low)) / (guess - low) > limit:
            return guess
        low = guess
    return low


class _Backward:
    """Memory of a micro-batch's forward and backward; every size is traced once."""

    def __init__(self, job: Job, sizes: Sizes, kept: Bytes) -> None:
        self._job, self._sizes, self._kept = job, sizes, kept
        self._known: dict[int, Bytes] = {}

    def bytes(self, rollouts: int) -> Bytes:
        rollouts = min(rollouts, self._job.rows)
        if rollouts not in self._known:
            self._known[rollouts] = self._trace(rollouts)
        return self._known[rollouts]

    def _trace(self, rollouts: int) -> Bytes:
        traced = trace_update(self._job, rollouts)
        if self._job.strategy != "fsdp2":
            return _without(self._kept, GRADIENTS) + _without(traced, WEIGHTS)
        # What is traced is whole: the shards and the parts that are gathered take its place.
        unreduced = traced[GRADIENTS]
        compute = 2 if self._job.mixed else 4
        gathered = compute * (self._sizes.root + 2 * self._sizes.block)
        unreduced += (compute + 4) * self._sizes.trained_block
        needed = _without(traced, WEIGHTS, GRADIENTS)
        return self._kept + needed + Bytes({GATHERED: gathered, REDUCED: unreduced})


def _without(held: Bytes, *names: str) -> Bytes:
    return Bytes({name: size for name, size in held.items() if name not in names})


def _kept(job: Job, sizes: Sizes, cost: OptimizerCost) -> Bytes:
    """What stays from step to step, and gradients."""
    gradients = 4 * sizes.trained
    held = Bytes(
        {
            WEIGHTS: _weights(job, sizes),
            REFERENCE: (2 if job.mixed else 4) * sizes.parameters if job.reference else 0,
            GRADIENTS: gradients,
            OPTIMIZER: round(cost.state * sizes.trained),
        }
    )
    if job.strategy == "ddp":
        held[BUCKETS] = gradients
    if job.strategy == "fsdp2":
        share = 0 if job.cpu_offload else 1
        held = Bytes({name: share * -(-size // job.ranks) for name, size in held.items()})
    for sampler in _samplers(job):
        if sampler.vllm and not job.gpu:  # asleep between rollouts on a GPU
            held[ENGINE] += _vllm_bytes(job, sizes, sampler)
    if job.guidance is not None and not job.guidance.sampler.vllm:
        held[TEACHER] = _own_weights(job, job.guidance.sampler)
    return +held


def _samplers(job: Job) -> list[Sampler]:
    teacher = job.guidance.sampler if job.guidance is not None else job.sampler
    return [job.sampler] if teacher is job.sampler else [job.sampler, teacher]


def _weights(job: Job, sizes: Sizes) -> int:
    """Bytes of the student's weights as they are held, whatever computes."""
    if job.lora is None:
        return 4 * sizes.parameters
    if not job.quantized:
        return sizes.bytes
    computing = 2 if job.mixed else 4
    return sizes.bytes - computing * sizes.quantized + _in_bits(sizes.quantized, job.lora.base)


def _in_bits(parameters: int, kind: str) -> int:
    """Bytes of weights that bitsandbytes keeps; nf4 has a float32 scale for every 64 of them."""
    return round(parameters * {"8bit": 1.0, "4bit": 0.5 + 4 / 64}[kind])


def _stepping(job: Job, sizes: Sizes, cost: OptimizerCost) -> int:
    share = job.ranks if job.strategy == "fsdp2" else 1
    if job.cpu_offload:
        return 0
    return round((cost.step * sizes.trained + cost.step_largest * sizes.largest) / share)


def _decoding(job: Job, sizes: Sizes, sampler: Sampler, guidance: Guidance | None) -> Bytes:
    """What an engine takes while it samples for the student, or replies for the teacher."""
    if sampler.server:
        return Bytes()
    if sampler.vllm:
        return Bytes({ENGINE: _vllm_bytes(job, sizes, sampler)} if job.gpu else {})
    if guidance is None:
        # A prompt's completions stay together.
        prompts = max(1, min(job.prompts, sampler.max_batch_size // job.group_size))
        model = student(job)
        shape = (prompts, prompts * job.group_size, job.prompt_tokens, job.completion_tokens)
    else:
        chats = min(guidance.replies, sampler.max_batch_size)
        own = sampler.pretrained
        model = reference(job) if own is None else named_model(own, job)
        shape = (chats, chats, guidance.prompt_tokens, guidance.reply_tokens)
    held = trace_sampling(job, model, *shape)
    if job.strategy == "fsdp2":  # the policy's, or the reference's; the policy's until the update
        held[GATHERED] = sizes.parameters * (2 if job.mixed else 4)
    return held


def _vllm_bytes(job: Job, sizes: Sizes, sampler: Sampler) -> int:
    parameters = sizes.parameters
    if sampler.pretrained is not None:
        parameters = measure_model(sampler.pretrained, job).parameters
    width = 4 if sampler.dtype == "float32" or (sampler.dtype is None and not job.gpu) else 2
    if job.gpu and sampler.kv_cache_gib is None:
        return int(sampler.memory_fraction * job.device_memory)
    return width * parameters + int((sampler.kv_cache_gib or 1) * GIB)


def _own_weights(job: Job, sampler: Sampler) -> int:
    """Bytes of a teacher's weights in the Transformers engine."""
    if sampler.pretrained is None:
        return 0
    sizes = measure_model(sampler.pretrained, job)
    dtype = getattr(read_config(sampler.pretrained), "dtype", None) if job.gpu else None
    width = (dtype or torch.float32).itemsize
    if sampler.quantization is None:
        return int(width * sizes.parameters)
    whole = width * (sizes.parameters - sizes.quantized)
    return int(whole + _in_bits(sizes.quantized, sampler.quantization))
