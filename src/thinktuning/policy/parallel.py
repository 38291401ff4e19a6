"""A model cut over ranks by FSDP2, gathered whole while it samples."""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.utils.checkpoint import checkpoint

from thinktuning.errors import InputError
from thinktuning.policy.weights import base_of


def recompute_activations(model: nn.Module) -> None:
    """Keep only the inputs of each transformer block for the backward, and compute the rest again.

    Transformers' own switch acts in train mode alone, and takes the cache away from decoding.

    Raises:
        InputError: If the model doesn't name its blocks.
    """
    for block in transformer_blocks(model):
        block.forward = _recomputed(block.forward)


def shard(
    model: nn.Module, mesh: DeviceMesh, compute_dtype: torch.dtype, cpu_offload: bool = False
) -> None:
    """Cut every parameter over the mesh: each transformer block is gathered when it computes.

    Args:
        model: With the same weights on every rank; stays float32, as gradients and their sums do.
        mesh: One-dimensional.
        compute_dtype: In which weights are gathered and blocks compute.
        cpu_offload: Keep shards, gradients and the optimizer in host memory.

    Raises:
        InputError: If the model doesn't name its blocks.
    """
    precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    settings: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": precision,
        "offload_policy": offload if cpu_offload else OffloadPolicy(),
        # Also the root, which would else stay gathered after a forward without a backward, and
        # miss the optimizer's step.
        "reshard_after_forward": True,
    }
    for block in transformer_blocks(model):
        fully_shard(block, **settings)
    fully_shard(model, **settings)


def gather(model: nn.Module) -> None:
    """Hold all weights of a sharded model on every rank until ``release``.

    All ranks must call it. Forwards in between need no other rank, so that ranks may sample
    different numbers of tokens. A model that isn't sharded stays as it is.
    """
    for module in _shards(model):
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()


def release(model: nn.Module) -> None:
    """Keep this rank's shards only, and forget the forwards that no backward has followed."""
    for module in _shards(model):
        module.reshard()
        module.set_reshard_after_forward(True, recurse=False)
    if isinstance(model, FSDPModule):
        # FSDP2 notes every forward for the backward's prefetching; a reference never has one.
        model.reset_iter_state()


def _shards(model: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks, which Transformers' models name themselves."""
    base: Any = base_of(model)
    names = set(getattr(base, "_no_split_modules", None) or ())
    blocks = [module for module in base.modules() if type(module).__name__ in names]
    if not blocks:
        raise InputError(
            f"{type(base).__name__} doesn't name its transformer blocks (_no_split_modules), so it "
            f"can be neither sharded nor recomputed block by block; use trainer.strategy ddp and "
            f"model.activation_checkpointing false"
        )
    return blocks


def _recomputed(forward: Any) -> Any:
    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run
