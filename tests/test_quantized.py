"""A teacher with weights and a tokenizer of its own, in few bits."""

import bitsandbytes
import pytest
import tiny
import torch
from lightning.pytorch import Callback
from running import audit, fit_arguments
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from thinktuning.cli import main
from thinktuning.engines import TransformersEngine
from thinktuning.errors import InputError
from thinktuning.teaching import FeedbackForm, ReplyParams, ask_in_form, parse_feedback
from thinktuning.types import Rollout

LINEAR = {
    None: nn.Linear,
    "4bit": bitsandbytes.nn.Linear4bit,
    "8bit": bitsandbytes.nn.Linear8bitLt,
}
every_bits = pytest.mark.parametrize("bits", ["4bit", "8bit"])
CHATS = [
    [{"role": "system", "content": "Help."}, {"role": "user", "content": f"{a} plus 4?"}]
    for a in range(4)
]


def save(folder):
    """A teacher's folder; on some CPUs bitsandbytes packs 4 bits in blocks of 64 columns."""
    text = tiny.tokenizer("pad_is_eos")
    config = tiny.model("llama", len(text), text.eos_token_id, width=64, heads=2).config
    config.max_position_embeddings = 16384
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    text.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save(tmp_path_factory.mktemp("teacher")))


def started(folder, bits):
    engine = TransformersEngine(pretrained=folder, quantization=bits)
    engine.start()
    return engine


def linears(engine):
    """Linear layers but for the head, which stays as it is."""
    layers = engine._model.named_modules()
    return [m for name, m in layers if isinstance(m, nn.Linear) and name != "lm_head"]


@pytest.mark.parametrize("bits", [None, "4bit", "8bit"])
def test_linear_layers_are_those_of_the_quantization(folder, bits):
    found = linears(started(folder, bits))
    assert len(found) == 2 * 7
    assert {type(layer) for layer in found} == {LINEAR[bits]}
    dtypes = {None: torch.float32, "4bit": torch.uint8, "8bit": torch.int8}
    assert {layer.weight.dtype for layer in found} == {dtypes[bits]}


@every_bits
def test_a_quantised_teacher_replies(folder, bits):
    engine = started(folder, bits)
    replies = engine.reply(CHATS, ReplyParams(12, 500))
    assert all(r.skipped is None and (r.text or not r.cut_off) for r in replies)
    assert engine.reply(CHATS, ReplyParams(12, 500)) == replies, "greedy, so the same again"


@every_bits
def test_a_quantised_teacher_replies_in_form(folder, bits):
    replies = ask_in_form(started(folder, bits), CHATS[:2], FeedbackForm(80), 500)
    assert all(parse_feedback(r.text) is not None for r in replies)


@every_bits
def test_replies_come_from_the_quantised_weights(folder, bits):
    whole, quantised = started(folder, None), started(folder, bits)
    ids = torch.arange(10, 30)[None]
    # Before the first pass: some CPUs repack the numbers for it.
    numbers = [dequantised(layer) for layer in linears(quantised)]
    with torch.no_grad():
        exact, found = (e._model(ids).logits.float() for e in (whole, quantised))
        # The whole model with the numbers that the quantised layers stand for.
        for layer, weight in zip(linears(whole), numbers, strict=True):
            layer.weight.copy_(weight)
        expected = whole._model(ids).logits
    off = (found - exact).norm() / exact.norm()
    assert 1e-4 < off < 0.3
    # Inputs of layers are rounded as well, to 8 bits or bfloat16.
    assert (found - expected).norm() / exact.norm() < off / (4 if bits == "4bit" else 1)


def dequantised(layer):
    if isinstance(layer, bitsandbytes.nn.Linear4bit):
        return bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    return layer.weight.data.float() * scales[:, None] / 127


def test_a_second_start_loads_nothing(folder):
    engine = started(folder, "4bit")
    model = engine._model
    engine.start()
    assert engine._model is model


@every_bits
def test_quantization_without_weights_of_its_own_is_refused(bits):
    with pytest.raises(InputError, match="quantization needs pretrained"):
        TransformersEngine(quantization=bits)


# ---------------------------------------------------------------- two tokenizers in a run

TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}[teacher] "


class ListeningTeacher(TransformersEngine):
    """Notes the prompts that it reads."""

    heard: list[list[int]] = []  # noqa: RUF012 (the command line makes the object)

    def sample(self, prompts, seeds, params):
        self.heard.extend(prompts)
        return super().sample(prompts, seeds, params)


class KeepRollouts(Callback):
    """Keeps a step's rollouts for the test."""

    kept: tuple[Rollout, ...] = ()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        KeepRollouts.kept = outputs["rollouts"].rollouts


@pytest.fixture
def other_teacher(tmp_path, monkeypatch):
    """A teacher's folder with a template, a padding and a vocabulary unlike the student's."""
    monkeypatch.setattr(
        tiny, "CORPUS", ["the teacher speaks another language", "Question: My answer:"]
    )
    folder = save(tmp_path / "teacher")
    text = AutoTokenizer.from_pretrained(folder)
    text.chat_template = TEMPLATE
    text.save_pretrained(folder)
    monkeypatch.undo()
    return folder


@pytest.mark.slow
def test_a_teacher_with_another_tokenizer_reads_its_own_and_is_spliced_in_the_students(
    student, questions, tmp_path, other_teacher
):
    ListeningTeacher.heard.clear()
    main(
        fit_arguments(
            student("llama", "own_pad"),
            questions,
            tmp_path,
            "--guidance.teacher=test_quantized.ListeningTeacher",
            f"--guidance.teacher.pretrained={other_teacher}",
            "--guidance.teacher.quantization=4bit",
            "--guidance.behaviors=[catchphrase]",
            "--guidance.max_prompt_tokens=12000",
            "--model.max_new_tokens=256",
            "--trainer.max_steps=1",
            "--trainer.callbacks+=test_quantized.KeepRollouts",
        )
    )
    own = AutoTokenizer.from_pretrained(student("llama", "own_pad"))
    theirs = AutoTokenizer.from_pretrained(other_teacher)
    assert own.encode("Question: 3") != theirs.encode("Question: 3")

    prompts = ListeningTeacher.heard
    assert prompts
    for prompt in prompts:
        shown = theirs.decode(prompt)
        assert shown.startswith("[system] ")
        assert "[teacher] " in shown
        assert "<|start|>" not in shown and "<|bos|>" not in shown
        assert "My answer: It is \\boxed{" in shown

    guided = [r for r in KeepRollouts.kept if r.guided]
    assert guided
    assert len(guided) == len([row for row in audit(tmp_path / "version_0") if row["after"]])
    for rollout in guided:
        feedback = parse_feedback(rollout.guidance.text)
        start, stop = rollout.injected_span
        spliced = rollout.completion_ids[start : stop - 1]
        text = f"\n\n{feedback.reason}\n\n{feedback.phrase}"
        assert list(spliced) == own.encode(text, add_special_tokens=False)
        assert own.decode(spliced) == text
        assert rollout.completion_ids[-1] == own.eos_token_id
