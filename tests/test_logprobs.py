"""Logprobs and entropies against the naive way, and the models they come from."""

import shutil
from dataclasses import replace

import naive
import pytest
import tiny
import torch
from naive import FAMILIES, ids
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
)

from thinktuning.errors import InputError
from thinktuning.plan.peak import PeakMemory
from thinktuning.policy import (
    PLAIN,
    Scoring,
    completion_logprobs,
    end_of_turn_ids,
    load_model,
    load_tokenizer,
    recompute_activations,
    suitable,
)
from thinktuning.policy.head import linear_logprobs
from thinktuning.types import PolicyInputs

# Prompt and completion lengths of four rollouts.
LENGTHS = [(5, 7), (1, 3), (9, 1), (4, 7)]
ROWS = [(ids(p, seed=10 + i), ids(c, seed=20 + i)) for i, (p, c) in enumerate(LENGTHS)]
# The second and third answer one question, and so do the last two.
ROWS = [ROWS[0], ROWS[1], (ROWS[1][0], ids(5, seed=31)), ROWS[2], ROWS[3], (ROWS[3][0], [7])]
SCORINGS = [PLAIN, Scoring(True, False), Scoring(False, True), Scoring()]


def inputs_of(rows, left: int = 0, right: int = 0, filler: int = 0) -> PolicyInputs:
    """Padded inputs; ``left`` and ``right`` columns more than needed, ``filler`` under all of it.

    A negative filler puts another id under every padded place.
    """
    prompt_width = max(len(p) for p, _ in rows) + left
    width = max(len(c) for _, c in rows) + right
    shape = (len(rows), prompt_width + width)
    if filler < 0:
        input_ids = torch.tensor(ids(shape[0] * shape[1], seed=-filler)).view(shape)
    else:
        input_ids = torch.full(shape, filler)
    attention_mask = torch.zeros(shape, dtype=torch.bool)
    for i, (prompt, completion) in enumerate(rows):
        columns = slice(prompt_width - len(prompt), prompt_width + len(completion))
        input_ids[i, columns] = torch.tensor([*prompt, *completion])
        attention_mask[i, columns] = True
    mask = attention_mask[:, prompt_width:]
    return PolicyInputs(
        input_ids, attention_mask, mask, torch.zeros_like(mask), torch.zeros(len(rows))
    )


@pytest.fixture(scope="module", params=FAMILIES)
def net(request) -> PreTrainedModel:
    return naive.in_float64(naive.decided_model(request.param))


@pytest.fixture(params=SCORINGS, ids=["plain", "tiled", "packed", "tiled-packed"], autouse=True)
def scoring(request, monkeypatch) -> Scoring:
    """Every test sees every way to compute; three tokens fill a tile, and eight float64 a block."""
    monkeypatch.setattr("thinktuning.policy.head._TILE_BYTES", 3 * 4 * 48)
    monkeypatch.setattr("thinktuning.policy.head._BLOCK_BYTES", 8 * 8 * 48)
    return request.param


def token_factors(row: int) -> torch.Tensor:
    """Fixed factors of a row's tokens; their sum has every token in its gradient."""
    return torch.arange(1, len(ROWS[row][1]) + 1) * (row + 1.0) / 10


def scored(net, scoring, chosen, **padding) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Logprobs of each chosen row without its padding, and the gradients of a sum over them."""
    inputs = inputs_of([ROWS[i] for i in chosen], **padding)
    scores = completion_logprobs(net, inputs, scoring=scoring)
    rows = [scores.logprobs[k, : len(ROWS[i][1])] for k, i in enumerate(chosen)]
    sum((token_factors(i) * row).sum() for i, row in zip(chosen, rows, strict=True)).backward()
    return [row.detach() for row in rows], naive.gradients(net)


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    # Scoring is float32 whatever the model is; relative to the largest gradient of all.
    assert found.keys() == expected.keys()
    scale = max(float(g.abs().max()) for g in expected.values())
    assert scale > 0.1
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=2e-6 * scale)


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_logprobs_and_entropies_are_those_of_single_unpadded_rows(net, scoring, temperature):
    inputs = inputs_of(ROWS)
    scores = completion_logprobs(net, inputs, temperature, scoring)
    assert scores.logprobs.shape == scores.entropy.shape == inputs.completion_mask.shape
    assert scores.logprobs.dtype == scores.entropy.dtype == torch.float32
    for i, (prompt, completion) in enumerate(ROWS):
        with torch.no_grad():
            every = naive.token_distributions(net, prompt, completion, temperature)
        logprobs = every[torch.arange(len(completion)), torch.tensor(completion)]
        entropy = -(every.exp() * every).sum(dim=1)
        n = len(completion)
        assert scores.logprobs[i, :n].tolist() == pytest.approx(logprobs.tolist(), abs=5e-6)
        assert scores.entropy[i, :n].tolist() == pytest.approx(entropy.tolist(), abs=5e-6)


def test_gradients_are_those_of_single_unpadded_rows(net, scoring):
    for i, (prompt, completion) in enumerate(ROWS):
        (token_factors(i) * naive.token_logprobs(net, prompt, completion)).sum().backward()
    expected = naive.gradients(net)
    assert_close(scored(net, scoring, range(len(ROWS)))[1], expected)


def test_what_is_outside_the_mask_is_zero_and_without_gradient(net, scoring):
    inputs = inputs_of(ROWS, right=2)
    # Real tokens may stay out of the loss too.
    mask = inputs.completion_mask.clone()
    mask[0, 2] = mask[3, 0] = False
    whole = completion_logprobs(net, inputs, scoring=scoring)
    part = completion_logprobs(net, replace(inputs, completion_mask=mask), scoring=scoring)
    for found, full in zip(part, whole, strict=True):
        assert (found[~mask] == 0).all()
        assert torch.equal(found[mask], full[mask])
        assert (found[mask] != 0).all()
    part.logprobs[~mask].sum().backward()
    assert all(not g.any() for g in naive.gradients(net).values())


def test_an_impossible_token_spoils_neither_entropy_nor_the_other_logprobs():
    net = naive.decided_model("gpt2", vocab_size=48)
    net.lm_head = torch.nn.Linear(48, 48)
    with torch.no_grad():
        net.lm_head.weight.zero_()
        net.lm_head.bias.fill_(float("-inf"))
        net.lm_head.bias[[4, 9]] = 0.0
    scores = completion_logprobs(net, inputs_of([([1, 2], [4, 5, 9])]))
    half = torch.log(torch.tensor(0.5)).item()
    assert scores.logprobs[0].tolist() == pytest.approx([half, float("-inf"), half])
    assert scores.entropy[0].tolist() == pytest.approx([-half] * 3)


def test_entropy_has_no_gradient_and_without_grad_mode_neither_have_logprobs(net, scoring):
    inputs = inputs_of(ROWS)
    scores = completion_logprobs(net, inputs, scoring=scoring)
    assert scores.logprobs.requires_grad
    assert not scores.entropy.requires_grad
    with torch.no_grad():
        frozen = completion_logprobs(net, inputs, scoring=scoring)
    assert not frozen.logprobs.requires_grad
    assert torch.equal(frozen.logprobs, scores.logprobs)


def test_half_precision_logits_are_scored_in_float32(scoring):
    net = naive.decided_model("llama").to(torch.bfloat16)
    # What this pass has computed: another one may round otherwise, on some CPUs.
    hidden = []
    net.model.norm.register_forward_hook(lambda norm, inputs, output: hidden.append(output))
    scores = completion_logprobs(net, inputs_of(ROWS[:1]), scoring=scoring)
    logits = net.lm_head(hidden[0])[0, len(ROWS[0][0]) - 1 :]
    assert len(logits) == 7, "the last token predicts nothing"
    exact = torch.log_softmax(logits.double(), dim=-1)
    expected = exact[torch.arange(7), torch.tensor(ROWS[0][1])]
    assert scores.logprobs[0].tolist() == pytest.approx(expected.tolist(), abs=1e-5)


# ---------------------------------------------------------------- padding and neighbours


@pytest.mark.parametrize(
    "padding",
    [
        {"left": 3},
        {"right": 4},
        {"left": 2, "right": 1, "filler": 17},
        {"left": 1, "right": 3, "filler": -1},
        {"left": 1, "right": 3, "filler": -2},
    ],
    ids=str,
)
def test_padding_changes_neither_values_nor_gradients(net, scoring, padding):
    every = range(len(ROWS))
    expected, expected_gradients = scored(net, PLAIN, every)
    found, found_gradients = scored(net, scoring, every, **padding)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=5e-6)
    assert_close(found_gradients, expected_gradients)


@pytest.mark.parametrize(
    "parts", [[[0], [1, 2], [3], [4, 5]], [[5, 3, 1], [0, 2, 4]], [[2, 3, 4, 1], [0, 5]]]
)
def test_neighbours_change_neither_values_nor_gradients(net, scoring, parts):
    expected, expected_gradients = scored(net, PLAIN, range(len(ROWS)))
    total: dict[str, torch.Tensor] = {}
    for part in parts:
        values, gradients = scored(net, scoring, part)
        for i, value in zip(part, values, strict=True):
            torch.testing.assert_close(value, expected[i], rtol=0, atol=5e-6)
        total = {name: total.get(name, 0) + g for name, g in gradients.items()}
    assert_close(total, expected_gradients)


# ---------------------------------------------------------------- how it is computed


def test_blocks_that_are_computed_again_change_nothing(net, scoring):
    expected, expected_gradients = scored(net, PLAIN, range(len(ROWS)))
    again = naive.in_float64(net)
    recompute_activations(again)
    found, found_gradients = scored(again, scoring, range(len(ROWS)))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=5e-6)
    assert_close(found_gradients, expected_gradients)


def test_a_prompt_is_read_once_for_its_rows():
    net = naive.decided_model("llama")
    read: list[torch.Size] = []
    net.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    completion_logprobs(net, inputs_of(ROWS), scoring=Scoring())
    prompts, completions = 5 + 1 + 9 + 4, 7 + 3 + 5 + 1 + 7 + 1
    assert read == [(1, prompts + completions - 6)], "nothing is read of the last of each"


def test_logits_of_all_tokens_exist_only_in_the_plain_way(scoring):
    net = naive.decided_model("llama", vocab_size=4096)
    inputs = inputs_of([(ids(4, seed=1), ids(64, seed=2))] * 2)
    with PeakMemory("scores") as memory:
        completion_logprobs(net, inputs, scoring=scoring).logprobs.sum().backward()
    logits = 2 * 64 * 4096 * 4
    assert (memory.peak.total() > 2 * logits) == (not scoring.tiled_head)


def test_gradients_in_bfloat16_are_as_good_as_those_of_whole_logits(monkeypatch):
    monkeypatch.setattr("thinktuning.policy.head._BLOCK_BYTES", 1024 * 2 * 48)
    torch.manual_seed(0)
    exact = torch.randn(4096, 32).double(), torch.randn(48, 32).double()
    targets = torch.randint(0, 48, (4096,))

    def gradient(rounded: torch.dtype, tiled: bool) -> torch.Tensor:
        hidden, weight = (x.bfloat16().to(rounded) for x in exact)
        weight.requires_grad_()
        if tiled:
            logprobs, _ = linear_logprobs(hidden, weight, targets, 1.0)
        else:
            every = torch.log_softmax((hidden @ weight.T).to(exact[0]), dim=-1)
            logprobs = every.gather(1, targets[:, None])[:, 0]
        return torch.autograd.grad(logprobs.sum(), weight)[0].double()

    expected = gradient(torch.float64, tiled=False)
    tiled, whole = (
        float((gradient(torch.bfloat16, tiled=kind) - expected).norm() / expected.norm())
        for kind in (True, False)
    )
    assert tiled < 1.5 * whole < 0.01, (tiled, whole)


def test_a_heads_own_forward_comes_back(scoring):
    net = naive.decided_model("llama")
    head, calls = net.lm_head, []
    usual = head.forward
    head.forward = wrapped = lambda hidden: calls.append(1) or usual(hidden)
    completion_logprobs(net, inputs_of(ROWS), scoring=scoring)
    assert head.forward is wrapped
    net.model.norm.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        completion_logprobs(net, inputs_of(ROWS), scoring=scoring)
    assert head.forward is wrapped


def test_layers_keep_one_mask_for_the_backward():
    net = naive.decided_model("llama")
    masks = set()

    def saved(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() == 4 and tensor.shape[1] == 1 and tensor.shape[0] == 2:
            masks.add(tensor.untyped_storage().data_ptr())
        return tensor

    rows = [(ids(9, seed=1), ids(20, seed=2)), (ids(9, seed=1), ids(22, seed=3))]
    with torch.autograd.graph.saved_tensors_hooks(saved, lambda tensor: tensor):
        completion_logprobs(net, inputs_of(rows), scoring=Scoring())
    assert len(masks) == 1 < net.config.num_hidden_layers


def test_what_suits_a_model_is_found_out_by_asking_it(net):
    plain = naive.decided_model(net.config.model_type)
    assert suitable(plain, Scoring()) == Scoring()
    assert suitable(plain, PLAIN) == PLAIN
    plain.lm_head.bias = torch.nn.Parameter(torch.ones(48))
    assert suitable(plain, Scoring()) == Scoring(tiled_head=False)


def test_a_model_that_does_more_with_its_logits_keeps_its_head():
    class Capped(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            outputs = super().forward(*args, **kwargs)
            outputs.logits = torch.tanh(outputs.logits / 2) * 2
            return outputs

    net = naive.decided_model("llama")
    net.__class__ = Capped
    assert suitable(net, Scoring()) == Scoring(tiled_head=False)


def test_a_model_with_a_sliding_window_is_not_packed():
    config = Qwen2Config(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=0,
    )
    net = AutoModelForCausalLM.from_config(config).eval()
    assert suitable(net, Scoring()) == Scoring(packed=False)


# ---------------------------------------------------------------- end of turn


def test_every_id_that_ends_a_turn_is_found():
    text = tiny.tokenizer("own_pad")
    own = text.eos_token_id
    assert end_of_turn_ids(text, GenerationConfig(eos_token_id=own + 5)) == (own, own + 5)
    assert end_of_turn_ids(text, GenerationConfig(eos_token_id=[own + 5, 0])) == (0, own, own + 5)
    assert end_of_turn_ids(text, GenerationConfig(eos_token_id=[own])) == (own,)
    assert end_of_turn_ids(text, GenerationConfig(eos_token_id=None)) == (own,)
    assert end_of_turn_ids(text, None) == (own,)


def test_the_generation_config_alone_may_name_the_end_of_turn():
    text = tiny.tokenizer("no_template")
    text.eos_token = None
    assert end_of_turn_ids(text, GenerationConfig(eos_token_id=3)) == (3,)
    assert end_of_turn_ids(text, GenerationConfig(eos_token_id=[9, 3])) == (3, 9)
    assert end_of_turn_ids(text, GenerationConfig(eos_token_id=0)) == (0,), "0 is an id"


@pytest.mark.parametrize("config", [None, GenerationConfig(), GenerationConfig(eos_token_id=[])])
def test_a_model_without_end_of_turn_is_refused_with_what_to_set(config):
    text = tiny.tokenizer("no_template")
    text.eos_token = None
    with pytest.raises(InputError, match=r"eos_token in tokenizer_config\.json"):
        end_of_turn_ids(text, config)


# ---------------------------------------------------------------- loading


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("model") / "tiny", "gpt2", "pad_is_eos")


def test_a_folder_is_loaded_as_it_was_saved(folder):
    loaded = load_model(str(folder))
    saved = tiny.model("gpt2", len(tiny.tokenizer("pad_is_eos")), 1).state_dict()
    assert loaded.dtype == torch.float32
    assert {n: w.shape for n, w in loaded.state_dict().items()} == {
        n: w.shape for n, w in saved.items()
    }
    assert all(torch.equal(w, saved[n]) for n, w in loaded.state_dict().items())
    text = load_tokenizer(str(folder))
    assert text.encode("3 plus 4") == tiny.tokenizer("pad_is_eos").encode("3 plus 4")
    assert text.chat_template == tiny.CHAT_TEMPLATE


def test_dtype_and_attention_are_those_asked_for(folder):
    loaded = load_model(str(folder), dtype=torch.bfloat16, attention="eager")
    assert loaded.dtype == torch.bfloat16
    assert loaded.config._attn_implementation == "eager"
    assert load_model(str(folder)).config._attn_implementation == "grouped_sdpa"


def test_a_loaded_model_has_no_dropout(folder):
    loaded = load_model(str(folder))
    assert loaded.config.attn_pdrop > 0, "gpt2 would drop in training mode"
    inputs = inputs_of(ROWS)
    first, second = (completion_logprobs(loaded, inputs).logprobs for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_missing_folder_is_refused_with_what_was_expected(load, tmp_path):
    missing = str(tmp_path / "nowhere")
    with pytest.raises(InputError) as refusal:
        load(missing)
    for part in (missing, "folder with config.json, weights and tokenizer files", "'embedded'"):
        assert part in str(refusal.value)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_a_folder_without_a_tokenizer_is_refused(tmp_path, family):
    tiny.model(family, 48, 0).save_pretrained(tmp_path)
    load_model(str(tmp_path))
    with pytest.raises(InputError, match="cannot load the tokenizer"):
        load_tokenizer(str(tmp_path))


def test_a_folder_without_weights_is_refused(folder, tmp_path):
    shutil.copy(folder / "config.json", tmp_path)
    with pytest.raises(InputError, match="cannot load the model"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("fault", ["empty folder", "no model_type", "cut", "missing", "shape"])
def test_a_folder_with_something_wrong_in_it_is_refused(folder, tmp_path, fault):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    file = broken / "model.safetensors"
    weights = load_file(file)
    if fault == "empty folder":
        shutil.rmtree(broken)
        broken.mkdir()
    elif fault == "no model_type":
        (broken / "config.json").write_text("{}")
    elif fault == "cut":
        file.write_bytes(file.read_bytes()[:1000])
    elif fault == "missing":
        weights.pop("transformer.h.1.mlp.c_fc.weight")
        save_file(weights, file, metadata={"format": "pt"})
    else:
        weights["transformer.h.1.mlp.c_fc.weight"] = torch.zeros(3, 3)
        save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match="cannot load the model"):
        load_model(str(broken))
