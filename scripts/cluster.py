"""A training step on 8, 64 and 512 GPUs, on paper: seconds, bytes and where it saturates.

    python scripts/cluster.py [--params 8.0e9 --layers 32 --kv_width 1024]

Nothing here is measured on a cluster. Every constant is an argument with the value it assumes; put
in what your machines reach. docs/scaling.md has the formulas in words.
"""

import argparse
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Step:
    """Seconds of each stage on every GPU, and bytes that reach each GPU."""

    sync: float
    rollout: float
    teacher: float
    logprobs: float
    update: float
    sync_bytes: float
    update_bytes: float
    waits_for: str

    @property
    def seconds(self) -> float:
        """Of the whole step: the stages follow each other."""
        return self.sync + self.rollout + self.teacher + self.logprobs + self.update


def step(a: argparse.Namespace, gpus: int, sequences: float) -> Step:
    """A step in which every GPU has a vLLM engine and a part of the FSDP2 policy."""
    own = sequences / gpus  # completions of a GPU
    flops = a.tflops * 1e12 * a.mfu
    memory = a.hbm_gb_s * 1e9 * a.hbm_share
    link = (a.node_gb_s if gpus <= a.gpus_per_node else a.network_gb_s) * 1e9
    away = (gpus - 1) / gpus  # share of the weights that lies on other GPUs

    def decode(rows: float, prompt: float, tokens: float) -> float:
        cache = rows * (prompt + tokens / 2) * a.layers * 2 * a.kv_width * 2
        read = (2 * a.params + cache) / memory  # once a token: weights and cache, 2 bytes each
        return tokens * max(read, rows * 2 * a.params / flops)

    guided = own * a.gamma
    prefill = 2 * a.params * own / a.group_size * a.prompt_tokens / flops
    teacher_prefill = 2 * a.params * guided * a.teacher_prompt_tokens / flops
    tokens = own * (a.prompt_tokens + a.mean_tokens)
    micro_batches = max(1.0, tokens / a.micro_batch_tokens)
    # A weight is gathered in bfloat16 for the forward and the backward; its float32 gradient is
    # scattered once.
    moved = micro_batches * (2 + 2 + 4) * a.params * away
    compute = (8 if a.recompute else 6) * a.params * tokens / flops
    forward_moved = micro_batches * 2 * a.params * away
    forward = 2 * a.params * tokens / flops
    # Gathered in float32, once for the engine, which rounds it, and once to check what it holds.
    sync_bytes = 2 * 4 * a.params * away
    return Step(
        sync=sync_bytes / link,
        rollout=prefill + decode(own, a.prompt_tokens, a.max_tokens),
        teacher=teacher_prefill + decode(guided, a.teacher_prompt_tokens, a.teacher_tokens),
        logprobs=max(forward, forward_moved / link),
        update=max(compute, moved / link),
        sync_bytes=sync_bytes,
        update_bytes=moved + forward_moved,
        waits_for="network" if moved / link > compute else "compute",
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    for name, value, meaning in (
        ("params", 3.21e9, "of the policy (Llama-3.2-3B)"),
        ("layers", 28, "of the policy"),
        ("kv_width", 1024, "key-value heads times their width"),
        ("questions", 128, "of a rollout batch"),
        ("group_size", 8, "answers to a question"),
        ("prompt_tokens", 200, "of a question"),
        ("mean_tokens", 400, "of an answer"),
        ("max_tokens", 1024, "of the longest answer, for which the batch waits"),
        ("gamma", 0.1, "guided share"),
        ("teacher_prompt_tokens", 2500, "worked examples included"),
        ("teacher_tokens", 400, "of a reply"),
        ("micro_batch_tokens", 8192, "prompt and answer tokens in a forward and backward pass"),
        ("tflops", 989, "of a GPU in bfloat16 (H100, data sheet)"),
        ("mfu", 0.4, "share of them that an update reaches (assumed)"),
        ("hbm_gb_s", 3350, "memory bandwidth (H100, data sheet)"),
        ("hbm_share", 0.6, "share of it that decoding reaches (assumed)"),
        ("node_gb_s", 300, "between the GPUs of a node, each (NVLink, assumed)"),
        ("network_gb_s", 40, "between nodes, each GPU (400 Gb/s, assumed)"),
        ("gpus_per_node", 8, "GPUs of a node"),
    ):
        parser.add_argument(f"--{name}", type=type(value), default=value, help=meaning)
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing")
    a = parser.parse_args()

    console = Console(width=140)
    for title, grows in (("the same batch on more GPUs", False), ("the batch grows along", True)):
        stages = ("sync", "rollout", "teacher", "logprobs", "update", "step, s")
        bytes_and_rates = ("GB sync", "GB update", "rollout tok/s", "update tok/s")
        table = Table("GPUs", "answers", *stages, *bytes_and_rates, "of 8", "for", title=title)
        base = None
        for gpus in (8, 64, 512):
            sequences = a.questions * a.group_size * (gpus / 8 if grows else 1)
            s = step(a, gpus, sequences)
            rate = sequences / s.seconds / gpus
            base = base or rate
            table.add_row(
                str(gpus),
                f"{sequences:.0f}",
                *(f"{t:.2f}" for t in (s.sync, s.rollout, s.teacher, s.logprobs, s.update)),
                f"{s.seconds:.1f}",
                f"{s.sync_bytes / 1e9:.0f}",
                f"{s.update_bytes / 1e9:.0f}",
                f"{sequences * a.mean_tokens / s.rollout:,.0f}",
                f"{sequences * (a.prompt_tokens + a.mean_tokens) / s.update:,.0f}",
                f"{rate / base:.0%}",
                s.waits_for,
            )
        console.print(table)


if __name__ == "__main__":
    main()
