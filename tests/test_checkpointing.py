"""Checkpoint files are whole or not there, and reading one runs no code."""

import os
import pickle
import time
from pathlib import Path

import pytest
import torch

from thinktuning.checkpointing import (
    CHECKSUMS,
    META,
    SIZES,
    AtomicCheckpointIO,
    checksum,
    fault,
    file_sizes,
    is_whole,
    put,
    save_file,
)
from thinktuning.errors import InputError
from thinktuning.runs import last_checkpoint
from thinktuning.trained import check_sound

pytestmark = pytest.mark.faults

STATE = {
    "state_dict": {"policy.weight": torch.arange(6.0).view(2, 3)},
    "optimizer_states": [
        {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]}
    ],
    "global_step": 7,
    "callbacks": {"TeacherGuidance": {"planned_steps": None}},
    "pretrained": "embedded",
}


def assert_is_state(found: dict) -> None:
    weights, optimizer = found["state_dict"], found["optimizer_states"][0]
    assert torch.equal(weights["policy.weight"], STATE["state_dict"]["policy.weight"])
    assert optimizer["state"][0]["step"] == 3.0
    assert optimizer["param_groups"] == [{"lr": 0.1}]
    assert {k: found[k] for k in ("global_step", "callbacks", "pretrained")} == {
        k: STATE[k] for k in ("global_step", "callbacks", "pretrained")
    }


@pytest.fixture
def half_a_write(monkeypatch):
    """A disk that is full after half of a checkpoint."""
    whole_save = torch.save

    def save(state, file, *args, **kwargs):
        path = file if isinstance(file, (str, os.PathLike)) else file.name
        whole_save(state, f"{path}.whole")
        with open(f"{path}.whole", "rb") as source:
            written = source.read()
        os.remove(f"{path}.whole")
        half = written[: len(written) // 2]
        if hasattr(file, "write"):
            file.write(half)
            file.flush()
        else:
            with open(path, "wb") as target:
                target.write(half)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", save)


def test_what_was_saved_is_read_again(tmp_path):
    path = tmp_path / "new" / "folder" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(STATE, path)
    assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"], "nothing else stays"
    assert_is_state(AtomicCheckpointIO().load_checkpoint(path))
    assert_is_state(AtomicCheckpointIO().load_checkpoint(str(path)))


def test_a_later_save_replaces_the_earlier_one(tmp_path):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({**STATE, "global_step": 6}, path)
    AtomicCheckpointIO().save_checkpoint(STATE, str(path))
    assert_is_state(AtomicCheckpointIO().load_checkpoint(path))


def test_a_failed_write_leaves_the_old_checkpoint_whole(tmp_path, request):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(STATE, path)
    before = path.read_bytes()
    request.getfixturevalue("half_a_write")
    with pytest.raises(OSError, match="No space left"):
        AtomicCheckpointIO().save_checkpoint({**STATE, "global_step": 8}, path)
    assert path.read_bytes() == before
    assert_is_state(AtomicCheckpointIO().load_checkpoint(path))


def test_a_failed_first_write_leaves_no_checkpoint(tmp_path, half_a_write):
    path = tmp_path / "last.ckpt"
    with pytest.raises(OSError, match="No space left"):
        AtomicCheckpointIO().save_checkpoint(STATE, path)
    assert not path.exists()


def test_the_bytes_are_on_disk_before_the_file_gets_its_name(tmp_path, monkeypatch):
    events = []
    whole_sync, whole_replace = os.fsync, os.replace
    path = tmp_path / "last.ckpt"

    def sync(descriptor):
        events.append(("sync", os.fstat(descriptor).st_size))
        whole_sync(descriptor)

    def rename(source, target):
        events.append(("rename", os.stat(source).st_size))
        assert os.path.dirname(source) == os.path.dirname(target), "the same file system"
        whole_replace(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", rename)
    AtomicCheckpointIO().save_checkpoint(STATE, path)
    size = path.stat().st_size
    assert events[:2] == [("sync", size), ("rename", size)]


class Payload:
    """Pickled code: unpickling it makes a folder."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("weights_only", [None, False, True])
def test_a_checkpoint_with_code_in_it_is_refused_and_the_code_not_run(tmp_path, weights_only):
    path, trace = tmp_path / "evil.ckpt", tmp_path / "ran"
    torch.save({**STATE, "hyper_parameters": Payload(str(trace))}, path)
    with pytest.raises(InputError, match=r"evil\.ckpt"):
        AtomicCheckpointIO().load_checkpoint(path, weights_only=weights_only)
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists(), "the payload works where it is let"


def test_a_bare_pickle_is_refused_and_not_run(tmp_path):
    path, trace = tmp_path / "evil.ckpt", tmp_path / "ran"
    path.write_bytes(pickle.dumps({"state_dict": Payload(str(trace))}, protocol=2))
    with pytest.raises(InputError):
        AtomicCheckpointIO().load_checkpoint(path)
    assert not trace.exists()


@pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.99])
def test_a_cut_off_file_is_refused_with_its_name(tmp_path, part):
    path = tmp_path / "cut.ckpt"
    AtomicCheckpointIO().save_checkpoint(STATE, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(InputError, match=r"cut\.ckpt.* is damaged"):
        AtomicCheckpointIO().load_checkpoint(path)


@pytest.mark.parametrize(
    "content",
    [
        b"version https://git-lfs.github.com/spec/v1\n",
        b"<html>",
        b"co:\xcf<\x1b\x86\xa3\xad\x1a\xe7L\t\xd0",
        b"\x86\x13\xe9\xca=\xce\xb1\xfd\x1a\n",
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused_with_its_name(tmp_path, content):
    path = tmp_path / "other.ckpt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"other\.ckpt.* is damaged"):
        AtomicCheckpointIO().load_checkpoint(path)


@pytest.mark.parametrize("given", ["new.ckpt", "last.ckpt"])
def test_only_an_older_checkpoint_is_offered_for_a_damaged_one(tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)  # a relative path is the same one
    old, new, newer = (Path(f"{name}.ckpt") for name in ("old", "new", "newer"))
    for seconds, path in enumerate((old, new, newer)):
        AtomicCheckpointIO().save_checkpoint(STATE, path)
        os.utime(path, (seconds, seconds))
    Path("last.ckpt").symlink_to(new)
    check_sound(Path(given))
    weights = STATE["state_dict"]["policy.weight"].numpy().tobytes()
    new.write_bytes(new.read_bytes().replace(weights, weights[::-1]))
    os.utime(new, (1, 1))
    with pytest.raises(InputError, match=r"is damaged.*\n.*sound: --ckpt_path \S*/old\.ckpt"):
        check_sound(Path(given))
    old.unlink()
    with pytest.raises(InputError, match=r"is damaged.*\n.*no older one"):
        check_sound(Path(given))


# ---------------------------------------------------------------- folders


def folder_checkpoint(path, content="new"):
    path.mkdir(parents=True)
    (path / "part.distcp").write_text(content)
    (path / META).write_text(content)
    return path


def noted_folder(path, *checked):
    path.mkdir()
    for name in ("__0_0.distcp", "__1_0.distcp", ".metadata"):
        (path / name).write_bytes(os.urandom(3_000_000))  # longer than what is read at once
    checksums = {name: checksum(path / name) for name in checked}
    save_file({SIZES: file_sizes(path), CHECKSUMS: checksums}, path / META)
    return path


DAMAGES = {
    "cut off": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "missing": lambda file: file.unlink(),
    "a bit": lambda file: file.write_bytes(with_a_bit_flipped(file.read_bytes())),
}


def with_a_bit_flipped(content):
    return content[:2_000_000] + bytes([content[2_000_000] ^ 1]) + content[2_000_001:]


@pytest.mark.parametrize("part", ["__1_0.distcp", ".metadata"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_part_of_a_folder_is_named(tmp_path, damage, part):
    folder = noted_folder(tmp_path / "a.ckpt", "__0_0.distcp", "__1_0.distcp", ".metadata")
    assert fault(folder) is None
    DAMAGES[damage](folder / part)
    assert "a.ckpt' is damaged" in fault(folder) and part in fault(folder)
    assert is_whole(folder) == (damage == "a bit"), "which reads no contents"


def test_a_folder_without_checksums_is_judged_by_its_sizes(tmp_path):
    folder = noted_folder(tmp_path / "a.ckpt")
    assert fault(folder) is None
    DAMAGES["cut off"](folder / "__0_0.distcp")
    assert "__0_0.distcp" in fault(folder)


@pytest.mark.parametrize("old", ["nothing", "file", "folder"])
@pytest.mark.parametrize("new", ["file", "folder"])
def test_what_is_finished_takes_the_name_of_what_was_there(tmp_path, old, new):
    path, finished = tmp_path / "a.ckpt", tmp_path / "a.ckpt.tmp"
    if old == "file":
        path.write_text("old")
    elif old == "folder":
        folder_checkpoint(path, "old")
        folder_checkpoint(tmp_path / "a.ckpt.old", "left by a kill")
    if new == "file":
        finished.write_text("new")
    else:
        folder_checkpoint(finished)
    put(finished, path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]
    assert (path if new == "file" else path / META).read_text() == "new"


def test_a_folder_that_is_half_deleted_is_not_taken_for_the_last(tmp_path, monkeypatch):
    checkpoints = tmp_path / "version_0" / "checkpoints"
    first = folder_checkpoint(checkpoints / "step=000010.ckpt")
    second = folder_checkpoint(checkpoints / "step=000020.ckpt")
    (second / META).touch()
    (checkpoints / "last.ckpt").symlink_to(second.name)
    assert last_checkpoint(tmp_path) == second

    def killed(path, **_):
        if path.exists():
            (path / "part.distcp").unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr("thinktuning.checkpointing.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        AtomicCheckpointIO().remove_checkpoint(first)
    assert last_checkpoint(tmp_path) == second
    # Deleting touches a folder, which is no newer for that.
    (second / "part.distcp").unlink()
    third = folder_checkpoint(checkpoints / "step=000030.ckpt")
    os.utime(third / META, ns=(time.time_ns() + 10**9,) * 2)
    os.utime(second, ns=(time.time_ns() + 10**10,) * 2)
    assert last_checkpoint(tmp_path) == third


def test_a_folder_without_its_last_part_is_not_whole(tmp_path):
    checkpoints = tmp_path / "version_0" / "checkpoints"
    whole = folder_checkpoint(checkpoints / "step=000010.ckpt")
    (folder_checkpoint(checkpoints / "step=000020.ckpt") / META).unlink()
    assert last_checkpoint(tmp_path) == whole
    AtomicCheckpointIO().remove_checkpoint(whole)
    assert last_checkpoint(tmp_path) is None
    assert not whole.exists() and not list(checkpoints.glob("*.old"))
