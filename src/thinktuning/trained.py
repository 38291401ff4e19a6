"""The trained policy of a checkpoint, as a Transformers model."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thinktuning import runs
from thinktuning.checkpointing import AtomicCheckpointIO, fault, read_file, read_meta
from thinktuning.errors import InputError
from thinktuning.policy import (
    GROUPED,
    LoraSettings,
    load_base,
    load_model,
    named_weights,
    resolve,
    with_adapters,
)

_POLICY = "policy."


@dataclass(frozen=True)
class Training:
    """What a checkpoint says of the training that made it.

    Attributes:
        pretrained: The base model's name in training.
        step: Batches that the policy was trained on.
        lora: How it was trained; None: all weights.
    """

    pretrained: str
    step: int
    lora: LoraSettings | None


@dataclass(frozen=True)
class Trained:
    """A trained policy.

    Attributes:
        model: A Transformers model, or peft's around one.
        source: Where the base model lies now: hub id or absolute folder.
        training: What made it.
    """

    model: Any
    source: str
    training: Training


def read_training(path: Path) -> Training:
    """Look into a checkpoint of ``thinktuning fit``, a file or a folder, without its tensors.

    Raises:
        InputError: If it isn't there or isn't ours.
    """
    if not path.exists():
        raise InputError(
            f"there is no checkpoint {str(path)!r}; give the path of one, such as "
            f"runs/gsm8k/version_0/checkpoints/last.ckpt"
        )
    checkpoint = read_meta(path) if path.is_dir() else read_file(path, mmap=True)
    if "pretrained" not in checkpoint:
        raise InputError(f"{str(path)!r} was not written by `thinktuning fit`")
    lora = None if checkpoint.get("lora") is None else LoraSettings(**checkpoint["lora"])
    return Training(checkpoint["pretrained"], checkpoint["global_step"], lora)


def check_sound(path: Path) -> None:
    """Read every byte of a checkpoint, a file or a folder; torch would load flipped bits.

    Raises:
        InputError: If it is damaged; the message has the newest older one that is sound.
    """
    found = fault(path)
    if found is None:
        return
    given = path.resolve()
    others = runs.checkpoints(given.parent)
    older = others[others.index(given) + 1 :] if given in others else others
    sound = next((other for other in older if fault(other) is None), None)
    if sound is None:
        raise InputError(f"{found}\nThere is no older one in {path.parent} that is sound.")
    raise InputError(f"{found}\nThe one before it is sound: --ckpt_path {sound}")


def load_trained(
    path: Path,
    base: str | None = None,
    merged: bool = True,
    dtype: torch.dtype = torch.float32,
    attention: str = GROUPED,
) -> Trained:
    """Load the policy of a checkpoint.

    Args:
        path: A checkpoint of ``thinktuning fit``, a file or a folder.
        base: Where the base model lies now, if that isn't where it lay in training.
        merged: Merge a LoRA into the base model's weights.
        dtype: Of the model's weights; adapters that aren't merged, and their base, are float32.
        attention: Transformers' ``attn_implementation``.

    Raises:
        InputError: If the checkpoint isn't there, isn't ours, is damaged, or doesn't fit its base
            model.
    """
    training = read_training(path)
    check_sound(path)
    lora = training.lora
    checkpoint = AtomicCheckpointIO().load_checkpoint(path)
    trained = {
        name.removeprefix(_POLICY): weight
        for name, weight in checkpoint["state_dict"].items()
        if name.startswith(_POLICY)
    }
    source = _located(base or training.pretrained)
    # Loaded in its dtype and not cast to it, which would round more than weights: RoPE's angles.
    plain = load_model(source, dtype if lora is None or merged else torch.float32, attention)
    if lora is None or not merged:
        return Trained(_policy(trained, plain, source, lora), source, training)
    # Adapters were fitted to the numbers that a base in few bits stands for.
    adapted = _policy(trained, load_base(source, lora.base), source, lora)
    loaded = plain.load_state_dict(dict(named_weights(adapted, tied=True)), strict=False)
    assert not loaded.unexpected_keys, f"weights that the plain model lacks: {loaded}"
    return Trained(plain, source, training)


def _located(name: str) -> str:
    """A local folder by its whole path, which an adapter's configuration keeps."""
    name = resolve(name)
    return str(Path(name).absolute()) if Path(name).is_dir() else name


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
            f"and {_shape(expected, misfits[0]) or 'missing'} in the model; say where the model "
            f"lies that it was trained from: --base of export, --model.base of test"
        )
    model.load_state_dict(trained, strict=lora is None)
    return model


def _shape(weights: Mapping[str, Tensor], name: str) -> list[int] | None:
    return list(weights[name].shape) if name in weights else None
