"""TRL's side of ``versus.py``: a step of GRPOTrainer whenever one is asked for."""

import argparse
from typing import Any

import torch
from datasets import Dataset
from side import SYSTEM, Steps, questions, reward
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

STEPS = Steps()


class OneByOne(TrainerCallback):
    """Takes a step when it is asked for."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Wait for the first word."""
        optimizer = kwargs["optimizer"]
        optimizer.step = STEPS.timed("update", optimizer.step)
        STEPS.wait()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Say how it was, and wait for the next word."""
        STEPS.tell()
        STEPS.wait()


def drawn(completions: list[Any], **kwargs: Any) -> list[float]:
    """0 or 1, as if drawn."""
    return [reward(c[0]["content"]) for c in completions]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--work", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--kl", type=float, default=0.04)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--group_size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--micro_batch_size", type=int, default=8)
    parser.add_argument("--no_checkpointing", action="store_true")
    options = parser.parse_args()
    rows = [
        {"prompt": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": q}]}
        for q in questions(options.data)
    ]
    completions = options.prompts * options.group_size
    checkpointing = {"gradient_checkpointing": False} if options.no_checkpointing else {}
    config = GRPOConfig(
        output_dir=options.work,
        model_init_kwargs={"dtype": options.dtype},
        use_cpu=True,
        bf16=False,
        beta=options.kl,
        learning_rate=1e-6,
        per_device_train_batch_size=options.micro_batch_size,
        gradient_accumulation_steps=completions // options.micro_batch_size,
        num_generations=options.group_size,
        max_completion_length=options.tokens,
        generation_kwargs={"min_new_tokens": options.tokens},
        temperature=1.0,
        max_steps=1000,
        shuffle_dataset=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **checkpointing,
    )
    trainer = GRPOTrainer(
        model=options.model,
        reward_funcs=drawn,
        args=config,
        train_dataset=Dataset.from_list(rows),
        callbacks=[OneByOne()],
    )
    generate = STEPS.timed("rollout", trainer._generate)

    def counted(*args: Any, **kwargs: Any) -> Any:
        generated = generate(*args, **kwargs)
        for name, part in zip(("prompt_tokens", "tokens"), generated, strict=False):
            STEPS.seconds[name] = sum(len(ids) for ids in part)
        return generated

    trainer._generate = counted
    score = trainer._get_per_token_logps_and_entropies
    before, within = STEPS.timed("logprobs", score), STEPS.timed("update", score)
    trainer._get_per_token_logps_and_entropies = lambda *a, **k: (
        within if torch.is_grad_enabled() else before
    )(*a, **k)
    trainer.accelerator.backward = STEPS.timed("update", trainer.accelerator.backward)
    trainer.train()


if __name__ == "__main__":
    main()
