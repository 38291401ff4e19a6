"""Models: loading them, prompting them, and asking them for logprobs."""

from thinktuning.policy.arithmetic import ForwardCost, forward_cost
from thinktuning.policy.attention import GROUPED
from thinktuning.policy.loading import (
    end_of_turn_ids,
    load_generation_config,
    load_model,
    load_tokenizer,
    read_config,
    resolve,
)
from thinktuning.policy.logprobs import (
    PLAIN,
    Scoring,
    TokenScores,
    completion_logprobs,
    possible,
    suitable,
)
from thinktuning.policy.lora import LoraSettings, load_base, with_adapters, without_adapters
from thinktuning.policy.parallel import (
    gather,
    recompute_activations,
    release,
    shard,
    transformer_blocks,
)
from thinktuning.policy.precision import native_bfloat16, packed_linears, rounded_weights
from thinktuning.policy.prompts import Message, completion_text, render_prompt
from thinktuning.policy.weights import (
    base_of,
    device_of,
    is_frozen,
    is_transposed,
    named_weights,
    whole,
)

__all__ = [
    "GROUPED",
    "PLAIN",
    "ForwardCost",
    "LoraSettings",
    "Message",
    "Scoring",
    "TokenScores",
    "base_of",
    "completion_logprobs",
    "completion_text",
    "device_of",
    "end_of_turn_ids",
    "forward_cost",
    "gather",
    "is_frozen",
    "is_transposed",
    "load_base",
    "load_generation_config",
    "load_model",
    "load_tokenizer",
    "named_weights",
    "native_bfloat16",
    "packed_linears",
    "possible",
    "read_config",
    "recompute_activations",
    "release",
    "render_prompt",
    "resolve",
    "rounded_weights",
    "shard",
    "suitable",
    "transformer_blocks",
    "whole",
    "with_adapters",
    "without_adapters",
]
