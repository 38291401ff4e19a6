"""Rollouts in one row of tokens: no padding, and a prompt once for all its rollouts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from thinktuning.tensors import Lengths
from thinktuning.types import PolicyInputs


@dataclass(frozen=True)
class Part:
    """Pieces of a packed row that attend in one call, since they have about one length.

    Attributes:
        pieces: Their numbers.
        before: The piece that stands before each of them, too; None: nothing.
        mask: bool [R, 1, L, K]; which keys each query sees, both padded on the right.
    """

    pieces: Sequence[int]
    before: Sequence[int | None]
    mask: Tensor
    _made: dict[tuple[int, torch.dtype], Tensor] = field(default_factory=dict)

    def bias(self, groups: int, dtype: torch.dtype) -> Tensor:
        """The mask as what is added to scores, [R, 1, groups * L, K]. Made once: every layer keeps
        its own for the backward.
        """
        if (groups, dtype) not in self._made:
            hidden = ~self.mask.repeat(1, 1, groups, 1)
            bias = torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, float("-inf"))
            self._made[groups, dtype] = bias
        return self._made[groups, dtype]


@dataclass(frozen=True)
class Packing:
    """How a row was packed: its pieces are the prompts, and then what is read of each completion.

    Attributes:
        lengths: Of the pieces.
        parts: All pieces that have tokens.
    """

    lengths: Sequence[int]
    parts: Sequence[Part]


@dataclass(frozen=True)
class PackedRow:
    """Rollouts in one row of N tokens, of which K are predicted.

    Attributes:
        ids: int64 [1, N].
        places: int64 [1, N]; of each token in its own text.
        predicting: int64 [K]; the tokens that stand before predicted ones.
        targets: int64 [K].
        columns: int64 [K]; where the targets are in the completions, [B * T].
        packing: For the attention.
    """

    ids: Tensor
    places: Tensor
    predicting: Tensor
    targets: Tensor
    columns: Tensor
    packing: Packing


def pack(inputs: PolicyInputs, lengths: Lengths) -> PackedRow:
    """Put the rollouts into one row."""
    device = inputs.input_ids.device
    columns, width = inputs.input_ids.shape[1], inputs.completion_mask.shape[1]
    read = [max(n - 1, 0) for n in lengths.completions]  # nothing follows the last
    pieces = [*lengths.prompts, *read]
    starts = list(accumulate(pieces, initial=0))
    rows = range(len(read))
    in_prompts = [
        (i + 1) * columns - width - n for i, n in zip(lengths.first, lengths.prompts, strict=True)
    ]
    in_completions = [(i + 1) * columns - width for i in rows]
    flat = inputs.input_ids.flatten()
    taken = _spans([*in_prompts, *in_completions], pieces, device)
    before = [lengths.prompts[u] for u in lengths.owner]
    places = _spans([0] * len(lengths.prompts) + before, pieces, device)
    last = [starts[u + 1] - 1 for u in lengths.owner]
    own = [starts[len(lengths.prompts) + i] for i in rows]
    counts = [size for n, k in zip(lengths.completions, read, strict=True) for size in (n - k, k)]
    predicting = _spans([x for pair in zip(last, own, strict=True) for x in pair], counts, device)
    return PackedRow(
        ids=flat[taken][None],
        places=places[None],
        predicting=predicting,
        targets=flat[_spans(in_completions, lengths.completions, device)],
        columns=_spans([i * width for i in rows], lengths.completions, device),
        packing=Packing(pieces, list(_parts(lengths, pieces, device))),
    )


def _spans(starts: Sequence[int], sizes: Sequence[int], device: torch.device) -> Tensor:
    """The numbers of all spans, one span behind the other."""
    spans = zip(starts, sizes, strict=True)
    return torch.cat([torch.arange(a, a + n) for a, n in spans]).to(device)


def _parts(lengths: Lengths, pieces: Sequence[int], device: torch.device) -> Iterator[Part]:
    prompts = range(len(lengths.prompts))
    completions = range(len(prompts), len(pieces))
    before = [*(None for _ in prompts), *lengths.owner]
    for kind in (prompts, completions):
        part: list[int] = []
        for i in sorted((i for i in kind if pieces[i]), key=lambda i: pieces[i]):
            if part and pieces[i] > 1.5 * pieces[part[0]] + 16:
                yield _part(part, before, pieces, device)
                part = []
            part.append(i)
        if part:
            yield _part(part, before, pieces, device)


def _part(
    part: Sequence[int], before: Sequence[int | None], pieces: Sequence[int], device: torch.device
) -> Part:
    prefixes = [before[i] for i in part]
    offsets = [0 if p is None else pieces[p] for p in prefixes]
    queries = torch.arange(max(pieces[i] for i in part), device=device)
    keys = torch.arange(
        max(pieces[i] + n for i, n in zip(part, offsets, strict=True)), device=device
    )
    seen = queries[:, None] + torch.tensor(offsets, device=device)[:, None, None, None]
    return Part(part, prefixes, keys <= seen)
