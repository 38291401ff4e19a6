"""Runs that resume from the end of an epoch, against one that never stopped."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from thinktuning.callbacks import RolloutCheckpoint
from thinktuning.data import PromptLoader
from thinktuning.resuming import begin_new_epoch


class Notes(Callback):
    """What happened: batches, and validations by the step that they came after."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, int, tuple[int, ...]]] = []
        self.validated: list[int] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.batches.append((trainer.current_epoch, batch_idx, tuple(batch)))

    def on_validation_start(self, trainer, pl_module) -> None:
        self.validated.append(trainer.global_step)


class Toy(LightningModule):
    """One weight; three batches an epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def on_train_start(self) -> None:
        begin_new_epoch(self.trainer)

    def training_step(self, batch, batch_idx) -> None:
        self.weight.grad = torch.ones(())
        self.optimizers().step()

    def validation_step(self, batch, batch_idx) -> None:
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def train_dataloader(self):
        return PromptLoader(range(6), 2, seed=1)

    def val_dataloader(self):
        return [0]


def fit(folder, ckpt_path=None, **settings) -> SimpleNamespace:
    notes = Notes()
    keep = RolloutCheckpoint(
        dirpath=folder,
        filename="{step}",
        every_n_train_steps=settings.pop("every", 1),
        save_top_k=-1,
        save_last=True,
    )
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[notes, keep],
        **settings,
    )
    module = Toy()
    trainer.fit(module, ckpt_path=ckpt_path)
    return SimpleNamespace(
        batches=notes.batches,
        validated=notes.validated,
        steps=trainer.global_step,
        epoch=trainer.current_epoch,
        weight=float(module.weight),
    )


KINDS = {
    "epochs": {"max_epochs": 4},
    "epochs and steps": {"max_epochs": 4, "max_steps": 12},
    "steps": {"max_epochs": -1, "max_steps": 12},
    "validation every 2": {"max_epochs": 4, "val_check_interval": 2},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stops", [(3, 4), (3, 6), (2, 3), (6, 7), (4, 8)])
@pytest.mark.parametrize("kind", KINDS)
def test_two_resumes_make_what_one_run_makes(tmp_path, kind, stops):
    settings = KINDS[kind]
    whole = fit(tmp_path / "whole", **settings)
    assert whole.steps == len(whole.batches) == 12
    first, second = stops
    source = tmp_path / "whole" / f"step={first}.ckpt"
    middle = fit(tmp_path / "middle", source, **settings)
    assert middle.batches == whole.batches[first:]
    end = fit(tmp_path / "end", tmp_path / "middle" / f"step={second}.ckpt", **settings)
    assert end.batches == whole.batches[second:]
    for part, stop in ((middle, first), (end, second)):
        assert part.validated == [s for s in whole.validated if s > stop]
        assert (part.steps, part.epoch, part.weight) == (whole.steps, whole.epoch, whole.weight)
    again = fit(tmp_path / "again", tmp_path / "end" / "step=12.ckpt", **settings)
    assert not again.batches, "it was finished"


@pytest.mark.filterwarnings("ignore")
def test_the_last_step_is_saved_behind_two_resumes(tmp_path):
    settings = {"max_epochs": -1, "max_steps": 11}
    fit(tmp_path / "a", max_epochs=-1, max_steps=6)
    fit(tmp_path / "b", tmp_path / "a" / "step=6.ckpt", every=5, max_epochs=-1, max_steps=9)
    fit(tmp_path / "c", tmp_path / "b" / "last.ckpt", every=5, **settings)
    saved = torch.load(tmp_path / "c" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 11
