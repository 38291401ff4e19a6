"""What the trainer asks of an engine."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Literal

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from thinktuning.errors import InputError
from thinktuning.policy import completion_text, end_of_turn_ids, render_prompt
from thinktuning.teaching import Chat, Reply, ReplyParams, Teacher


@dataclass(frozen=True)
class SamplingParams:
    """How to sample. There is no top-p or top-k: they would cut off the support of the policy, and
    the ratio between the policy and its sampler would be wrong.

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


class Engine(Teacher):
    """Samples completions from the weights that it was given last: the student's, or a teacher's.

    Args:
        pretrained: Of a teacher with weights of its own: hub id, folder, or embedded. None: it
            samples from what ``load_weights`` gives it.
    """

    def __init__(self, pretrained: str | None = None) -> None:
        self.pretrained = pretrained
        self.needs_weights = pretrained is None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._stop_ids: tuple[int, ...] = ()
        self._described: PreTrainedModel | None = None
        self._identity = ""

    @abstractmethod
    def load_weights(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        """Sample from the present weights of ``model`` from now on.

        Args:
            model: A causal language model.
            tokenizer: Its tokenizer; needed for replies and for sampling with a pattern.
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

    @property
    @abstractmethod
    def context_length(self) -> int | None:
        """Tokens that a prompt and its completion may have together; None: no limit is known."""

    @property
    def numerics(self) -> str:
        """What its completions depend on beside the weights: its kind, and how it computes."""
        return type(self).__name__

    @property
    def identity(self) -> str:
        """Kind of engine, model, revision and precision."""
        return f"{type(self).__name__} {self._identity}"

    def reply(self, chats: Sequence[Chat], params: ReplyParams) -> list[Reply]:
        """Render chats by the model's own template, decode greedily; see ``Teacher``."""
        tokenizer = self._tokenizer
        assert tokenizer is not None, "a teacher needs its tokenizer: give it to load_weights"
        limit = params.max_prompt_tokens
        if self.context_length is not None:
            room = self.context_length - params.max_new_tokens - params.spare_tokens
            if room < 1:
                raise InputError(
                    f"guidance: replies of {params.max_new_tokens + params.spare_tokens} tokens "
                    f"leave no room for a prompt in the {self.context_length} positions of the "
                    f"teacher; lower guidance.max_new_tokens"
                )
            limit = min(limit, room)
        prompts = [render_prompt(tokenizer, chat) for chat in chats]
        asked = [p for p in prompts if len(p) <= limit]
        sampling = SamplingParams(params.max_new_tokens, self._stop_ids, 0.0, params.pattern)
        groups = iter(self.sample(asked, [[0]] * len(asked), sampling) if asked else [])
        replies = []
        for prompt in prompts:
            if len(prompt) > limit:
                replies.append(Reply(skipped="prompt_too_long"))
                continue
            (completion,) = next(groups)
            text = completion_text(tokenizer, completion.token_ids)
            cut_off = completion.finish_reason == "length"
            replies.append(Reply(text, cut_off, tokens=len(completion.token_ids)))
        return replies

    def _describe(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Note whose weights these are, for replies."""
        if tokenizer is None or model is self._described:
            return
        self._described = model
        self._tokenizer = tokenizer
        self._stop_ids = end_of_turn_ids(tokenizer, model.generation_config)
        self._identity = model_identity(model)


def own_weights(engine: Engine) -> str | None:
    """What is wrong with an engine that is to sample from a module's weights; None if nothing."""
    if getattr(engine, "pretrained", None) is None:  # jsonargparse's lazy default has none
        return None
    return (
        "its engine samples from the module's weights: leave out engine.pretrained, which is for a "
        "teacher (guidance.teacher)"
    )


def model_identity(model: PreTrainedModel) -> str:
    """Name, revision and precision of a model as it was loaded."""
    config = model.config
    quantization = getattr(config, "quantization_config", None)
    bits = "" if quantization is None else repr(quantization.to_dict())
    name = str(model.name_or_path)
    return f"{name} {revision(name)} {model.dtype} {bits}".strip()


def revision(name: str) -> str | None:
    """What distinguishes the weights of a name over time.

    For a folder a hash over the names, sizes and times of its files, for a hub id the commit in
    the local cache; None where there is neither.
    """
    folder = Path(name)
    if folder.is_dir():
        files = sorted(p for p in folder.iterdir() if p.is_file())
        listed = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
        return blake2b(repr(listed).encode(), digest_size=8).hexdigest()
    try:
        cached = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # a folder that isn't there
        return None
    return Path(cached).parent.name if isinstance(cached, str) else None
