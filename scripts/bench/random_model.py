"""A random model: ``python scripts/bench/random_model.py FOLDER [--vocabulary 128256] …``.

It has SmolLM2's tokenizer, and a width, a depth and a vocabulary to choose, or with ``--like`` the
shape that another model's config.json gives.
"""

import argparse

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from thinktuning.policy import load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--like", help="a folder with config.json, or a hub id")
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    tokenizer = load_tokenizer("embedded")
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(arguments.like) if arguments.like else shape(arguments)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, arguments.dtype))
    model.save_pretrained(arguments.folder)
    tokenizer.save_pretrained(arguments.folder)


def shape(arguments: argparse.Namespace) -> PretrainedConfig:
    """A small Llama's."""
    return LlamaConfig(
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.hidden,
        intermediate_size=3 * arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 64,
        num_key_value_heads=arguments.hidden // 64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )


if __name__ == "__main__":
    main()
