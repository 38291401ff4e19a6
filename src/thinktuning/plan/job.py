"""What the planner reads out of a configuration; of it only the optimizer is instantiated."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.cli import OptimizerCallable
from torch.optim import Optimizer

from thinktuning.errors import InputError
from thinktuning.objective import ObjectiveConfig
from thinktuning.policy import LoraSettings, Scoring
from thinktuning.strategy import check_strategy
from thinktuning.teaching import guided_count

GIB = 2**30


@dataclass(frozen=True)
class PlanOptions:
    """What the plan is made for; all else comes from the configuration.

    Attributes:
        device_memory_gib: Memory of a device in GiB. null: this machine's GPU, or its RAM shared by
            the processes that train on its CPUs.
        prompt_tokens: Length of a prompt. null: data.max_prompt_tokens, the longest there may be.
        tflops: What a device achieves, in 10^12 floating-point operations a second; with it the
            plan has times.
        bandwidth: What a device's memory achieves, in 10^9 bytes a second; with it the plan has
            the time that decoding takes at least.
    """

    device_memory_gib: float | None = None
    prompt_tokens: int | None = None
    tflops: float | None = None
    bandwidth: float | None = None

    def __post_init__(self) -> None:
        for name in ("device_memory_gib", "prompt_tokens", "tflops", "bandwidth"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise InputError(f"plan: {name} must be positive or null, got {value}")


@dataclass(frozen=True)
class Sampler:
    """An engine, as far as memory goes.

    Attributes:
        pretrained: Of weights of its own; None for those of student and reference.
        vllm: It is vLLM, with weights and cache of its own; else it decodes with Transformers.
        server: It is servers', on devices that aren't planned for.
        max_batch_size: Completions that Transformers decodes at a time.
        quantization: Of weights of its own.
        dtype: In which vLLM keeps weights and cache; None: float32 on a CPU, else bfloat16.
        memory_fraction: Share of a GPU that vLLM takes.
        kv_cache_gib: vLLM's cache; None: what memory_fraction leaves, 1 GiB on a CPU.
    """

    pretrained: str | None = None
    vllm: bool = False
    server: bool = False
    max_batch_size: int = 64
    quantization: Literal["4bit", "8bit"] | None = None
    dtype: str | None = None
    memory_fraction: float = 0.3
    kv_cache_gib: float | None = None


@dataclass(frozen=True)
class Guidance:
    """Stage 2, as far as memory goes.

    Attributes:
        sampler: Whose engine replies: the teacher's, or the student's.
        replies: Of a rollout batch on one rank, at most.
        prompt_tokens: Of the teacher's prompt, at most.
        reply_tokens: Of a reply, at most.
    """

    sampler: Sampler
    replies: int
    prompt_tokens: int
    reply_tokens: int


@dataclass(frozen=True)
class Job:
    """A run on one device, lengths as long as they may be.

    Attributes:
        pretrained: The student.
        attention: Transformers' ``attn_implementation``.
        scoring: How logprobs are computed.
        lora: Adapters; None trains all weights.
        activation_checkpointing: Blocks are computed again in the backward.
        mixed: Computes in bfloat16 on float32 weights.
        objective: What the update optimises.
        optimizer: Makes the optimizer of some parameters.
        micro_batch_size: Rollouts in a forward and backward pass.
        num_mini_batches: Optimizer steps of a rollout batch.
        prompts: Of a rollout batch on one rank.
        group_size: Rollouts of a prompt.
        prompt_tokens: Of every prompt.
        completion_tokens: Of every completion.
        sampler: The student's engine.
        guidance: None without one, and where a server replies.
        reference: A frozen copy of the student is held.
        strategy: One whole model, one on each rank, or one that ranks share.
        cpu_offload: Of FSDP2.
        ranks: Devices that train.
        gpu: The device is one.
        device_memory: Of a rank's device, bytes.
    """

    pretrained: str
    attention: str
    scoring: Scoring
    lora: LoraSettings | None
    activation_checkpointing: bool
    mixed: bool
    objective: ObjectiveConfig
    optimizer: Callable[[Iterable[Any]], Optimizer]
    micro_batch_size: int
    num_mini_batches: int
    prompts: int
    group_size: int
    prompt_tokens: int
    completion_tokens: int
    sampler: Sampler
    guidance: Guidance | None
    reference: bool
    strategy: Literal["single", "ddp", "fsdp2"]
    cpu_offload: bool
    ranks: int
    gpu: bool
    device_memory: int

    @property
    def quantized(self) -> bool:
        """The frozen weights are in 8 or 4 bits."""
        return self.lora is not None and self.lora.base in ("8bit", "4bit")

    @property
    def rows(self) -> int:
        """Rollouts of an optimizer step on one rank."""
        return max(1, self.prompts * self.group_size // self.num_mini_batches)


def read_job(config: Namespace, options: PlanOptions) -> Job:
    """The job that ``thinktuning fit`` would do with a configuration.

    Args:
        config: As the parser of ``thinktuning plan`` gives it.
        options: What it doesn't say.

    Raises:
        InputError: If the configuration can't be planned for.
    """
    model, data, trainer = config.model, config.data, config.trainer
    for name in ("group_size", "max_new_tokens", "num_mini_batches", "micro_batch_size"):
        if model[name] < 1:
            raise InputError(f"model: {name} must be at least 1, got {model[name]}")
    gpu = _on_gpu(trainer.accelerator)
    local = _devices(trainer.devices, gpu)
    ranks = local * trainer.num_nodes
    if data.batch_size < ranks:
        raise InputError(f"data: batch_size={data.batch_size} leaves some of {ranks} ranks without")
    strategy, cpu_offload = _strategy(trainer.strategy, ranks)
    prompts = -(-data.batch_size // ranks)
    sampler = _sampler(config.engine)
    lora = None if model.lora is None else LoraSettings(**model.lora.as_dict())
    objective = ObjectiveConfig(**model.objective.as_dict())
    guided = config.guidance.gamma.start > 0
    teacher = config.guidance.teacher
    own = teacher is not None and _init(teacher).get("pretrained", "a server's") is not None
    return Job(
        pretrained=model.pretrained,
        attention=model.attention,
        scoring=Scoring(**model.scoring.as_dict()),
        lora=lora,
        activation_checkpointing=model.activation_checkpointing,
        mixed=_mixed(trainer.precision),
        objective=objective,
        optimizer=_optimizer(model.optimizer),
        micro_batch_size=model.micro_batch_size,
        num_mini_batches=model.num_mini_batches,
        prompts=prompts,
        group_size=model.group_size,
        prompt_tokens=options.prompt_tokens or data.max_prompt_tokens,
        completion_tokens=model.max_new_tokens,
        sampler=sampler,
        guidance=_guidance(config.guidance, prompts, model.group_size, sampler) if guided else None,
        reference=lora is None and (objective.kl_coef > 0 or (guided and not own)),
        strategy=strategy,
        cpu_offload=cpu_offload,
        ranks=ranks,
        gpu=gpu,
        device_memory=_device_memory(options.device_memory_gib, gpu, local),
    )


def _init(spec: Namespace) -> dict[str, Any]:
    arguments: dict[str, Any] = spec.get("init_args", Namespace()).as_dict()
    return arguments


def _guidance(
    settings: Namespace, prompts: int, group_size: int, student: Sampler
) -> Guidance | None:
    teacher = settings.teacher
    if teacher is not None and "pretrained" not in _init(teacher):
        return None  # a server's memory is its own
    gamma = settings.gamma
    most = max(gamma.start, gamma.end if gamma.kind != "constant" else 0.0)
    return Guidance(
        student if teacher is None else _sampler(teacher),
        prompts * guided_count(most, group_size),
        settings.max_prompt_tokens,
        settings.max_new_tokens,
    )


def _sampler(spec: Namespace) -> Sampler:
    known = {k: v for k, v in _init(spec).items() if k in Sampler.__dataclass_fields__}
    name = spec.class_path.rsplit(".", 1)[-1]
    return Sampler(vllm=name == "VLLMEngine", server=name == "VLLMServerEngine", **known)


def _optimizer(spec: Namespace) -> Callable[[Iterable[Any]], Optimizer]:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--optimizer", type=OptimizerCallable)
    made = parser.instantiate(parser.parse_object({"optimizer": spec.as_dict()}))
    factory: Callable[[Iterable[Any]], Optimizer] = made.optimizer
    return factory


def _mixed(precision: Any) -> bool:
    if precision in (None, 32, "32", "32-true"):
        return False
    if precision in ("bf16", "bf16-mixed"):
        return True
    raise InputError(
        f"trainer.precision {precision} isn't supported; expected bf16-mixed or 32-true"
    )


def _strategy(spec: Any, ranks: int) -> tuple[Literal["single", "ddp", "fsdp2"], bool]:
    """The strategy and whether it offloads."""
    if isinstance(spec, str):
        check_strategy(spec)
        if spec == "fsdp2":
            return "fsdp2", False
        return ("ddp" if ranks > 1 or spec.startswith("ddp") else "single"), False
    name = spec.class_path.rsplit(".", 1)[-1]
    if name == "FSDP2Strategy":
        return "fsdp2", bool(_init(spec).get("cpu_offload"))
    if name in ("DDPStrategy", "SingleDeviceStrategy"):
        return ("ddp" if name == "DDPStrategy" else "single"), False
    raise InputError(f"trainer.strategy {name} can't be planned for; expected auto, ddp or fsdp2")


def _on_gpu(accelerator: Any) -> bool:
    if accelerator in ("gpu", "cuda"):
        return True
    if accelerator == "cpu":
        return False
    if accelerator == "auto":
        return torch.cuda.is_available()
    raise InputError(f"trainer.accelerator {accelerator!r}: the plan knows cpu, gpu and auto")


def _devices(devices: Any, gpu: bool) -> int:
    """How many devices of this machine, or of a machine like it, train."""
    if isinstance(devices, list):
        return len(devices)
    if devices in ("auto", -1, "-1"):
        return max(1, torch.cuda.device_count()) if gpu else 1
    if gpu and isinstance(devices, str) and "," in devices:
        return len([d for d in devices.split(",") if d.strip()])
    return int(devices)


def _device_memory(gib: float | None, gpu: bool, local_ranks: int) -> int:
    if gib is not None:
        return int(gib * GIB)
    if not gpu:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // local_ranks
    if not torch.cuda.is_available():
        raise InputError("this machine has no GPU to plan for: say --device_memory_gib 80")
    return torch.cuda.get_device_properties(0).total_memory
