"""Supervised fine-tuning on the gold solutions that come with the questions."""

import logging
import math
from collections.abc import Sequence
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from thinktuning.baselines.supervised import SupervisedModule
from thinktuning.data import GSM8KDataModule
from thinktuning.errors import InputError
from thinktuning.metrics import StepMetrics, mean
from thinktuning.types import Prompt, Rollout

log = logging.getLogger(__name__)


class SFTModule(SupervisedModule):
    r"""Supervised fine-tuning: the student learns to write the gold solutions, token by token.

    A solution is asked of it in the form ``<solution>``, an empty line,
    ``The final answer is \boxed{<answer>}.`` Those longer than ``max_new_tokens`` are left out.
    The arguments are those of ``SupervisedModule``.
    """

    _warned = False

    def setup(self, stage: str) -> None:
        """Refuse questions without a gold solution before a model is loaded."""
        super().setup(stage)
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if stage == "fit" and isinstance(data, GSM8KDataModule):
            assert data.train_prompts is not None, "Lightning sets up the data first"
            _check_solutions(data.train_prompts, data.source)

    def training_step(self, prompts: list[Prompt], batch_idx: int) -> dict[str, Any]:
        """One optimizer step on a batch's gold solutions."""
        metrics = StepMetrics()
        rollouts = [self._gold(prompt) for prompt in prompts]
        metrics.add({"data/left_out": mean(not r.finished for r in rollouts)})
        too_long = sum(not r.finished for r in rollouts)
        if too_long and not self._warned:
            self._warned = True
            log.warning(
                "%d of %d gold solutions of this batch are longer than max_new_tokens=%d and left "
                "out; data/left_out is their share in every batch",
                too_long,
                len(rollouts),
                self.max_new_tokens,
            )
        return self._train_on(rollouts, metrics)

    def _gold(self, prompt: Prompt) -> Rollout:
        """The gold solution as an answer; if it's too long, no more than its end, unfinished."""
        text = gold_response(prompt)
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        ids.append(written_end_of_turn(self.tokenizer, self.stop_ids))
        fits = len(ids) <= self.max_new_tokens
        ids = ids if fits else ids[-1:]
        return Rollout(
            prompt=prompt,
            sample=0,
            completion_ids=tuple(ids),
            logprobs=(math.nan,) * len(ids),  # nobody has sampled them
            injected_mask=(True,) * len(ids),
            finished=fits,
            text=text,
            advantage=1.0,
        )


def gold_response(prompt: Prompt) -> str:
    """A gold solution in the form that answers are asked in."""
    return f"{prompt.solution}\n\nThe final answer is \\boxed{{{prompt.answer}}}."


def written_end_of_turn(tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]) -> int:
    """The one of several end-of-turn ids that the chat template puts behind an assistant's turn.

    Llama 3 stops at ``<|end_of_text|>`` as well, which no chat of its has. A tokenizer without a
    template has its EOS token there.
    """
    if tokenizer.chat_template is not None:
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        chat = tokenizer.apply_chat_template(turns, tokenize=False)
        assert isinstance(chat, str)
        ids: list[int] = tokenizer.encode(chat, add_special_tokens=False)
        written = [i for i in ids if i in stop_ids]
        if written:
            return written[-1]
    eos: int | None = tokenizer.eos_token_id
    return stop_ids[0] if eos is None else eos


def _check_solutions(prompts: Sequence[Prompt], source: str) -> None:
    lacking = [p.index + 1 for p in prompts if not p.solution]
    if lacking:
        raise InputError(
            f"data: {len(lacking)} of {len(prompts)} training questions of {source!r} have no "
            f"worked solution to train on, the first in row {lacking[0]}; SFT needs answers in "
            f"GSM8K's form: the solution, then #### and the final answer"
        )
