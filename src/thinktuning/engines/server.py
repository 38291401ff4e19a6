"""Sampling on vLLM servers beside the trainer, which reload its weights before each batch."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from thinktuning.engines import probe
from thinktuning.engines.base import Completion, Engine, SamplingParams
from thinktuning.engines.http import api_key, client_faults, connect, in_short, url_fault
from thinktuning.engines.weight_files import new_folder, write_weights
from thinktuning.errors import InputError, StaleWeightsError
from thinktuning.policy import is_frozen, named_weights

_RETRIES = 3
_CONNECT_SECONDS = 10.0
# What a request leaves open, the server takes from the checkpoint's generation_config.json.
_WHOLE_DISTRIBUTION = {
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


class VLLMServerEngine(Engine):
    """Samples on vLLM servers that run beside the trainer, on other GPUs or other nodes.

    Before each rollout batch the trainer writes its weights into a folder, every server reloads
    them in place and forgets its cached prefixes, and then has to say the same of a fixed text as
    the trainer does: see ``probe.check`` for what that shows. One server is one replica, by tensor
    or pipeline parallelism over any number of GPUs; with ``--data-parallel-size`` only the replica
    that answers is checked. Seeds give the same samples in the same batch; another batch may round
    differently.

    Start each server, on the student's checkpoint, by
    ``VLLM_SERVER_DEV_MODE=1 vllm serve STUDENT --logprobs-mode processed_logprobs``. In this mode
    whoever reaches its port can command it: keep it inside of your network.

    Args:
        base_urls: Of the servers, e.g. [http://127.0.0.1:8000]. Each rank spreads its prompts over
            all of them.
        model: Name of the student on the servers (--served-model-name; else what was served).
        weights_folder: Where the weights lie during a sync, under the same path for the trainer
            and for all servers: in memory (/dev/shm/…) on one machine, on a shared file system over
            several. It belongs to this run.
        api_key_env: Environment variable with the servers' key; null: they want none.
        concurrency: Requests at a time that a rank sends, >= 1.
        timeout: Seconds that a server may take for one answer, and for a reload; > 0.
    """

    def __init__(
        self,
        base_urls: list[str],
        model: str,
        weights_folder: str,
        api_key_env: str | None = None,
        concurrency: int = 128,
        timeout: float = 600.0,
    ) -> None:
        super().__init__()
        faults = [
            fault
            for url in base_urls
            if (fault := url_fault(url, "base_urls", "http://127.0.0.1:8000"))
        ]
        if not base_urls:
            faults.append("base_urls must name at least one server")
        faults += client_faults(concurrency, timeout, api_key_env)
        if faults:
            raise InputError("engine VLLMServerEngine: " + "; ".join(faults))
        self.model = model
        self.weights_folder = Path(weights_folder).expanduser().absolute()
        self.concurrency = concurrency
        key = api_key(api_key_env)
        self._servers = [_Server(url, model, key, timeout) for url in base_urls]
        self._dtype: torch.dtype | None = None
        self._context_length: int | None = None
        self._held: PreTrainedModel | None = None  # only a frozen one, which needn't be sent again
        self._sent: list[int] = []
        self._answers: list[Tensor] = []

    def load_weights(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        """Give the present weights of ``model`` to every server, and check that they arrived.

        All ranks must call it together. A frozen model that the servers hold already isn't sent
        again.

        Raises:
            InputError: If a server can't be reached, or isn't started as it must be.
            StaleWeightsError: If a server doesn't hold the model's weights afterwards.
        """
        frozen = is_frozen(model)
        if frozen and model is self._held:
            return
        if self._dtype is None:
            self._connect()
        self._held = None
        _wait_for_all_ranks()  # some may sample from the old weights yet
        sums = self._send(model)
        own = probe.take(model, self.context_length - 1)
        with _error_of_first_rank():
            if _rank() == 0:
                self._check(own, sums)
        self._held = model if frozen else None
        self._describe(model, tokenizer)

    def _connect(self) -> None:
        """Ask the servers what they are."""
        dtypes, lengths = zip(*(server.settings() for server in self._servers), strict=True)
        if len(set(dtypes)) > 1:
            raise InputError(
                f"the servers have weights of {', '.join(sorted(set(map(str, dtypes))))}; start "
                f"all of them with the same --dtype"
            )
        self._dtype, self._context_length = dtypes[0], min(lengths)

    def _send(self, model: PreTrainedModel) -> list[int]:
        """Bring the weights to the servers, rounded to their precision.

        Returns:
            On the first rank a sum over the bits of each.
        """
        assert self._dtype is not None
        sums: list[int] = []
        with _error_of_first_rank():
            weights = named_weights(model)
            try:
                if _rank() == 0:
                    with new_folder(self.weights_folder) as folder:
                        sums = write_weights(weights, folder, self._dtype)
                        self._on_all_servers(lambda server: server.reload(folder))
            finally:
                for _ in weights:  # what is cut over ranks is gathered by all of them together
                    pass
        return sums

    def _check(self, own: probe.Probe, sums: list[int]) -> None:
        assert self._dtype is not None
        answers = self._on_all_servers(lambda server: server.score(own.token_ids))
        changed = sums != self._sent
        for i, (server, answer) in enumerate(zip(self._servers, answers, strict=True)):
            stale = self._answers[i] if self._answers and changed else None
            probe.check(own, answer, stale, self._dtype, server.url)
        self._sent, self._answers = sums, answers

    def _on_all_servers(self, ask: Callable[["_Server"], Any]) -> list[Any]:
        with ThreadPoolExecutor(len(self._servers)) as pool:
            return list(pool.map(ask, self._servers))

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        params: SamplingParams,
    ) -> list[list[Completion]]:
        """Complete every prompt once for each of its seeds; see ``Engine``.

        Raises:
            InputError: If a prompt leaves no room for its completion, or if a server refuses a
                request or doesn't answer after some retries.
        """
        assert self._dtype is not None, "load_weights must come before sample"
        assert len(prompts) == len(seeds), "every prompt needs its seeds"
        self._check_room(max(map(len, prompts), default=0) + params.max_new_tokens)
        requests = [
            # A prompt's completions go to one server, which reads it once.
            (self._servers[(_rank() + number) % len(self._servers)], list(prompt), seed)
            for number, (prompt, own) in enumerate(zip(prompts, seeds, strict=True))
            for seed in own
        ]
        with ThreadPoolExecutor(self.concurrency) as pool:
            finished = pool.map(lambda r: r[0].complete(r[1], r[2], params), requests)
            # An error cancels what hasn't begun.
            return [[next(finished) for _ in own] for own in seeds]

    def _check_room(self, tokens: int) -> None:
        # Where room is short vLLM lowers max_tokens by itself, and ends rollouts too early.
        if tokens > self.context_length:
            raise InputError(
                f"a prompt and its completion need up to {tokens} tokens, and the servers have "
                f"room for {self.context_length}: start them with a greater --max-model-len"
            )

    @property
    def context_length(self) -> int:
        """The servers' ``--max-model-len``, or what the model allows."""
        assert self._context_length is not None, "load_weights must come first"
        return self._context_length

    def close(self) -> None:
        """Close the connections; the servers go on with the weights that they have."""
        for server in self._servers:
            server.close()


class _Server:
    """One vLLM server over HTTP."""

    def __init__(self, url: str, model: str, key: str, timeout: float) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.model = model
        self._key = key
        patience = openai.Timeout(timeout, connect=_CONNECT_SECONDS)
        self._client = connect(self.url, key, patience, _RETRIES)

    def settings(self) -> tuple[torch.dtype, int]:
        """Precision of its weights, and tokens that a prompt and its completion may have together.

        Raises:
            InputError: If it doesn't serve the model, or not in the way that is needed.
        """
        served = [card["id"] for card in self._get("/v1/models")["data"]]
        if self.model not in served:
            raise InputError(
                f"engine: the server at {self.url} has no model {self.model!r}; it serves "
                f"{', '.join(served)}"
            )
        config = self._get("/server_info?config_format=json")["vllm_config"]["model_config"]
        if config["logprobs_mode"] != "processed_logprobs":
            raise InputError(
                f"the server at {self.url} gives logprobs that leave the sampling temperature out; "
                f"start it with --logprobs-mode processed_logprobs"
            )
        return getattr(torch, config["dtype"].removeprefix("torch.")), config["max_model_len"]

    def reload(self, folder: Path) -> None:
        """Load the weights in a folder in place of those that it has."""
        arguments = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        try:
            self._post("/collective_rpc", arguments)
        except InputError as error:
            raise InputError(
                f"{error}\nit was to load {folder}: engine.weights_folder must be a folder that "
                f"the server sees under the same path, and the weights those of the model it was "
                f"started with; vLLM doesn't survive this, start it again"
            ) from error
        # Keys and values of the old weights would be reused for the new ones' prompts.
        if not self._post("/reset_prefix_cache", {})["success"]:
            raise InputError(
                f"the server at {self.url} keeps keys and values of older weights, since somebody "
                f"else's requests use them; no other client may use it during a run"
            )

    def score(self, token_ids: list[int]) -> Tensor:
        """Logprobs of every token but the first, read without the prefix cache: float32, nats."""
        choice = self._ask({"prompt": token_ids, "max_tokens": 1, "prompt_logprobs": 0})
        steps = zip(token_ids[1:], choice["prompt_logprobs"][1:], strict=True)
        return torch.tensor([step[str(token)]["logprob"] for token, step in steps])

    def complete(self, prompt: list[int], seed: int, params: SamplingParams) -> Completion:
        """Sample one completion."""
        body: dict[str, Any] = {
            "prompt": prompt,
            "max_tokens": params.max_new_tokens,
            "stop_token_ids": list(params.stop_ids),
            "ignore_eos": True,  # stop_ids are all there is
            "temperature": params.temperature,
            "seed": seed,
            "logprobs": 0,
            "return_token_ids": True,
            **_WHOLE_DISTRIBUTION,
        }
        if params.pattern is not None:
            body["structured_outputs"] = {"regex": params.pattern}
        choice = self._ask(body)
        if choice["finish_reason"] not in ("stop", "length"):
            raise InputError(
                f"the server at {self.url} ended a completion with {choice['finish_reason']!r}; "
                f"see its log"
            )
        logprobs = choice["logprobs"]["token_logprobs"]
        assert len(logprobs) == len(choice["token_ids"]), "vLLM gives one logprob per token"
        return Completion(tuple(choice["token_ids"]), tuple(logprobs), choice["finish_reason"])

    def _ask(self, body: dict[str, Any]) -> dict[str, Any]:
        """The only choice of a completion."""
        (choice,) = self._post("/v1/completions", {"model": self.model, **body})["choices"]
        assert isinstance(choice, dict)
        return choice

    def _get(self, path: str) -> Any:
        with self._in_short_words(path):
            return self._client.get(path, cast_to=object)

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        with self._in_short_words(path):
            return self._client.post(path, cast_to=object, body=body)

    @contextmanager
    def _in_short_words(self, path: str) -> Iterator[None]:
        try:
            yield
        except openai.APIStatusError as error:
            # The error itself may repeat the key, and mustn't be shown with this one.
            raise InputError(self._refused(path, error)) from None
        except openai.APIConnectionError as error:  # timeouts too
            raise InputError(
                f"the server at {self.url} doesn't answer ({error}); rollouts can't do "
                f"without it: look at its log, start it, and resume with --ckpt_path last"
            ) from error

    def _refused(self, path: str, error: openai.APIStatusError) -> str:
        if isinstance(error, openai.NotFoundError) and not path.startswith("/v1/"):
            return (
                f"the server at {self.url} has no {path.partition('?')[0]}: start vLLM with "
                f"VLLM_SERVER_DEV_MODE=1 in its environment, so that it reloads weights"
            )
        what = "fails" if isinstance(error, openai.InternalServerError) else "refuses"
        return f"the server at {self.url} {what}: {in_short(error, self._key)}"

    def close(self) -> None:
        self._client.close()


@contextmanager
def _error_of_first_rank() -> Iterator[None]:
    """Raise what the first rank raises on every rank: the others would wait for it in vain."""
    error: InputError | StaleWeightsError | None = None
    try:
        yield
    except (InputError, StaleWeightsError) as raised:
        error = raised
    if torch.distributed.is_initialized():
        shared = [error]
        torch.distributed.broadcast_object_list(shared)
        (error,) = shared
    if error is not None:
        raise error


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _wait_for_all_ranks() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
