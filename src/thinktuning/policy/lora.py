"""A student that is a LoRA on frozen weights: one copy of them for student, reference, teacher."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import nn
from transformers import PreTrainedModel

from thinktuning.errors import InputError
from thinktuning.policy.attention import GROUPED
from thinktuning.policy.loading import load_model

if TYPE_CHECKING:
    from peft import PeftModel


Base = Literal["float32", "bfloat16", "8bit", "4bit"]


@dataclass(frozen=True)
class LoraSettings:
    """Which adapters are trained, and on what. Adapters are float32.

    Attributes:
        rank: Of every adapter, >= 1.
        alpha: An adapter's output is scaled by alpha / rank; positive.
        target_modules: Names of the linear layers that get one, or all-linear.
        base: Precision of the frozen weights. 4bit (nf4) and 8bit keep linear layers so through
            bitsandbytes (QLoRA), and the rest in bfloat16 or float32, as trainer.precision says.
            The reference is as coarse as the student.
    """

    rank: int = 16
    alpha: float = 32.0
    target_modules: list[str] | str = "all-linear"
    base: Base = "float32"

    def __post_init__(self) -> None:
        faults = []
        if self.rank < 1:
            faults.append(f"rank must be at least 1, got {self.rank}")
        if not self.alpha > 0:
            faults.append(f"alpha must be positive, got {self.alpha}")
        if self.base not in get_args(Base):
            faults.append(f"base must be one of {', '.join(get_args(Base))}, got {self.base!r}")
        if faults:
            raise InputError("model.lora: " + "; ".join(faults))


def load_base(
    name: str,
    base: Base,
    compute_dtype: torch.dtype = torch.float32,
    attention: str = GROUPED,
) -> PreTrainedModel:
    """The weights that adapters are put on; see ``load_model``.

    Args:
        name: Hub id, local folder, or ``embedded``.
        base: See ``LoraSettings``.
        compute_dtype: In which the layers of a quantised base compute, and of all else in it.
        attention: Transformers' ``attn_implementation``.
    """
    if base == "4bit" or base == "8bit":
        return load_model(name, compute_dtype, attention, quantization=base)
    return load_model(name, getattr(torch, base), attention)


def with_adapters(model: PreTrainedModel, settings: LoraSettings) -> "PeftModel":
    """The model with trainable float32 adapters, all else frozen; they begin as no change at all.

    It isn't sent through peft's ``prepare_model_for_kbit_training``, which would blow up to
    float32 whatever isn't quantised, and turn on Transformers' activation checkpointing.
    Gradients need neither.

    Raises:
        InputError: If the model has no such layers.
    """
    from peft import LoraConfig, get_peft_model  # slow to import

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        target_modules=settings.target_modules,
    )
    try:
        adapted = get_peft_model(model, config)
    except (ValueError, re.error) as error:
        raise InputError(f"model.lora: {error}") from error
    _keep_differentiable(adapted)
    return adapted.eval()


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Compute as the base model does.

    Unlike peft's ``disable_adapter`` it leaves ``requires_grad`` alone: a model that is cut over
    ranks has each parameter twice, and one of them would stay frozen.
    """
    from peft.tuners.lora import LoraLayer  # slow to import

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def _keep_differentiable(model: nn.Module) -> None:
    """On CPUs with AVX512-BF16 a 4-bit layer repacks its weights for good when it first computes
    without gradients, as it does in every rollout, and no gradient passes the repacked ones.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
