"""What walks through the rooms: one record per rollout, tensors only at the end.

Dimensions: P prompts, G group size, B = P * G rollouts, S prompt + completion columns, T completion
columns, V vocabulary. Masks are bool and True means that the named property holds.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum

from torch import Tensor


class Outcome(StrEnum):
    """What the verifier found in a completion."""

    CORRECT = "correct"
    WRONG = "wrong"
    NO_ANSWER = "no_answer"
    CUT_OFF = "cut_off"
    TIMEOUT = "timeout"


class AnswerKind(StrEnum):
    """What an answer is, and so how it is asked for and judged."""

    MATH = "math"
    CHOICE = "choice"
    YES_NO = "yes_no"


@dataclass  # not frozen: Lightning copies batches field by field and refuses frozen dataclasses
class Prompt:
    """A question, ready for the student. Made by the data room.

    Attributes:
        index: Row of the question in its source; the same in every epoch and on every rank.
        question: Text as the source has it, e.g. ``"How many are 6 bags of 7?"``.
        answer: Gold answer, normalised, e.g. ``"1000"`` for ``#### 1,000``.
        token_ids: The rendered chat prompt, up to where the student starts to write.
        solution: Gold worked solution without the final answer's line; empty where there is none.
    """

    index: int
    question: str
    answer: str
    token_ids: list[int]
    solution: str = ""


@dataclass(frozen=True)
class Feedback:
    """The three parts of a teacher's reply that parsed.

    Attributes:
        opinion: The teacher's verdict on the student's answer: ``correct`` or ``incorrect``.
        reason: Reflection in the first person.
        phrase: Continuation that ends with the final answer.
    """

    opinion: str
    reason: str
    phrase: str


@dataclass(frozen=True)
class Guidance:
    """What became of one rollout that was selected for guidance. Made by ``TeacherGuidance``.

    Attributes:
        behaviors: Names of the behaviors that the teacher was shown.
        text: The teacher's reply as decoded; empty where there is none.
        feedback: The parsed reply; None where it did not parse.
        skipped: Why the rollout stays unguided; None as long as nothing speaks against injection.
        closed: The length limit cut the reply off, and a second request has closed it.
        cached: The reply was read from the disk.
        tokens: That the teacher wrote.
    """

    behaviors: tuple[str, ...]
    text: str = ""
    feedback: Feedback | None = None
    skipped: str | None = None
    closed: bool = False
    cached: bool = False
    tokens: int = 0


@dataclass(frozen=True)
class Rollout:
    """One answer of the student to one prompt, as it goes from stage to stage.

    Attributes:
        prompt: The question; shared by its group.
        sample: Place in the group, 0 to G - 1.
        completion_ids: Token ids after the prompt, injected ones included.
        logprobs: The engine's sampling logprobs in nats, one per completion id; NaN where injected.
        injected_mask: True where the teacher wrote the token; one per completion id.
        finished: The completion ends with its one end-of-turn token, within the length limit.
        text: The completion decoded without special tokens.
        guidance: Set on the rollouts that were selected for guidance.
        original: What the student wrote; set on guided rollouts only, by the injection.
        outcome: The verifier's finding; set by scoring.
        reward: Sum of all rewards; set by scoring.
        reward_parts: Weighted rewards by name; they sum up to ``reward``.
        reward_failed: A reward had no number for it, which counts as 0; set by scoring.
        advantage: Group-relative advantage; set after scoring.
    """

    prompt: Prompt
    sample: int
    completion_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    injected_mask: tuple[bool, ...]
    finished: bool
    text: str
    guidance: Guidance | None = None
    original: "Rollout | None" = None
    outcome: Outcome | None = None
    reward: float | None = None
    reward_parts: Mapping[str, float] = field(default_factory=dict)
    reward_failed: bool = False
    advantage: float | None = None

    @property
    def guided(self) -> bool:
        """The teacher's continuation was spliced in."""
        return self.original is not None

    @property
    def injected_span(self) -> tuple[int, int] | None:
        """Where the injected tokens lie in ``completion_ids``: ``[start, stop)``, or None."""
        if not self.guided:
            return None
        start = self.injected_mask.index(True)
        return start, start + sum(self.injected_mask)


@dataclass(frozen=True)
class RolloutBatch:
    """All rollouts of one step on one rank.

    Attributes:
        step: Number of the rollout batch, from 0.
        group_size: G.
        rollouts: B records, group by group.
    """

    step: int
    group_size: int
    rollouts: tuple[Rollout, ...]

    def groups(self) -> Iterator[tuple[Rollout, ...]]:
        """The G rollouts of each prompt, prompt by prompt."""
        for start in range(0, len(self.rollouts), self.group_size):
            yield self.rollouts[start : start + self.group_size]

    def with_rollouts(self, rollouts: tuple[Rollout, ...]) -> "RolloutBatch":
        """The same batch with each rollout replaced; order and number stay."""
        assert len(rollouts) == len(self.rollouts), "a stage returns one rollout for each it gets"
        return replace(self, rollouts=rollouts)


@dataclass(frozen=True)
class PolicyInputs:
    """Tensors of the update. Prompts are padded on the left, completions on the right, so that
    every completion starts in column S - T.

    Attributes:
        input_ids: int64 [B, S].
        attention_mask: bool [B, S]; False on padding. Never derived from ids: pad may equal eos.
        completion_mask: bool [B, T]; the token enters the loss.
        injected_mask: bool [B, T]; the teacher wrote the token.
        advantages: float32 [B].
        logprobs: float32 [B, T], nats, with gradient; set for the loss.
        old_logprobs: float32 [B, T], nats, of the policy that sampled; None on the first update
            after sampling, where they equal ``logprobs``.
        ref_logprobs: float32 [B, T], nats, of the frozen reference; None without a KL term.
        sampling_logprobs: float32 [B, T], nats, as the engine that sampled gave them; NaN where
            injected.
        token_weights: float32 [B, T]; share of each token in the mean of the whole optimizer step
            over all ranks. None: these rows are the whole step.
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor
    injected_mask: Tensor
    advantages: Tensor
    logprobs: Tensor | None = None
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    sampling_logprobs: Tensor | None = None
    token_weights: Tensor | None = None

    def rows(self, chosen: slice | Tensor) -> "PolicyInputs":
        """The inputs of some rollouts: a slice, a bool mask [B], or their places."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: t[chosen] for k, t in tensors.items() if t is not None})
