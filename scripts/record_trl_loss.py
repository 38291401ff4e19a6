"""Record what TRL's GRPO trainer computes on fixed log-probabilities, for our tests.

TRL isn't a dependency, so its numbers are recorded once, in an environment of its own::

    python3 -m venv /tmp/trl-venv
    /tmp/trl-venv/bin/pip install torch==2.13.0 'trl==1.16.*'
    /tmp/trl-venv/bin/python scripts/record_trl_loss.py tests/data/trl_grpo_loss.json

Every case builds a ``GRPOTrainer`` around a throw-away model and replaces one thing: the forward
pass, which returns the fixed log-probabilities. Loss and gradient are then TRL's own code,
``GRPOTrainer._compute_loss``. The gradient is the one with respect to the log-probabilities.

One setting isn't TRL's default: ``use_bias_correction_kl``, which multiplies the KL estimate by the
importance ratio, is off, because our KL term is the plain k3 estimate.
"""

import argparse
import itertools
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch import Tensor

ROWS, TOKENS, MAX_COMPLETION = 6, 7, 10
LENGTHS = [7, 4, 1, 6, 3, 5]
LOSS_TYPES = ["bnpo", "dapo", "grpo", "dr_grpo"]
BETAS = [0.0, 0.04]
EPSILON_HIGHS = [0.2, 0.28]


class FixedLogprobs(trl.GRPOTrainer):
    """GRPO with the forward pass taken out."""

    fixed: Tensor

    def _get_per_token_logps_and_entropies(
        self, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor, None]:
        return self.fixed, torch.zeros_like(self.fixed), None


def make_inputs() -> dict[str, Tensor]:
    """Ratios from about 0.4 to 2.5, so that both clips act on both signs of the advantage."""
    generator = torch.Generator().manual_seed(20)

    def normal() -> Tensor:
        return torch.randn(ROWS, TOKENS, generator=generator)

    logprobs = -0.05 - 1.5 * normal().abs()
    old_logprobs = logprobs + 0.35 * normal()
    old_logprobs[0, 1] = logprobs[0, 1] - math.log(1.24)  # between the two upper bounds
    return {
        "logprobs": logprobs,
        "old_logprobs": old_logprobs,
        "ref_logprobs": logprobs + 0.5 * normal(),
        "advantages": torch.tensor([1.4, -0.9, 0.3, -1.7, 0.0, 0.8]),
        "completion_mask": torch.arange(TOKENS) < torch.tensor(LENGTHS)[:, None],
    }


def save_student(folder: str) -> None:
    """A model and a tokenizer that the trainer's constructor accepts; neither is ever called."""
    core = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=3,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def make_trainer(folder: str, loss_type: str, beta: float, epsilon_high: float) -> FixedLogprobs:
    config = trl.GRPOConfig(
        output_dir=f"{folder}/out",
        loss_type=loss_type,
        beta=beta,
        epsilon=0.2,
        epsilon_high=epsilon_high,
        delta=None,
        use_bias_correction_kl=False,
        max_completion_length=MAX_COMPLETION,
        per_device_train_batch_size=ROWS,
        num_generations=ROWS,
        gradient_accumulation_steps=1,
        steps_per_generation=1,
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    trainer = FixedLogprobs(
        model=folder,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config,
        train_dataset=Dataset.from_list([{"prompt": "x"}]),
    )
    trainer.current_gradient_accumulation_steps = 1  # the training loop would set it
    trainer.model.train()
    return trainer


def record(
    trainer: FixedLogprobs, inputs: dict[str, Tensor], on_policy: bool
) -> tuple[float, Tensor]:
    """TRL's loss and its gradient with respect to the log-probabilities."""
    trainer.fixed = inputs["logprobs"].clone().requires_grad_()
    mask = inputs["completion_mask"].long()
    ids = torch.zeros(ROWS, 1, dtype=torch.long)
    batch = {
        "prompt_ids": ids,
        "prompt_mask": torch.ones_like(ids),
        "completion_ids": torch.zeros_like(mask),
        "completion_mask": mask,
        "advantages": inputs["advantages"],
        "ref_per_token_logps": inputs["ref_logprobs"],
        "old_per_token_logps": None if on_policy else inputs["old_logprobs"],
        "num_items_in_batch": mask.sum(),
    }
    loss = trainer.compute_loss(trainer.model, batch)
    (gradient,) = torch.autograd.grad(loss, trainer.fixed)
    return loss.item(), gradient


def numbers(tensor: Tensor) -> list[Any]:
    """Nested lists; nine significant digits identify a float32."""
    if tensor.ndim > 1:
        return [numbers(row) for row in tensor]
    return [float(f"{value:.9g}") for value in tensor.tolist()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output

    transformers.utils.logging.disable_progress_bar()
    inputs = make_inputs()
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        save_student(folder)
        for loss_type, beta, epsilon_high in itertools.product(LOSS_TYPES, BETAS, EPSILON_HIGHS):
            trainer = make_trainer(folder, loss_type, beta, epsilon_high)
            for on_policy in (False, True):
                if on_policy and epsilon_high != EPSILON_HIGHS[0]:
                    continue  # all ratios are 1, whatever the clipping distance
                loss, gradient = record(trainer, inputs, on_policy)
                cases.append(
                    {
                        "loss_type": loss_type,
                        "beta": beta,
                        "epsilon": 0.2,
                        "epsilon_high": epsilon_high,
                        "on_policy": on_policy,
                        "loss": float(f"{loss:.9g}"),
                        "gradient": numbers(gradient),
                    }
                )
    recorded = {
        "versions": {m.__name__: m.__version__ for m in (trl, transformers, torch)},
        "max_completion_length": MAX_COMPLETION,
        "inputs": {
            name: tensor.int().tolist() if tensor.dtype == torch.bool else numbers(tensor)
            for name, tensor in inputs.items()
        },
        "cases": cases,
    }
    text = json.dumps(recorded)
    output.write_text(text.replace('{"loss_type"', '\n{"loss_type"') + "\n")
    print(f"{len(cases)} cases of TRL {trl.__version__} in {output}")


if __name__ == "__main__":
    main()
