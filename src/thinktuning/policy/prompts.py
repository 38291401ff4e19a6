"""Prompt text: a chat, rendered by the model's own template."""

import re
import warnings
from collections.abc import Sequence

from jinja2 import TemplateError
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from thinktuning.errors import InputError

Message = dict[str, str]

# Half a character, which no text in UTF-8 can hold: it marks where a text is cut.
_CUT = "\ud800"

# Llama 3's template writes a date, by default today's: a run would change from day to day.
_DATE = "26 Jul 2024"


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Token ids of a chat, up to where the assistant starts to write, or goes on writing.

    Uses the tokenizer's chat template, so that control tokens stand where the model expects them;
    a tokenizer without one gets the messages as paragraphs. Where the tokenizer begins texts with
    a BOS token the prompt has exactly one, whether or not the template writes it. A message that
    spells a control token is read as that text: only the template writes control tokens.

    Args:
        tokenizer: Of the model that reads the prompt.
        messages: The first one is the system's; the last one the user's, or the beginning of the
            assistant's turn.

    Returns:
        The ids.

    Raises:
        InputError: If a message is no text that UTF-8 can hold, or the template refuses the chat.
    """
    messages = [{**m, "content": _without_control(tokenizer, m["content"])} for m in messages]
    begun = ""
    if messages[-1]["role"] == "assistant":
        *messages, last = messages
        begun = last["content"]
    if tokenizer.chat_template is None:
        text = "\n\n".join(m["content"] for m in messages) + "\n\n"
    else:
        text = _apply_template(tokenizer, messages)
    ids: list[int] = []
    for piece in (text + begun).split(_CUT):
        ids += tokenizer.encode(piece, add_special_tokens=False)
    return _with_one_bos(tokenizer, ids)


def completion_text(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """Text of a completion without its control tokens."""
    text = tokenizer.decode(list(token_ids), skip_special_tokens=True)
    assert isinstance(text, str)
    return text


def _without_control(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """A text with a cut in every control token that it spells."""
    if re.search("[\ud800-\udfff]", text):
        raise InputError(
            f"a prompt has half a character (a lone surrogate), which no tokenizer reads; take it "
            f"out of the text {text!r:.80}"
        )
    tokens = tokenizer.added_tokens_decoder.values()
    control = {*(str(t) for t in tokens if t.special), *tokenizer.all_special_tokens}
    for token in control:
        text = text.replace(token, f"{token[0]}{_CUT}{token[1:]}")
    return text


def _apply_template(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    try:
        return _rendered(tokenizer, messages)
    except TemplateError as error:
        refusal = error
    system, first, *rest = messages
    merged = {"role": "user", "content": f"{system['content']}\n\n{first['content']}"}
    try:
        text = _rendered(tokenizer, [merged, *rest])
    except TemplateError as error:
        raise InputError(
            f"the chat template of {tokenizer.name_or_path!r} can't render a chat: {error}; mend "
            f"chat_template.jinja, or chat_template in tokenizer_config.json"
        ) from error
    warnings.warn(
        f"the chat template refuses a system message ({refusal}); it becomes the beginning of the "
        f"first user message",
        stacklevel=2,
    )
    return text


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    text = tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=True, date_string=_DATE
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
