"""The LightningModule of an evaluation: one model, some prompting strategies."""

import json
import signal
import threading
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import lazy_instance
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torchmetrics import MeanMetric
from transformers import PreTrainedModel

from thinktuning.callbacks.release import EngineRelease
from thinktuning.engines import Engine, TransformersEngine, own_weights
from thinktuning.engines.base import revision
from thinktuning.errors import InputError
from thinktuning.evaluation.data import BenchmarkDataModule
from thinktuning.evaluation.display import scalars
from thinktuning.evaluation.prompts import PromptTexts
from thinktuning.evaluation.records import Item, ItemResult
from thinktuning.evaluation.sampling import SamplingSettings, check_room, run_strategy
from thinktuning.evaluation.store import CellSettings, CellStore, read_cell
from thinktuning.evaluation.strategies import TEXTS, check_strategies
from thinktuning.evaluation.summary import Cell, Summary, summarise
from thinktuning.policy import (
    GROUPED,
    end_of_turn_ids,
    load_model,
    load_tokenizer,
    read_config,
    resolve,
)
from thinktuning.strategy import FSDP2Strategy
from thinktuning.teaching import load_behaviors
from thinktuning.trained import load_trained, read_training
from thinktuning.types import Outcome

BEHAVIORS = ("self_conflict", "self_critique", "self_agreement", "self_consultancy")


class EvaluationModule(LightningModule):
    """Answers benchmarks with a model and judges the answers.

    A model with a strategy on a benchmark is a cell. Its results are kept on the disk, item by
    item, and an item that has been answered under the same settings isn't asked again.

    Args:
        pretrained: The model: hub id, local folder, or embedded; not read if there is a checkpoint.
        checkpoint: Of ``thinktuning fit``, a file or a folder, to be evaluated instead. The command
            line's --ckpt_path.
        base: Where the model lies that the checkpoint was trained from; null is where it lay then.
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
        base: str | None = None,
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
        attention: str = GROUPED,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        self.trained_by = None if self.checkpoint is None else read_training(self.checkpoint)
        source = pretrained if self.trained_by is None else base or self.trained_by.pretrained
        if source is None:
            raise InputError("model: give model.pretrained, or --ckpt_path of a training run")
        if (fault := own_weights(engine)) is not None:
            raise InputError(f"model: {fault}")
        check_strategies(strategies)
        self.settings = SamplingSettings(max_new_tokens, temperature, samples, seed, budget, texts)
        self.source = source
        self.title = _title(source, self.checkpoint)
        self.label = label or self.title
        self.strategies = strategies
        self.engine = engine
        self.behaviors = load_behaviors(behaviors)
        self.root = Path(cells)
        self.dtype_of_weights = dtype
        self.attention = attention
        self.metrics = nn.ModuleDict()
        # Of the first rank, once the evaluation is through.
        self.cells: list[Cell] = []
        self.summaries: list[Summary] = []

    # ------------------------------------------------------------- what is there

    def setup(self, stage: str) -> None:
        """Look for results that are there already."""
        if isinstance(self.trainer.strategy, FSDP2Strategy):
            raise InputError(
                "an evaluation has the whole model on every rank: use trainer.strategy ddp, or "
                "vLLM servers for a model that doesn't fit one device"
            )
        read_config(self.source)  # a hub id's revision is known once its configuration is here
        model = f"{self._model_identity()} {self.dtype_of_weights} {self.attention}"
        self.stores = {
            (strategy, benchmark): CellStore(
                self.root,
                self.title,
                self._cell_settings(model, strategy, benchmark),
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

    def _cell_settings(self, model: str, strategy: str, benchmark: str) -> CellSettings:
        settings = self.settings
        return CellSettings(
            model=model,
            engine=f"{self.engine.numerics} {self.trainer.precision}",
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
        source = f"{self.source} {revision(resolve(self.source))}"
        if self.checkpoint is None:
            return source
        path = self.checkpoint.resolve()  # last.ckpt is a link to another one each time
        return f"{path} {path.stat().st_mtime_ns} on {source}"

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
        dtype = getattr(torch, self.dtype_of_weights)
        if self.checkpoint is None:
            self.policy = load_model(self.source, dtype, self.attention)
        else:
            self.policy = load_trained(
                self.checkpoint, self.source, dtype=dtype, attention=self.attention
            ).model
        self.policy.requires_grad_(False)
        self.tokenizer = load_tokenizer(self.source)
        self.stop_ids = end_of_turn_ids(self.tokenizer, self.policy.generation_config)

    def on_test_start(self) -> None:
        """Give the engine the weights, and see that everything that will be asked fits it."""
        # Lightning would note it and go on; every finished batch is on the disk already.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if not self._pending:
            return
        self.engine.wake()
        self.engine.load_weights(self.policy, self.tokenizer)
        for cell, store in self.stores.items():
            missing = self._missing(cell, store.items.values())
            check_room(cell[0], missing, self.engine, self.tokenizer, self.settings)

    def configure_callbacks(self) -> list[Callback]:
        """What belongs to every run of the module."""
        return [EngineRelease()]

    def teardown(self, stage: str) -> None:
        """Release the engine."""
        self.engine.close()

    # ------------------------------------------------------------------- answers

    def test_step(self, items: list[Item], batch_idx: int) -> None:
        """Answer the items of a benchmark with every strategy, as far as that wasn't done."""
        if not items:
            return
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
        self._merge()
        if self.trainer.is_global_zero:
            self.cells = [
                read_cell(self.label, store.folder, len(store.items))
                for store in self.stores.values()
            ]
            self.summaries = [summarise(cell, self.behaviors) for cell in self.cells]
            for cell, summary in zip(self.cells, self.summaries, strict=True):
                values |= scalars(cell, summary)
            for logger in self.loggers:
                logger.log_metrics(values, step=self.trained_by.step if self.trained_by else 0)

    def write_index(self, path: Path) -> None:
        """Note which cells this evaluation was about, for reports."""
        cells = [
            {"folder": str(store.folder.absolute()), "items": len(store.items)}
            for store in self.stores.values()
        ]
        path.write_text(json.dumps(cells, indent=2) + "\n", encoding="utf-8")


def _title(source: str, checkpoint: Path | None) -> str:
    """A short name for a model that may begin the name of a folder."""
    if checkpoint is None:
        return Path(source).name
    run = checkpoint.absolute().parent.parent
    return f"{run.parent.name}-{run.name}-{checkpoint.resolve().stem}"
