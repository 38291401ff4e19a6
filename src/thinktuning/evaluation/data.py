"""The LightningDataModule of an evaluation: benchmarks, in batches."""

from collections.abc import Iterator, Sequence

import torch
from lightning.pytorch import LightningDataModule

from thinktuning.errors import InputError, too_small
from thinktuning.evaluation.benchmarks import check_benchmarks, load_benchmark, parse_spec
from thinktuning.evaluation.records import Item


class BenchmarkDataModule(LightningDataModule):
    """Serves the items of benchmarks.

    Args:
        benchmarks: NAME for the hub's set, or NAME=FILE for a .jsonl, .json, .csv or .parquet file
            with the hub's columns or with id, benchmark, question, choices and answer. Names:
            gsm8k, math500, aime24, aime_1983_2024, commonsense_qa, arc_challenge, gpqa_diamond,
            strategyqa, mmlu_pro.
        limit: Items of each benchmark, the first ones; null for all.
        batch_size: Items that are answered together on each rank.
    """

    def __init__(
        self, benchmarks: list[str], limit: int | None = None, batch_size: int = 32
    ) -> None:
        super().__init__()
        check_benchmarks(benchmarks)
        faults = too_small(
            ("limit", 1 if limit is None else limit, 1), ("batch_size", batch_size, 1)
        )
        if faults:
            raise InputError("data: " + "; ".join(faults))
        self.benchmarks = benchmarks
        self.limit = limit
        self.batch_size = batch_size
        self.items: dict[str, list[Item]] = {}

    def setup(self, stage: str) -> None:
        """Read the benchmarks."""
        self.items = {
            parse_spec(spec)[0]: load_benchmark(spec, self.limit) for spec in self.benchmarks
        }

    def test_dataloader(self) -> "ItemLoader":
        """This rank's batches. Which items are answered together doesn't depend on the ranks."""
        size = self.batch_size
        batches = [
            items[start : start + size]
            for items in self.items.values()
            for start in range(0, len(items), size)
        ]
        trainer = self.trainer
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        # A rank without any batch would leave the others waiting at the end of the loop.
        return ItemLoader(batches[rank::world_size] or [[]])

    def transfer_batch_to_device(
        self, batch: list[Item], device: torch.device, dataloader_idx: int
    ) -> list[Item]:
        """Items are text, and stay where they are."""
        return batch


class ItemLoader:
    """Serves batches as they are. (Lightning would take a list of them for a list of loaders.)

    Args:
        batches: Of this rank.
    """

    def __init__(self, batches: Sequence[list[Item]]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Item]]:
        return iter(self.batches)
