r"""Prompting strategies: what is asked after what.

A strategy is a generator function over one conversation. It yields requests, is sent the engine's
completions, and returns the response that is judged; ``sampling.py`` drives many at once.
"""

import re
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from thinktuning.engines import Completion
from thinktuning.errors import InputError
from thinktuning.evaluation.prompts import PromptTexts
from thinktuning.evaluation.records import Item, Turn
from thinktuning.policy import Message, completion_text, render_prompt
from thinktuning.rewards import LETTERS, extract_answer, last_boxed

VERIFY = """\
Verify your answer step by step. Then say on a line of its own either "Verdict: correct" or \
"Verdict: incorrect". If it is incorrect, solve the problem again and give a new final answer in \
the same form as before."""
FIND_MISTAKES = """\
There may be mistakes in your answer. Find them, and answer the question again. Give your final \
answer in the same form as before."""
WAIT = "Wait"
FINAL_ANSWER = "\n\nThe final answer is \\boxed{"
FINAL_ANSWER_TOKENS = 32

_VERDICT = re.compile(r"\bverdict(?:\s+is)?[\W_]*(correct|incorrect)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Request:
    """What a strategy wants from the engine next.

    Attributes:
        prompt_ids: All that the model reads, beginnings of its own answer included.
        max_new_tokens: Length limit of the completion, end-of-turn token included.
        spare_tokens: To be left free behind the completion, for later requests that go on from it.
    """

    prompt_ids: list[int]
    max_new_tokens: int
    spare_tokens: int = 0


@dataclass(frozen=True)
class Response:
    """What a model wrote in one turn.

    Attributes:
        text: Without control tokens.
        finished: It came to its end within the length limit.
    """

    text: str
    finished: bool


class Dialogue:
    """A conversation with a model about one item, and the record of it.

    Args:
        item: What it is about.
        tokenizer: The model's, whose chat template renders every turn.
        texts: What stands around the question.
        max_new_tokens: Length limit of a turn.
        budget: Tokens to think with, where the strategy has such a budget.

    Attributes:
        question: The first user message.
        turns: What was said so far.
        tokens: Written so far over all turns, by the model or into its turn by the strategy.
    """

    def __init__(
        self,
        item: Item,
        tokenizer: PreTrainedTokenizerBase,
        texts: PromptTexts,
        max_new_tokens: int,
        budget: int,
    ) -> None:
        self.item = item
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self.budget = budget
        self.question = texts.question(item)
        self.turns: list[Turn] = []
        self.tokens = 0
        self._messages: list[Message] = [{"role": "system", "content": texts.system}]

    def ask(self, text: str) -> Generator[Request, Completion, Response]:
        """Say something as the user, and let the model answer it."""
        prompt = self.prompt(text)
        completion = yield Request(prompt, self.max_new_tokens)
        return self.record(prompt, completion.token_ids, completion.finish_reason == "stop")

    def prompt(self, text: str) -> list[int]:
        """Say something as the user; the whole chat's ids, up to where the model answers."""
        self._messages.append({"role": "user", "content": text})
        return render_prompt(self.tokenizer, self._messages)

    def record(
        self, prompt_ids: Sequence[int], token_ids: Sequence[int], finished: bool
    ) -> Response:
        """Note what the model wrote in answer to ``prompt_ids``."""
        text = completion_text(self.tokenizer, token_ids)
        self.turns.append(Turn(str(self.tokenizer.decode(list(prompt_ids))), text))
        self.tokens += len(token_ids)
        self._messages.append({"role": "assistant", "content": text})
        return Response(text, finished)

    def encode(self, text: str) -> list[int]:
        """Ids of a text to be put into the model's turn."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        assert ids, f"the tokenizer has no ids for {text!r}"
        return ids


Conversation = Generator[Request, Completion, Response]
Strategy = Callable[[Dialogue], Conversation]


def zero_shot(dialogue: Dialogue) -> Conversation:
    """One answer."""
    return (yield from dialogue.ask(dialogue.question))


def self_verify(dialogue: Dialogue) -> Conversation:
    """An answer, then its verification by the same model.

    The first response stands unless a finished verification overturns it: one whose last verdict
    is ``incorrect`` and that gives an answer, or one without a verdict that gives a boxed answer.
    """
    first = yield from dialogue.ask(dialogue.question)
    second = yield from dialogue.ask(VERIFY)
    return second if second.finished and _overturns(second.text, dialogue.item) else first


def self_correct(dialogue: Dialogue) -> Conversation:
    """An answer, then another one after a hint that the first may have mistakes."""
    yield from dialogue.ask(dialogue.question)
    return (yield from dialogue.ask(FIND_MISTAKES))


def s1_budget(dialogue: Dialogue) -> Conversation:
    r"""Budget forcing (Muennighoff et al. 2025): think for exactly ``budget`` tokens, then answer.

    An end of turn that comes earlier is taken back, which counts nowhere, and ``Wait`` is put in
    its place, which counts as spent. At the budget the beginning of a final answer up to
    ``\boxed{`` is put in, and the model closes the box. What it writes behind it isn't kept; a box
    that stays open is a response that was cut off.

    Everything goes by token ids: what the model wrote is never decoded and encoded again.
    """
    prompt = dialogue.prompt(dialogue.question)
    wait, forced = dialogue.encode(WAIT), dialogue.encode(FINAL_ANSWER)
    spare = len(forced) + FINAL_ANSWER_TOKENS
    thought: list[int] = []
    # Every round adds a token at least, so this ends even where the model only ends its turn.
    while len(thought) < dialogue.budget:
        piece = yield Request([*prompt, *thought], dialogue.budget - len(thought), spare)
        thought += piece.token_ids
        if piece.finish_reason == "stop":
            thought[-1:] = wait
            del thought[dialogue.budget :]
    answer = yield Request([*prompt, *thought, *forced], FINAL_ANSWER_TOKENS)
    closed = _until_the_box_closes(dialogue.tokenizer, forced, answer.token_ids)
    written = answer.token_ids if closed is None else closed
    return dialogue.record(prompt, [*thought, *forced, *written], finished=closed is not None)


STRATEGIES: dict[str, Strategy] = {
    "zero_shot": zero_shot,
    "self_verify": self_verify,
    "self_correct": self_correct,
    "s1_budget": s1_budget,
}

# What strategies say beside the item itself, so that results made with other words are known.
TEXTS = {
    "zero_shot": "",
    "self_verify": VERIFY,
    "self_correct": FIND_MISTAKES,
    "s1_budget": f"{WAIT} {FINAL_ANSWER} {FINAL_ANSWER_TOKENS}",
}


def check_strategies(names: Sequence[str]) -> None:
    """Refuse names that aren't strategies.

    Raises:
        InputError: If there is none, or with all that are unknown.
    """
    unknown = [name for name in names if name not in STRATEGIES]
    if unknown or not names:
        found = f"got {', '.join(map(repr, unknown))}" if unknown else "got none"
        raise InputError(f"evaluation: strategies must be among {', '.join(STRATEGIES)}; {found}")


def _overturns(verification: str, item: Item) -> bool:
    verdicts: list[str] = _VERDICT.findall(verification)
    if not verdicts:
        # In loose text "No, that is right" would be read as an answer to a yes-or-no question.
        return bool(last_boxed(verification))
    options = len(item.choices or LETTERS)
    answer = extract_answer(item.kind, verification, options)
    return verdicts[-1].lower() == "incorrect" and answer is not None


def _until_the_box_closes(
    tokenizer: PreTrainedTokenizerBase, opening: list[int], token_ids: Sequence[int]
) -> Sequence[int] | None:
    """The shortest beginning of ``token_ids`` that closes the box of ``opening``, or None."""
    for length in range(1, len(token_ids) + 1):
        if last_boxed(completion_text(tokenizer, [*opening, *token_ids[:length]])) is not None:
            return token_ids[:length]
    return None
