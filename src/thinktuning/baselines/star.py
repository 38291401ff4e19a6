"""STaR: a student that is trained on those of its own answers that are right, round by round.

Zelikman et al. 2022, arXiv 2203.14465. An epoch of the trainer is a round:

1. The student answers every training question; right answers are kept.
2. It answers those that it failed again, with the gold answer as a hint; right ones are kept too.
3. It begins again from the base weights and is trained on what was kept, without the hint.

How it differs from the paper: a round makes ``data.passes`` passes over what it kept, where the
paper fixes a number of steps that grows by a fifth every round; and the student sees no worked
rationales, unless ``data.examples`` has some.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import nan
from typing import Any

import torch
import torch.distributed
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.distributed.tensor import DTensor

from thinktuning.baselines.rationales import Rationale, RationaleLoader
from thinktuning.baselines.supervised import SupervisedModule
from thinktuning.data import GSM8KDataModule
from thinktuning.engines import SamplingParams, derive_seed
from thinktuning.errors import InputError, too_small
from thinktuning.metrics import StepMetrics, mean
from thinktuning.objective import Mean
from thinktuning.policy import render_prompt
from thinktuning.rewards import verify_math
from thinktuning.types import Outcome, Prompt, Rollout

_STATE = "star"


class STaRDataModule(GSM8KDataModule):
    """Streams a round's rationales to a ``STaRModule``.

    Args:
        tokenizer: Hub id or folder of the tokenizer; taken from model.pretrained by the CLI.
        passes: How often a round trains on each answer that it kept.
        hint: Put behind a question that the student has failed, as a paragraph of its own, where
            {answer} becomes the gold answer.
        kwargs: Those of ``GSM8KDataModule``; ``val_batch_size`` also counts the questions that are
            asked at a time when a round begins.
    """

    def __init__(
        self,
        tokenizer: str,
        passes: int = 1,
        hint: str = r"Hint: the final answer is \boxed{{answer}}.",
        **kwargs: Any,
    ) -> None:
        super().__init__(tokenizer, **kwargs)
        faults = too_small(("passes", passes, 1))
        if "{answer}" not in hint:
            faults.append(f"hint must say where the gold answer goes: {{answer}}; got {hint!r}")
        if faults:
            raise InputError("data: " + "; ".join(faults))
        self.passes = passes
        self.hint = hint

    def hinted(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The questions with their gold answers; those too long for ``max_prompt_tokens`` not."""
        asked = [replace(p, token_ids=self._hinted_ids(p)) for p in prompts]
        return [p for p in asked if len(p.token_ids) <= self.max_prompt_tokens]

    def _hinted_ids(self, prompt: Prompt) -> list[int]:
        hint = self.hint.replace("{answer}", prompt.answer)
        return render_prompt(self._tokenizer, self._messages(f"{prompt.question}\n\n{hint}"))

    def train_dataloader(self) -> RationaleLoader:  # type: ignore[override]
        """What the running round trains on; Lightning asks for it when a round begins."""
        trainer = self.trainer
        assert trainer is not None and self.train_prompts is not None, "setup must come first"
        module = trainer.lightning_module
        assert isinstance(module, STaRModule), "rationales are those of a STaRModule"
        if self.batch_size % trainer.world_size:
            raise InputError(
                f"data: batch_size counts the rationales of all ranks and must be a multiple of "
                f"their number; got batch_size={self.batch_size} on {trainer.world_size} ranks"
            )
        number = trainer.current_epoch
        return RationaleLoader(
            module.rationales(self, number),
            self.passes,
            self.batch_size,
            derive_seed(self.seed, number, "rationales"),
            trainer.global_rank,
            trainer.world_size,
        )


class STaRModule(SupervisedModule):
    """STaR: rounds of answering, keeping what is right, and training the base model on it.

    An epoch is a round, so that ``trainer.max_epochs`` counts them, and
    ``trainer.reload_dataloaders_every_n_epochs`` must be 1. The base weights stay in host memory,
    each rank's own part of them, or of a LoRA the adapters as they began.

    Args:
        temperature: Of the sampled answers; 0 takes the most likely token, as the paper does.
        kwargs: Those of ``SupervisedModule``.
    """

    def __init__(self, temperature: float = 0.0, **kwargs: Any) -> None:
        if temperature < 0:
            raise InputError(f"model: temperature must not be negative, got {temperature}")
        super().__init__(**kwargs)
        self.temperature = temperature
        self._round: int | None = None
        self._kept: list[Rationale] = []
        self._saved: dict[str, Any] | None = None

    # ---------------------------------------------------------------- models

    def setup(self, stage: str) -> None:
        """Refuse a trainer that would train on the first round's rationales for ever."""
        super().setup(stage)
        every = self.trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
        if stage == "fit" and every != 1:
            raise InputError(
                f"STaR collects its training data anew every epoch: "
                f"trainer.reload_dataloaders_every_n_epochs must be 1, got {every}"
            )

    def configure_model(self) -> None:
        """Load the policy, and remember what every round begins from."""
        if hasattr(self, "policy"):
            return
        super().configure_model()
        if self._fitting():
            self._base = {
                name: _own_part(weight).to("cpu", copy=True) for name, weight in self._trained()
            }

    def _trained(self) -> Iterator[tuple[str, Tensor]]:
        return ((n, p.detach()) for n, p in self.policy.named_parameters() if p.requires_grad)

    def _begin_from_base(self) -> None:
        """Give the policy its first weights again; optimizer and warm-up start anew."""
        for name, weight in self._trained():
            _own_part(weight).copy_(self._base[name])
        self.trainer.strategy.setup_optimizers(self.trainer)

    # ------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the running round's rationales."""
        super().on_save_checkpoint(checkpoint)
        ids = [i for r in self._kept for i in r.token_ids]
        checkpoint[_STATE] = {
            "round": self._round,
            "rows": [r.prompt.index for r in self._kept],
            "hinted": [r.hinted for r in self._kept],
            "lengths": [len(r.token_ids) for r in self._kept],
            "token_ids": torch.tensor(ids, dtype=torch.int32),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the saved rationales until the questions are asked for."""
        super().on_load_checkpoint(checkpoint)
        self._saved = checkpoint.get(_STATE)
        if self._saved is None and self._fitting():
            raise InputError(
                "the checkpoint has no rationales, so STaR can't go on from it: it was made by "
                "another method; give one of a STaR run, or leave out --ckpt_path"
            )

    def _restore(self, saved: Mapping[str, Any], prompts: Sequence[Prompt]) -> list[Rationale]:
        asked = {p.index: p for p in prompts}
        missing = [row for row in saved["rows"] if row not in asked]
        if missing:
            raise InputError(
                f"the checkpoint has answers to {len(missing)} questions that aren't among the "
                f"training questions, e.g. row {missing[0] + 1}; give the data section that it was "
                f"made with"
            )
        parts = saved["token_ids"].split(saved["lengths"])
        return [
            Rationale(asked[row], ids.tolist(), hinted)
            for row, hinted, ids in zip(saved["rows"], saved["hinted"], parts, strict=True)
        ]

    # ------------------------------------------------------------- collection

    def rationales(self, data: STaRDataModule, number: int) -> list[Rationale]:
        """What round ``number`` trains on, on every rank the same.

        They are collected, and the policy begins from the base weights, unless a checkpoint was
        made in that very round.

        Raises:
            InputError: If too few answers are right.
        """
        prompts = data.train_prompts
        assert prompts is not None, "setup must come first"
        saved, self._saved = self._saved, None
        if saved is not None and saved["round"] == number:
            self._round, self._kept = number, self._restore(saved, prompts)
        elif self._round != number:
            self._round, self._kept = number, self._collect(data, prompts, number)
            self._begin_from_base()
        return self._kept

    def _collect(
        self, data: STaRDataModule, prompts: Sequence[Prompt], number: int
    ) -> list[Rationale]:
        metrics = StepMetrics()
        # Lightning opens no autocast around data loaders.
        with metrics.timed("collection"), self.trainer.precision_plugin.forward_context():
            self._give_weights()
            solved = self._right_answers(prompts, data.val_batch_size, number, "questions")
            failed = data.hinted([p for p in prompts if p.index not in solved])
            hinted = self._right_answers(failed, data.val_batch_size, number, "hinted questions")
            self.engine.sleep()
        metrics.add(
            {
                "star/solved": Mean(len(solved), len(prompts)),
                "star/rationalised": Mean(len(hinted), len(prompts)),
                "star/hint_left_out": Mean(len(prompts) - len(solved) - len(failed), len(prompts)),
                "star/kept": mean([len(solved) + len(hinted)]),
            }
        )
        values = metrics.over_ranks(self.trainer.strategy)
        for logger in self.loggers:
            logger.log_metrics(values, step=self.global_step)
        rank_zero_info(
            f"round {number + 1}: of {len(prompts)} questions {len(solved)} solved, and "
            f"{len(hinted)} of the others with the answer as a hint"
        )
        self._check_number(len(solved) + len(hinted), len(prompts), number)
        ids = solved | hinted
        return [Rationale(p, ids[p.index], p.index in hinted) for p in prompts if p.index in ids]

    def _right_answers(
        self, prompts: Sequence[Prompt], batch_size: int, number: int, what: str
    ) -> dict[int, list[int]]:
        """Ids of the right answers by the rows of their questions; every rank asks its share."""
        params = SamplingParams(self.max_new_tokens, self.stop_ids, self.temperature)
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        right: dict[int, list[int]] = {}
        for start in range(0, len(prompts), batch_size):
            own = prompts[start : start + batch_size][rank::world_size]
            seeds = [[derive_seed(self.seed, number, p.index, what, "star")] for p in own]
            groups = self._complete(own, seeds, params)
            for prompt, (completion,) in zip(own, groups, strict=True):
                answer = self._rollout(prompt, 0, completion)
                if verify_math(answer.text, prompt.answer, answer.finished) is Outcome.CORRECT:
                    right[prompt.index] = list(answer.completion_ids)
            asked = min(start + batch_size, len(prompts))
            rank_zero_info(f"round {number + 1}: asked {asked} of {len(prompts)} {what}")
        return _over_ranks(right)

    def _check_number(self, kept: int, asked: int, number: int) -> None:
        if kept < self.trainer.world_size:
            raise InputError(
                f"round {number + 1}: of {asked} questions {kept} were answered right, with and "
                f"without the answer as a hint, which is too few to train on (each rank needs "
                f"one); give a model that can solve some of them, a model.max_new_tokens that its "
                f"answers fit into, an instruction that asks for \\boxed{{}}, or easier data"
            )

    # --------------------------------------------------------------- training

    def training_step(self, rationales: list[Rationale], batch_idx: int) -> dict[str, Any]:
        """One optimizer step on a batch of the round's rationales."""
        return self._train_on([self._given(r) for r in rationales], StepMetrics())

    def _given(self, rationale: Rationale) -> Rollout:
        number = len(rationale.token_ids)
        return Rollout(
            prompt=rationale.prompt,
            sample=0,
            completion_ids=tuple(rationale.token_ids),
            logprobs=(nan,) * number,  # those of the policy that sampled aren't kept
            injected_mask=(False,) * number,
            finished=True,
            text=self.decode(rationale.token_ids),
            advantage=1.0,
        )


def _own_part(weight: Tensor) -> Tensor:
    """This rank's shard of a weight that is cut over ranks, or the weight itself."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def _over_ranks(answers: dict[int, list[int]]) -> dict[int, list[int]]:
    """The answers of all ranks, which must all call this."""
    if not torch.distributed.is_initialized():
        return answers
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, answers)
    return {row: ids for part in parts for row, ids in part.items()}
