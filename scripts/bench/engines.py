"""Rollout throughput of both engines on the same prompts, alternating, and what a sync costs.

    python scripts/bench/engines.py --data path/to/gsm8k/train.jsonl [--model FOLDER]

Every completion is forced to the same length, so that both engines decode the same number of
tokens. Prints a table and one JSON line per measurement.
"""

import argparse
import json
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table

from thinktuning.data import load_questions
from thinktuning.engines import Engine, SamplingParams, TransformersEngine, VLLMEngine, derive_seed
from thinktuning.policy import load_model, load_tokenizer, render_prompt
from thinktuning.provenance import provenance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="questions in GSM8K's form")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--group_size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128, help="of every completion")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--compiled", action="store_true", help="vLLM with torch.compile")
    arguments = parser.parse_args()

    dtype = getattr(torch, arguments.dtype)
    model, tokenizer = load_model(arguments.model, dtype), load_tokenizer(arguments.model)
    questions = load_questions(arguments.data, "train")[: arguments.prompts]
    prompts = [render_prompt(tokenizer, _chat(q.text)) for q in questions]
    engines: dict[str, Engine] = {
        "transformers": TransformersEngine(),
        "vllm": VLLMEngine(dtype=arguments.dtype, max_model_len=2048, eager=not arguments.compiled),
    }
    params = SamplingParams(arguments.tokens, stop_ids=(), temperature=0.7)
    speeds: dict[str, list[float]] = {name: [] for name in engines}
    syncs: dict[str, list[float]] = {name: [] for name in engines}
    for repeat in range(-1, arguments.repeats):  # the first one warms up
        seeds = [
            [derive_seed(repeat, p, g) for g in range(arguments.group_size)]
            for p in range(len(prompts))
        ]
        for name, engine in engines.items():
            started = time.perf_counter()
            engine.load_weights(model, tokenizer)
            synced = time.perf_counter()
            groups = engine.sample(prompts, seeds, params)
            seconds = time.perf_counter() - synced
            tokens = sum(len(c.token_ids) for group in groups for c in group)
            assert tokens == len(prompts) * arguments.group_size * arguments.tokens
            if repeat >= 0:
                speeds[name].append(tokens / seconds)
                syncs[name].append(synced - started)
                print(json.dumps({"engine": name, "tokens_per_second": tokens / seconds}))
    _report(arguments, speeds, syncs)


def _chat(question: str) -> list[dict[str, str]]:
    return [
        {"role": "system", "content": "You solve word problems in a few short steps."},
        {"role": "user", "content": question},
    ]


def _report(
    arguments: argparse.Namespace, speeds: dict[str, list[float]], syncs: dict[str, list[float]]
) -> None:
    table = Table("engine", "tokens/s, median", "lowest", "highest", "sync, s")
    for name, values in speeds.items():
        median = statistics.median(values)
        row = [f"{x:.0f}" for x in (median, min(values), max(values))]
        table.add_row(name, *row, f"{statistics.median(syncs[name]):.2f}")
    console = Console()
    console.print(table)
    ratios = [v / t for v, t in zip(speeds["vllm"], speeds["transformers"], strict=True)]
    console.print(
        f"vLLM / Transformers: {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f})"
    )
    console.print(vars(arguments) | provenance())


if __name__ == "__main__":
    main()
