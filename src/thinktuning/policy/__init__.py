"""Models: loading them and asking them for logprobs."""

from thinktuning.policy.loading import end_of_turn_ids, load_model, load_tokenizer
from thinktuning.policy.logprobs import completion_logprobs

__all__ = ["completion_logprobs", "end_of_turn_ids", "load_model", "load_tokenizer"]
