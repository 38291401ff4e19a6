"""What a run was made of, noted in its checkpoints and compared when it resumes."""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from thinktuning.callbacks.guidance import TeacherGuidance
from thinktuning.errors import InputError
from thinktuning.policy.loading import resolve
from thinktuning.types import Prompt

log = logging.getLogger(__name__)

_NOTED = "made_of"
_QUESTIONS = (
    "the training questions aren't those of the checkpoint, or have other answers or worked "
    "solutions: some would be repeated and others missed, or the run would learn from other texts; "
    "give the same data.source with the same contents, data.val_source, data.val_size, data.limit, "
    "data.max_prompt_tokens (which the other parts of a prompt count towards) and seed_everything"
)
_TOKENIZER = (
    "the tokenizer or its chat template isn't that of the checkpoint: its token ids would mean "
    "other texts, or the same text have other ids; give the model folder, and the version of "
    "tokenizers, that the run began with"
)
_BASE = "model.pretrained"
_OTHER_BASE = (
    "model.pretrained has other contents than it had, and the checkpoint has adapters only: they "
    "would change other weights than those that they were trained on; give the model folder that "
    "the run began with"
)
_REFUSED = {
    "questions": _QUESTIONS,
    "solutions": _QUESTIONS,
    "tokenizer": _TOKENIZER,
    "tokenizer_rules": _TOKENIZER,
}
_MODEL_FILES = ("config.json", "generation_config.json", "*.safetensors", "*.bin", "*.gguf")
_SAMPLES, _SAMPLE_BYTES = 16, 4096


class ResumeCheck(Callback):
    """Lists what changed since the checkpoint: settings, and contents of files that they name.

    Other training questions and another tokenizer are refused.

    Attributes:
        configuration: Settings of this start by dotted names; set by the command line.
    """

    def __init__(self) -> None:
        self.configuration: dict[str, str] = {}
        self._digests: dict[str, str] = {}
        self._contents: dict[str, str] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the files while they are those that were read."""
        self._look(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note what the run is made of."""
        self._look(trainer, pl_module)
        checkpoint[_NOTED] = {
            "configuration": self.configuration,
            **self._digests,
            "contents": self._contents,
        }

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Compare; what is given now wins where it may."""
        noted = checkpoint.get(_NOTED)
        if noted is None or trainer.state.fn != "fit":
            return
        self._look(trainer, pl_module)
        before = self._digests | noted  # older versions noted less
        differ = [key for key, digest in self._digests.items() if before[key] != digest]
        faults = dict.fromkeys(_REFUSED[key] for key in differ)
        others = _other_contents(noted.get("contents", {}), self._contents)
        if getattr(pl_module, "lora", None) is not None and _BASE in others:
            faults[_OTHER_BASE] = None
        if faults:
            raise InputError(
                "this run can't go on from the checkpoint: "
                + "; ".join(faults)
                + "; or export the checkpoint and begin a new run from the exported model"
            )
        changed = changes(noted["configuration"], self.configuration)
        _tell(changed + [f"{name}: other contents" for name in others])

    def _look(self, trainer: Trainer, module: LightningModule) -> None:
        if self._digests:
            return
        prompts, tokenizer = trainer.datamodule.train_prompts, module.tokenizer  # type: ignore[attr-defined]
        self._digests = {
            "questions": _questions(prompts),
            "solutions": _digest(p.solution for p in prompts),
            "tokenizer": _tokenizer(tokenizer),
            "tokenizer_rules": _tokenizer_rules(tokenizer),
        }
        self._contents = _contents(trainer, module)


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """A line for every setting that differs."""
    names = sorted(before.keys() | now.keys())
    return [
        f"{name}: {before.get(name, '(not set)')} -> {now.get(name, '(not set)')}"
        for name in names
        if before.get(name) != now.get(name)
    ]


@rank_zero_only
def _tell(changed: list[str]) -> None:
    if changed:
        listed = "\n  ".join(changed)
        log.warning("changed since the checkpoint; what is given now counts:\n  %s", listed)


def _other_contents(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    common = sorted(before.keys() & now.keys())
    return [name for name in common if before[name] != now[name]]


def _contents(trainer: Trainer, module: LightningModule) -> dict[str, str]:
    """Digests of what settings know by a name or a path only."""
    contents = {"validation questions": _questions(trainer.datamodule.val_prompts)}  # type: ignore[attr-defined]
    for stage in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(stage, TeacherGuidance):
            contents |= {f"behavior {b.name}": _digest([repr(b)]) for b in stage.behaviors}
    folder = Path(resolve(str(module.pretrained)))
    if folder.is_dir():  # else a hub id
        contents[_BASE] = _digest(_sampled(folder))
    return contents


def _sampled(folder: Path) -> Iterator[str | bytes]:
    """A model's settings, and samples of its weights: all of them would take minutes to read."""
    files = sorted(file for pattern in _MODEL_FILES for file in folder.glob(pattern))
    for file in files:
        size = file.stat().st_size
        yield f"{file.name} {size}"
        with file.open("rb") as content:
            for i in range(_SAMPLES):
                content.seek(size * i // _SAMPLES)
                yield content.read(_SAMPLE_BYTES)


def _questions(prompts: Iterable[Prompt]) -> str:
    return _digest(f"{p.index}\0{p.question}\0{p.answer}" for p in prompts)


def _tokenizer(tokenizer: Any) -> str:
    vocabulary = sorted(tokenizer.get_vocab().items())
    special = sorted(map(str, tokenizer.special_tokens_map.items()))
    return _digest([repr(vocabulary), repr(special), repr(tokenizer.chat_template)])


def _tokenizer_rules(tokenizer: Any) -> str:
    """How a text becomes tokens; a slow tokenizer doesn't tell."""
    fast = getattr(tokenizer, "is_fast", False)
    rules = json.loads(tokenizer.backend_tokenizer.to_str()) if fast else {}
    for of_a_call in ("padding", "truncation"):
        rules.pop(of_a_call, None)
    rules["add_bos_token"] = getattr(tokenizer, "add_bos_token", None)
    return _digest([json.dumps(rules, sort_keys=True)])


def _digest(parts: Iterable[str | bytes]) -> str:
    """A hash of texts and bytes in their order; any text is allowed."""
    digest = blake2b(digest_size=16)
    for part in parts:
        encoded = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(len(encoded).to_bytes(8) + encoded)
    return digest.hexdigest()
