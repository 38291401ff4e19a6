"""Models: loading them, prompting them, and asking them for logprobs."""

from thinktuning.policy.loading import (
    end_of_turn_ids,
    load_generation_config,
    load_model,
    load_tokenizer,
    resolve,
)
from thinktuning.policy.logprobs import completion_logprobs
from thinktuning.policy.lora import LoraSettings, with_adapters
from thinktuning.policy.prompts import Message, completion_text, render_prompt
from thinktuning.policy.weights import base_of, named_weights

__all__ = [
    "LoraSettings",
    "Message",
    "base_of",
    "completion_logprobs",
    "completion_text",
    "end_of_turn_ids",
    "load_generation_config",
    "load_model",
    "load_tokenizer",
    "named_weights",
    "render_prompt",
    "resolve",
    "with_adapters",
]
