"""Our side of ``versus.py``: ``thinktuning fit``, a step whenever one is asked for."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from side import SYSTEM, Steps, reward

from thinktuning.cli import main
from thinktuning.engines import Completion, SamplingParams, TransformersEngine, VLLMEngine
from thinktuning.rewards import Response, Reward

STEPS = Steps()
PARTS = ("sync", "rollout", "guidance", "injection", "reward", "logprobs", "update")


class Forced:
    """Students' completions all have one length, and end like finished ones.

    Args:
        tokens: That length.
    """

    def __init__(self, tokens: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tokens = tokens

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        params: SamplingParams,
    ) -> list[list[Completion]]:
        """See ``Engine``; a teacher decodes greedily and is left alone."""
        if params.temperature == 0:
            return super().sample(prompts, seeds, params)  # type: ignore[misc]
        free = replace(params, stop_ids=(), max_new_tokens=self.tokens)
        groups = super().sample(prompts, seeds, free)  # type: ignore[misc]
        return [[_ended(c, params.stop_ids[0]) for c in group] for group in groups]


def _ended(completion: Completion, stop_id: int) -> Completion:
    return replace(
        completion, token_ids=(*completion.token_ids[:-1], stop_id), finish_reason="stop"
    )


class ForcedTransformers(Forced, TransformersEngine):
    """In this process."""


class ForcedVLLM(Forced, VLLMEngine):
    """In vLLM."""


class Drawn(Reward):
    """As if drawn."""

    def score(self, responses: Sequence[Response]) -> list[float]:
        """0 or 1."""
        return [reward(r.text) for r in responses]


class OneByOne(Callback):
    """Takes a step when it is asked for."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for the first word."""
        STEPS.wait()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Say how it was, and wait for the next word."""
        metrics = outputs["metrics"]
        parts = {name: metrics.get(f"seconds/{name}", 0.0) for name in PARTS}
        rollouts = outputs["rollouts"].rollouts
        prompt_tokens = sum(len(r.prompt.token_ids) for r in rollouts)
        tokens = sum(len(r.completion_ids) for r in rollouts)
        STEPS.tell(
            **parts,
            prompt_tokens=prompt_tokens,
            tokens=tokens,
            guided=metrics["guidance/realised_gamma"],
        )
        STEPS.wait()


def fit(options: argparse.Namespace, more: list[str]) -> None:
    room = options.feedback if options.gamma else 0
    engine = "ForcedVLLM" if options.engine == "vllm" else "ForcedTransformers"
    vllm = ["--engine.dtype", options.dtype, "--engine.max_model_len", "2048"]
    main(
        [
            "fit",
            "--seed_everything=1",
            f"--model.pretrained={options.model}",
            f"--engine=ours.{engine}",
            f"--engine.tokens={options.tokens}",
            *(vllm if options.engine == "vllm" else []),
            f"--model.group_size={options.group_size}",
            f"--model.max_new_tokens={options.tokens + room}",
            "--model.temperature=1.0",
            f"--model.objective.kl_coef={options.kl}",
            "--model.rewards=[{class_path: ours.Drawn}]",
            "--model.optimizer=torch.optim.AdamW",
            "--model.optimizer.lr=1e-6",
            "--model.optimizer.fused=true",  # as is TRL's
            f"--guidance.gamma.start={options.gamma}",
            "--guidance.gamma.kind=constant",
            f"--guidance.max_new_tokens={options.feedback}",
            f"--data.source={options.data}",
            "--data.val_size=0",
            f"--data.batch_size={options.prompts}",
            f"--data.system_message={SYSTEM}",
            "--data.instruction=",
            "--trainer.accelerator=cpu",
            "--trainer.devices=1",
            f"--trainer.precision={'32-true' if options.dtype == 'float32' else 'bf16-mixed'}",
            "--trainer.max_steps=1000",
            f"--trainer.default_root_dir={options.work}",
            "--trainer.callbacks=ours.OneByOne",
            "--checkpoint.every_n_train_steps=1000",
            *more,
        ]
    )


if __name__ == "__main__":
    sys.modules["ours"] = sys.modules["__main__"]
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--work", required=True)
    parser.add_argument("--engine", default="transformers")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--kl", type=float, default=0.04)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--group_size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--gamma", type=float, default=0.0)
    parser.add_argument("--feedback", type=int, default=80)
    fit(*parser.parse_known_args())
