"""Folders as ranks write them: what is in them is read again, and none of it is run."""

import os
import pickle

import pytest
import torch
import torch.distributed.checkpoint as distributed_checkpoint
from lightning.pytorch import LightningModule

from thinktuning.checkpointing import (
    META,
    PARTS,
    AtomicCheckpointIO,
    save_file,
    sharded_names,
)
from thinktuning.errors import InputError
from thinktuning.strategy import FSDP2Strategy

pytestmark = [
    pytest.mark.faults,
    # The only rank is alone here.
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]

OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.8, 0.9)),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "a tensor as lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.1)),
}


class Toy(LightningModule):
    """A few weights in two dtypes, two steps into their training."""

    def __init__(self, optimizer: str = "AdamW", seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.policy = torch.nn.Linear(3, 2)
        self.register_buffer("halved", torch.rand(3).bfloat16())
        self.optimizer = OPTIMIZERS[optimizer](self.parameters())
        for _ in range(2):
            self.policy(torch.rand(1, 3)).sum().backward()
            self.optimizer.step()

    def state(self) -> dict:
        return {
            "state_dict": dict(self.state_dict()),
            "optimizer_states": [self.optimizer.state_dict()],
        }


def rank_of(toy):
    strategy = FSDP2Strategy()
    strategy.connect(toy)
    strategy._lightning_module = toy  # as the trainer does
    strategy.optimizers = [toy.optimizer]
    return strategy


def written(folder, toy, **settings):
    """A folder as a rank writes it; its optimizer may have more settings."""
    state = rank_of(toy).optimizer_state(toy.optimizer)
    state["param_groups"][0] |= settings
    content = {"state_dict": toy.state_dict(), "optimizer_0": state}
    distributed_checkpoint.save(content, checkpoint_id=folder, no_dist=True)
    save_file({"global_step": 7}, folder / META)
    return folder


def read_whole(folder):
    return AtomicCheckpointIO().load_checkpoint(folder)


def read_by_a_rank(folder):
    return rank_of(Toy(seed=1)).load_checkpoint(folder)


READERS = [read_whole, read_by_a_rank]


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_is_in_a_folder_is_read_again(tmp_path, optimizer):
    toy, other = Toy(optimizer), Toy(optimizer, seed=1)
    folder = written(tmp_path / "a.ckpt", toy)
    whole = read_whole(folder)
    assert whole.pop("global_step") == 7
    assert_equal(whole, toy.state())

    assert not torch.equal(other.policy.bias, toy.policy.bias)
    assert rank_of(other).load_checkpoint(folder)["global_step"] == 7
    assert_equal(other.state(), toy.state())


class Payload:
    """Pickled code: unpickling it makes a folder."""

    def __init__(self, path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def hidden_in_parts(parts, payload):
    parts.planner_data["state_dict.policy.bias"] = payload
    return parts


def instead_of_parts(parts, payload):
    return payload


@pytest.mark.parametrize("place", [hidden_in_parts, instead_of_parts])
@pytest.mark.parametrize("read", [*READERS, sharded_names])
def test_code_in_a_folders_list_of_parts_is_refused_and_not_run(tmp_path, read, place):
    folder, trace = written(tmp_path / "evil.ckpt", Toy()), tmp_path / "ran"
    parts = pickle.loads((folder / PARTS).read_bytes())
    (folder / PARTS).write_bytes(pickle.dumps(place(parts, Payload(trace))))
    with pytest.raises(InputError, match=r"evil\.ckpt.*its \.metadata names \w+\.mkdir"):
        read(folder)
    assert not trace.exists()
    pickle.loads((folder / PARTS).read_bytes())
    assert trace.exists(), "the payload works where it is let"


@pytest.mark.parametrize("read", READERS)
def test_code_as_an_optimizers_setting_is_refused_and_not_run(tmp_path, read):
    trace = tmp_path / "ran"
    folder = written(tmp_path / "evil.ckpt", Toy(), eps=Payload(trace))
    with pytest.raises(InputError, match=r"evil\.ckpt.*param_groups.*eps isn't plain data"):
        read(folder)
    assert not trace.exists()
    entry = "optimizer_0.param_groups.0.eps"
    distributed_checkpoint.load({entry: 0}, checkpoint_id=folder)
    assert trace.exists(), "the payload works where it is let"


FOREIGN = {
    "cut off": lambda content: content[:-1],
    "empty": lambda content: b"",
    "another pickle": lambda content: pickle.dumps({"state_dict_metadata": {}}),
    "another attribute": lambda content: content.replace(b"state_dict_meta", b"state_dict_Meta"),
    "prose": lambda content: b"version https://git-lfs.github.com/spec/v1\n",
}


@pytest.mark.parametrize("damage", FOREIGN)
@pytest.mark.parametrize("read", [*READERS, sharded_names])
def test_a_damaged_list_of_parts_is_refused_with_the_folders_name(tmp_path, read, damage):
    folder = written(tmp_path / "a.ckpt", Toy())
    content = (folder / PARTS).read_bytes()
    (folder / PARTS).write_bytes(FOREIGN[damage](content))
    with pytest.raises(InputError, match=r"a\.ckpt' is damaged"):
        read(folder)


def test_a_folder_without_its_list_of_parts_is_refused(tmp_path):
    folder = written(tmp_path / "a.ckpt", Toy())
    (folder / PARTS).unlink()
    with pytest.raises(InputError, match=r"a\.ckpt' is damaged.*No such file"):
        read_whole(folder)
