"""The strategy for models that are cut over ranks: Lightning's, with checkpoints that are whole."""

import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed
import torch.distributed.checkpoint as distributed_checkpoint
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
    StrategyRegistry,
)
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from thinktuning.checkpointing import (
    CHECKSUMS,
    DAMAGED,
    META,
    PARTS,
    SIZES,
    by_index,
    by_name,
    cause,
    checksum,
    damaged,
    file_sizes,
    load_shards,
    put,
    read_file,
    read_meta,
    save_file,
    sharded_names,
    unsaved,
)
from thinktuning.errors import InputError, UnsavedError

T = TypeVar("T")

_FSDP2 = """\
trainer:
  strategy: fsdp2
or, with its settings,
trainer:
  strategy:
    class_path: thinktuning.strategy.FSDP2Strategy
    init_args: {save_distributed_checkpoint: true, cpu_offload: false}"""


class FSDP2Strategy(ModelParallelStrategy):
    """FSDP2 (``fully_shard``) over all devices of all nodes; ``trainer.strategy: fsdp2``.

    Every rank keeps its part of the weights, gradients and optimizer state. A transformer block is
    gathered when it computes, and the whole policy while the TransformersEngine samples from it.
    With ``trainer.precision: bf16-mixed`` blocks are gathered and compute in bfloat16; what is
    trained stays float32. The weights are those of ``ThinkTuningModule.configure_model``.

    Args:
        save_distributed_checkpoint: Every rank writes its part into a folder; false gathers all on
            rank 0, which writes one file. Both are read by any strategy on any number of ranks.
        cpu_offload: Keep weights, gradients and optimizer state in host memory.
        timeout: Of collective operations: when a rank dies, the others end after it.
    """

    def __init__(
        self,
        save_distributed_checkpoint: bool = True,
        cpu_offload: bool = False,
        timeout: timedelta = default_pg_timeout,
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            timeout=timeout,
        )
        self.cpu_offload = cpu_offload

    def setup_environment(self) -> None:
        """Make one mesh of all ranks; "auto" would be that of the nodes."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def _get_process_group_backend(self) -> str:
        on_gpu = self.root_device.type == "cuda"
        # What lies in host memory is summed up there.
        if self.cpu_offload and on_gpu:
            return "cpu:gloo,cuda:nccl"
        return super()._get_process_group_backend()

    def model_to_device(self) -> None:
        """Move what isn't cut; shards that are offloaded stay in host memory."""
        if not self.cpu_offload:
            super().model_to_device()
            return
        assert self.model is not None
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self.root_device))

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """This rank's part by the names of parameters, or all of it as torch numbers them."""
        options = StateDictOptions(full_state_dict=not self._sharded, cpu_offload=True)
        state: dict[str, Any] = get_optimizer_state_dict(self._module, optimizer, options=options)
        # A full state is on rank 0 only.
        return state if self._sharded or not state else by_index(state)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        """Write a folder or a file that appears under its name when it is whole.

        Raises:
            UnsavedError: Of a folder on all ranks, whichever of them failed; of a file on rank 0.
        """
        assert storage_options is None, "local files take no storage options"
        path = Path(self.broadcast(str(filepath)))
        if not self._sharded:
            Strategy.save_checkpoint(self, checkpoint, path)
            return
        unfinished = _unfinished(path)
        self._discard(unfinished)  # of a run that was killed
        state = {"state_dict": checkpoint.pop("state_dict")}
        optimizers = checkpoint.pop("optimizer_states", [])
        state |= {f"optimizer_{i}": optimizer for i, optimizer in enumerate(optimizers)}
        try:
            distributed_checkpoint.save(state, checkpoint_id=unfinished)
            parts = self._together(lambda: self._checksums(unfinished))
            checksums = {name: value for part in parts for name, value in part.items()}
            self._together(lambda: self._finish(checkpoint | {CHECKSUMS: checksums}, path))
        except (OSError, CheckpointException) as error:
            self._discard(unfinished)
            first = cause(error)
            # torch's writers have RuntimeErrors of their own for a full disk.
            if isinstance(error, UnsavedError) or not isinstance(first, OSError | RuntimeError):
                raise
            raise UnsavedError(unsaved(path, first)) from error

    def _checksums(self, folder: Path) -> dict[str, int]:
        """Those of the files that this rank has written, the cheapest for it to read back."""
        mine = list(folder.glob(f"__{self.global_rank}_*"))
        if self.is_global_zero:
            mine.append(folder / PARTS)
        return {file.name: checksum(file) for file in mine}

    def _finish(self, meta: dict[str, Any], path: Path) -> None:
        if self.is_global_zero:
            unfinished = _unfinished(path)
            save_file(meta | {SIZES: file_sizes(unfinished)}, unfinished / META)
            put(unfinished, path)

    def _discard(self, folder: Path) -> None:
        if self.is_global_zero:
            folder.unlink() if folder.is_file() else shutil.rmtree(folder, ignore_errors=True)
        self.barrier()

    def _together(self, action: Callable[[], T]) -> list[T]:
        """What an action returns on every rank; where it fails on one, it fails on all."""
        mine: T | OSError
        try:
            mine = action()
        except OSError as error:
            mine = error
        everyones: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(everyones, mine)
        for each in everyones:
            if isinstance(each, OSError):
                raise each
        return everyones

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Give every rank its part of a checkpoint that any strategy wrote on any ranks."""
        path = Path(self.broadcast(str(checkpoint_path)))
        load = self._load_folder if path.is_dir() else self._load_file
        return load(path)

    def _load_folder(self, path: Path) -> dict[str, Any]:
        checkpoint = read_meta(path)
        checkpoint["state_dict"] = dict.fromkeys(sharded_names(path))
        # Lightning asks it later, when a missing weight would have failed less clearly.
        self._module.on_load_checkpoint(checkpoint)
        try:
            self._read_shards(path)
        except DAMAGED as error:
            raise InputError(damaged(path, error)) from error
        return checkpoint

    def _read_shards(self, path: Path) -> None:
        weights = {"state_dict": self._module.state_dict()}
        load_shards(weights, path)
        for i, optimizer in enumerate(self.optimizers):
            state = {f"optimizer_{i}": get_optimizer_state_dict(self._module, optimizer)}
            load_shards(state, path)
            set_optimizer_state_dict(
                self._module, optimizer, optim_state_dict=state[f"optimizer_{i}"]
            )

    def _load_file(self, path: Path) -> dict[str, Any]:
        checkpoint = read_file(path, mmap=True)
        self._module.on_load_checkpoint(checkpoint)
        whole = StateDictOptions(full_state_dict=True, strict=False)  # it has no reference
        weights = dict(checkpoint["state_dict"])  # which torch would fill up
        set_model_state_dict(self._module, weights, options=whole)
        for optimizer, state in zip(
            self.optimizers, checkpoint["optimizer_states"], strict=bool(self.optimizers)
        ):
            named = by_name(state, self._names_of(optimizer))
            set_optimizer_state_dict(self._module, optimizer, optim_state_dict=named, options=whole)
        return checkpoint

    def _names_of(self, optimizer: Optimizer) -> list[str]:
        names = {parameter: name for name, parameter in self._module.named_parameters()}
        return [names[p] for group in optimizer.param_groups for p in group["params"]]

    @property
    def _sharded(self) -> bool:
        return self._save_distributed_checkpoint

    @property
    def _module(self) -> Any:
        assert self.lightning_module is not None
        return self.lightning_module


def _unfinished(path: Path) -> Path:
    """Where a folder is written before it gets its name."""
    return path.with_name(path.name + ".tmp")


StrategyRegistry.register("fsdp2", FSDP2Strategy, description=FSDP2Strategy.__doc__ or "")


def check_strategy(strategy: str | Strategy) -> None:
    """Refuse a strategy that the trainer can't run right.

    Raises:
        InputError: With the lines to write instead.
    """
    if isinstance(strategy, str):
        unsuitable = strategy not in ("auto", "fsdp2") and not strategy.startswith("ddp")
        name = strategy
    else:
        suitable = (SingleDeviceStrategy, DDPStrategy, FSDP2Strategy)
        unsuitable, name = not isinstance(strategy, suitable), type(strategy).__name__
    if unsuitable:
        raise InputError(
            f"trainer.strategy {name} isn't supported: the trainer steps its optimizer itself, and "
            f"its models are cut by FSDP2, which runs on CPUs as well. For one device write auto, "
            f"for several with a whole model each ddp, and for several that share a model\n{_FSDP2}"
        )
