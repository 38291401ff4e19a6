"""The LightningDataModule: grade-school mathematics, or anything in its format."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from lightning.pytorch import LightningDataModule

from thinktuning.data.loader import PromptLoader
from thinktuning.data.sources import Question, load_questions
from thinktuning.errors import InputError, too_small
from thinktuning.policy import Message, load_tokenizer, render_prompt
from thinktuning.types import Prompt

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptExample:
    """A worked example that the student is shown before its question.

    Attributes:
        question: A question.
        response: A good answer to it, in the asked format.
    """

    question: str
    response: str


class GSM8KDataModule(LightningDataModule):
    r"""Streams questions as prompts.

    Args:
        tokenizer: Hub id or folder of the tokenizer; taken from model.pretrained by the CLI.
        source: Hub id (openai/gsm8k), a .jsonl or .parquet file with the columns question and
            answer in GSM8K's format, or reasoning-gym:NAME (gsm_symbolic: generated word problems)
            with settings of that generator, reasoning-gym:chain_sum?max_terms=3&max_digits=2.
        val_source: Questions for validation and test, in the same forms; null holds out the last
            val_size questions of source, or takes the hub's test split.
        val_size: Questions for validation; 0 for none.
        limit: Training questions to read at most; null for all (1000 from a generator).
        batch_size: Questions of a rollout batch, over all ranks.
        val_batch_size: Questions of a validation batch, over all ranks.
        max_prompt_tokens: Longer prompts are left out, counted and logged.
        system_message: Always sent, since a template's default may say anything.
        instruction: Appended to every question after an empty line; may be empty.
        examples: Worked examples, shown to the student as earlier turns of the chat; for models
            that don't keep to the format by themselves.
        seed: Of the order and of generated questions; taken from seed_everything by the CLI.
    """

    def __init__(
        self,
        tokenizer: str,
        source: str = "openai/gsm8k",
        val_source: str | None = None,
        val_size: int = 64,
        limit: int | None = None,
        batch_size: int = 8,
        val_batch_size: int = 32,
        max_prompt_tokens: int = 512,
        system_message: str = "You are a careful solver of mathematical word problems.",
        instruction: str = r"Reason step by step, and put your final answer inside \boxed{}.",
        examples: list[PromptExample] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        faults = too_small(
            ("batch_size", batch_size, 1),
            ("val_batch_size", val_batch_size, 1),
            ("val_size", val_size, 0),
            ("max_prompt_tokens", max_prompt_tokens, 1),
        )
        if limit is not None and limit < 1:
            faults.append(f"limit must be at least 1 or null, got {limit}")
        if val_source is not None and val_size == 0:
            faults.append(f"val_size=0 asks nothing of val_source={val_source!r}; give a val_size")
        if faults:
            raise InputError("data: " + "; ".join(faults))
        self.tokenizer_name = tokenizer
        self.source = source
        self.val_source = val_source
        self.val_size = val_size
        self.limit = limit
        self.batch_size = batch_size
        self.val_batch_size = val_batch_size
        self.max_prompt_tokens = max_prompt_tokens
        self.system_message = system_message
        self.instruction = instruction
        self.examples = tuple(examples or ())
        self.seed = seed
        self.train_prompts: list[Prompt] | None = None
        self.val_prompts: list[Prompt] = []

    def setup(self, stage: str) -> None:
        """Read the questions and render their prompts, once."""
        if self.train_prompts is not None:
            return
        self._tokenizer = load_tokenizer(self.tokenizer_name)
        train, val = self._split()
        self.train_prompts = self._prompts(train, "training")
        self.val_prompts = self._prompts(val, "validation") if val else []

    def _split(self) -> tuple[list[Question], list[Question]]:
        """Training and validation questions; no text is in both."""
        train, val = self._sources()
        held_out = {question.text for question in val}
        apart = [question for question in train if question.text not in held_out]
        if len(apart) < len(train):
            log.warning(
                "%d of %d training questions are asked in validation, too, and left out",
                len(train) - len(apart),
                len(train),
            )
        if not apart:
            raise InputError(
                "data: every training question is asked in validation, too; give other questions "
                "as val_source"
            )
        return apart, val

    def _sources(self) -> tuple[list[Question], list[Question]]:
        if self.val_size == 0:
            return load_questions(self.source, "train", self.seed, self.limit), []
        is_hub_gsm8k = self.source == "openai/gsm8k"
        if self.val_source == self.source and not is_hub_gsm8k:
            raise InputError(
                f"data: val_source is the same as source, {self.source!r}, so validation would ask "
                f"what was trained on; leave val_source out to hold out val_size questions"
            )
        if self.val_source is not None or is_hub_gsm8k:
            train = load_questions(self.source, "train", self.seed, self.limit)
            val_source = self.val_source or self.source
            return train, load_questions(val_source, "test", self.seed, self.val_size)
        wanted = None if self.limit is None else self.limit + self.val_size
        questions = load_questions(self.source, "train", self.seed, wanted)
        if len(questions) <= self.val_size:
            raise InputError(
                f"data: {self.source!r} has {len(questions)} questions, and validation takes "
                f"{self.val_size} of them; give a smaller val_size or a val_source"
            )
        return questions[: -self.val_size], questions[-self.val_size :]

    def _prompts(self, questions: Sequence[Question], what: str) -> list[Prompt]:
        prompts = [
            Prompt(
                q.index,
                q.text,
                q.answer,
                render_prompt(self._tokenizer, self._messages(q.text)),
                q.solution,
            )
            for q in questions
        ]
        fitting = [p for p in prompts if len(p.token_ids) <= self.max_prompt_tokens]
        if len(fitting) < len(prompts):
            log.warning(
                "%d of %d %s prompts are longer than max_prompt_tokens=%d and left out",
                len(prompts) - len(fitting),
                len(prompts),
                what,
                self.max_prompt_tokens,
            )
        if not fitting:
            shortest = min(len(p.token_ids) for p in prompts)
            raise InputError(
                f"data: every {what} prompt is longer than max_prompt_tokens="
                f"{self.max_prompt_tokens}; the shortest has {shortest} tokens"
            )
        return fitting

    def _messages(self, question: str) -> list[Message]:
        messages = [{"role": "system", "content": self.system_message}]
        for example in self.examples:
            messages.append(self._user(example.question))
            messages.append({"role": "assistant", "content": example.response})
        messages.append(self._user(question))
        return messages

    def _user(self, question: str) -> Message:
        asked = f"{question}\n\n{self.instruction}" if self.instruction else question
        return {"role": "user", "content": asked}

    def _loader(self, prompts: list[Prompt], batch_size: int, seed: int | None) -> PromptLoader:
        trainer = self.trainer
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        return PromptLoader(prompts, batch_size, seed, rank, world_size)

    def train_dataloader(self) -> PromptLoader:
        """Rollout batches, shuffled."""
        assert self.train_prompts is not None, "setup must come first"
        return self._loader(self.train_prompts, self.batch_size, self.seed)

    def val_dataloader(self) -> PromptLoader | list[list[Prompt]]:
        """Validation questions in the order of the source."""
        if not self.val_prompts:
            return []
        return self._loader(self.val_prompts, self.val_batch_size, None)

    def test_dataloader(self) -> PromptLoader | list[list[Prompt]]:
        """The validation questions."""
        return self.val_dataloader()
