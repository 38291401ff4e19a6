"""Prompt text: a chat, rendered by the model's own template."""

import warnings
from collections.abc import Sequence

from jinja2 import TemplateError
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

Message = dict[str, str]

# Llama 3's template writes a date, by default today's: a run would change from day to day.
_DATE = "26 Jul 2024"


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Token ids of a chat, up to where the assistant starts to write, or goes on writing.

    Uses the tokenizer's chat template, so that control tokens stand where the model expects them;
    a tokenizer without one gets the messages as paragraphs. Where the tokenizer begins texts with
    a BOS token the prompt has exactly one, whether or not the template writes it.

    Args:
        tokenizer: Of the model that reads the prompt.
        messages: The first one is the system's; the last one the user's, or the beginning of the
            assistant's turn.

    Returns:
        The ids.
    """
    begun = ""
    if messages[-1]["role"] == "assistant":
        *messages, last = messages
        begun = last["content"]
    if tokenizer.chat_template is None:
        text = "\n\n".join(m["content"] for m in messages) + "\n\n"
    else:
        text = _apply_template(tokenizer, messages)
    ids: list[int] = tokenizer.encode(text + begun, add_special_tokens=False)
    return _with_one_bos(tokenizer, ids)


def completion_text(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """Text of a completion without its control tokens."""
    text = tokenizer.decode(list(token_ids), skip_special_tokens=True)
    assert isinstance(text, str)
    return text


def _apply_template(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True, date_string=_DATE
        )
    except TemplateError as error:
        system, first, *rest = messages
        warnings.warn(
            f"the chat template refuses a system message ({error}); it becomes the beginning of "
            f"the first user message",
            stacklevel=2,
        )
        merged = {"role": "user", "content": f"{system['content']}\n\n{first['content']}"}
        text = tokenizer.apply_chat_template(
            [merged, *rest], tokenize=False, add_generation_prompt=True, date_string=_DATE
        )
    assert isinstance(text, str)
    return text


def _with_one_bos(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    bos = tokenizer.bos_token_id
    # Some models name a BOS token that they never put in front (SmolLM2: its turn opener).
    if bos is None or tokenizer.encode("x")[0] != bos:
        return ids
    start = 0
    while start < len(ids) and ids[start] == bos:
        start += 1
    return [bos, *ids[start:]]
