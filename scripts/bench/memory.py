"""The plan's peak beside the peak of a real run, in memory of the process.

    python scripts/bench/memory.py --data path/to/gsm8k/train.jsonl

Every case trains in a process of its own: the real module, its update and, in the cases called
rollout, its sampling. The other cases' completions are random ids of the full length. Measured is
the highest resident set (VmHWM) less that before the model was loaded: with the allocator as it is,
and with one that gives freed tensors back to the system at once (MALLOC_MMAP_THRESHOLD_ of 1 MiB),
which is nearer to what tensors need. The difference is what glibc keeps of freed blocks.
"""

import argparse
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from rich.console import Console
from rich.table import Table

from thinktuning.data import GSM8KDataModule
from thinktuning.engines import Completion, SamplingParams, TransformersEngine
from thinktuning.module import ThinkTuningModule
from thinktuning.objective import ObjectiveConfig
from thinktuning.plan import Job, make_plan
from thinktuning.plan.job import GIB, Sampler
from thinktuning.policy import GROUPED, LoraSettings, Scoring
from thinktuning.provenance import provenance
from thinktuning.rewards import Response, Reward

GROUP = 8
CASES: dict[str, dict[str, Any]] = {
    "micro-batch 1": {"micro_batch_size": 1},
    "micro-batch 4": {"micro_batch_size": 4},
    "micro-batch 8": {"micro_batch_size": 8},
    "micro-batch 4, reference": {"micro_batch_size": 4, "kl_coef": 0.01},
    "micro-batch 4, bf16-mixed": {"micro_batch_size": 4, "precision": "bf16-mixed"},
    "micro-batch 4, checkpointing": {"micro_batch_size": 4, "activation_checkpointing": True},
    "micro-batch 8, checkpointing": {"micro_batch_size": 8, "activation_checkpointing": True},
    "micro-batch 4, LoRA": {"micro_batch_size": 4, "lora": {"rank": 16}},
    "micro-batch 4, LoRA on bfloat16": {
        "micro_batch_size": 4,
        "lora": {"rank": 16, "base": "bfloat16"},
    },
    "rollout of 8, checkpointing": {
        "micro_batch_size": 1,
        "activation_checkpointing": True,
        "sample": True,
    },
}


class RandomEngine(TransformersEngine):
    """Completions of the full length, at once."""

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        params: SamplingParams,
    ) -> list[list[Completion]]:
        """Random ids; see ``Engine``."""
        return [[_random(seed, params.max_new_tokens) for seed in own] for own in seeds]


def _random(seed: int, length: int) -> Completion:
    ids = torch.randint(100, 1000, (length,), generator=torch.Generator().manual_seed(seed))
    return Completion(tuple(ids.tolist()), (-1.0,) * length, "length")


class EveryOther(Reward):
    """Rewards rollouts in turn, so that all have an advantage."""

    def score(self, responses: Sequence[Response]) -> list[float]:
        """1, 0, 1, 0, and so on."""
        return [float(i % 2) for i in range(len(responses))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="questions in GSM8K's form")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--tokens", type=int, default=256, help="of every completion")
    parser.add_argument("--steps", type=int, default=2, help="rollout batches")
    parser.add_argument("--only", help="cases with this in their name")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(CASES[arguments.case], arguments)))
        return
    table = Table("case", "plan, GiB", "measured", "error", "returning", "error", "peak at")
    for name, case in CASES.items():
        if arguments.only is None or arguments.only in name:
            table.add_row(name, *_compared(name, case, arguments))
    console = Console()
    console.print(table)
    console.print(vars(arguments) | provenance())


def _compared(name: str, case: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    usual = _measured(name, {})
    returning = _measured(name, {"MALLOC_MMAP_THRESHOLD_": str(2**20)})
    plan = make_plan(_job(case, arguments, usual["prompt_tokens"]))
    moments = {
        k: m.total() for k, m in plan.moments.items() if case.get("sample") or k != "rollout"
    }
    at = max(moments, key=lambda moment: moments[moment])
    row = [f"{moments[at] / GIB:.2f}"]
    for found in (usual, returning):
        row += [f"{found['bytes'] / GIB:.2f}", f"{moments[at] / found['bytes'] - 1:+.1%}"]
    print(name, *row, at, file=sys.stderr)
    return [*row, at]


def _measured(name: str, environment: dict[str, str]) -> dict[str, int]:
    command = [sys.executable, __file__, *sys.argv[1:], "--case", name]
    environment = {**os.environ, **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def _job(case: dict[str, Any], arguments: argparse.Namespace, prompt_tokens: int) -> Job:
    lora = case.get("lora")
    return Job(
        pretrained=arguments.model,
        attention=GROUPED,
        scoring=Scoring(),
        lora=None if lora is None else LoraSettings(**lora),
        activation_checkpointing=case.get("activation_checkpointing", False),
        mixed=case.get("precision") == "bf16-mixed",
        objective=ObjectiveConfig(kl_coef=case.get("kl_coef", 0.0)),
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-6),
        micro_batch_size=case["micro_batch_size"],
        num_mini_batches=1,
        prompts=1,
        group_size=GROUP,
        prompt_tokens=prompt_tokens,
        completion_tokens=arguments.tokens,
        sampler=Sampler(max_batch_size=GROUP),
        guidance=None,
        reference="kl_coef" in case,
        strategy="single",
        cpu_offload=False,
        ranks=1,
        gpu=False,
        device_memory=2**60,
    )


def measure(case: dict[str, Any], arguments: argparse.Namespace) -> dict[str, int]:
    """Train in this process; the longest prompt, and bytes that the run added at its peak."""
    warnings.filterwarnings("ignore")
    case = dict(case)
    engine = TransformersEngine if case.pop("sample", False) else RandomEngine
    objective = replace(ObjectiveConfig(), kl_coef=case.pop("kl_coef", 0.0))
    precision, lora = case.pop("precision", "32-true"), case.pop("lora", None)
    module = ThinkTuningModule(
        pretrained=arguments.model,
        engine=engine(max_batch_size=GROUP),
        group_size=GROUP,
        max_new_tokens=arguments.tokens,
        objective=objective,
        rewards=[EveryOther()],
        lora=None if lora is None else LoraSettings(**lora),
        **case,
    )
    data = GSM8KDataModule(arguments.model, arguments.data, val_size=0, limit=1, batch_size=1)
    data.setup("fit")
    assert data.train_prompts is not None
    trainer = Trainer(
        accelerator="cpu",
        precision=precision,
        max_steps=arguments.steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    trainer.fit(module, data)
    assert trainer.global_step == arguments.steps
    peak = _status("VmHWM") - before
    return {"prompt_tokens": max(len(p.token_ids) for p in data.train_prompts), "bytes": peak}


def _status(field: str) -> int:
    """Bytes, of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(field)]
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
