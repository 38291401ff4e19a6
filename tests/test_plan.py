"""The planner against counts by hand, and against real tensors."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from transformers import LlamaConfig

from thinktuning.cli import main
from thinktuning.errors import InputError
from thinktuning.objective import ObjectiveConfig, policy_loss
from thinktuning.plan import Job, PlanOptions, make_plan
from thinktuning.plan.job import GIB, Guidance, Sampler
from thinktuning.plan.memory import largest_fitting
from thinktuning.plan.model import measure_model, student
from thinktuning.plan.peak import PeakMemory
from thinktuning.plan.tracing import measure_optimizer, trace_sampling, trace_update
from thinktuning.plan.work import work_of
from thinktuning.policy import LoraSettings, Scoring, completion_logprobs, load_model
from thinktuning.types import PolicyInputs

# tiny.model("llama", 384): width 48, 4 heads, 2 of them for keys and values, 96 wide inside.
ROOT = 384 * 48 + 48
BLOCK = 2 * 48 * 48 + 2 * 24 * 48 + 3 * 96 * 48 + 2 * 48
PARAMETERS = ROOT + 2 * BLOCK
ADAMW = 8  # two float32 moments


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny.model("llama", 384, 1).config.save_pretrained(path)  # no weights, no tokenizer
    return str(path)


def job(folder: str, **changes) -> Job:
    return replace(
        Job(
            pretrained=folder,
            attention="grouped_sdpa",
            scoring=Scoring(),
            lora=None,
            activation_checkpointing=False,
            mixed=False,
            objective=ObjectiveConfig(),
            optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3),
            micro_batch_size=2,
            num_mini_batches=1,
            prompts=4,
            group_size=4,
            prompt_tokens=24,
            completion_tokens=40,
            sampler=Sampler(max_batch_size=8),
            guidance=None,
            reference=False,
            strategy="single",
            cpu_offload=False,
            ranks=1,
            gpu=False,
            device_memory=GIB,
        ),
        **changes,
    )


def test_weights_gradients_and_optimizer_state_by_hand(folder):
    plan = make_plan(job(folder, reference=True))
    step = plan.moments["optimizer step"]
    assert plan.largest_micro_batch == 16, "all rollouts of an optimizer step"
    assert plan.sizes.parameters == plan.sizes.trained == PARAMETERS
    assert step["policy weights"] == step["reference weights"] == 4 * PARAMETERS
    assert step["gradients"] == 4 * PARAMETERS
    assert step["optimizer state"] == pytest.approx(ADAMW * PARAMETERS, rel=1e-4)


def test_ddp_holds_the_gradients_twice(folder):
    single = make_plan(job(folder)).moments["optimizer step"]
    ddp = make_plan(job(folder, strategy="ddp", ranks=2)).moments["optimizer step"]
    assert ddp["gradient buckets"] == 4 * PARAMETERS
    assert ddp.total() == single.total() + 4 * PARAMETERS


@pytest.mark.parametrize("mixed", [False, True])
def test_fsdp2_shares_what_stays_and_gathers_what_computes(folder, mixed):
    plan = make_plan(job(folder, strategy="fsdp2", ranks=4, mixed=mixed))
    compute = 2 if mixed else 4
    for name, moment in plan.moments.items():
        assert moment["policy weights"] == PARAMETERS
        assert moment["gradients"] == (PARAMETERS if name != "rollout" else 0)
        assert moment["optimizer state"] == pytest.approx(ADAMW / 4 * PARAMETERS, rel=1e-4)
    assert plan.moments["backward"]["gathered weights"] == compute * (ROOT + 2 * BLOCK)
    assert plan.moments["rollout"]["gathered weights"] == compute * PARAMETERS


def test_offloaded_shards_are_not_on_the_device(folder):
    plan = make_plan(job(folder, strategy="fsdp2", ranks=2, cpu_offload=True))
    for moment in plan.moments.values():
        assert not moment["policy weights"] + moment["gradients"] + moment["optimizer state"]


@pytest.mark.parametrize(
    ("base", "mixed", "byte"),
    [("float32", False, 4), ("bfloat16", True, 2), ("8bit", True, 1), ("4bit", True, 0.5625)],
)
def test_lora_trains_adapters_on_a_base_of_any_precision(folder, base, mixed, byte):
    lora = LoraSettings(rank=2, base=base)
    plan = make_plan(job(folder, lora=lora, mixed=mixed))
    # Two rows or columns of each: q and o 48 x 48, k and v 48 x 24, the three of the MLP 48 x 96.
    adapters = 2 * 2 * (2 * (48 + 48) + 2 * (48 + 24) + 3 * (48 + 96))
    linear = 2 * (BLOCK - 2 * 48)
    rest = PARAMETERS - linear
    other = {"float32": 4, "bfloat16": 2, "8bit": 2, "4bit": 2}[base]
    step = plan.moments["optimizer step"]
    assert plan.sizes.trained == adapters
    assert step["gradients"] == 4 * adapters
    assert step["policy weights"] == byte * linear + other * rest + 4 * adapters


def test_a_peak_is_of_what_is_alive_together():
    with PeakMemory("first") as memory:
        first = torch.zeros(1000)
        view = first[:10]
        memory.phase = "second"
        second = torch.zeros(500)
        del first, view
        third = second + 1
        memory.hold("third", [third])
    assert memory.peak == {"first": 4000, "second": 2000}
    assert memory.live == {"first": 0, "second": 2000, "third": 2000}


@pytest.mark.parametrize("rollouts", [2, 16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_update_s_peak_is_that_of_real_tensors(folder, tmp_path, rollouts, checkpointing):
    tiny.model("llama", 384, 1).save_pretrained(tmp_path)
    wanted = job(folder, activation_checkpointing=checkpointing)
    traced = trace_update(wanted, rollouts)
    measured = real_peak(load_model(str(tmp_path)), wanted, rollouts)
    assert traced.total() == pytest.approx(measured, rel=0.02)


def real_peak(model, wanted: Job, rollouts: int) -> int:
    """The peak of the second of two micro-batches, or of the only one, on real tensors."""
    from thinktuning.policy import recompute_activations

    if wanted.activation_checkpointing:
        recompute_activations(model)
    width = wanted.prompt_tokens + wanted.completion_tokens
    shape = (rollouts, wanted.completion_tokens)
    mask = torch.ones(rollouts, width, dtype=torch.bool)
    mask[: wanted.group_size, 0] = False  # as in real batches: the mask can't be left out
    ids = torch.randint(384, (wanted.prompts, width))
    for _ in range(1 if rollouts == wanted.rows else 2):
        with PeakMemory("all") as memory:
            memory.hold("all", [*model.parameters(), *(p.grad for p in model.parameters())])
            inputs = PolicyInputs(
                input_ids=ids.repeat_interleave(wanted.group_size, dim=0)[:rollouts],
                attention_mask=mask,
                completion_mask=mask[:, wanted.prompt_tokens :],
                injected_mask=torch.zeros(shape, dtype=torch.bool),
                advantages=torch.ones(rollouts),
                sampling_logprobs=torch.zeros(shape),
                token_weights=torch.ones(shape),
            )
            scores = completion_logprobs(model, inputs, scoring=wanted.scoring)
            policy_loss(replace(inputs, logprobs=scores.logprobs), wanted.objective).loss.backward()
            del inputs, scores
    return memory.peak.total()


def test_what_an_attention_cannot_do_is_not_planned(folder):
    own = job(folder, attention="sdpa")
    padded = replace(own, scoring=Scoring(packed=False))
    assert trace_update(own, 4) == trace_update(padded, 4) != trace_update(job(folder), 4)


def test_the_cache_of_rollouts_by_hand(folder):
    held = trace_sampling(job(folder), student(job(folder)), 2, 8, 24, 40)
    # Two layers, keys and values, two heads of 12; the last token isn't read, and room for 64 was
    # made before the one that is read last.
    assert held["KV cache"] == 2 * 2 * 8 * 2 * 12 * (24 + 40 - 2 + 64) * 4


def test_guidance_has_lengths_of_its_own(folder):
    guidance = Guidance(Sampler(max_batch_size=2), replies=4, prompt_tokens=100, reply_tokens=20)
    moments = make_plan(job(folder, guidance=guidance)).moments
    assert moments["guidance"]["KV cache"] == 2 * 2 * 2 * 2 * 12 * (118 + 64) * 4


def test_vllm_has_weights_and_a_cache_of_its_own(folder):
    vllm = Sampler(vllm=True, kv_cache_gib=0.25)
    on_cpu = make_plan(job(folder, sampler=vllm))
    own = 4 * PARAMETERS + GIB // 4
    assert {m["vLLM's own weights"] for m in on_cpu.moments.values()} == {own}, "it never sleeps"
    on_gpu = make_plan(job(folder, sampler=Sampler(vllm=True, memory_fraction=0.5), gpu=True))
    assert on_gpu.moments["rollout"]["vLLM's own weights"] == GIB // 2
    assert not on_gpu.moments["backward"]["vLLM's own weights"]


def test_servers_sample_elsewhere(folder):
    server = Sampler(server=True)
    guidance = Guidance(server, replies=4, prompt_tokens=100, reply_tokens=20)
    plan = make_plan(job(folder, sampler=server, guidance=guidance))
    for moment in ("rollout", "guidance"):
        assert plan.moments[moment].keys() == {"policy weights", "optimizer state"}
    assert work_of(plan.job, plan.sizes, plan.moments).keys() == {"update"}


def test_the_largest_micro_batch_fits_and_the_next_does_not(folder):
    need = {n: trace_update(job(folder), n).total() + ADAMW * PARAMETERS for n in (5, 6)}
    plan = make_plan(job(folder, device_memory=(need[5] + need[6]) // 2))
    assert plan.largest_micro_batch == 5
    assert make_plan(job(folder, device_memory=2**20)).largest_micro_batch == 0


def test_the_search_finds_the_edge_of_a_convex_need():
    def need(size: int) -> int:
        return max(50 + size, 10 * size, 30 * size - 400)

    for limit in range(40, 1000, 7):
        most = max((n for n in range(1, 41) if need(n) <= limit), default=0)
        for known in (1, 4, 40):
            assert largest_fitting(need, limit, known, 40) == most, (limit, known)


def test_an_optimizer_is_measured_not_assumed():
    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=1, momentum=0.9)

    assert measure_optimizer(sgd, gpu=False).state == 4
    assert measure_optimizer(lambda p: torch.optim.SGD(p, lr=1), gpu=False).state == 0
    adamw = measure_optimizer(lambda p: torch.optim.AdamW(p, lr=1), gpu=False)
    assert (adamw.step, adamw.step_largest) == (0, 8), "a root and its quotient, tensor by tensor"
    adamw = measure_optimizer(lambda p: torch.optim.AdamW(p, lr=1), gpu=True)
    assert (adamw.step, adamw.step_largest) == (4, 0), "the roots of all second moments at once"


def test_work_by_hand(folder):
    plan = make_plan(job(folder))
    work = work_of(plan.job, plan.sizes, plan.moments)
    pairs = 64 * 65 / 2  # of a token and one it looks at
    assert work["update"].tokens == 16 * 64
    assert work["update"].flop == 3 * 16 * (2 * PARAMETERS * 64 + 4 * 2 * 48 * pairs)
    assert work["update"].seconds(tflops=1e-6, bandwidth=None) == work["update"].flop / 1e6
    # Two batches of eight, 40 tokens: the weights and half of the cache at every one.
    cache = plan.moments["rollout"]["KV cache"]
    assert work["rollout"].decoded == 2 * 40 * (4 * PARAMETERS + cache / 2)


@pytest.fixture(scope="module")
def llama_3b(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    LlamaConfig(
        hidden_size=3072,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=8192,
        vocab_size=128256,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
    ).save_pretrained(path)
    return str(path)


def test_llama_3b_is_counted_from_its_config(llama_3b):
    sizes = measure_model(llama_3b, job(llama_3b))
    assert sizes.parameters == 3_212_749_824, "as published"
    assert sizes.bytes == 4 * sizes.parameters


def test_the_recipe_for_3b_is_planned(capsys, llama_3b):
    main(
        [
            "plan",
            "--config=configs/gsm8k.yaml",
            f"--model.pretrained={llama_3b}",
            "--model.activation_checkpointing=true",
            "--model.micro_batch_size=20",
            "--trainer.accelerator=gpu",
            "--trainer.devices=8",
            "--trainer.strategy=fsdp2",
            "--device_memory_gib=80",
            "--guidance.gamma.start=0",
            "--tflops=400",
            "--bandwidth=3000",
        ]
    )
    text = " ".join(capsys.readouterr().out.split())
    assert "3,212.7M parameters, 3,212.7M trained; each of 8 devices, fsdp2" in text
    for row in ("optimizer state", "KV cache", "activations", "logits", "gathered weights"):
        assert row in text
    assert "Largest micro_batch_size: 20, all rollouts of an optimizer step." in text
    assert "seconds" in text


@pytest.mark.parametrize(("gpus", "said"), [(2, "for each of two"), (8, "for each of eight")])
def test_the_recipe_fits_gpus_as_documented(gpus, said, capsys, llama_3b):
    main(
        [
            "plan",
            "--config=configs/gsm8k.yaml",
            "--config=configs/fsdp2.yaml",
            f"--model.pretrained={llama_3b}",
            "--trainer.accelerator=gpu",
            f"--trainer.devices={gpus}",
            "--device_memory_gib=80",
        ]
    )
    found = re.search(r"Peak: ([\d.]+) GiB, at the guidance", capsys.readouterr().out)
    text = " ".join(Path("docs/results/README.md").read_text().split())
    assert f"{float(found[1]):.1f} GiB {said}" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.pretrained=no/such/model"], "expected a folder with config.json"),
        (["--model.micro_batch_size=0"], "micro_batch_size must be at least 1"),
        (["--trainer.precision=16-mixed"], "expected bf16-mixed or 32-true"),
        (["--trainer.strategy=deepspeed"], "isn't supported"),
        (["--device_memory_gib=0"], "must be positive"),
        (["--trainer.accelerator=gpu", "--device_memory_gib=null"], "--device_memory_gib 80"),
    ],
)
def test_what_cannot_be_planned_is_said(arguments, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit) as ended:
        main(["plan", *arguments])
    assert message in str(ended.value.code)


def test_help_is_readable(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith("usage: thinktuning plan [-c FILE]...")
    assert "Length of a prompt. null: data.max_prompt_tokens" in text


def test_options_are_checked():
    with pytest.raises(InputError, match="tflops must be positive"):
        PlanOptions(tflops=0.0)
