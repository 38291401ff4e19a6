"""Constrained decoding: every row keeps to a regular expression."""

from collections.abc import Sequence

import xgrammar
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase


class GrammarCompiler:
    """Compiles patterns for one tokenizer; each is compiled once.

    Args:
        tokenizer: Of the model that writes.
        vocab_size: Columns of its logits, which may be more than the tokenizer's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self._compiled: dict[tuple[str, tuple[int, ...]], xgrammar.CompiledGrammar] = {}

    def masks(self, pattern: str, stop_ids: tuple[int, ...], rows: int) -> "GrammarMasks":
        """The masks of ``rows`` completions; behind the pattern only a stop id is allowed."""
        key = pattern, stop_ids
        if key not in self._compiled:
            info = xgrammar.TokenizerInfo.from_huggingface(
                self.tokenizer, vocab_size=self.vocab_size, stop_token_ids=list(stop_ids)
            )
            self._compiled[key] = xgrammar.GrammarCompiler(info).compile_regex(pattern)
        return GrammarMasks(self._compiled[key], rows, self.vocab_size)


class GrammarMasks:
    """Where each of a batch's completions is in the pattern."""

    def __init__(self, compiled: xgrammar.CompiledGrammar, rows: int, vocab_size: int) -> None:
        self._matchers = [xgrammar.GrammarMatcher(compiled) for _ in range(rows)]
        self._bits = xgrammar.allocate_token_bitmask(rows, vocab_size)

    def apply(self, logits: Tensor, live: Sequence[int]) -> None:
        """Set the logits [len(live), V] of forbidden tokens to -inf, in place."""
        for place, row in enumerate(live):
            self._matchers[row].fill_next_token_bitmask(self._bits, place)
        bits = self._bits[: len(live)].to(logits.device)
        xgrammar.apply_token_bitmask_inplace(logits, bits)

    def accept(self, tokens: Sequence[int], live: Sequence[int]) -> None:
        """Move on by one drawn token per live row."""
        for row, token in zip(live, tokens, strict=True):
            accepted = self._matchers[row].accept_token(token)
            assert accepted, "a masked token was drawn"
