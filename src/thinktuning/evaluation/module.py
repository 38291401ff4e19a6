"""The LightningModule of an evaluation: one model, some prompting strategies."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import lazy_instance
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torchmetrics import MeanMetric
from transformers import PreTrainedModel

from thinktuning.engines import Engine, TransformersEngine
from thinktuning.engines.base import revision
from thinktuning.errors import InputError
from thinktuning.evaluation.data import BenchmarkDataModule
from thinktuning.evaluation.display import scalars
from thinktuning.evaluation.prompts import PromptTexts
from thinktuning.evaluation.records import Item, ItemResult
from thinktuning.evaluation.sampling import SamplingSettings, run_strategy
from thinktuning.evaluation.store import CellSettings, CellStore, read_cell
from thinktuning.evaluation.strategies import TEXTS, check_strategies
from thinktuning.evaluation.summary import Cell, summarise
from thinktuning.policy import end_of_turn_ids, load_model, load_tokenizer, resolve
from thinktuning.teaching import load_behaviors
from thinktuning.trained import load_trained
from thinktuning.types import Outcome

BEHAVIORS = ("self_conflict", "self_critique", "self_agreement", "self_consultancy")


class EvaluationModule(LightningModule):
    """Answers benchmarks with a model and judges the answers.

    A model with a strategy on a benchmark is a cell. Its results are kept on the disk, item by
    item, and an item that has been answered under the same settings isn't asked again.

    Args:
        pretrained: The model: hub id, local folder, or embedded. With a checkpoint: where the model
            lies that it was trained from; null is where it lay in training.
        checkpoint: Of ``thinktuning fit``, a file or a folder; null evaluates ``pretrained``. The
            command line's --ckpt_path.
        label: How reports call the model; null is its name.
        strategies: Of zero_shot, self_verify, self_correct, s1_budget.
        engine: Samples the answers.
        max_new_tokens: Length limit of a turn.
        temperature: 0 decodes greedily.
        samples: Answers to each item; more than one needs a temperature, and gives maj@k and pass@k
            beside mean@k.
        budget: Tokens that s1_budget thinks with.
        texts: What stands around a question.
        behaviors: Whose patterns are counted in the responses: names of shipped behaviors, or
            paths of .yaml files with patterns.
        cells: Folder of the results of all evaluations.
        dtype: Of the model's weights.
        attention: Transformers' attn_implementation.
        seed: Of sampling; taken from seed_everything by the CLI.
    """

    policy: PreTrainedModel

    def __init__(
        self,
        pretrained: str | None = None,
        checkpoint: str | None = None,
        label: str | None = None,
        strategies: Sequence[str] = ("zero_shot",),
        engine: Engine = lazy_instance(TransformersEngine),  # noqa: B008
        max_new_tokens: int = 1024,
        temperature: float = 0.0,
        samples: int = 1,
        budget: int = 2048,
        texts: PromptTexts = PromptTexts(),  # noqa: B008 (frozen)
        behaviors: Sequence[str] = BEHAVIORS,
        cells: str = "runs/evaluation/cells",
        dtype: Literal["float32", "bfloat16"] = "float32",
        attention: str = "sdpa",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if pretrained is None and checkpoint is None:
            raise InputError("model: give model.pretrained, or --ckpt_path of a training run")
        if checkpoint is not None and not Path(checkpoint).exists():
            raise InputError(f"there is no checkpoint {checkpoint!r}")
        check_strategies(strategies)
        self.settings = SamplingSettings(max_new_tokens, temperature, samples, seed, budget, texts)
        self.pretrained = pretrained
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        self.label = label or _title(pretrained, self.checkpoint)
        self.strategies = strategies
        self.engine = engine
        self.behaviors = load_behaviors(behaviors)
        self.root = Path(cells)
        self.dtype_of_weights = dtype
        self.attention = attention
        self.step = 0
        self.metrics = nn.ModuleDict()

    # ------------------------------------------------------------- what is there

    def setup(self, stage: str) -> None:
        """Look for results that are there already."""
        self.stores = {
            (strategy, benchmark): CellStore(
                self.root,
                _title(self.pretrained, self.checkpoint),
                self._cell_settings(strategy, benchmark),
                items,
            )
            for strategy in self.strategies
            for benchmark, items in self._data.items.items()
        }
        self._merge()
        self.results = {cell: store.read() for cell, store in self.stores.items()}
        for cell in self.stores:
            # float64: a sum of lengths in float32 would depend on who adds up what.
            self.metrics["/".join(cell)] = nn.ModuleDict(
                {name: MeanMetric().set_dtype(torch.float64) for name in ("accuracy", "tokens")}
            )

    @property
    def _data(self) -> BenchmarkDataModule:
        data: BenchmarkDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        return data

    def _merge(self) -> None:
        """One file for each cell, on the first rank while the others wait."""
        self.trainer.strategy.barrier()
        if self.trainer.is_global_zero:
            for store in self.stores.values():
                store.merge()
        self.trainer.strategy.barrier()

    def _cell_settings(self, strategy: str, benchmark: str) -> CellSettings:
        settings = self.settings
        return CellSettings(
            model=f"{self._model_identity()} {self.dtype_of_weights} {self.attention}",
            engine=f"{type(self.engine).__name__} {self.trainer.precision}",
            strategy=strategy,
            benchmark=benchmark,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            samples=settings.samples,
            seed=settings.seed if settings.temperature > 0 else None,
            budget=settings.budget if strategy == "s1_budget" else None,
            texts=asdict(settings.texts) | {"strategy": TEXTS[strategy]},
        )

    def _model_identity(self) -> str:
        if self.checkpoint is None:
            assert self.pretrained is not None
            return f"{self.pretrained} {revision(resolve(self.pretrained))}"
        path = self.checkpoint.resolve()  # last.ckpt is a link to another one each time
        return f"{path} {path.stat().st_mtime_ns}"

    def _missing(self, cell: tuple[str, str], items: Iterable[Item]) -> list[Item]:
        return [item for item in items if item.id not in self.results[cell]]

    @property
    def _pending(self) -> bool:
        return any(self._missing(cell, self.stores[cell].items.values()) for cell in self.stores)

    # ----------------------------------------------------------------- the model

    def configure_model(self) -> None:
        """Load the model, if it has anything to do."""
        if hasattr(self, "policy") or not self._pending:
            return
        if self.checkpoint is None:
            assert self.pretrained is not None
            source, dtype = self.pretrained, getattr(torch, self.dtype_of_weights)
            self.policy = load_model(source, dtype, self.attention)
        else:
            trained = load_trained(self.checkpoint, self.pretrained)
            source, self.step = trained.source, trained.step
            self.policy = trained.model.to(getattr(torch, self.dtype_of_weights))
            self.policy.set_attn_implementation(self.attention)
        self.policy.requires_grad_(False)
        self.tokenizer = load_tokenizer(source)
        self.stop_ids = end_of_turn_ids(self.tokenizer, self.policy.generation_config)

    def on_test_start(self) -> None:
        """Give the engine the weights."""
        if self._pending:
            self.engine.wake()
            self.engine.load_weights(self.policy, self.tokenizer)

    def teardown(self, stage: str) -> None:
        """Release the engine."""
        self.engine.close()

    # ------------------------------------------------------------------- answers

    def test_step(self, items: list[Item], batch_idx: int) -> None:
        """Answer the items of a benchmark with every strategy, as far as that wasn't done."""
        for strategy in self.strategies:
            cell = strategy, items[0].benchmark
            missing = self._missing(cell, items)
            if missing:
                answered = run_strategy(
                    strategy, missing, self.engine, self.tokenizer, self.stop_ids, self.settings
                )
                self.stores[cell].append(answered, self.global_rank)
                self.results[cell] |= {result.id: result for result in answered}
                items_of_cell = len(self.stores[cell].items)
                rank_zero_info(
                    f"{strategy} on {items[0].benchmark}: this process knows "
                    f"{len(self.results[cell])} of {items_of_cell} results"
                )
            self._count(cell, [self.results[cell][item.id] for item in items])

    def _count(self, cell: tuple[str, str], results: Sequence[ItemResult]) -> None:
        metrics: Any = self.metrics["/".join(cell)]
        for sample in (sample for result in results for sample in result.samples):
            metrics["accuracy"].update(float(sample.outcome is Outcome.CORRECT))
            metrics["tokens"].update(float(sample.tokens))

    def on_test_epoch_end(self) -> None:
        """Log the numbers of every cell over all ranks."""
        values = {
            f"{cell}/{name}": metric.compute().item()
            for cell, metrics in self.metrics.items()
            for name, metric in metrics.items()  # type: ignore[operator]
        }
        self.log_dict(values, logger=False)
        self._merge()
        if self.trainer.is_global_zero:
            for cell in self.finished_cells():
                values |= scalars(cell, summarise(cell, self.behaviors))
            for logger in self.loggers:
                logger.log_metrics(values, step=self.step)

    def finished_cells(self) -> list[Cell]:
        """All cells with their results, once the evaluation is through."""
        return [
            read_cell(self.label, store.folder, len(store.items)) for store in self.stores.values()
        ]

    def write_index(self, path: Path) -> None:
        """Note which cells this evaluation was about, for reports."""
        cells = [
            {"folder": str(store.folder.absolute()), "items": len(store.items)}
            for store in self.stores.values()
        ]
        path.write_text(json.dumps(cells, indent=2) + "\n", encoding="utf-8")


def _title(pretrained: str | None, checkpoint: Path | None) -> str:
    """A short name for a model that may begin the name of a folder."""
    if checkpoint is None:
        return Path(str(pretrained)).name
    run = checkpoint.absolute().parent.parent
    return f"{run.parent.name}-{run.name}-{checkpoint.resolve().stem}"
