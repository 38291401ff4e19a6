"""A model's weights under the names of its base, one at a time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

_ADAPTED = ".base_layer"


def named_weights(model: nn.Module, tied: bool = False) -> Iterator[tuple[str, Tensor]]:
    """What an engine is to hold: the model's present weights, adapters merged in.

    A LoRA layer's sum is made when its turn comes, so that no second copy of the model exists; it
    is float32 where the adapters are. 4 and 8 bits become the numbers that they stand for. Where
    the model is cut over ranks, all of them must take the same steps.

    Args:
        model: A Transformers model, or a peft model around one with plain LoRA adapters.
        tied: Yield a tied weight under each of its names, not once.

    Yields:
        Name as in the Transformers model, and the whole weight, detached.
    """
    base = base_of(model)
    if base is model:
        for name, parameter in model.named_parameters(remove_duplicate=not tied):
            yield name, whole(parameter.detach())
        return
    from peft.tuners.lora import LoraLayer  # slow to import

    layers = {name: layer for name, layer in base.named_modules() if isinstance(layer, LoraLayer)}
    for name, parameter in base.named_parameters(remove_duplicate=not tied):
        if "lora_" in name:
            continue
        owner = base.get_submodule(name.rpartition(".")[0])
        weight = _dequantised(owner, whole(parameter.detach()))
        layer: Any = layers.get(name.removesuffix(f"{_ADAPTED}.weight"))
        if layer is not None and not layer.disable_adapters:
            # The trainer's mixed precision would round what is merged.
            with torch.autocast(weight.device.type, enabled=False):
                for adapter in layer.active_adapters:
                    weight = weight + whole(layer.get_delta_weight(adapter).detach())
        if weight.dim() == 2 and not isinstance(owner, Conv1D) and is_transposed(owner):
            weight = weight.T
        yield name.replace(_ADAPTED, ""), weight


def is_frozen(model: nn.Module) -> bool:
    """Whether ``named_weights`` of the model stay as they are: a LoRA's do without its adapters."""
    if base_of(model) is model:
        return not any(parameter.requires_grad for parameter in model.parameters())
    from peft.tuners.lora import LoraLayer  # slow to import

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    return all(layer.disable_adapters for layer in layers)


def is_transposed(layer: nn.Module) -> bool:
    """Whether the model's weight of a layer is [inputs, outputs], as GPT-2's are; Transformers
    turns it around where it quantises it.
    """
    return isinstance(layer, Conv1D) or getattr(layer, "source_cls", None) is Conv1D


def _dequantised(layer: Any, weight: Tensor) -> Tensor:
    """A layer's weight in few bits as the numbers it stands for; other tensors as they are."""
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    if weight.is_floating_point():
        return weight
    if isinstance(layer, Linear4bit):
        return dequantize_4bit(weight, layer.quant_state)
    assert isinstance(layer, Linear8bitLt), f"{type(layer)} holds weights of {weight.dtype}"
    parameter: Any = layer.weight
    # The layer's first pass moves the scales.
    scales = layer.state.SCB if parameter.SCB is None else parameter.SCB
    assert scales is not None
    return int8_vectorwise_dequant(weight, scales)


def whole(tensor: Tensor) -> Tensor:
    """A tensor with the parts of all ranks, which must all call this; or the tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def device_of(model: nn.Module) -> torch.device:
    """Where a model computes; its shards may lie in host memory meanwhile."""
    first = next(model.parameters())
    return (
        torch.device(first.device_mesh.device_type) if isinstance(first, DTensor) else first.device
    )


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module compute something else."""
    known = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if known is not None:
            module.forward = known


def base_of(model: Any) -> nn.Module:
    """The Transformers model inside of peft's, or the model itself."""
    base: nn.Module = model.get_base_model() if hasattr(model, "peft_config") else model
    return base
