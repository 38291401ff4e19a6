"""From a Lightning checkpoint to a folder that Transformers loads."""

from pathlib import Path
from typing import Any

from thinktuning.checkpointing import AtomicCheckpointIO
from thinktuning.errors import InputError
from thinktuning.policy import LoraSettings, load_model, load_tokenizer, with_adapters

_POLICY = "policy."


def export(ckpt_path: str, output: str) -> None:
    """Write the trained policy of a checkpoint as a Hugging Face folder.

    Args:
        ckpt_path: A checkpoint file of ``thinktuning fit``.
        output: Folder to write: weights as safetensors (adapters merged in), configuration,
            tokenizer, chat template.

    Raises:
        InputError: If the checkpoint isn't there or isn't ours, or the folder isn't empty.
    """
    path, folder = Path(ckpt_path), Path(output)
    if not path.is_file():
        raise InputError(f"there is no checkpoint {ckpt_path!r}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{output!r} exists and isn't an empty folder; choose another --output")
    checkpoint = AtomicCheckpointIO().load_checkpoint(path)
    if "pretrained" not in checkpoint:
        raise InputError(f"{ckpt_path!r} was not written by `thinktuning fit`")
    model: Any = load_model(checkpoint["pretrained"])
    lora = checkpoint.get("lora")
    if lora is not None:
        model = with_adapters(model, LoraSettings(**lora))
    weights = {
        name.removeprefix(_POLICY): tensor
        for name, tensor in checkpoint["state_dict"].items()
        if name.startswith(_POLICY)
    }
    # A LoRA's checkpoint has its adapters only.
    unexpected = model.load_state_dict(weights, strict=lora is None).unexpected_keys
    assert not unexpected, f"the checkpoint has weights that its model lacks: {unexpected}"
    model = model if lora is None else model.merge_and_unload()
    model.save_pretrained(folder)
    load_tokenizer(checkpoint["pretrained"]).save_pretrained(folder)
    print(f"wrote the policy after {checkpoint['global_step']} rollout steps to {folder}")
