"""Checks of text and tokens: tokenizer, chat template, questions."""

from collections.abc import Sequence

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from thinktuning.doctor.finding import Finding, failed, ok, warning
from thinktuning.doctor.setup import Setup
from thinktuning.policy import end_of_turn_ids, load_generation_config
from thinktuning.types import Prompt

_PLACE = "The answer stands here."
_PROMPTS = 3
_ONE_BOS = "take a bos_token out of the model's chat template"


def tokenizer(setup: Setup) -> Finding:
    """The student's tokenizer can be loaded, and has a chat template."""
    found = setup.tokenizer
    named = f"{type(found).__name__} of {len(found)} tokens"
    if found.chat_template is None:
        return warning(
            f"{named}, without a chat template: prompts are plain paragraphs",
            "right for a base model; else add chat_template.jinja to the model's folder",
        )
    return ok(f"{named}, with a chat template")


def end_of_turn(setup: Setup) -> Finding:
    """There are ids that end a turn, and that of the chat template is among them."""
    name = setup.config.model.pretrained
    return ends_of_turn(
        setup.tokenizer, end_of_turn_ids(setup.tokenizer, load_generation_config(name))
    )


def ends_of_turn(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> Finding:
    """Compare the ids that end a turn with what the template writes behind an answer."""
    named = _named(tokenizer, ids)
    if tokenizer.chat_template is None:
        return ok(named)
    written = template_end(tokenizer)
    if written is None:
        return warning(
            f"{named}; the chat template writes no control token behind an answer",
            "see whether the model was trained to end its turns with one of these ids",
        )
    if written not in ids:
        return failed(
            f"the chat template ends a turn with {_named(tokenizer, [written])}, but a turn is "
            f"taken to end with {named}: no answer would ever finish",
            f"add {written} to eos_token_id in the model's generation_config.json",
        )
    return ok(f"{named}; the chat template writes {_named(tokenizer, [written])}")


def template_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The first control token that the chat template writes behind an answer."""
    turns = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": _PLACE}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert isinstance(text, str)
    behind = tokenizer.encode(text.rpartition(_PLACE)[2], add_special_tokens=False)
    control = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return next((i for i in behind if i in control), None)


def questions(setup: Setup) -> Finding:
    """The source can be read and fills a rollout batch."""
    longest = max(len(p.token_ids) for p in setup.prompts)
    return ok(f"{len(setup.prompts)} training prompts; the longest has {longest} tokens")


def prompt(setup: Setup) -> Finding:
    """The first question as the student reads it: at most one BOS, and the question in it."""
    return rendered(setup.tokenizer, setup.prompts[0])


def rendered(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> Finding:
    """Look at a rendered prompt."""
    ids, bos = prompt.token_ids, tokenizer.bos_token_id
    text = _decoded(tokenizer, ids)
    if bos is None:
        found = "no BOS token"
    else:
        leading = next((i for i, token in enumerate(ids) if token != bos), len(ids))
        found = f"begins with {leading} BOS token{'s' * (leading != 1)} ({tokenizer.bos_token})"
        if leading > 1:
            return failed(found, f"{_ONE_BOS}, so that there is one at most", text)
        # A token that also opens turns (SmolLM2) isn't put in front by the tokenizer.
        if ids.count(bos) > 1 and tokenizer.encode("x")[0] == bos:
            return warning(
                f"{found} and has {ids.count(bos) - leading} more inside",
                "right for a model that begins every turn with one (Llama 2); else: " + _ONE_BOS,
                text,
            )
    if prompt.question not in text:
        return warning(
            "the question isn't in the prompt as it was written",
            "see whether the chat template writes it, and the tokenizer knows its characters",
            text,
        )
    if bos is not None and _template_doubles(tokenizer):
        return warning(
            f"{found}; the chat template writes two, and the trainer takes one away",
            f"{_ONE_BOS}: where the trained model is served nobody will",
            text,
        )
    return ok(f"{len(ids)} tokens, {found}", text)


def _template_doubles(tokenizer: PreTrainedTokenizerBase) -> bool:
    if tokenizer.chat_template is None:
        return False
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hello."}], tokenize=False)
    assert isinstance(text, str)
    return text.startswith(2 * str(tokenizer.bos_token))


def tokens_of_prompts(setup: Setup) -> Finding:
    """Ids of prompts become text and the same ids again."""
    return round_trip(setup.tokenizer, [p.token_ids for p in setup.prompts[:_PROMPTS]])


def round_trip(tokenizer: PreTrainedTokenizerBase, sequences: Sequence[Sequence[int]]) -> Finding:
    """Decode and encode ids of texts that were encoded before."""
    lost, changed = _lost(tokenizer, sequences), _changed(tokenizer, sequences)
    if lost:
        return _losing(lost, len(sequences))
    if changed:
        return warning(
            f"{changed} of {len(sequences)} come back as other ids of the same text",
            "harmless here, where ids are never encoded again; who sends the text of a prompt to a "
            "server will get other answers",
        )
    return ok(f"all {len(sequences)} come back as they were")


def tokens_of_completions(setup: Setup) -> Finding:
    """Ids that the student sampled become text that stays the same when it is encoded."""
    return round_trip_sampled(setup.tokenizer, [r.completion_ids for r in setup.rollouts.rollouts])


def round_trip_sampled(
    tokenizer: PreTrainedTokenizerBase, sequences: Sequence[Sequence[int]]
) -> Finding:
    """Decode and encode ids that were drawn one by one, and so may cut a text in their own way."""
    lost, changed = _lost(tokenizer, sequences), _changed(tokenizer, sequences)
    if lost:
        return _losing(lost, len(sequences))
    if changed:
        return ok(
            f"{changed} of {len(sequences)} come back as other ids of the same text, which is "
            f"natural: they were drawn one by one"
        )
    return ok(f"all {len(sequences)} come back as they were")


def _losing(lost: int, number: int) -> Finding:
    return failed(
        f"{lost} of {number} have another text after they were decoded and encoded",
        "the tokenizer's files don't fit together: take those that the model was published with",
    )


def _lost(tokenizer: PreTrainedTokenizerBase, sequences: Sequence[Sequence[int]]) -> int:
    """How many have another text after a round trip."""
    texts = [_decoded(tokenizer, ids) for ids in sequences]
    return sum(_decoded(tokenizer, _encoded(tokenizer, text)) != text for text in texts)


def _changed(tokenizer: PreTrainedTokenizerBase, sequences: Sequence[Sequence[int]]) -> int:
    """How many have other ids after a round trip."""
    return sum(_encoded(tokenizer, _decoded(tokenizer, ids)) != list(ids) for ids in sequences)


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    text = tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def _named(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return ", ".join(f"{tokenizer.convert_ids_to_tokens(i)} ({i})" for i in ids)
