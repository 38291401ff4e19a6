"""What a run was made of, noted in its checkpoints and compared when it resumes."""

import logging
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from thinktuning.errors import InputError

log = logging.getLogger(__name__)

_NOTED = "made_of"


class ResumeCheck(Callback):
    """Lists settings that changed since the checkpoint; refuses other questions, another tokenizer.

    Attributes:
        configuration: Settings of this start by dotted names; set by the command line.
    """

    def __init__(self) -> None:
        self.configuration: dict[str, str] = {}

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note what the run is made of."""
        checkpoint[_NOTED] = {
            "configuration": self.configuration,
            "questions": _questions(trainer),
            "tokenizer": _tokenizer(pl_module),
        }

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Compare; what is given now wins where it may."""
        noted = checkpoint.get(_NOTED)
        if noted is None or trainer.state.fn != "fit":
            return
        faults = []
        if noted["questions"] != _questions(trainer):
            faults.append(
                "the training questions aren't those of the checkpoint: their order would be "
                "another, so that some would be repeated and others missed; give the same "
                "data.source, data.val_source, data.val_size, data.limit, data.max_prompt_tokens "
                "(which the other parts of a prompt count towards) and seed_everything"
            )
        if noted["tokenizer"] != _tokenizer(pl_module):
            faults.append(
                "the tokenizer or its chat template isn't that of the checkpoint: its token ids "
                "would mean other texts; give the model folder that the run began with"
            )
        if faults:
            raise InputError(
                "this run can't go on from the checkpoint: "
                + "; ".join(faults)
                + "; or export the checkpoint and begin a new run from the exported model"
            )
        _tell(changes(noted["configuration"], self.configuration))


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


def _questions(trainer: Trainer) -> str:
    prompts = trainer.datamodule.train_prompts  # type: ignore[attr-defined]
    return _digest(f"{p.index}\0{p.question}\0{p.answer}" for p in prompts)


def _tokenizer(module: LightningModule) -> str:
    tokenizer: Any = module.tokenizer
    vocabulary = sorted(tokenizer.get_vocab().items())
    special = sorted(map(str, tokenizer.special_tokens_map.items()))
    return _digest([repr(vocabulary), repr(special), repr(tokenizer.chat_template)])


def _digest(texts: Iterable[str]) -> str:
    """A hash of texts in their order; any text is allowed."""
    digest = blake2b(digest_size=16)
    for text in texts:
        encoded = text.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8) + encoded)
    return digest.hexdigest()
