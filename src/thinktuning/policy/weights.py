"""A model's weights under the names of its checkpoint, one at a time."""

from collections.abc import Iterator
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
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
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    layers = {name: layer for name, layer in base.named_modules() if isinstance(layer, LoraLayer)}
    for name, parameter in base.named_parameters(remove_duplicate=not tied):
        if "lora_" in name:
            continue
        weight = parameter.detach()
        if name.endswith(f"{_ADAPTED}.weight"):
            layer: Any = layers[name.removesuffix(f"{_ADAPTED}.weight")]
            if not layer.disable_adapters:
                for adapter in layer.active_adapters:
                    weight = weight + layer.get_delta_weight(adapter).detach().to(weight.dtype)
        yield name.replace(_ADAPTED, ""), weight
