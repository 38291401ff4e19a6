"""Models with shapes alone: what they weigh, and what their computation can be traced with."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from thinktuning.errors import InputError
from thinktuning.plan.job import Job
from thinktuning.policy import (
    ForwardCost,
    LoraSettings,
    base_of,
    forward_cost,
    read_config,
    recompute_activations,
    transformer_blocks,
    with_adapters,
)


@dataclass(frozen=True)
class Sizes:
    """How big a model is.

    Attributes:
        bytes: Of all weights as they are held.
        parameters: All of them.
        trained: Those that are trained.
        largest: The biggest trained tensor.
        root: Outside of the transformer blocks: embedding, head, last norm.
        block: Of the biggest transformer block.
        trained_block: Trained, of the biggest block.
        quantized: Of the linear layers that bitsandbytes would keep in fewer bits.
        forward: What reading tokens takes.
    """

    bytes: int
    parameters: int
    trained: int
    largest: int
    root: int
    block: int
    trained_block: int
    quantized: int
    forward: ForwardCost


def measure_model(name: str, job: Job) -> Sizes:
    """Count the weights of the student, or of another model without its adapters."""
    model = named_model(name, job)
    base: Any = base_of(model)
    blocks = transformer_blocks(model)
    head = base.get_output_embeddings().weight
    everything, trained = list(model.parameters()), trained_parameters(model.parameters())
    block, trained_block = (
        max(_count(select(b.parameters())) for b in blocks) for select in (list, trained_parameters)
    )
    return Sizes(
        bytes=sum(p.nbytes for p in everything),
        parameters=_count(everything),
        trained=_count(trained),
        largest=max((p.numel() for p in trained), default=0),
        root=_count(everything) - sum(_count(b.parameters()) for b in blocks),
        block=block,
        trained_block=trained_block,
        quantized=_linear(base, head),
        forward=forward_cost(model),
    )


def _linear(base: nn.Module, head: Tensor) -> int:
    """Weights of linear layers but the head; adapters aren't counted."""
    return sum(
        m.weight.numel()
        for name, m in base.named_modules()
        if isinstance(m, nn.Linear) and m.weight is not head and "lora_" not in name
    )


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in parameters)


def trained_parameters(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Those that aren't frozen."""
    return [p for p in parameters if p.requires_grad]


def named_model(name: str, job: Job) -> Any:
    """The student, or a teacher's model of its own."""
    return student(job) if name == job.pretrained else _without_data(name, job, torch.float32)


def reference(job: Job) -> Any:
    """The frozen reference: without LoRA a model of its own, in the precision that computes."""
    compute = torch.bfloat16 if job.mixed else torch.float32
    return student(job) if job.lora else _without_data(job.pretrained, job, compute)


def student(job: Job) -> Any:
    """The student without data, as ``ThinkTuningModule.configure_model`` prepares it.

    Its linear layers that bitsandbytes keeps in fewer bits are those it computes with.
    """
    compute = torch.bfloat16 if job.mixed else torch.float32
    # FSDP2 gathers what it computes with in the precision of the computation.
    dtype = compute if job.strategy == "fsdp2" else torch.float32
    if job.lora is not None:
        dtype = compute if job.quantized else getattr(torch, job.lora.base)
    return _without_data(job.pretrained, job, dtype, job.lora)


def _without_data(name: str, job: Job, dtype: torch.dtype, lora: LoraSettings | None = None) -> Any:
    """A model with shapes alone, on the device meta."""
    config = read_config(name)
    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=job.attention
            )
            model = model if lora is None else with_adapters(model, lora)
    except (ValueError, ImportError) as error:
        raise InputError(f"cannot plan for the model {name!r}: {error}") from error
    if job.activation_checkpointing:
        recompute_activations(model)
    return model.eval()


def give_shapes(model: Any) -> Any:
    """The model on a CPU as far as its operations can tell, in a ``FakeTensorMode``."""
    # Not on the device meta, where attention would take memory that no device's kernel takes.
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False, remove_duplicate=False):
            if weight not in made:  # tied weights stay tied
                shape = torch.empty(weight.shape, dtype=weight.dtype)
                made[weight] = nn.Parameter(shape, weight.requires_grad)
            module._parameters[name] = made[weight]
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return model
