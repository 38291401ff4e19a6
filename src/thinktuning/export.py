"""From a checkpoint to a folder that Transformers, peft and vLLM load."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import GenerationConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from thinktuning import runs
from thinktuning.checkpointing import AtomicCheckpointIO
from thinktuning.errors import InputError
from thinktuning.model_card import Exported, model_card
from thinktuning.policy import (
    LoraSettings,
    end_of_turn_ids,
    load_base,
    load_model,
    load_tokenizer,
    named_weights,
    resolve,
    with_adapters,
)

_POLICY = "policy."


def export(
    ckpt_path: str,
    output: str,
    base: str | None = None,
    adapter: bool = False,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
) -> None:
    """Write a checkpoint's trained policy as a Hugging Face folder.

    It has weights as safetensors, configuration, tokenizer, chat template, and a model card.

    Args:
        ckpt_path: A checkpoint of ``thinktuning fit``, a file or a folder.
        output: Folder to write. It appears when it is whole; one that isn't empty is left alone.
        base: Where the base model lies now, if that isn't where it lay in training: hub id, local
            folder, or embedded. Adapters need the very same weights.
        adapter: Write a LoRA as peft's adapter, without the base model's weights; false merges it
            into them.
        dtype: Of the written weights.

    Raises:
        InputError: If the checkpoint isn't there, isn't ours, or doesn't fit its base model; if an
            adapter is asked of one without LoRA; if the folder isn't empty or can't be written.
    """
    path, folder = Path(ckpt_path), Path(output).absolute()
    if not path.exists():
        raise InputError(f"there is no checkpoint {ckpt_path!r}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{output!r} exists and isn't an empty folder; choose another --output")
    checkpoint = AtomicCheckpointIO().load_checkpoint(path)
    if "pretrained" not in checkpoint:
        raise InputError(f"{ckpt_path!r} was not written by `thinktuning fit`")
    lora = None if checkpoint.get("lora") is None else LoraSettings(**checkpoint["lora"])
    if adapter and lora is None:
        raise InputError(f"{ckpt_path!r} has no LoRA to write as an adapter; leave out --adapter")
    trained = {
        name.removeprefix(_POLICY): weight
        for name, weight in checkpoint["state_dict"].items()
        if name.startswith(_POLICY)
    }
    source = _located(base or checkpoint["pretrained"])
    merged = lora is not None and not adapter
    # Adapters were fitted to the numbers that a base in few bits stands for.
    held = load_base(source, lora.base if lora is not None and merged else "float32")
    model = _policy(trained, held, source, lora)
    if merged:
        model = _merged(model, source)
    exported = Exported(
        folder.name, checkpoint["pretrained"], checkpoint["global_step"], lora, adapter, dtype
    )
    _write(
        folder,
        model.to(getattr(torch, dtype)),
        load_tokenizer(source),
        model_card(exported, runs.run_of(path)),
    )
    print(f"wrote the policy after {checkpoint['global_step']} rollout steps to {output}")


def _located(name: str) -> str:
    """A local folder by its whole path, which an adapter's configuration keeps."""
    name = resolve(name)
    return str(Path(name).absolute()) if Path(name).is_dir() else name


def _merged(model: Any, source: str) -> Any:
    """A plain model with the adapters in its weights."""
    plain = load_model(source)
    loaded = plain.load_state_dict(dict(named_weights(model, tied=True)), strict=False)
    assert not loaded.unexpected_keys, f"weights that the plain model lacks: {loaded}"
    return plain


def _policy(
    trained: Mapping[str, Tensor], model: Any, source: str, lora: LoraSettings | None
) -> Any:
    """The base model with the trained weights, or with trained adapters around its own."""
    if lora is not None:
        model = with_adapters(model, lora)
    expected = {k: w for k, w in model.state_dict().items() if lora is None or "lora_" in k}
    misfits = sorted(
        name
        for name in trained.keys() | expected.keys()
        if _shape(trained, name) != _shape(expected, name)
    )
    if misfits:
        raise InputError(
            f"the checkpoint doesn't fit the base model {source!r}: {len(misfits)} weights differ, "
            f"e.g. {misfits[0]!r} is {_shape(trained, misfits[0]) or 'missing'} in the checkpoint "
            f"and {_shape(expected, misfits[0]) or 'missing'} in the model; say with --base where "
            f"the model lies that it was trained from"
        )
    model.load_state_dict(trained, strict=lora is None)
    return model


def _shape(weights: Mapping[str, Tensor], name: str) -> list[int] | None:
    return list(weights[name].shape) if name in weights else None


def _write(folder: Path, model: Any, tokenizer: PreTrainedTokenizerBase, card: str) -> None:
    """Write beside the target, sync, then rename: a kill or a full disk leaves no half folder."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
            # One level down, since TemporaryDirectory is closed to other users.
            unfinished = Path(scratch) / folder.name
            if hasattr(model, "peft_config"):
                model.save_pretrained(unfinished, save_embedding_layers=False)  # they are frozen
            else:
                _save_model(model, tokenizer, unfinished)
            tokenizer.save_pretrained(unfinished)
            (unfinished / "README.md").write_text(card, encoding="utf-8")
            _sync(unfinished)
            os.replace(unfinished, folder)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {str(folder)!r}: {error}") from error


def _save_model(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Weights, configuration, and a generation config that ends turns as in training."""
    generation: GenerationConfig = model.generation_config
    ids = end_of_turn_ids(tokenizer, generation)
    generation.eos_token_id = ids[0] if len(ids) == 1 else list(ids)
    # Transformers refuses to save what many bases have: a temperature without do_sample.
    model.generation_config = GenerationConfig()
    model.save_pretrained(folder)
    generation.to_json_file(folder / "generation_config.json")


def _sync(folder: Path) -> None:
    """Put the files on the disk."""
    mode = (folder / "README.md").stat().st_mode
    for path in (p for p in folder.rglob("*") if p.is_file()):
        path.chmod(mode)  # safetensors closes its files to other users
        with path.open("rb") as file:
            os.fsync(file.fileno())
