"""Tokens and floating-point operations of a step on one device, and the time they take."""

from dataclasses import dataclass

from thinktuning.plan.job import Job
from thinktuning.plan.model import Sizes
from thinktuning.plan.peak import Bytes
from thinktuning.plan.tracing import CACHE


@dataclass(frozen=True)
class Work:
    """One stage of a step.

    Attributes:
        tokens: That the model reads or writes.
        flop: Floating-point operations.
        decoded: Bytes that decoding reads: the weights and the cache once for every token of a
            batch of completions; 0 for stages that don't decode.
    """

    tokens: int
    flop: float
    decoded: float = 0.0

    def seconds(self, tflops: float | None, bandwidth: float | None) -> float | None:
        """The longer of computing and of reading memory, where the device's speed is known."""
        computing = self.flop / (tflops * 1e12) if tflops is not None else 0.0
        reading = self.decoded / (bandwidth * 1e9) if bandwidth is not None else 0.0
        return max(computing, reading) or None


def work_of(job: Job, sizes: Sizes, moments: dict[str, Bytes]) -> dict[str, Work]:
    """The stages of a step that a device does, for completions as long as they may be."""
    rollouts = job.prompts * job.group_size
    length = job.prompt_tokens + job.completion_tokens
    forward = rollouts * sizes.forward.flop(length)
    stages = {}
    if not job.sampler.server:
        stages["rollout"] = Work(
            tokens=job.prompts * job.prompt_tokens + rollouts * job.completion_tokens,
            flop=rollouts * sizes.forward.flop(length, since=job.prompt_tokens)
            + job.prompts * sizes.forward.flop(job.prompt_tokens),
            decoded=_decoded(
                job,
                sizes,
                batches=-(-rollouts // max(job.group_size, job.sampler.max_batch_size)),
                steps=job.completion_tokens,
                cache=moments["rollout"][CACHE],
            ),
        )
    if job.guidance is not None and not job.guidance.sampler.server:
        replies = job.guidance.replies
        length_of_reply = job.guidance.prompt_tokens + job.guidance.reply_tokens
        stages["guidance"] = Work(
            tokens=replies * length_of_reply,
            flop=replies * sizes.forward.flop(length_of_reply),
            decoded=_decoded(
                job,
                sizes,
                batches=-(-replies // job.guidance.sampler.max_batch_size),
                steps=job.guidance.reply_tokens,
                cache=moments["guidance"][CACHE],
            ),
        )
    passes = (job.num_mini_batches > 1) + (job.objective.kl_coef > 0)
    if passes:
        stages["logprobs"] = Work(passes * rollouts * length, passes * forward)
    # The backward takes twice the forward; frozen weights have no gradient of their own, and
    # checkpointing computes the forward again.
    factor = (2 if job.lora is not None else 3) + job.activation_checkpointing
    stages["update"] = Work(rollouts * length, factor * forward)
    return stages


def _decoded(job: Job, sizes: Sizes, batches: int, steps: int, cache: int) -> float:
    """Bytes read; the cache is half full on average."""
    width = 2 if job.strategy == "fsdp2" and job.mixed else 4
    return batches * steps * (width * sizes.forward.linear + cache / 2)
