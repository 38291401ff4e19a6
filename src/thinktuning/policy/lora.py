"""A student that is a LoRA on frozen weights: one copy of them for student, reference, teacher."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from thinktuning.errors import InputError

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True)
class LoraSettings:
    """Which adapters are trained.

    Attributes:
        rank: Of every adapter, >= 1.
        alpha: An adapter's output is scaled by alpha / rank; positive.
        target_modules: Names of the linear layers that get one, or all-linear.
    """

    rank: int = 16
    alpha: float = 32.0
    target_modules: list[str] | str = "all-linear"

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0:
            raise InputError(
                f"model.lora: rank must be at least 1 and alpha positive, got {self.rank} and "
                f"{self.alpha}"
            )


def with_adapters(model: PreTrainedModel, settings: LoraSettings) -> "PeftModel":
    """The model with trainable adapters, all else frozen; they begin as no change at all.

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
    return adapted.eval()
