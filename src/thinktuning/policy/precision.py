"""Computing in the precision that autocast asks for, with weights rounded once and not at each use.

Under ``trainer.precision: bf16-mixed`` weights, gradients and the optimizer stay float32. Autocast
would round every weight at every use and leave the residual stream and the KV cache in float32;
here the model computes in bfloat16 throughout, as it does under FSDP2.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from thinktuning.policy.weights import device_of, replaced_forward


class GradientSums:
    """Float32 sums over backward passes through rounded weights, for the exact ones."""

    def __init__(self, rounded: dict[nn.Parameter, nn.Parameter]) -> None:
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._trained = [p for p in rounded if p.requires_grad]
        for exact in self._trained:
            rounded[exact].register_post_accumulate_grad_hook(partial(self._add, exact))

    @property
    def needed(self) -> bool:
        """Whether there are rounded weights; without them gradients arrive by themselves."""
        return bool(self._trained)

    @property
    def tensors(self) -> list[Tensor]:
        """The sums so far."""
        return list(self._sums.values())

    def deliver(self, backward: Callable[[Tensor], None]) -> None:
        """Give the exact weights their gradients.

        Args:
            backward: Lightning's, so that ranks add up theirs. Called once, if there are any.
        """
        if self._sums:
            loss = _Deliver.apply(self.tensors, *self._sums)
            self._sums = {}  # a gradient that somebody else holds would be copied
            backward(loss)

    def _add(self, exact: nn.Parameter, rounded: Tensor) -> None:
        assert rounded.grad is not None
        if exact in self._sums:
            self._sums[exact].add_(rounded.grad)
        else:
            self._sums[exact] = rounded.grad.float()
        rounded.grad = None


class _Deliver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], *exact: Tensor) -> Tensor:
        ctx.gradients = gradients
        return exact[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        return None, *gradients


def native_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies matrices in bfloat16.

    A CPU without instructions for it computes all the same, a hundred times slower than in float32.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return True


@contextmanager
def rounded_weights(model: nn.Module) -> Iterator[GradientSums]:
    """Hold the model's weights in autocast's precision, and turn autocast off; without autocast,
    leave everything as it is. What FSDP2 has cut is rounded where it is gathered.

    Yields:
        What backward passes through the rounded weights add up to.
    """
    device = device_of(model).type
    if not torch.is_autocast_enabled(device):
        yield GradientSums({})
        return
    dtype = torch.get_autocast_dtype(device)
    rounded: dict[nn.Parameter, nn.Parameter] = {}
    if not isinstance(model, FSDPModule):
        rounded = {
            p: nn.Parameter(p.detach().to(dtype), requires_grad=p.requires_grad)
            for p in model.parameters()
            if p.is_floating_point() and p.dtype != dtype
        }
    held = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter in rounded
    ]
    try:
        for module, name, parameter in held:
            module._parameters[name] = rounded[parameter]
        with torch.autocast(device, enabled=False):
            yield GradientSums(rounded)
    finally:
        for module, name, parameter in held:
            module._parameters[name] = parameter


@contextmanager
def packed_linears(model: nn.Module) -> Iterator[None]:
    """On a CPU, give linear layers a copy of their weights in the layout of its kernels, for many
    calls with few tokens and without gradients; packing takes as long as some such calls gain.
    """
    with ExitStack() as packed:
        for linear in model.modules():
            if type(linear) is nn.Linear and _packs(linear.weight):
                weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
                packed.enter_context(
                    replaced_forward(linear, partial(_packed, weight, linear.bias))
                )
        yield


def _packed(weight: Tensor, bias: Tensor | None, inputs: Tensor) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")
    return result


def _packs(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or isinstance(weight, DTensor):
        return False
    if not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return native_bfloat16(weight.device)
    return weight.dtype == torch.float32
