"""Grouped-query attention that never repeats keys and values for the heads that share them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from thinktuning.policy.packing import Packing

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
    packing: Packing | None = None,
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
        packing: Of the only row, where it was packed; the mask counts for nothing then.
        options: Others of Transformers' attention interface.

    Returns:
        [B, L, Hq, D], and no attention weights.
    """
    dropout = options.get("dropout", 0.0)
    if packing is not None:
        return _packed(query, key, value, packing, scaling, dropout), None
    shared = key.shape[1] < query.shape[1]
    masked = attention_mask is not None and attention_mask.shape[1] == 1
    if not shared or position_bias is not None or not (masked or query.shape[2] == 1):
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
    if attention_mask is not None and query.shape[2] > 1:
        attention_mask = attention_mask.repeat(1, 1, query.shape[1] // key.shape[1], 1)
    attended = _grouped(query, key, value, attention_mask, scaling, dropout)
    return attended.transpose(1, 2).contiguous(), None


def _grouped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
) -> Tensor:
    """As above, but [B, Hq, L, D], and with a mask of all queries in line or of one row."""
    batch, heads, length, width = query.shape
    groups = heads // key.shape[1]
    attended = nn.functional.scaled_dot_product_attention(
        query.reshape(batch, key.shape[1], groups * length, width),
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        scale=scaling,
    )
    return attended.reshape(batch, heads, length, -1)


def _packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    scaling: float | None,
    dropout: float,
) -> Tensor:
    """Every piece sees itself, up to each of its tokens, and the piece before it."""
    queries, keys, values = (
        states[0].transpose(0, 1).split(packing.lengths) for states in (query, key, value)
    )
    groups = query.shape[1] // key.shape[1]
    attended: dict[int, Tensor] = {}
    for part in packing.parts:
        known = list(zip(part.pieces, part.before, strict=True))
        found = _grouped(
            _padded([queries[i] for i in part.pieces]),
            _padded([_behind(keys, before, i) for i, before in known]),
            _padded([_behind(values, before, i) for i, before in known]),
            part.bias(groups, query.dtype),
            scaling,
            dropout,
        )
        for i, row in zip(part.pieces, found.transpose(1, 2).unbind(0), strict=True):
            attended[i] = row[: packing.lengths[i]]
    return torch.cat([attended[i] for i in sorted(attended)])[None]


def _behind(pieces: Sequence[Tensor], before: int | None, i: int) -> Tensor:
    return pieces[i] if before is None else torch.cat([pieces[before], pieces[i]])


def _padded(rows: list[Tensor]) -> Tensor:
    """[R, H, L, D] from R times [L, H, D]."""
    return pad_sequence(rows, batch_first=True).transpose(1, 2)


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, sdpa_mask)
