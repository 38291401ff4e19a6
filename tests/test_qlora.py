"""A LoRA on frozen weights of few bits: what is computed with, what is trained, what is sent on."""

import contextlib
import sys
from dataclasses import asdict

import bitsandbytes
import pytest
import tiny
import torch
from bitsandbytes.functional import has_avx512bf16
from running import checkpoint, fit_arguments, run, scalars
from torch import nn
from transformers import AutoModelForCausalLM

from thinktuning.checkpointing import AtomicCheckpointIO
from thinktuning.cli import main
from thinktuning.engines import TransformersEngine
from thinktuning.errors import InputError
from thinktuning.export import export
from thinktuning.policy import LoraSettings, load_base, load_model, named_weights, with_adapters
from thinktuning.policy import lora as lora_module

WIDE = {"width": 64, "heads": 2}
IDS = torch.arange(10, 30)[None]
LINEAR = {
    "float32": (nn.Linear, torch.float32),
    "bfloat16": (nn.Linear, torch.bfloat16),
    "8bit": (bitsandbytes.nn.Linear8bitLt, torch.int8),
    "4bit": (bitsandbytes.nn.Linear4bit, torch.uint8),
}
every_base = pytest.mark.parametrize("base", LINEAR)
few_bits = pytest.mark.parametrize("base", ["8bit", "4bit"])
families = pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])


def save(folder, family="llama", intermediate=128):
    """A model folder; random weights. Rows of 64 numbers are what 4 bits need on a CPU."""
    text = tiny.tokenizer("own_pad")
    config = tiny.model(family, len(text), text.eos_token_id, **WIDE).config
    if family != "gpt2":
        config.intermediate_size = intermediate
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    text.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = {}

    def make(family="llama"):
        if family not in made:
            made[family] = str(save(tmp_path_factory.mktemp(family), family))
        return made[family]

    return make


def adapted(folder, base, compute=torch.float32, seed=1, **settings):
    """A model with adapters that are far from zero."""
    settings = LoraSettings(rank=4, base=base, **settings)
    model = with_adapters(load_base(folder, base, compute), settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def gradients(model):
    """Those of the adapters, of a loss that depends on all logits."""
    model.zero_grad()
    weights = torch.randn(model.config.vocab_size, generator=torch.Generator().manual_seed(5))
    (model(input_ids=IDS).logits.float().log_softmax(dim=-1) * weights).sum().backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in trained.items()}


def norm(tensors):
    return torch.stack([t.double().norm() for t in tensors]).norm()


def distance(found, expected):
    """Relative, over all tensors together."""
    return norm([found[n] - expected[n] for n in expected]) / norm(expected.values())


def plain(folder, model):
    """A model of plain layers that holds what an engine is sent."""
    twin = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    left = twin.load_state_dict(dict(named_weights(model)), strict=False)
    assert not left.unexpected_keys and set(left.missing_keys) <= {"lm_head.weight"}
    return twin


def test_faults_come_together():
    with pytest.raises(InputError, match=r"rank .* got 0; alpha .* got -1; base .* got '2bit'"):
        LoraSettings(rank=0, alpha=-1, base="2bit")


# ---------------------------------------------------------------- what is loaded


@every_base
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
def test_layers_are_those_of_the_base_and_adapters_float32(folder, base, compute):
    model = adapted(folder(), base, compute)
    kind, dtype = LINEAR[base]
    layers = [m.base_layer for m in model.modules() if hasattr(m, "base_layer")]
    assert len(layers) == 2 * 7
    assert {type(layer) for layer in layers} == {kind}
    assert {layer.weight.dtype for layer in layers} == {dtype}
    if base == "4bit":
        assert {(la.compute_dtype, la.weight.quant_type) for la in layers} == {(compute, "nf4")}
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 7 and all("lora_" in name for name in trained)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    rest = model.get_base_model().get_input_embeddings().weight.dtype
    assert rest == (compute if base in ("4bit", "8bit") else dtype)


# ---------------------------------------------------------------- gradients


@families
@every_base
def test_a_rollout_before_the_update_leaves_the_gradients_as_they_were(folder, base, family):
    expected = gradients(adapted(folder(family), base))
    assert min(g.norm() for g in expected.values()) > 0
    model = adapted(folder(family), base)
    before = logits(model)
    found = gradients(model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(logits(model), before)


@families
@pytest.mark.parametrize(("base", "limit"), [("4bit", 1e-5), ("8bit", 0.05)])
def test_gradients_are_those_of_plain_layers_with_the_same_numbers(folder, base, limit, family):
    model = adapted(folder(family), base)
    logits(model)
    with model.disable_adapter():
        twin = with_adapters(plain(folder(family), model), LoraSettings(rank=4))
    twin.load_state_dict(
        {n: w for n, w in model.state_dict().items() if "lora_" in n}, strict=False
    )
    # 8-bit layers round their inputs, too, to 8 bits a row: about half a percent a layer.
    assert distance(gradients(model), gradients(twin)) < limit


def test_layers_of_any_number_of_outputs_are_used_in_4_bits(tmp_path):
    text = tiny.tokenizer("own_pad")
    config = tiny.model("llama", len(text), text.eos_token_id, **WIDE).config
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 8, 1, 40
    config.intermediate_size = 128
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    text.save_pretrained(tmp_path)
    teacher = load_model(str(tmp_path), quantization="4bit")
    student = with_adapters(load_base(str(tmp_path), "4bit"), LoraSettings(rank=4, base="4bit"))
    found, expected = logits(teacher), logits(student)
    # The fast kernel of some CPUs rounds to bfloat16.
    assert (found - expected).norm() / expected.norm() < 0.02


def test_a_4_bit_layer_that_would_be_misread_is_refused(tmp_path):
    uneven = str(save(tmp_path, intermediate=96))
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.down_proj has 96 inputs .* use 8bit"):
        load_base(uneven, "4bit")
    with pytest.raises(InputError, match="multiple of 64"):
        TransformersEngine(pretrained=uneven, quantization="4bit").start()
    for base in ("8bit", "bfloat16"):
        model = adapted(uneven, base)
        logits(model)
        assert min(g.norm() for g in gradients(model).values()) > 0


def test_bitsandbytes_by_itself_would_lose_gradients(folder, monkeypatch):
    monkeypatch.setattr(lora_module, "_keep_differentiable", lambda model: None)
    model = adapted(folder(), "4bit", target_modules=["q_proj", "v_proj"])
    assert norm(gradients(model).values()) > 0
    logits(model)
    lost = norm(gradients(model).values()) == 0
    assert lost == has_avx512bf16(), "bitsandbytes repacks on these CPUs only"


def lossy(folder, questions, root, *more):
    """A run whose every step has something to learn: what the teacher alone says."""
    reward = "{class_path: thinktuning.rewards.PhraseReward, init_args: {phrase: It stays.}}"
    targets = "--model.lora.target_modules=[q_proj,v_proj]"
    return fit_arguments(folder, questions, root, f"--model.rewards=[{reward}]", targets, *more)


@pytest.mark.slow
def test_a_run_on_repacked_layers_stops(folder, questions, tmp_path, monkeypatch):
    monkeypatch.setattr(lora_module, "_keep_differentiable", lambda model: None)
    stops = pytest.raises(SystemExit, match=r"error: the loss has a gradient .* exactly 0")
    with stops if has_avx512bf16() else contextlib.nullcontext():
        main(lossy(folder(), questions, tmp_path, "--model.lora.base=4bit"))


@pytest.mark.slow
@pytest.mark.parametrize("left", ["zeros", "nothing"])
def test_a_run_whose_layers_cut_gradients_off_stops(folder, questions, tmp_path, monkeypatch, left):
    def cut(layer, inputs, output):
        return output.detach() + (0 * inputs[0] if left == "zeros" else 0)

    def cut_off(model):
        for name, layer in model.named_modules():
            if name.endswith("o_proj"):
                layer.register_forward_hook(cut)

    monkeypatch.setattr(lora_module, "_keep_differentiable", cut_off)
    with pytest.raises(SystemExit) as ended:
        main(lossy(folder(), questions, tmp_path))
    said = str(ended.value.code)
    assert said.startswith("error: the loss has a gradient") and "model.lora.base" in said


# ---------------------------------------------------------------- what an engine is sent


@families
@pytest.mark.parametrize(
    # bitsandbytes rounds the inputs of 8-bit layers, too, to 8 bits a row.
    ("base", "limit"),
    [("float32", 1e-5), ("4bit", 1e-5), ("8bit", 0.03)],
)
@pytest.mark.parametrize("targets", ["all-linear", "some"])
def test_a_plain_model_with_the_weights_sent_gives_the_same_logits(
    folder, base, limit, family, targets
):
    some = ["c_attn"] if family == "gpt2" else ["q_proj", "down_proj"]
    targets = some if targets == "some" else targets
    model = adapted(folder(family), base, target_modules=targets)
    for moment in ("before the first pass", "after it"):
        twin = plain(folder(family), model)
        found, expected = logits(twin), logits(model)
        assert (found - expected).norm() / expected.norm() < limit, moment
    with model.disable_adapter():
        reference = logits(plain(folder(family), model))
        expected = logits(model)
    assert (reference - expected).norm() / expected.norm() < limit
    assert (reference - found).norm() / expected.norm() > 0.1, "adapters count"


@few_bits
def test_the_numbers_are_coarse_ones_near_the_checkpoint_s(folder, base):
    exact = dict(AutoModelForCausalLM.from_pretrained(folder()).named_parameters())
    model = adapted(folder(), base)
    with model.disable_adapter():
        sent = dict(named_weights(model))
    assert sent.keys() == exact.keys()
    for name, weight in sent.items():
        off = (weight - exact[name]).norm() / exact[name].norm()
        levels = torch.unique(weight[:1]).numel()
        if name.endswith("_proj.weight"):
            assert 1e-3 < off < 0.15, name
            assert levels <= (2 * 16 if base == "4bit" else 255), name
        else:
            assert off == 0, name


def test_adapters_on_bfloat16_are_summed_in_float32(folder):
    model = adapted(folder(), "bfloat16")
    sent = dict(named_weights(model))
    name = "model.layers.0.self_attn.q_proj"
    layer = model.get_base_model().get_submodule(name)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = layer.base_layer.weight.float() + b @ a * (32 / 4)
    assert sent[f"{name}.weight"].dtype == torch.float32
    torch.testing.assert_close(sent[f"{name}.weight"], expected.detach())


# ---------------------------------------------------------------- runs

LORA = [
    "--model.lora.rank=4",
    "--model.optimizer.lr=1e-2",
    "--model.objective.kl_coef=0.01",
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "precision"),
    [
        ("bfloat16", "32-true"),
        ("bfloat16", "bf16-mixed"),
        ("8bit", "32-true"),
        ("4bit", "32-true"),
        ("4bit", "bf16-mixed"),
    ],
)
def test_runs_train_adapters_against_the_base_as_reference(
    student, questions, tmp_path, base, precision
):
    more = [*LORA, f"--model.lora.base={base}", f"--trainer.precision={precision}"]
    main(fit_arguments(student("gpt2", **WIDE), questions, tmp_path, *more))
    logged = scalars(tmp_path / "version_0")
    assert logged["objective/kl"][0] == 0 and logged["objective/kl"][-1] > 0
    assert min(logged["optimizer/grad_norm"]) > 0
    # Tokens are scored as they were sampled: up to the rounding of activations, which with 8 bits
    # may fall to the other side.
    limits = {("4bit", "32-true"): 1e-5, ("8bit", "32-true"): 1e-3}
    assert max(logged["engine/logprob_gap"]) < limits.get((base, precision), 0.01)
    saved = checkpoint(tmp_path)["state_dict"]
    assert all(".lora_" in n and w.dtype == torch.float32 for n, w in saved.items())
    assert all(w.abs().max() > 0 for n, w in saved.items() if "lora_B" in n)


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit_on_its_own_base_only(student, questions, tmp_path):
    folder, bits = student("gpt2", **WIDE), "--model.lora.base=4bit"
    two, whole = tmp_path / "two", tmp_path / "whole"
    main(fit_arguments(folder, questions, whole, *LORA, bits))
    main(fit_arguments(folder, questions, two, *LORA, bits, "--trainer.max_steps=2"))
    with pytest.raises(SystemExit, match=r"made with model\.lora .*'base': '4bit'"):
        main(fit_arguments(folder, questions, two, *LORA, "--ckpt_path=last"))
    main(fit_arguments(folder, questions, two, *LORA, bits, "--ckpt_path=last"))
    found, expected = checkpoint(two), checkpoint(whole)
    assert found["global_step"] == 3
    for name, weight in expected["state_dict"].items():
        assert torch.equal(found["state_dict"][name], weight), name


@pytest.mark.slow
def test_vllm_samples_from_the_numbers_that_are_trained_on(student, questions, tmp_path):
    arguments = fit_arguments(
        student("gpt2", **WIDE),
        questions,
        tmp_path,
        *LORA,
        "--model.lora.base=4bit",
        "--engine=thinktuning.engines.VLLMEngine",
        "--engine.max_model_len=1024",
        "--engine.kv_cache_gib=0.25",
    )
    done = run([sys.executable, "-m", "thinktuning.cli", *arguments])
    assert done.returncode == 0, done.stderr[-3000:]
    logged = scalars(tmp_path / "version_0")
    assert max(logged["engine/logprob_gap_max"]) < 1e-3
    assert min(logged["optimizer/grad_norm"]) > 0


@every_base
def test_a_merged_export_is_the_policy_that_was_trained(folder, base, tmp_path):
    trained = adapted(folder(), base)
    checkpoint = {
        "pretrained": folder(),
        "lora": asdict(LoraSettings(rank=4, base=base)),
        "global_step": 1,
        "state_dict": {f"policy.{k}": v for k, v in trained.state_dict().items() if "lora_" in k},
    }
    AtomicCheckpointIO().save_checkpoint(checkpoint, tmp_path / "a.ckpt")
    export(str(tmp_path / "a.ckpt"), str(tmp_path / "out"))
    exported = load_model(str(tmp_path / "out"))
    weights = dict(named_weights(trained, tied=True))
    for name, weight in exported.named_parameters():
        torch.testing.assert_close(weight, weights[name].float(), rtol=0, atol=0)
