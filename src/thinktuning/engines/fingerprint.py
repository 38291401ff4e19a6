"""Proof that vLLM holds the trainer's weights: columns of each are read back and compared."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from thinktuning.errors import StaleWeightsError
from thinktuning.policy import base_of, is_transposed, named_weights

_COLUMNS = 8


def check(
    model: PreTrainedModel,
    apply: Callable[[Callable[[nn.Module], Any]], Any],
    dtype: torch.dtype,
    seed: int,
) -> int:
    """Compare some columns of every weight that vLLM holds, bit by bit, with the trainer's.

    Args:
        model: The trainer's model.
        apply: Calls a function on vLLM's own module and returns what that returns.
        dtype: Of vLLM's weights; the trainer's are rounded to it.
        seed: Which columns to look at; others each time.

    Returns:
        How many of the trainer's weights were compared.

    Raises:
        StaleWeightsError: If a weight differs, or if one of the trainer's could not be compared.
    """
    own = dict(_of_trainer(model, seed))
    compared: set[str] = set()
    for names, found in apply(lambda module: list(_of_vllm(module, seed))):
        if not all(name in own for name in names):
            continue  # a name that this architecture has in vLLM only
        expected = torch.cat([own[name] for name in names]).to(found.device, dtype)
        if not torch.equal(expected, found[: len(expected)].to(dtype)):  # vocabularies are padded
            raise StaleWeightsError(
                f"vLLM doesn't hold the trainer's weights: {', '.join(names)} differ after the "
                f"sync, so that it would sample from another policy"
            )
        compared.update(names)
    if missing := set(own) - compared:
        raise StaleWeightsError(
            f"{len(missing)} weights of {type(model).__name__} can't be found in vLLM again, e.g. "
            f"{min(missing)}, so that nothing shows whether it samples from this policy; use the "
            f"TransformersEngine"
        )
    return len(compared)


def _of_trainer(model: PreTrainedModel, seed: int) -> Iterator[tuple[str, Tensor]]:
    transposed = {
        f"{name.removesuffix('.base_layer')}.weight"
        for name, module in base_of(model).named_modules()
        if is_transposed(module)
    }
    for name, weight in named_weights(model, tied=True):
        if weight.dim() < 2:
            yield name, weight
        else:
            weight = weight.T if name in transposed else weight
            yield name, weight[:, _columns(weight.shape[1], seed).to(weight.device)]


def _of_vllm(model: nn.Module, seed: int) -> Iterator[tuple[list[str], Tensor]]:
    """Every weight's columns, and the names of the checkpoint's weights that were joined in it."""
    packed: dict[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    for path, module in model.named_modules():
        prefix, _, leaf = path.rpartition(".")
        parts = [f"{prefix}.{part}".lstrip(".") for part in packed.get(leaf, [leaf])]
        for kind in ("weight", "bias"):
            tensor = getattr(module, kind, None)
            if not isinstance(tensor, Tensor):
                continue
            if kind == "weight" and hasattr(module, "cpu_linear"):
                # On a CPU the layer computes with a repacked copy, which shows only by its work:
                # a unit vector brings a column out exactly.
                columns = _columns(_width(module), seed)
                units = nn.functional.one_hot(columns, _width(module)).to(_dtype(module))
                tensor = module.quant_method.apply(module, units, None).T
            elif tensor.dim() == 2:
                tensor = tensor[:, _columns(tensor.shape[1], seed).to(tensor.device)]
            elif tensor.dim() != 1:
                continue
            yield [f"{part}.{kind}" for part in parts], tensor.detach()


def _width(module: Any) -> int:
    width = getattr(module, "input_size_per_partition", None)
    return int(module.embedding_dim if width is None else width)


def _dtype(module: Any) -> torch.dtype:
    dtype = getattr(module, "params_dtype", None)
    return module.weight.dtype if dtype is None else dtype


def _columns(width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(width, generator=generator)[:_COLUMNS]
