"""A teacher behind an OpenAI-compatible server."""

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import openai

from thinktuning.engines.http import api_key, client_faults, connect, in_short, url_fault
from thinktuning.errors import InputError
from thinktuning.teaching import Chat, Reply, ReplyParams, Teacher

log = logging.getLogger(__name__)

_TOO_LONG = ("context length", "context_length", "context size")  # vLLM, OpenAI, llama.cpp
_MEND = {
    400: "where the server isn't vLLM, set structured_outputs: none",
    422: "where the server isn't vLLM, set structured_outputs: none",
    401: "check api_key_env",
    403: "check api_key_env",
    404: "check model, and base_url, which mostly ends in /v1",
}


class OpenAIEngine(Teacher):
    """Asks a server by chat completions. It takes no weights, so that it can't be the student's.

    A server that doesn't answer ends no run: after the retries that request, and what is left of
    the step's, stays unanswered. What the server refuses (key, model, arguments) ends the run.

    Args:
        base_url: E.g. http://127.0.0.1:8000/v1.
        model: Name of the model on the server.
        api_key_env: Environment variable with the key; null: the server wants none.
        concurrency: Requests at a time, >= 1.
        timeout: Seconds that the server may be silent for, and that a reply may take once it has
            begun; > 0.
        max_retries: Of a request that failed, each after a longer pause; >= 0.
        structured_outputs: How the server takes a pattern: vllm, in its structured_outputs; none:
            it can't, so that replies are free and some may not parse.
        revision: Tells apart, in the cache of replies, what the server serves under one name.
    """

    elsewhere = True

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key_env: str | None = None,
        concurrency: int = 16,
        timeout: float = 120.0,
        max_retries: int = 3,
        structured_outputs: Literal["vllm", "none"] = "vllm",
        revision: str | None = None,
    ) -> None:
        faults = []
        if fault := url_fault(base_url, "base_url", "http://127.0.0.1:8000/v1"):
            faults.append(fault)
        faults += client_faults(concurrency, timeout, api_key_env)
        if max_retries < 0:
            faults.append(f"max_retries must not be negative, got {max_retries}")
        if faults:
            raise InputError("engine OpenAIEngine: " + "; ".join(faults))
        self.base_url = base_url
        self.model = model
        self.concurrency = concurrency
        self.structured_outputs = structured_outputs
        self.revision = revision
        self._key = api_key(api_key_env)
        self._client = connect(base_url, self._key, timeout, max_retries)
        self.can_continue = structured_outputs == "vllm"
        self._away = False

    @property
    def identity(self) -> str:
        """Server, model, revision, and whether replies keep to a pattern."""
        served = f"{self.base_url} {self.model} {self.revision}"
        return f"{type(self).__name__} {served} {self.structured_outputs}"

    def reply(self, chats: Sequence[Chat], params: ReplyParams) -> list[Reply]:
        """Ask about every chat; see ``Teacher``. Whether a prompt is too long the server says."""
        failure = _Failure()
        with ThreadPoolExecutor(self.concurrency) as pool:
            asked = pool.map(lambda chat: self._ask(chat, params, failure), chats)
            replies = list(asked)
        if failure.error is not None and not self._away:
            log.warning(
                "the teacher at %s doesn't answer (%s); rollouts stay unguided until it does",
                self.base_url,
                in_short(failure.error, self._key),
            )
        elif failure.error is None and self._away:
            log.warning("the teacher at %s answers again", self.base_url)
        self._away = failure.error is not None
        return replies

    def _ask(self, chat: Chat, params: ReplyParams, failure: "_Failure") -> Reply:
        if failure.error is not None:  # others have waited for it already
            return Reply(skipped="unavailable")
        try:
            response = self._client.chat.completions.create(
                model=self.model,
                messages=chat,  # type: ignore[arg-type]
                max_tokens=params.max_new_tokens,
                temperature=0.0,
                extra_body=self._extra(chat, params),
            )
            return _read(response)
        except openai.APIStatusError as error:
            if _passes(error.status_code):
                failure.note(error)
                return Reply(skipped="unavailable")
            if any(words in f"{error} {error.body}" for words in _TOO_LONG):
                return Reply(skipped="prompt_too_long")
            # The error itself may repeat the key, and mustn't be shown with this one.
            raise InputError(self._refused(error)) from None
        except (openai.APIConnectionError, ValueError) as error:  # timeouts; what is no completion
            failure.note(error)
            return Reply(skipped="unavailable")

    def _extra(self, chat: Chat, params: ReplyParams) -> dict[str, Any]:
        """What the OpenAI protocol has no words for."""
        extra: dict[str, Any] = {}
        if self.structured_outputs == "vllm" and params.pattern is not None:
            extra["structured_outputs"] = {"regex": params.pattern}
        if chat[-1]["role"] == "assistant":
            extra |= {"continue_final_message": True, "add_generation_prompt": False}
        return extra

    def _refused(self, error: openai.APIStatusError) -> str:
        hint = f" ({_MEND[error.status_code]})" if error.status_code in _MEND else ""
        said = in_short(error, self._key)
        return f"the teacher at {self.base_url} refuses the request: {said}{hint}"

    def close(self) -> None:
        """Close the connections."""
        self._client.close()


class _Failure:
    """The first thing that went wrong in a step, seen by all of its requests."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.error: Exception | None = None

    def note(self, error: Exception) -> None:
        with self._lock:
            self.error = self.error or error


def _read(response: Any) -> Reply:
    """The reply of a response, which the client hands on whatever it is."""
    try:
        choice = response.choices[0]
        text = choice.message.content
    except (AttributeError, LookupError, TypeError):
        raise ValueError("it sent no completion") from None
    if not isinstance(text, str | None):
        raise ValueError("it sent no text")
    # JSON can write halves of characters, which no file in UTF-8 takes.
    text = (text or "").encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    tokens = getattr(getattr(response, "usage", None), "completion_tokens", None)
    return Reply(
        text,
        cut_off=choice.finish_reason == "length",
        tokens=tokens if isinstance(tokens, int) else 0,
    )


def _passes(status: int) -> bool:
    """Whether the same request may be answered later."""
    return status >= 500 or status in (408, 409, 429)
