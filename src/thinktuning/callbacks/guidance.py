"""Stage 2: the teacher reads some of the student's answers."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from jsonargparse import lazy_instance
from lightning.pytorch import LightningModule, Trainer

from thinktuning.callbacks.base import RolloutCallback
from thinktuning.data import render_prompt
from thinktuning.engines import Engine, SamplingParams, TransformersEngine, derive_seed
from thinktuning.errors import InputError
from thinktuning.teaching import (
    Behavior,
    GammaSchedule,
    feedback_pattern,
    guided_count,
    load_behaviors,
    parse_feedback,
    select_guided,
    teacher_messages,
)
from thinktuning.types import Guidance, Rollout, RolloutBatch

if TYPE_CHECKING:
    from thinktuning.module import ThinkTuningModule

log = logging.getLogger(__name__)

FOUR_BEHAVIORS = ["self_conflict", "self_agreement", "self_critique", "self_consultancy"]


class TeacherGuidance(RolloutCallback):
    """Selects rollouts of every group and attaches the teacher's feedback to them.

    The teacher is the frozen reference and decodes greedily. Feedback that doesn't parse is
    dropped; that rollout stays unguided. Constrained decoding makes every reply parse that ends
    within the length limit: its probabilities are never used, so that masking them does no harm.

    Args:
        gamma: The guided fraction of every group and how it changes over the run.
        behaviors: What the teacher is to show: names of shipped behaviors (self_conflict,
            self_agreement, self_critique, self_consultancy, catchphrase) or paths of .yaml files
            of the same form.
        max_prompt_tokens: A rollout whose teacher prompt is longer stays unguided.
        max_new_tokens: Length limit of the teacher's reply.
        constrained: Keep replies to the tagged form, with at most max_new_tokens characters in the
            reflection and in the continuation; false lets the teacher write freely, as in the
            paper.
        teacher: Engine that decodes the replies; it is given the weights of the frozen reference.
    """

    stage = "guidance"

    def __init__(
        self,
        gamma: GammaSchedule = GammaSchedule(),  # noqa: B008 (frozen)
        behaviors: list[str] = FOUR_BEHAVIORS,
        max_prompt_tokens: int = 3072,
        max_new_tokens: int = 1024,
        constrained: bool = True,
        teacher: Engine = lazy_instance(TransformersEngine),  # noqa: B008
    ) -> None:
        if max_prompt_tokens < 1 or max_new_tokens < 1:
            raise InputError("guidance: max_prompt_tokens and max_new_tokens must be at least 1")
        self.gamma = gamma
        self.behaviors: tuple[Behavior, ...] = load_behaviors(behaviors)
        self.max_prompt_tokens = max_prompt_tokens
        self.max_new_tokens = max_new_tokens
        self.pattern = feedback_pattern(max_new_tokens) if constrained else None
        self.planned_steps: int | None = None
        self.teacher = teacher

    def needs_reference(self) -> bool:
        """The frozen reference is the teacher, unless gamma is 0 throughout."""
        return self.gamma.start > 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fix the length of the schedule; a resumed run keeps the one it began with."""
        if self.gamma.start == 0:
            self.planned_steps = self.planned_steps or 1
            return
        planned = _planned_steps(trainer)
        if self.planned_steps is None:
            self.planned_steps = planned
        elif planned != self.planned_steps:
            log.warning(
                "the run is now planned for %s rollout steps, but gamma's schedule goes on as it "
                "began, over %s",
                planned,
                self.planned_steps,
            )

    def on_rollouts(
        self, trainer: Trainer, module: "ThinkTuningModule", rollouts: RolloutBatch
    ) -> RolloutBatch:
        """Ask the teacher about the selected rollouts."""
        assert self.planned_steps is not None, "on_train_start must come first"
        gamma = self.gamma.at(rollouts.step, self.planned_steps)
        module.log("guidance/gamma", gamma, batch_size=1)
        selected = self._select(rollouts, gamma, module.seed)
        if not selected:
            return rollouts
        guidance = self._ask(module, [rollouts.rollouts[i] for i in selected])
        guided = dict(zip(selected, guidance, strict=True))
        return rollouts.with_rollouts(
            tuple(
                replace(r, guidance=guided[i]) if i in guided else r
                for i, r in enumerate(rollouts.rollouts)
            )
        )

    def _select(self, batch: RolloutBatch, gamma: float, seed: int) -> list[int]:
        """Places of the selected rollouts in the batch."""
        count = guided_count(gamma, batch.group_size)
        selected: list[int] = []
        for number, group in enumerate(batch.groups()):
            eligible = [i for i, r in enumerate(group) if r.finished]
            draw = derive_seed(seed, batch.step, group[0].prompt.index, "select")
            chosen = select_guided(eligible, count, draw)
            selected += [number * batch.group_size + i for i in chosen]
        return selected

    def _ask(self, module: "ThinkTuningModule", rollouts: Sequence[Rollout]) -> list[Guidance]:
        prompts = [
            render_prompt(
                module.tokenizer, teacher_messages(self.behaviors, r.prompt.question, r.text)
            )
            for r in rollouts
        ]
        fits = [len(p) <= self.max_prompt_tokens for p in prompts]
        asked = [p for p, fit in zip(prompts, fits, strict=True) if fit]
        params = SamplingParams(self.max_new_tokens, module.stop_ids, 0.0, self.pattern)
        self.teacher.load_weights(module.reference, module.tokenizer)
        replies = self.teacher.sample(asked, [[0]] * len(asked), params) if asked else []
        names = tuple(b.name for b in self.behaviors)
        reply = iter(replies)
        guidance = []
        for fit in fits:
            if not fit:
                guidance.append(Guidance(names, skipped="prompt_too_long"))
                continue
            (completion,) = next(reply)
            text = module.decode(completion.token_ids)
            feedback = parse_feedback(text)
            skipped = "unparsed" if feedback is None else None
            guidance.append(Guidance(names, text, feedback, skipped))
        return guidance

    def state_dict(self) -> dict[str, Any]:
        """The length of gamma's schedule; its position is the run's global step."""
        return {"planned_steps": self.planned_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the schedule as it began."""
        self.planned_steps = state_dict["planned_steps"]


def _planned_steps(trainer: Trainer) -> int:
    """Rollout steps that the trainer's limits allow."""
    # Not estimated_stepping_batches: asking for it makes Lightning lose the data's position.
    limits = []
    if trainer.max_steps > 0:
        limits.append(trainer.max_steps)
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        limits.append(int(trainer.max_epochs * trainer.num_training_batches))
    if not limits:
        raise InputError(
            "guidance needs to know how long the run is: set trainer.max_steps or "
            "trainer.max_epochs"
        )
    return min(limits)
