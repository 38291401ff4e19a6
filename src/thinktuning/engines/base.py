"""What the trainer asks of an engine."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase


@dataclass(frozen=True)
class SamplingParams:
    """How to sample.

    Attributes:
        max_new_tokens: Length limit of a completion, end-of-turn token included.
        stop_ids: Every id that ends a turn; the one that was drawn stays in the completion.
        temperature: Divides the logits; 0 decodes greedily.
        pattern: Regular expression that completions keep to, unless the length limit ends them
            first; None doesn't constrain. Logprobs are those of the constrained distribution.
    """

    max_new_tokens: int
    stop_ids: tuple[int, ...]
    temperature: float = 1.0
    pattern: str | None = None


@dataclass(frozen=True)
class Completion:
    """One sampled continuation.

    Attributes:
        token_ids: The continuation alone, the end-of-turn token included where there is one.
        logprobs: Of the drawn tokens in nats, at the sampling temperature (greedy: at 1).
        finish_reason: ``stop``: an end-of-turn token was drawn; ``length``: the limit was reached.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: Literal["stop", "length"]


class Engine(ABC):
    """Samples completions from the weights that it was given last."""

    @abstractmethod
    def load_weights(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        """Sample from the present weights of ``model`` from now on.

        Args:
            model: A causal language model.
            tokenizer: Its tokenizer; needed for sampling with a pattern.
        """

    @abstractmethod
    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        params: SamplingParams,
    ) -> list[list[Completion]]:
        """Complete every prompt once for each of its seeds.

        Args:
            prompts: Token ids, used as they are: nothing is added.
            seeds: For each prompt one seed per completion. A completion's randomness depends on
                its seed alone, not on its neighbours in the batch.
            params: How to sample.

        Returns:
            For each prompt its completions, in the order of its seeds.
        """
