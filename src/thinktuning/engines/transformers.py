"""Sampling with the Transformers model that is being trained: no copy, no second runtime."""

from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import count
from typing import Literal

import torch
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from thinktuning.engines.base import Completion, Engine, SamplingParams
from thinktuning.engines.decoding import (
    Batch,
    Group,
    Prefix,
    common_length,
    new_row,
    read_kept_prefix,
    read_prefix,
    read_prompts,
)
from thinktuning.engines.grammar import GrammarCompiler, GrammarMasks
from thinktuning.engines.kv_cache import sees_all
from thinktuning.errors import InputError
from thinktuning.policy import (
    gather,
    is_frozen,
    load_model,
    load_tokenizer,
    packed_linears,
    release,
    rounded_weights,
)


class TransformersEngine(Engine):
    """Decodes with the live PyTorch module; weight sync is free.

    The tokens that all prompts share (system message, worked examples) are read once, with frozen
    weights once for good, and every prompt once for its whole group. Finished rows leave the batch;
    when a quarter of it is free, waiting groups join.

    Args:
        max_batch_size: Completions decoded at a time, >= 1, or a group if that is larger.
        pretrained: Of a teacher with weights of its own: hub id, folder, or embedded. null: the
            student's weights, or those of the frozen reference.
        quantization: Loads those weights in 4 or 8 bits through bitsandbytes; null doesn't.
        packed: On a CPU, lay out the weights of linear layers for its kernels while tokens are
            drawn; rounds otherwise, no less exactly.
    """

    def __init__(
        self,
        max_batch_size: int = 64,
        pretrained: str | None = None,
        quantization: Literal["4bit", "8bit"] | None = None,
        packed: bool = True,
    ) -> None:
        super().__init__(pretrained)
        if max_batch_size < 1:
            raise InputError(f"engine: max_batch_size must be at least 1, got {max_batch_size}")
        if quantization is not None and pretrained is None:
            raise InputError("engine: quantization needs pretrained, the weights to quantise")
        self.max_batch_size = max_batch_size
        self.quantization = quantization
        self.packed = packed
        self._model: PreTrainedModel | None = None
        self._grammars: GrammarCompiler | None = None
        self._kept: tuple[PreTrainedModel, torch.dtype, Prefix] | None = None

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
        model.requires_grad_(False)
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
        self._model = self._grammars = self._described = self._kept = None

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
        if not prompts:
            return []
        numbers = count()
        groups = [[new_row(next(numbers), seed, params) for seed in own] for own in seeds]
        grammar = self._masks(params, next(numbers))
        packing = packed_linears(self._model) if self.packed else nullcontext()
        with rounded_weights(self._model), packing:
            prefix = self._read_prefix(self._model, prompts)
            waiting: deque[Group] = deque(zip(prompts, groups, strict=True))
            batch: Batch | None = None
            while waiting or batch is not None:
                if chosen := self._next(waiting, batch):
                    more = read_prompts(self._model, chosen, prefix)
                    if batch is None:
                        batch = more
                    else:
                        batch.join(more)
                assert batch is not None
                tokens = batch.draw(params, grammar)
                if batch.rows:
                    batch.read(self._model, tokens)
                else:
                    batch = None
        return [[row.completion(params) for row in rows] for rows in groups]

    def _next(self, waiting: deque[Group], batch: Batch | None) -> list[Group]:
        """Take those out of ``waiting`` that are to be decoded from now on."""
        free = self.max_batch_size - (0 if batch is None else len(batch.rows))
        if batch is not None and not (sees_all(batch.cache) and 4 * free >= self.max_batch_size):
            return []
        chosen: list[Group] = []
        while waiting and (len(waiting[0][1]) <= free or (batch is None and not chosen)):
            chosen.append(waiting.popleft())
            free -= len(chosen[-1][1])
        return chosen

    def _read_prefix(
        self, model: PreTrainedModel, prompts: Sequence[Sequence[int]]
    ) -> Prefix | None:
        """What all prompts begin with; that of frozen weights is kept for the next prompts."""
        shared = prompts[0][: min(common_length(prompts), min(len(p) for p in prompts) - 1)]
        if not is_frozen(model):
            return read_prefix(model, shared) if shared and len(prompts) > 1 else None
        dtype, known = next(model.parameters()).dtype, None
        if self._kept is not None and self._kept[:2] == (model, dtype):
            known, self._kept = self._kept[2], None
        prefix = read_kept_prefix(model, shared, known)
        if prefix is not None and sees_all(prefix.cache):
            self._kept = (model, dtype, prefix)
        return prefix

    def _masks(self, params: SamplingParams, rows: int) -> GrammarMasks | None:
        if params.pattern is None:
            return None
        assert self._grammars is not None, "a pattern needs the tokenizer: give it to load_weights"
        return self._grammars.masks(params.pattern, params.stop_ids, rows)
