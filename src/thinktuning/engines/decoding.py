"""A batch of completions in the making: a row leaves it when it ends, and others may join."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel

from thinktuning.engines.base import Completion, SamplingParams
from thinktuning.engines.grammar import GrammarMasks
from thinktuning.engines.kv_cache import RoomyLayer, decoding_cache, sees_all
from thinktuning.errors import DivergedError
from thinktuning.policy import device_of

_BLOCK = 256
"""Tokens whose probabilities are added up before they are looked at one by one."""

_KEPT_BLOCK = 64
"""Tokens of a prefix that is kept for later prompts are read so many at a time."""


@dataclass
class Row:
    """A completion in the making.

    Attributes:
        number: Its place among the completions that were asked for.
        uniforms: All random numbers that it will ever need; none where it is decoded greedily.
        token_ids: Drawn so far.
        logprobs: Of these, in nats.
    """

    number: int
    uniforms: list[float]
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def completion(self, params: SamplingParams) -> Completion:
        """The row as it is at its end."""
        stopped = self.token_ids[-1] in params.stop_ids
        return Completion(
            tuple(self.token_ids), tuple(self.logprobs), "stop" if stopped else "length"
        )


Group = tuple[Sequence[int], Sequence[Row]]
"""A prompt and its completions."""


def new_row(number: int, seed: int, params: SamplingParams) -> Row:
    """A row whose random numbers come from its seed alone."""
    if params.temperature == 0:
        return Row(number, [])
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(params.max_new_tokens, generator=generator, dtype=torch.float64)
    return Row(number, drawn.tolist())


@dataclass
class Prefix:
    """Tokens that prompts begin with, and what the model has read of them.

    Attributes:
        token_ids: At least one.
        cache: Of one row.
    """

    token_ids: list[int]
    cache: DynamicCache


def read_prefix(model: PreTrainedModel, token_ids: Sequence[int]) -> Prefix:
    """Read the tokens, at least one, at once."""
    cache = decoding_cache(model.config)
    _read(model, cache, token_ids, 0)
    return Prefix(list(token_ids), cache)


def read_kept_prefix(
    model: PreTrainedModel, token_ids: Sequence[int], known: Prefix | None = None
) -> Prefix | None:
    """Read whole blocks of the tokens, as far as ``known`` doesn't hold them already.

    Blocks begin at fixed places: what is read doesn't depend, in its last bits, on what was known,
    so that a run that is resumed repeats the one that wasn't stopped.

    Args:
        model: Whose weights are used.
        token_ids: To be read, but for those behind the last whole block.
        known: Read in the same way; used up. Its layers must all see all tokens.

    Returns:
        The whole blocks; None where there is none.
    """
    whole = len(token_ids) - len(token_ids) % _KEPT_BLOCK
    if whole == 0:
        return None
    cache, read = decoding_cache(model.config), 0
    if known is not None:
        read = common_length([known.token_ids, token_ids[:whole]])
        read -= read % _KEPT_BLOCK
        if read:
            cache = known.cache
        if 0 < read < len(known.token_ids):
            cache.crop(read - len(known.token_ids))
    for start in range(read, whole, _KEPT_BLOCK):
        _read(model, cache, token_ids[start : start + _KEPT_BLOCK], start)
    return Prefix(list(token_ids[:whole]), cache)


def _read(
    model: PreTrainedModel, cache: DynamicCache, token_ids: Sequence[int], start: int
) -> None:
    """Add one row's tokens to a cache that has ``start`` of them."""
    device = device_of(model)
    model(
        input_ids=torch.tensor([list(token_ids)], device=device),
        position_ids=torch.arange(start, start + len(token_ids), device=device)[None],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )


def common_length(sequences: Sequence[Sequence[int]]) -> int:
    """Tokens that all sequences begin with."""
    first, *others = sequences
    for i, token in enumerate(first):
        if any(len(other) <= i or other[i] != token for other in others):
            return i
    return len(first)


@dataclass
class Batch:
    """Rows that are decoded together; prompts end in one column.

    Attributes:
        rows: R of them.
        logits: Float [R, V], of each row's next token.
        cache: Of L columns.
        mask: bool [R, L]; False on padding, which stands at the left.
        places: int64 [R], of each row's next token in its own text.
    """

    rows: list[Row]
    logits: Tensor
    cache: DynamicCache
    mask: Tensor
    places: Tensor

    def join(self, other: "Batch") -> None:
        """Take the rows of a batch of the same model, whose layers must all see all tokens."""
        columns = max(self.mask.shape[1], other.mask.shape[1])
        masks = [pad(b.mask, (columns - b.mask.shape[1], 0)) for b in (self, other)]
        for mine, theirs in zip(self.cache.layers, other.cache.layers, strict=True):
            assert isinstance(mine, RoomyLayer) and isinstance(theirs, RoomyLayer)
            mine.join(theirs)
        self.rows = self.rows + other.rows
        self.logits = torch.cat([self.logits, other.logits])
        self.mask = torch.cat(masks)
        self.places = torch.cat([self.places, other.places])

    def draw(self, params: SamplingParams, grammar: GrammarMasks | None) -> Tensor:
        """Give every row its next token, and drop the rows that this ends.

        Returns:
            The drawn tokens, int64 [R], of the rows that are left.
        """
        logits = self.logits.float()
        numbers = [row.number for row in self.rows]
        if grammar is not None:
            grammar.apply(logits, numbers)
        uniforms = None
        if params.temperature > 0:
            uniforms = [row.uniforms[len(row.token_ids)] for row in self.rows]
        below = below_highest(logits, params.temperature)
        tokens, logprobs = draw_tokens(below, uniforms)
        drawn = tokens.tolist()
        if grammar is not None:
            grammar.accept(drawn, numbers)
        for row, token, logprob in zip(self.rows, drawn, logprobs.tolist(), strict=True):
            row.token_ids.append(token)
            row.logprobs.append(logprob)
        going = [
            place
            for place, (row, token) in enumerate(zip(self.rows, drawn, strict=True))
            if token not in params.stop_ids and len(row.token_ids) < params.max_new_tokens
        ]
        if len(going) < len(self.rows):
            self.rows = [self.rows[place] for place in going]
            tokens = self._keep(going, tokens)
        return tokens

    def _keep(self, going: list[int], tokens: Tensor) -> Tensor:
        kept = torch.tensor(going, dtype=torch.long, device=tokens.device)
        self.places = self.places[kept]
        self.mask = self.mask[kept]
        start = int(self.mask.int().argmax(dim=1).min()) if going and sees_all(self.cache) else 0
        if start:  # columns of rows that have left: with rows joining they'd never end
            self.mask = self.mask[:, start:]
            for layer in self.cache.layers:
                assert isinstance(layer, RoomyLayer)
                layer.keep(kept, start)
        elif going:
            self.cache.batch_select_indices(kept)
        return tokens[kept]

    def read(self, model: PreTrainedModel, tokens: Tensor) -> None:
        """Let the model read one more token of every row, int64 [R]."""
        self.mask = pad(self.mask, (0, 1), value=True)
        self.logits = model(
            input_ids=tokens[:, None],
            attention_mask=self.mask,
            position_ids=self.places[:, None],
            past_key_values=self.cache,
            use_cache=True,
        ).logits[:, -1]
        self.places = self.places + 1


def read_prompts(
    model: PreTrainedModel,
    groups: Sequence[Group],
    prefix: Prefix | None,
) -> Batch:
    """Read every prompt once for all its rows.

    Args:
        model: Whose weights are used.
        groups: Prompts and their rows.
        prefix: What they all begin with, and go on behind; stays as it is.
    """
    prompts = [prompt for prompt, _ in groups]
    shared = 0 if prefix is None else len(prefix.token_ids)
    cache = decoding_cache(model.config)
    if prefix is not None:
        cache = deepcopy(prefix.cache)
        cache.batch_repeat_interleave(len(prompts))
    longest = max(len(p) for p in prompts) - shared
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros(len(prompts), shared + longest, dtype=torch.bool)
    mask[:, :shared] = True
    for i, prompt in enumerate(prompts):
        rest = list(prompt[shared:])
        ids[i, longest - len(rest) :] = torch.tensor(rest)
        mask[i, shared + longest - len(rest) :] = True
    ids, mask = ids.to(device_of(model)), mask.to(device_of(model))
    logits = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, shared:],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]
    owner = torch.tensor([i for i, (_, rows) in enumerate(groups) for _ in rows], device=ids.device)
    cache.batch_select_indices(owner)
    mask = mask[owner]
    rows = [row for _, own in groups for row in own]
    return Batch(rows, logits[owner], cache, mask, mask.sum(dim=1))


def below_highest(logits: Tensor, temperature: float) -> Tensor:
    """fp32 logits [R, V], tempered unless it's 0, less the highest of each row; in place.

    Raises:
        DivergedError: If they aren't finite; on a GPU what follows would end in an assertion that
            no program survives.
    """
    if temperature not in (0, 1):
        logits.div_(temperature)
    highest = logits.amax(dim=-1, keepdim=True)
    if not highest.isfinite().all():
        raise DivergedError(
            "the model's logits aren't finite, so that nothing can be sampled from it; go on from "
            "an older checkpoint with a lower learning rate or model.max_grad_norm, or with "
            "trainer.precision 32-true"
        )
    return logits.sub_(highest)


def draw_tokens(logits: Tensor, uniforms: list[float] | None) -> tuple[Tensor, Tensor]:
    """The next token of each row and its logprob, by inverting the CDF, or the likeliest one.

    Args:
        logits: Of ``below_highest``, [R, V].
        uniforms: One in [0, 1) for each row; None for the likeliest.
    """
    if uniforms is None:
        tokens = logits.argmax(dim=-1, keepdim=True)
        normalizer = logits.logsumexp(dim=-1, keepdim=True)
        return tokens[:, 0], (logits.gather(1, tokens) - normalizer)[:, 0]
    # Sums of blocks first, then inside of one block: a running sum over all tokens is slow.
    shares = pad(logits.exp(), (0, -logits.shape[1] % _BLOCK)).unflatten(1, (-1, _BLOCK))
    sums = shares.sum(dim=-1).double().cumsum(dim=-1)
    drawn = torch.tensor(uniforms, dtype=torch.float64, device=logits.device)[:, None]
    place = drawn * sums[:, -1:]
    block = _first_above(sums, place)
    start = (sums - sums.diff(dim=-1, prepend=torch.zeros_like(place))).gather(1, block)
    inside = shares.gather(1, block[..., None].expand(-1, -1, _BLOCK))[:, 0]
    tokens = block * _BLOCK + _first_above(inside.cumsum(-1, dtype=torch.float64), place - start)
    return tokens[:, 0], (logits.gather(1, tokens) - sums[:, -1:].log().float())[:, 0]


def _first_above(sums: Tensor, place: Tensor) -> Tensor:
    """Where running sums [R, N] first exceed each row's place [R, 1], moved inside by a hair where
    rounding has put it out: always where something was added.
    """
    end = sums[:, -1:].nextafter(torch.zeros_like(place))
    return torch.searchsorted(sums, place.clamp(min=0).minimum(end), right=True)
