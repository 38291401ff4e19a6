"""Tiny real models and tokenizers, made here: no download, trained in seconds."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
CORPUS = [
    "What is 3 plus 4? Add the numbers: 3 plus 4 is 7. The final answer is \\boxed{7}.",
    "Wait, let me check my own answer again. I agree, this is right. So the answer stays.",
    "<opinion>correct</opinion>\n<reason>I counted again.</reason>\n<phrase>So it is 1.</phrase>",
    "system user assistant Question: My answer: incorrect 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14",
]


def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """``own_pad``: BOS in front, a chat template, its own pad; ``pad_is_eos``: a chat template,
    no BOS, pad = eos; ``no_template``: plain text, no pad.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|bos|>", "<|end|>", "<|start|>", "<|pad|>"]
    core.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=384,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    names: dict[str, str] = {"eos_token": "<|end|>"}
    if kind == "own_pad":
        core.post_processor = processors.TemplateProcessing(
            single="<|bos|> $A", special_tokens=[("<|bos|>", core.token_to_id("<|bos|>"))]
        )
        names |= {"bos_token": "<|bos|>", "pad_token": "<|pad|>"}
    elif kind == "pad_is_eos":
        names |= {"pad_token": "<|end|>"}
    else:
        assert kind == "no_template", kind
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, additional_special_tokens=["<|start|>"], **names
    )
    if kind != "no_template":
        made.chat_template = CHAT_TEMPLATE
    return made


def word_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """One token for every word of the texts; no chat template, so that prompts are a few tokens."""
    words = sorted({word for text in texts for word in text.split()})
    vocabulary = {word: i for i, word in enumerate(["<|end|>", *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<|end|>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>")


def model(
    family: str,
    vocab_size: int,
    eos_token_id: int,
    seed: int = 0,
    width: int = 48,
    heads: int = 4,
    max_position_embeddings: int = 1024,
) -> PreTrainedModel:
    """A randomly initialised ``llama``, ``qwen2`` or ``gpt2`` of about 50k parameters, fp32.

    vLLM's attention on CPUs wants heads of 32: a ``width`` of 64 with 2 ``heads``.
    """
    shape = {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
        "tie_word_embeddings": True,
    }
    wide = {
        "intermediate_size": 2 * width,
        "num_key_value_heads": heads // 2,
        "max_position_embeddings": max_position_embeddings,
    }
    if family == "llama":
        config = LlamaConfig(**shape, **wide)
    elif family == "qwen2":
        config = Qwen2Config(**shape, **wide)
    else:
        assert family == "gpt2", family
        config = GPT2Config(
            vocab_size=vocab_size,
            n_embd=width,
            n_layer=2,
            n_head=heads,
            n_positions=max_position_embeddings,
            bos_token_id=None,
            eos_token_id=eos_token_id,
        )
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).eval()


def save(folder: Path, family: str = "llama", kind: str = "own_pad", **shape: int) -> Path:
    """A model folder as a user would have it; random weights."""
    text = tokenizer(kind)
    model(family, len(text), text.eos_token_id, **shape).save_pretrained(folder)
    text.save_pretrained(folder)
    return folder


def train_on(
    folder: Path, pairs: list[tuple[list[int], list[int]]], steps: int, lr: float = 3e-3
) -> None:
    """Teach the model in ``folder`` to continue each prompt's ids with its completion's ids."""
    net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr)
    width = max(len(p) + len(c) for p, c in pairs)
    ids = torch.zeros(len(pairs), width, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    mask = torch.zeros_like(ids)
    for i, (prompt, completion) in enumerate(pairs):
        row = torch.tensor(prompt + completion)
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
        labels[i, len(prompt) : len(row)] = row[len(prompt) :]
    for _ in range(steps):
        loss = net(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.save_pretrained(folder)
