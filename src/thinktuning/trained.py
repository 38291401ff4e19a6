"""The trained policy of a checkpoint, as a Transformers model."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from thinktuning.checkpointing import AtomicCheckpointIO
from thinktuning.errors import InputError
from thinktuning.policy import (
    LoraSettings,
    load_base,
    load_model,
    named_weights,
    resolve,
    with_adapters,
)

_POLICY = "policy."


@dataclass(frozen=True)
class Trained:
    """A trained policy.

    Attributes:
        model: A Transformers model, or peft's around one.
        pretrained: The base model's name in training.
        source: Where the base model lies now: hub id or absolute folder.
        step: Batches that it was trained on.
        lora: How it was trained; None: all weights.
    """

    model: Any
    pretrained: str
    source: str
    step: int
    lora: LoraSettings | None


def load_trained(path: Path, base: str | None = None, merged: bool = True) -> Trained:
    """Load the policy of a checkpoint, in float32.

    Args:
        path: A checkpoint of ``thinktuning fit``, a file or a folder.
        base: Where the base model lies now, if that isn't where it lay in training.
        merged: Merge a LoRA into the base model's weights.

    Raises:
        InputError: If the checkpoint isn't there, isn't ours, or doesn't fit its base model.
    """
    if not path.exists():
        raise InputError(f"there is no checkpoint {str(path)!r}")
    checkpoint = AtomicCheckpointIO().load_checkpoint(path)
    if "pretrained" not in checkpoint:
        raise InputError(f"{str(path)!r} was not written by `thinktuning fit`")
    lora = None if checkpoint.get("lora") is None else LoraSettings(**checkpoint["lora"])
    trained = {
        name.removeprefix(_POLICY): weight
        for name, weight in checkpoint["state_dict"].items()
        if name.startswith(_POLICY)
    }
    source = _located(base or checkpoint["pretrained"])
    # Adapters were fitted to the numbers that a base in few bits stands for.
    held = load_base(source, lora.base if lora is not None and merged else "float32")
    model = _policy(trained, held, source, lora)
    if lora is not None and merged:
        model = _merged(model, source)
    return Trained(model, checkpoint["pretrained"], source, checkpoint["global_step"], lora)


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
