"""Grouped-query attention that never repeats keys and values for the heads that share them."""

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

GROUPED = "grouped_sdpa"
"""The name that Transformers knows it by, as ``attn_implementation``."""


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Scaled dot product attention; the query heads of a key head stand in line as more queries.

    What needs no mask goes Transformers' own way, since its kernels know causality by themselves.

    Args:
        module: The attention layer.
        query: [B, Hq, L, D].
        key: [B, Hk, K, D]; Hk divides Hq.
        value: [B, Hk, K, D].
        attention_mask: bool or float [B or 1, 1, L, K]; None: all is seen, or what comes before.
        scaling: Of the scores; None: D ** -0.5.
        position_bias: Goes Transformers' own way.
        options: Others of Transformers' attention interface.

    Returns:
        [B, L, Hq, D], and no attention weights.
    """
    batch, heads, length, width = query.shape
    groups = heads // key.shape[1]
    masked = attention_mask is not None and attention_mask.shape[1] == 1
    if groups == 1 or position_bias is not None or not (masked or length == 1):
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=scaling,
            position_bias=position_bias,
            **options,
        )
    if attention_mask is not None and length > 1:
        attention_mask = attention_mask.repeat(1, 1, groups, 1)
    attended = nn.functional.scaled_dot_product_attention(
        query.reshape(batch, key.shape[1], groups * length, width),
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=options.get("dropout", 0.0),
        scale=scaling,
    )
    return attended.reshape(batch, heads, length, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, sdpa_mask)
