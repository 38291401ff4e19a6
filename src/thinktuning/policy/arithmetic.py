"""Floating-point operations of a model."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from thinktuning.policy.weights import base_of


@dataclass(frozen=True)
class ForwardCost:
    """What reading tokens takes; a backward pass takes as much again for the activations, and as
    much for the weights.

    Attributes:
        linear: Weights in matrix products of every token: all but embeddings that aren't the head
            too.
        attention: FLOP of a token's attention for every token that it looks at.
    """

    linear: int
    attention: int

    def flop(self, length: int, since: int = 0) -> float:
        """Of reading a sequence from position ``since`` on."""
        seen = (length * (length + 1) - since * (since + 1)) / 2
        return 2.0 * self.linear * (length - since) + self.attention * seen


def forward_cost(model: nn.Module) -> ForwardCost:
    """Count the weights of a model, those that bitsandbytes keeps in fewer bits too."""
    base: Any = base_of(model)
    config = base.config.get_text_config()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    embeddings = base.get_input_embeddings().weight
    tied = base.get_output_embeddings().weight is embeddings
    return ForwardCost(
        linear=base.num_parameters() - (0 if tied else embeddings.numel()),
        attention=4 * config.num_hidden_layers * heads * width,
    )
