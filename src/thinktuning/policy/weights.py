"""A model's weights under the names of its base, one at a time."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

_ADAPTED = ".base_layer"


def named_weights(model: nn.Module, tied: bool = False) -> Iterator[tuple[str, Tensor]]:
    """What an engine is to hold: the model's present weights, adapters merged in.

    A LoRA layer's sum is made when its turn comes, so that no second copy of the model exists.

    Args:
        model: A Transformers model, or a peft model around one with plain LoRA adapters.
        tied: Yield a tied weight under each of its names, not once.

    Yields:
        Name as in the Transformers model, and the weight, detached.
    """
    base = base_of(model)
    if base is model:
        for name, parameter in model.named_parameters(remove_duplicate=not tied):
            yield name, parameter.detach()
        return
    from peft.tuners.lora import LoraLayer  # slow to import

    layers = {name: layer for name, layer in base.named_modules() if isinstance(layer, LoraLayer)}
    for name, parameter in base.named_parameters(remove_duplicate=not tied):
        if "lora_" in name:
            continue
        weight = parameter.detach()
        layer: Any = layers.get(name.removesuffix(f"{_ADAPTED}.weight"))
        if layer is not None and not layer.disable_adapters:
            for adapter in layer.active_adapters:
                weight = weight + layer.get_delta_weight(adapter).detach().to(weight.dtype)
        yield name.replace(_ADAPTED, ""), weight


def base_of(model: Any) -> nn.Module:
    """The Transformers model inside of peft's, or the model itself."""
    base: nn.Module = model.get_base_model() if hasattr(model, "peft_config") else model
    return base
