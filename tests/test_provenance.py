"""A result tells what it was made with."""

import re
import subprocess

import torch

from thinktuning.provenance import provenance


def test_the_processor_is_named_with_the_instructions_that_torch_uses():
    listed = subprocess.run(["lscpu"], capture_output=True, text=True, check=True).stdout
    name = re.search(r"^Model name: *(.+)$", listed, re.MULTILINE)
    assert name
    instructions = torch.__config__.show()  # "- CPU capability usage: AVX512"
    used = re.search(r"CPU capability usage: (.+)", instructions)
    assert used
    assert provenance()["machine"].startswith(f"{name[1]}, {used[1]}, ")
