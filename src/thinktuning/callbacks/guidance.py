"""Stage 2: the teacher reads some of the student's answers."""

import logging
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer

from thinktuning.callbacks.base import RolloutCallback
from thinktuning.engines import Engine, derive_seed
from thinktuning.errors import AbsentTeacherError, InputError, too_small
from thinktuning.teaching import (
    Behavior,
    CachedTeacher,
    Chat,
    FeedbackForm,
    GammaSchedule,
    Reply,
    ReplyParams,
    Teacher,
    ask_in_form,
    guided_count,
    in_script_of,
    load_behaviors,
    parse_feedback,
    select_guided,
    teacher_chat,
)
from thinktuning.types import Guidance, Rollout, RolloutBatch

if TYPE_CHECKING:
    from thinktuning.module import ThinkTuningModule

log = logging.getLogger(__name__)

_STEPS_WITHOUT_END = 5  # behind which it is told
_STEPS_WITHOUT_FEEDBACK = 5

FOUR_BEHAVIORS = ["self_conflict", "self_agreement", "self_critique", "self_consultancy"]


class TeacherGuidance(RolloutCallback):
    r"""Selects rollouts of every group and attaches the teacher's feedback to them.

    The teacher decodes greedily. Feedback that doesn't parse is dropped; that rollout stays
    unguided. Constrained replies all parse: their probabilities are never used, so that masking
    them does no harm.

    A teacher that is away leaves rollouts unguided, step by step, but not for ever.

    Args:
        gamma: Guided fraction of every group and how it changes over the run.
        behaviors: What the teacher is to show: names of shipped behaviors (self_conflict,
            self_agreement, self_critique, self_consultancy, catchphrase) or paths of .yaml files
            of the same form.
        max_prompt_tokens: A rollout whose teacher prompt is longer stays unguided.
        max_new_tokens: Length limit of the teacher's reply.
        constrained: Keep replies to the tagged form and end every one of them within
            max_new_tokens; false lets the teacher write freely, as in the paper.
        boxed: A constrained reply's continuation ends with \boxed{…}.
        teacher: Who replies: an engine with weights of its own (pretrained), one that gets those
            of the frozen reference, or a server. null: the frozen reference, in the student's
            engine.
        cache: Folder for the teacher's replies, so that none is paid for twice; null keeps none.
        max_steps_without_teacher: The run ends behind so many steps in a row in which none of the
            teacher's replies came; null: it goes on without.
    """

    stage = "guidance"

    def __init__(
        self,
        gamma: GammaSchedule = GammaSchedule(),  # noqa: B008 (frozen)
        behaviors: list[str] = FOUR_BEHAVIORS,
        max_prompt_tokens: int = 3072,
        max_new_tokens: int = 1024,
        constrained: bool = True,
        boxed: bool = False,
        teacher: Teacher | None = None,
        cache: str | None = None,
        max_steps_without_teacher: int | None = 10,
    ) -> None:
        patience = 1 if max_steps_without_teacher is None else max_steps_without_teacher
        faults = too_small(
            ("max_prompt_tokens", max_prompt_tokens, 1),
            ("max_new_tokens", max_new_tokens, 1),
            ("max_steps_without_teacher", patience, 1),
        )
        if faults:
            raise InputError("guidance: " + "; ".join(faults))
        if boxed and not constrained:
            raise InputError("guidance: boxed needs constrained, which makes replies keep to it")
        self.gamma = gamma
        self.behaviors: tuple[Behavior, ...] = load_behaviors(behaviors)
        self.max_prompt_tokens = max_prompt_tokens
        self.max_new_tokens = max_new_tokens
        self.form = FeedbackForm(max_new_tokens, boxed) if constrained else None
        self.teacher = teacher
        self.cache = None if cache is None else Path(cache).expanduser()
        self.max_steps_without_teacher = max_steps_without_teacher
        self.planned_steps: int | None = None
        self._steps_without_teacher = 0
        self._steps_without_end = 0
        self._steps_without_feedback = 0
        self._phrases = _example_phrases(self.behaviors)
        self._cached: CachedTeacher | None = None

    def needs_reference(self) -> bool:
        """A teacher without weights of its own is the frozen reference, unless gamma stays 0."""
        own = self.teacher is not None and not self.teacher.needs_weights
        return self.gamma.start > 0 and not own

    def cramped_behaviors(self) -> list[str]:
        """Names of behaviors with a worked example that is longer than a reply may be."""
        form = self.form
        if form is None:
            return []
        return [
            b.name for b in self.behaviors if not all(form.fits(e.feedback) for e in b.examples)
        ]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fix the length of the schedule; a resumed run keeps the one it began with."""
        if self.gamma.start == 0:
            return
        if cramped := self.cramped_behaviors():
            log.warning(
                "guidance.max_new_tokens=%s ends a constrained reply's reflection or continuation "
                "before it is as long as in the worked examples of %s, and in the middle of a "
                "word: raise it",
                self.max_new_tokens,
                ", ".join(cramped),
            )
        if self.teacher is not None:
            self.teacher.start()
            self.teacher.sleep()
        if self.cache is not None:
            assert isinstance(pl_module.engine, Teacher)
            self._cached = CachedTeacher(self.teacher or pl_module.engine, self.cache)
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
        if self.gamma.start == 0:
            return rollouts
        assert self.planned_steps is not None, "on_train_start must come first"
        gamma = self.gamma.at(rollouts.step, self.planned_steps)
        module.log("guidance/gamma", gamma, batch_size=1)
        if guided_count(gamma, rollouts.group_size) == 0:
            return rollouts
        # A rank without a rollout to guide asks nothing, but helps to gather the weights.
        selected = self._select(rollouts, gamma, module.seed)
        asked = [rollouts.rollouts[i] for i in selected]
        if self.teacher is not None and self.teacher.elsewhere:
            with ThreadPoolExecutor(1) as pool:
                replies = pool.submit(self._ask, module, asked)
                others = [i for i in range(len(rollouts.rollouts)) if i not in selected]
                module.work_ahead(rollouts, others)
                guidance = replies.result()
        else:
            guidance = self._ask(module, asked)
        skipped = Counter(g.skipped for g in guidance)
        faults = (0, 0) if self._cached is None else (self._cached.damaged, self._cached.unwritten)
        counts = torch.tensor(
            [
                sum(r.finished for r in rollouts.rollouts),
                len(guidance),
                skipped["unavailable"],
                skipped[None],
                *faults,
            ],
            device=trainer.strategy.root_device,
        )
        reduced = trainer.strategy.reduce(counts, reduce_op="sum").tolist()
        ended, replies_due, away, usable, damaged, unwritten = reduced
        self._note_ends(ended)
        self._note_absence(replies_due, away)
        self._note_useless(replies_due, usable, skipped)
        if self._cached is not None:
            module.log("guidance/cache_damaged", float(damaged), batch_size=1)
            module.log("guidance/cache_unwritten", float(unwritten), batch_size=1)
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
        teacher = module.engine if self.teacher is None else self.teacher
        chats = [teacher_chat(self.behaviors, r.prompt.question, r.text) for r in rollouts]
        teacher.wake()
        if isinstance(teacher, Engine) and teacher.needs_weights:
            with module.as_reference() as reference:
                teacher.load_weights(reference, module.tokenizer)
                replies = self.replies(self._cached or teacher, chats)
        else:
            replies = self.replies(self._cached or teacher, chats)
        if self.teacher is not None:
            self.teacher.sleep()
        return [self._guidance(r, reply) for r, reply in zip(rollouts, replies, strict=True)]

    def replies(self, teacher: Teacher, chats: Sequence[Chat]) -> list[Reply]:
        """Ask a teacher in the way that is configured; one reply per chat."""
        if not chats:
            return []
        if self.form is None:
            params = ReplyParams(self.max_new_tokens, self.max_prompt_tokens)
            return teacher.reply(chats, params)
        return ask_in_form(teacher, chats, self.form, self.max_prompt_tokens)

    def _guidance(self, rollout: Rollout, reply: Reply) -> Guidance:
        names = tuple(b.name for b in self.behaviors)
        if reply.skipped is not None:
            return Guidance(names, skipped=reply.skipped)
        feedback = parse_feedback(reply.text)
        skipped = None
        if feedback is None:
            skipped = "unparsed"
        elif not in_script_of(feedback, rollout.prompt.question, rollout.text, *self._phrases):
            feedback, skipped = None, "other_script"
        return Guidance(
            names, reply.text, feedback, skipped, reply.closed, reply.cached, reply.tokens
        )

    def _note_ends(self, ended: int) -> None:
        """Tell of a student that, on all ranks, has ended no answer for some steps."""
        self._steps_without_end = 0 if ended else self._steps_without_end + 1
        if self._steps_without_end == _STEPS_WITHOUT_END:
            log.warning(
                "no answer of the last %s rollout batches has ended within model.max_new_tokens, "
                "so that nothing is guided, and nothing that asks for an end is rewarded: allow "
                "more tokens, or go back to an older checkpoint with a lower learning rate, or "
                "with a reward for ending",
                _STEPS_WITHOUT_END,
            )

    def _note_absence(self, asked: int, away: int) -> None:
        """Count steps in which no rank's teacher has replied at all."""
        if asked:
            self._steps_without_teacher = self._steps_without_teacher + 1 if away == asked else 0
        limit = self.max_steps_without_teacher
        if limit is not None and self._steps_without_teacher >= limit:
            raise AbsentTeacherError(
                f"the teacher hasn't replied for {limit} steps in a row: start its server again "
                f"and go on with --ckpt_path last, or raise guidance.max_steps_without_teacher"
            )

    def _note_useless(self, asked: int, usable: int, skipped: Counter[str | None]) -> None:
        """Tell of a teacher that has given no usable feedback on all ranks for some steps."""
        if asked:
            self._steps_without_feedback = 0 if usable else self._steps_without_feedback + 1
        if asked and self._steps_without_feedback == _STEPS_WITHOUT_FEEDBACK:
            reasons = ", ".join(f"{reason} {n}" for reason, n in skipped.most_common())
            log.warning(
                "none of the teacher's feedback could be used for %s steps, so that this is plain "
                "GRPO; here in the last one: %s (see guidance/skipped_… and `thinktuning doctor`)",
                _STEPS_WITHOUT_FEEDBACK,
                reasons,
            )

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Release the teacher: Lightning tears down only what succeeds."""
        if self.teacher is not None:
            self.teacher.close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Release the teacher."""
        if self.teacher is not None:
            self.teacher.close()

    def state_dict(self) -> dict[str, Any]:
        """The length of gamma's schedule; its position is the run's global step."""
        return {"planned_steps": self.planned_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the schedule as it began."""
        self.planned_steps = state_dict["planned_steps"]


def _example_phrases(behaviors: Sequence[Behavior]) -> list[str]:
    """What feedback may sound like: that of the worked examples."""
    return [e.feedback.reason + e.feedback.phrase for b in behaviors for e in b.examples]


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
