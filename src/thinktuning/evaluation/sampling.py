"""A model's answers to many items: all conversations go on in lockstep, batched."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from thinktuning.engines import Completion, Engine, SamplingParams, derive_seed
from thinktuning.errors import InputError, too_small
from thinktuning.evaluation.prompts import PromptTexts
from thinktuning.evaluation.records import Item, ItemResult, Sample
from thinktuning.evaluation.strategies import (
    STRATEGIES,
    Dialogue,
    Request,
    Response,
    check_strategies,
)
from thinktuning.rewards import LETTERS, judge


@dataclass(frozen=True)
class SamplingSettings:
    """How items are answered.

    Attributes:
        max_new_tokens: Length limit of a turn, end-of-turn token included.
        temperature: 0 decodes greedily.
        samples: Answers to each item; more than one needs a temperature.
        seed: Of all draws.
        budget: Tokens that ``s1_budget`` thinks with.
        texts: What stands around a question.

    Raises:
        InputError: With all faulty values.
    """

    max_new_tokens: int = 1024
    temperature: float = 0.0
    samples: int = 1
    seed: int = 0
    budget: int = 2048
    texts: PromptTexts = field(default_factory=PromptTexts)

    def __post_init__(self) -> None:
        faults = too_small(
            ("max_new_tokens", self.max_new_tokens, 1),
            ("samples", self.samples, 1),
            ("budget", self.budget, 1),
        )
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            faults.append(f"temperature must be 0 or more, got {self.temperature}")
        if self.samples > 1 and self.temperature == 0:
            faults.append(
                f"samples={self.samples} at temperature 0 would all be the same; "
                f"raise temperature or ask for one"
            )
        if faults:
            raise InputError("evaluation: " + "; ".join(faults))


def run_strategy(
    strategy: str,
    items: Sequence[Item],
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: tuple[int, ...],
    settings: SamplingSettings,
) -> list[ItemResult]:
    """Answer every item with a strategy and judge the answers.

    A sample's draws depend on the seed, its item, its number, its turn and the strategy alone: not
    on the items beside it, nor on their order. A later turn whose prompt has grown so long that it
    might not fit the context stays empty and unfinished.

    Args:
        strategy: Name of a strategy.
        items: What is asked, e.g. a batch of a benchmark.
        engine: Holds the model's weights.
        tokenizer: The model's.
        stop_ids: Every id that ends a turn.
        settings: How.

    Returns:
        For each item its samples, in the order of ``items``.

    Raises:
        InputError: If there is no such strategy, or see ``check_room``; before anything is sampled.
    """
    check_strategies([strategy])
    check_room(strategy, items, engine, tokenizer, settings)
    conversations = [
        [
            _Conversation(strategy, item, k, tokenizer, settings, engine.context_length)
            for k in range(settings.samples)
        ]
        for item in items
    ]
    going = [conversation for group in conversations for conversation in group]
    while going:
        for call in _calls(going, engine.context_length):
            _complete(call, engine, stop_ids, settings.temperature)
        going = [conversation for conversation in going if conversation.response is None]
    return [
        ItemResult(
            item.id, item.question, item.answer, tuple(c.judged() for c in group), item.choices
        )
        for item, group in zip(items, conversations, strict=True)
    ]


def check_room(
    strategy: str,
    items: Sequence[Item],
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    settings: SamplingSettings,
) -> None:
    """Look whether the first turns of some items fit the context.

    Raises:
        InputError: If an item's prompt and what may be written after it don't.
    """
    conversations = [
        _Conversation(strategy, item, 0, tokenizer, settings, engine.context_length)
        for item in items
    ]
    overlong = [c for c in conversations if not _fits(c.request, engine.context_length)]
    if not overlong:
        return
    longest = max(overlong, key=lambda c: len(c.request.prompt_ids))
    request = longest.request
    raise InputError(
        f"evaluation: {strategy} doesn't fit the {engine.context_length} positions that the model "
        f"or its engine has with {len(overlong)} of {len(items)} items of "
        f"{longest.item.benchmark}: the longest, {longest.item.id}, has a prompt of "
        f"{len(request.prompt_ids)} tokens, and up to "
        f"{request.max_new_tokens + request.spare_tokens} are written after it; lower "
        f"max_new_tokens (s1_budget: budget), or give a file without these items"
    )


_NOTHING = Completion((), (), "length")


class _Conversation:
    """A sample of an item in the making: a strategy, and what it waits for.

    Attributes:
        item: What is asked.
        request: What the strategy waits for, or waited for last.
        response: What is judged; None as long as the strategy goes on.
    """

    def __init__(
        self,
        strategy: str,
        item: Item,
        sample: int,
        tokenizer: PreTrainedTokenizerBase,
        settings: SamplingSettings,
        context_length: int | None,
    ) -> None:
        self.item = item
        self._strategy = strategy
        self._sample = (settings.seed, item.benchmark, item.id, sample)
        self._turn = 0
        self._context_length = context_length
        self._dialogue = Dialogue(
            item, tokenizer, settings.texts, settings.max_new_tokens, settings.budget
        )
        self._steps = STRATEGIES[strategy](self._dialogue)
        self.request: Request = next(self._steps)
        self.response: Response | None = None

    @property
    def seed(self) -> int:
        """Of the draw that the strategy waits for."""
        return derive_seed(*self._sample, self._turn, self._strategy)

    def go_on(self, completion: Completion) -> None:
        """Give the strategy what it waits for."""
        self._turn += 1
        try:
            self.request = self._steps.send(completion)
            while not _fits(self.request, self._context_length):
                self.request = self._steps.send(_NOTHING)
        except StopIteration as end:
            self.response = end.value

    def judged(self) -> Sample:
        """The sample, once the strategy is through."""
        assert self.response is not None, "the strategy goes on"
        item, text = self.item, self.response.text
        options = len(item.choices or LETTERS)
        outcome, extracted = judge(item.kind, text, item.answer, self.response.finished, options)
        turns = tuple(self._dialogue.turns)
        return Sample(turns, text, extracted, outcome, self._dialogue.tokens)


def _calls(
    going: Sequence[_Conversation], context_length: int | None
) -> Iterator[list[_Conversation]]:
    """Who is served together: those with similar length limits, the longest first.

    A call of the engine has one length limit for all, but under ``s1_budget`` everyone has other
    tokens left, and a call for each would not be batched. So a call samples with the longest limit
    in it, and what a completion has past its own limit is cut off. The rest of it is what its own
    limit would have given: a completion's draws depend on its seed alone, token by token. Limits
    in a call differ by less than a factor of two, which bounds what is sampled in vain, and nobody
    is taken past the end of the context.
    """
    call: list[_Conversation] = []
    for conversation in sorted(going, key=lambda c: -c.request.max_new_tokens):
        request = conversation.request
        limit = call[0].request.max_new_tokens if call else request.max_new_tokens
        similar = 2 * request.max_new_tokens > limit
        if not (similar and _fits(replace(request, max_new_tokens=limit), context_length)):
            yield call
            call = []
        call.append(conversation)
    if call:
        yield call


def _complete(
    call: Sequence[_Conversation],
    engine: Engine,
    stop_ids: tuple[int, ...],
    temperature: float,
) -> None:
    """Sample what these conversations wait for; those with the same prompt share it."""
    sharers: dict[tuple[int, ...], list[_Conversation]] = {}
    for conversation in call:
        sharers.setdefault(tuple(conversation.request.prompt_ids), []).append(conversation)
    limit = max(conversation.request.max_new_tokens for conversation in call)
    groups = engine.sample(
        list(sharers),
        [[conversation.seed for conversation in group] for group in sharers.values()],
        SamplingParams(limit, stop_ids, temperature),
    )
    for group, completions in zip(sharers.values(), groups, strict=True):
        for conversation, completion in zip(group, completions, strict=True):
            conversation.go_on(_cut(completion, conversation.request.max_new_tokens))


def _cut(completion: Completion, limit: int) -> Completion:
    """The completion as its own length limit would have ended it."""
    if len(completion.token_ids) <= limit:
        return completion
    return Completion(completion.token_ids[:limit], completion.logprobs[:limit], "length")


def _fits(request: Request, context_length: int | None) -> bool:
    needed = len(request.prompt_ids) + request.max_new_tokens + request.spare_tokens
    return context_length is None or needed <= context_length
