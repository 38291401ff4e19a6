"""From a checkpoint to a folder that Transformers, peft and vLLM load."""

import os
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from thinktuning import runs
from thinktuning.errors import InputError
from thinktuning.model_card import Exported, model_card
from thinktuning.policy import end_of_turn_ids, load_tokenizer
from thinktuning.trained import load_trained, read_training


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
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{output!r} exists and isn't an empty folder; choose another --output")
    training = read_training(path)
    if adapter and training.lora is None:
        raise InputError(f"{ckpt_path!r} has no LoRA to write as an adapter; leave out --adapter")
    trained = load_trained(path, base, merged=not adapter, dtype=getattr(torch, dtype))
    exported = Exported(
        folder.name, training.pretrained, training.step, training.lora, adapter, dtype
    )
    _write(
        folder,
        trained.model.to(getattr(torch, dtype)),  # adapters are float32 until here
        load_tokenizer(trained.source),
        model_card(exported, runs.run_of(path)),
    )
    print(f"wrote the policy after {training.step} steps to {output}")


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
