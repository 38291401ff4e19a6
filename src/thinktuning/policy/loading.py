"""Students, references and teachers from a hub id or a folder."""

from collections.abc import Iterable
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from thinktuning.errors import InputError
from thinktuning.policy.attention import GROUPED
from thinktuning.policy.embedded import EMBEDDED, embedded_model

_UNLOADABLE = (
    OSError,
    ValueError,
    RuntimeError,
    KeyError,
    ImportError,  # a kernel that attn_implementation names
    SafetensorError,
    UnpicklingError,
)
_BLOCK = 64  # weights of nf4 that share a scale
_FAST_ROWS = 32  # outputs that the kernel for AVX512-BF16 computes together


def load_model(
    name: str,
    dtype: torch.dtype | Literal["auto"] = torch.float32,
    attention: str = GROUPED,
    quantization: Literal["4bit", "8bit"] | None = None,
) -> PreTrainedModel:
    """A causal language model in eval mode, so that dropout never blurs a probability.

    Args:
        name: Hub id, local folder, or ``embedded``.
        dtype: Of the weights; ``auto``: that of the checkpoint.
        attention: Transformers' ``attn_implementation``.
        quantization: Loads linear weights in 4 bits (nf4) or 8 bits through bitsandbytes; 4-bit
            layers compute in ``dtype``, in bfloat16 where that is ``auto``. None doesn't.

    Raises:
        InputError: If ``name`` can't be loaded, or not in 4 bits on a CPU.
    """
    path = resolve(name)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=attention,
            quantization_config=_quantization_config(quantization, dtype),
            output_loading_info=True,
            trust_remote_code=False,  # None would ask whoever sits there
        )
    except _UNLOADABLE as error:
        told = _cannot_load("model", name, error)
        if attention in str(error):
            told += f"\nmodel.attention {attention} may not suit it; sdpa suits most models"
        raise InputError(told) from error
    model: PreTrainedModel
    model, report = loaded
    if report["missing_keys"]:  # Transformers would go on with random weights
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise InputError(_cannot_load("model", name, f"it has no weights for {missing}"))
    if hasattr(model, "peft_config"):
        reason = (
            "it is an adapter; merge it by `thinktuning export` without --adapter, or give its "
            "base as model.pretrained and the training's checkpoint as --ckpt_path"
        )
        raise InputError(_cannot_load("model", name, reason))
    if quantization == "4bit":
        _fit_to_cpu(model, name)
    return model.eval()


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a model; see ``load_model``."""
    path = resolve(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except _UNLOADABLE as error:
        raise InputError(_cannot_load("tokenizer", name, error)) from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # Transformers makes up an empty one
        raise InputError(_cannot_load("tokenizer", name, "it has no vocabulary"))
    return tokenizer


def read_config(name: str) -> Any:
    """A model's configuration: of a hub id, a folder or the embedded one.

    Raises:
        InputError: If there is none.
    """
    try:
        return AutoConfig.from_pretrained(resolve(name), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        first_line = (str(error).strip() or repr(error)).splitlines()[0]
        raise InputError(
            f"cannot read the configuration of the model {name!r}: {first_line}\n"
            f"expected a folder with config.json, a hub id that this machine can reach, or embedded"
        ) from error


def load_generation_config(name: str) -> GenerationConfig | None:
    """The generation config that belongs to a model, if it has one; see ``load_model``."""
    try:
        return GenerationConfig.from_pretrained(resolve(name))
    except OSError:
        return None


def end_of_turn_ids(
    tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None
) -> tuple[int, ...]:
    """Every id that ends a turn, sorted: the tokenizer's and those of the generation config.

    Raises:
        InputError: If there is none, so that no completion could ever finish.
    """
    ids = {tokenizer.eos_token_id}
    configured = generation_config.eos_token_id if generation_config is not None else None
    ids.update(configured if isinstance(configured, Iterable) else [configured])
    ids.discard(None)
    if not ids:
        raise InputError(
            "the tokenizer and the generation config name no end-of-turn token, so no answer could "
            "ever finish; set eos_token in tokenizer_config.json or eos_token_id in "
            "generation_config.json"
        )
    return tuple(sorted(ids))


def _quantization_config(
    quantization: Literal["4bit", "8bit"] | None, dtype: torch.dtype | Literal["auto"]
) -> BitsAndBytesConfig | None:
    if quantization is None:
        return None
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.bfloat16 if dtype == "auto" else dtype
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute
    )


def _fit_to_cpu(model: PreTrainedModel, name: str) -> None:
    """Refuse layers whose rows don't fill blocks of 64 weights, which share a scale. On a CPU
    bitsandbytes 0.50 reads such layers with wrong scales: weights are off by a fifth, silently.
    Layers that its fast kernel would choke on are kept from it.
    """
    from bitsandbytes.nn import Linear4bit  # slow to import

    for path, layer in model.named_modules():
        if not isinstance(layer, Linear4bit) or layer.weight.device.type != "cpu":
            continue
        if layer.out_features % _FAST_ROWS:
            layer.support_avx512bf16_for_cpu = False
        if layer.in_features % _BLOCK:
            raise InputError(
                f"the model {name!r} can't be used in 4 bits on a CPU: its layer {path} has "
                f"{layer.in_features} inputs (and {layer.out_features} outputs), and bitsandbytes "
                f"would misread it where inputs aren't a multiple of {_BLOCK}; use 8bit"
            )


def resolve(name: str) -> str:
    """What Transformers and vLLM know a model by: the folder of the embedded one."""
    return str(embedded_model()) if name == EMBEDDED else name


def _cannot_load(what: str, name: str, reason: Exception | str) -> str:
    first_line = (str(reason).strip() or repr(reason)).splitlines()[0]
    return (
        f"cannot load the {what} {name!r}: {first_line}\n"
        f"expected a folder with config.json, weights and tokenizer files, a hub id that this "
        f"machine can reach, or {EMBEDDED!r} for the small model that is fetched from the package "
        f"index"
    )
