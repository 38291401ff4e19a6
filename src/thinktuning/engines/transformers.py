"""Sampling with the Transformers model that is being trained: no copy, no second runtime."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from thinktuning.engines.base import Completion, Engine, SamplingParams
from thinktuning.engines.grammar import GrammarCompiler, GrammarMasks
from thinktuning.errors import InputError
from thinktuning.policy import gather, load_model, load_tokenizer, release


class TransformersEngine(Engine):
    """Decodes with the live PyTorch module; weight sync is free.

    The tokens that all prompts of a batch share (system message, worked examples) are read once,
    every prompt once for its whole group, and finished rows leave the batch.

    Args:
        max_batch_size: Completions decoded at a time, >= 1; a prompt's group stays together.
        pretrained: Of a teacher with weights of its own: hub id, folder, or embedded. null: the
            student's weights, or those of the frozen reference.
        quantization: Loads those weights in 4 or 8 bits through bitsandbytes; null doesn't.
    """

    def __init__(
        self,
        max_batch_size: int = 64,
        pretrained: str | None = None,
        quantization: Literal["4bit", "8bit"] | None = None,
    ) -> None:
        super().__init__(pretrained)
        if max_batch_size < 1:
            raise InputError(f"engine: max_batch_size must be at least 1, got {max_batch_size}")
        if quantization is not None and pretrained is None:
            raise InputError("engine: quantization needs pretrained, the weights to quantise")
        self.max_batch_size = max_batch_size
        self.quantization = quantization
        self._model: PreTrainedModel | None = None
        self._grammars: GrammarCompiler | None = None

    def start(self) -> None:
        """Load the teacher's own weights onto the device that torch computes on."""
        if self.pretrained is None or self._model is not None:
            return
        on_gpu = torch.cuda.is_available()
        model = load_model(
            self.pretrained,
            dtype="auto" if on_gpu else torch.float32,
            quantization=self.quantization,
        )
        if on_gpu and self.quantization is None:
            model.to(torch.device("cuda"))  # type: ignore[arg-type]
        self.load_weights(model, load_tokenizer(self.pretrained))

    def load_weights(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        """Keep a reference to ``model``, whose later updates show by themselves.

        One that is cut over ranks is held whole until ``sleep``, or until another one comes.
        """
        if self._model is not model:
            self.sleep()
        gather(model)
        self._model = model
        self._describe(model, tokenizer)
        known = None if self._grammars is None else self._grammars.tokenizer
        if tokenizer is not None and tokenizer is not known:
            self._grammars = GrammarCompiler(tokenizer, model.config.vocab_size)

    @property
    def context_length(self) -> int | None:
        """Positions that the model was made for."""
        assert self._model is not None, "load_weights must come first"
        return getattr(self._model.config, "max_position_embeddings", None)

    def sleep(self) -> None:
        """Leave a model that is cut over ranks to them again."""
        if self._model is not None:
            release(self._model)

    def close(self) -> None:
        """Let go of the model."""
        self._model = self._grammars = self._described = None

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        params: SamplingParams,
    ) -> list[list[Completion]]:
        """Complete every prompt once for each of its seeds; see ``Engine``."""
        assert self._model is not None, "load_weights must come before sample"
        assert len(prompts) == len(seeds), "every prompt needs its seeds"
        completions: list[list[Completion]] = []
        for chosen in self._batches(seeds):
            batch_prompts = [prompts[i] for i in chosen]
            repeats = [len(seeds[i]) for i in chosen]
            logits, cache, mask = _prefill(self._model, batch_prompts, repeats)
            rows = [_Row(_uniforms(seed, params)) for i in chosen for seed in seeds[i]]
            grammar = self._masks(params, len(rows))
            _decode(self._model, rows, logits, cache, mask, params, grammar)
            finished = iter([row.completion(params) for row in rows])
            completions += [[next(finished) for _ in range(n)] for n in repeats]
        return completions

    def _masks(self, params: SamplingParams, rows: int) -> GrammarMasks | None:
        if params.pattern is None:
            return None
        assert self._grammars is not None, "a pattern needs the tokenizer: give it to load_weights"
        return self._grammars.masks(params.pattern, params.stop_ids, rows)

    def _batches(self, seeds: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Runs of prompts whose completions fit a batch together."""
        batch: list[int] = []
        size = 0
        for i, own in enumerate(seeds):
            if batch and size + len(own) > self.max_batch_size:
                yield batch
                batch, size = [], 0
            batch.append(i)
            size += len(own)
        if batch:
            yield batch


@dataclass
class _Row:
    """A completion in the making."""

    uniforms: list[float]
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def completion(self, params: SamplingParams) -> Completion:
        stopped = self.token_ids[-1] in params.stop_ids
        return Completion(
            tuple(self.token_ids), tuple(self.logprobs), "stop" if stopped else "length"
        )


def _uniforms(seed: int, params: SamplingParams) -> list[float]:
    """All random numbers that a row will ever need, from its seed alone."""
    if params.temperature == 0:
        return []
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(params.max_new_tokens, generator=generator, dtype=torch.float64).tolist()


def _shared_prefix_length(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts begin with, at most all but the last of the shortest prompt."""
    limit = min(len(p) for p in prompts) - 1
    first = prompts[0]
    for i in range(limit):
        if any(p[i] != first[i] for p in prompts):
            return i
    return limit


def _prefill(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], repeats: Sequence[int]
) -> tuple[Tensor, DynamicCache, Tensor]:
    """Read the prompts and copy their state to every completion.

    Returns:
        Logits of the next token [R, V], the cache, and the attention mask bool [R, L], for the R
        completions of all prompts.
    """
    device = next(model.parameters()).device
    cache = DynamicCache(config=model.config)
    shared = _shared_prefix_length(prompts) if len(prompts) > 1 else 0
    if shared > 0:
        prefix = torch.tensor([list(prompts[0][:shared])], device=device)
        model(input_ids=prefix, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.batch_repeat_interleave(len(prompts))

    longest = max(len(p) for p in prompts) - shared
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros(len(prompts), shared + longest, dtype=torch.bool)
    mask[:, :shared] = True
    for i, prompt in enumerate(prompts):
        rest = list(prompt[shared:])
        ids[i, longest - len(rest) :] = torch.tensor(rest)
        mask[i, shared + longest - len(rest) :] = True
    ids, mask = ids.to(device), mask.to(device)
    logits = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=_positions(mask)[:, shared:],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]

    owner = torch.repeat_interleave(
        torch.arange(len(prompts), device=device), torch.tensor(list(repeats), device=device)
    )
    cache.batch_select_indices(owner)
    return logits[owner], cache, mask[owner]


def _decode(
    model: PreTrainedModel,
    rows: Sequence[_Row],
    logits: Tensor,
    cache: DynamicCache,
    mask: Tensor,
    params: SamplingParams,
    grammar: GrammarMasks | None,
) -> None:
    """Draw tokens into ``rows`` until each has drawn an end-of-turn token or reached the limit."""
    stop_ids = set(params.stop_ids)
    live = list(range(len(rows)))
    positions = mask.sum(dim=1)
    for t in range(params.max_new_tokens):
        uniforms = [rows[i].uniforms[t] for i in live] if params.temperature > 0 else None
        logits = logits.float()
        if grammar is not None:
            grammar.apply(logits, live)
        tokens, logprobs = _draw(logits, uniforms, params.temperature)
        drawn = tokens.tolist()
        if grammar is not None:
            grammar.accept(drawn, live)
        for i, token, logprob in zip(live, drawn, logprobs.tolist(), strict=True):
            rows[i].token_ids.append(token)
            rows[i].logprobs.append(logprob)
        going = [k for k, token in enumerate(drawn) if token not in stop_ids]
        if not going or t + 1 == params.max_new_tokens:
            return
        if len(going) < len(live):
            keep = torch.tensor(going, device=tokens.device)
            cache.batch_select_indices(keep)
            tokens, mask, positions = tokens[keep], mask[keep], positions[keep]
            live = [live[k] for k in going]
        mask = torch.cat([mask, mask.new_ones(len(live), 1)], dim=1)
        logits = model(
            input_ids=tokens[:, None],
            attention_mask=mask,
            position_ids=positions[:, None],
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
        positions = positions + 1


def _draw(
    logits: Tensor, uniforms: list[float] | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """The next token of each row of fp32 logits [R, V], by inverting the CDF, and its logprob."""
    if uniforms is None:
        logprobs = torch.log_softmax(logits, dim=-1)
        tokens = logits.argmax(dim=-1)
    else:
        logprobs = torch.log_softmax(logits / temperature, dim=-1)
        cumulative = logprobs.exp().cumsum(dim=-1, dtype=torch.float64)
        target = torch.tensor(uniforms, dtype=torch.float64, device=logits.device)
        target = target[:, None] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, target, right=True)[:, 0]
        tokens = tokens.clamp(max=logits.shape[-1] - 1)
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]


def _positions(mask: Tensor) -> Tensor:
    """Position of each token in its own row, padding not counted; int64."""
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)
