"""A model's weights under the names of its checkpoint, one at a time."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_ADAPTED = ".base_layer"


def named_weights(model: nn.Module, tied: bool = False) -> Iterator[tuple[str, Tensor]]:
    """What an engine is to hold: the model's present weights, adapters merged in.

    A LoRA layer's sum is made when its turn comes, so that no second copy of the model exists.

    Args:
        model: A Transformers model, or a peft model around one with active LoRA adapters.
        tied: Yield a tied weight under each of its names, not once.

    Yields:
        Name as in the base model's checkpoint, and the weight, detached.
    """
    if not hasattr(model, "peft_config"):
        for name, parameter in model.named_parameters(remove_duplicate=not tied):
            yield name, parameter.detach()
        return
    from peft.tuners.lora import LoraLayer  # slow to import
    from peft.utils import ModulesToSaveWrapper

    base: Any = model
    base = base.get_base_model()
    layers = {name: layer for name, layer in base.named_modules() if isinstance(layer, LoraLayer)}
    # Layers that are trained whole beside the adapters: where each one's present copy lies.
    copies = {
        f"{name}.": f"{name}.{_present_copy(layer)}."
        for name, layer in base.named_modules()
        if isinstance(layer, ModulesToSaveWrapper)
    }
    for name, parameter in base.named_parameters(remove_duplicate=not tied):
        if "lora_" in name:
            continue
        path = next((path for path in copies if name.startswith(path)), "")
        if path:
            if not name.startswith(copies[path]):
                continue
            name = path + name.removeprefix(copies[path])
        layer = layers.get(name.removesuffix(f"{_ADAPTED}.weight"))
        weight = parameter.detach() if layer is None else _merged(layer, parameter.detach())
        yield name.replace(_ADAPTED, ""), weight


@torch.no_grad()
def _merged(layer: Any, weight: Tensor) -> Tensor:
    """The weight of a LoRA layer with its active adapters."""
    if layer.disable_adapters:
        return weight
    for adapter in layer.active_adapters:
        if adapter in layer.merged_adapters or adapter not in layer.scaling:
            continue
        if adapter in layer.lora_variant:  # DoRA and others: not a plain sum
            weight = layer.lora_variant[adapter].merge_safe(layer, adapter, weight)
        else:
            weight = weight + layer.get_delta_weight(adapter).to(weight.dtype)
    return weight


def _present_copy(layer: Any) -> str:
    adapter = next((a for a in layer.active_adapters if a in layer.modules_to_save), None)
    if layer.disable_adapters or adapter is None:
        return "original_module"
    return f"modules_to_save.{adapter}"
