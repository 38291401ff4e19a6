"""Real vLLM servers beside the trainer: their samples, and that they come from its weights."""

import copy
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import peft
import pytest
import torch
from running import audit, fit_arguments, run, scalars
from safetensors.torch import load_file
from serving import VllmServer
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from thinktuning.cli import main
from thinktuning.engines import SamplingParams, TransformersEngine, VLLMServerEngine, probe
from thinktuning.engines.server import _Server
from thinktuning.engines.weight_files import write_weights
from thinktuning.errors import InputError, StaleWeightsError
from thinktuning.policy import completion_logprobs, load_model, load_tokenizer
from thinktuning.teaching import ReplyParams
from thinktuning.types import PolicyInputs

pytestmark = pytest.mark.slow

LIMIT = 48
PROMPTS = [list(range(4 + i, 24 + 3 * i)) for i in range(3)]
PROMPTS += [[4 + (7 * i) % 300 for i in range(300)]]  # of two blocks of the prefix cache
SEEDS = [[1, 2], [3], [4, 5, 6], [7]]
SAMPLED = SamplingParams(LIMIT, tuple(range(5, 20)), temperature=0.7)
GREEDY = SamplingParams(LIMIT, (5, 6), temperature=0.0)
# vLLM 0.32 on CPUs crashes where a seeded request's prompt is read in pieces.
WHOLE_PROMPTS = ["--no-enable-chunked-prefill", "--max-num-batched-tokens", "4096"]
READY = [*WHOLE_PROMPTS, "--logprobs-mode", "processed_logprobs", "--generation-config", "auto"]


@pytest.fixture(scope="module")
def folder(student, tmp_path_factory) -> Path:
    """A student with a head of its own: on CPUs vLLM 0.32 doesn't reload one that is tied."""
    source = student(width=64, heads=2)
    target = tmp_path_factory.mktemp("untied") / "student"
    net = AutoModelForCausalLM.from_pretrained(source)
    net.config.tie_word_embeddings = False
    net.lm_head.weight = nn.Parameter(net.lm_head.weight.detach().clone())
    net.save_pretrained(target)
    load_tokenizer(str(source)).save_pretrained(target)
    settings = json.loads((target / "generation_config.json").read_text())
    settings |= {"do_sample": True, "top_k": 1, "repetition_penalty": 2.0}
    (target / "generation_config.json").write_text(json.dumps(settings))
    return target


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory) -> Iterator[VllmServer]:
    log = tmp_path_factory.mktemp("server") / "log"
    made = VllmServer(folder, log, *READY, VLLM_SERVER_DEV_MODE="1")
    try:
        made.start()
        yield made
    finally:
        made.stop()


@pytest.fixture
def net(folder) -> PreTrainedModel:
    return load_model(str(folder))


@pytest.fixture(scope="module")
def text(folder):
    return load_tokenizer(str(folder))


@pytest.fixture
def engine(server, tmp_path) -> Iterator[VLLMServerEngine]:
    # One server under two addresses: two servers that share what they are given.
    urls = [server.base_url, f"http://localhost:{server.port}/"]
    made = VLLMServerEngine(urls, "teacher", str(tmp_path / "weights"), concurrency=8)
    yield made
    made.close()


def perturbed(model: PreTrainedModel, by: float) -> PreTrainedModel:
    changed = copy.deepcopy(model)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(by * torch.randn_like(parameter))
    return changed


def gap(model, groups, temperature: float) -> float:
    """The greatest distance between the server's logprobs and the trainer's."""
    distances = []
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for completion in group:
            row = torch.tensor([[*prompt, *completion.token_ids]])
            mask = torch.ones(1, len(completion.token_ids), dtype=torch.bool)
            inputs = PolicyInputs(row, torch.ones_like(row).bool(), mask, ~mask, torch.zeros(1))
            with torch.no_grad():
                own = completion_logprobs(model, inputs, temperature).logprobs[0]
            distances.append((own - torch.tensor(completion.logprobs)).abs().max())
    return float(torch.stack(distances).max())


# ---------------------------------------------------------------- samples


def test_samples_come_from_the_weights_that_were_given(engine, net, text):
    for model in (net, perturbed(net, 0.02)):
        engine.load_weights(model, text)
        groups = engine.sample(PROMPTS, SEEDS, SAMPLED)
        assert [len(group) for group in groups] == [len(own) for own in SEEDS]
        assert gap(model, groups, 0.7) < 1e-4
        assert gap(model, groups, 1.0) > 1e-2, "the test can't tell temperatures apart"
    assert gap(net, groups, 0.7) > 1e-2, "the test can't tell models apart"
    assert list((engine.weights_folder).iterdir()) == [], "nothing stays on the disk"
    assert engine.context_length == 1024


def test_a_stop_token_ends_a_completion_and_belongs_to_it(engine, net, text):
    engine.load_weights(perturbed(net, 0.1), text)
    completions = [c for g in engine.sample(PROMPTS, SEEDS, SAMPLED) for c in g]
    assert {c.finish_reason for c in completions} == {"stop", "length"}, "choose other seeds"
    for completion in completions:
        *inner, last = completion.token_ids
        assert not set(inner) & set(SAMPLED.stop_ids)
        assert (last in SAMPLED.stop_ids) == (completion.finish_reason == "stop")
        assert completion.finish_reason == "stop" or len(completion.token_ids) == LIMIT


def test_only_stop_ids_end_a_turn(engine, net, text):
    engine.load_weights(net, text)
    (group,) = engine.sample([PROMPTS[0]], [[1, 2, 3]], SamplingParams(200, (), 1.0))
    assert all(c.finish_reason == "length" and len(c.token_ids) == 200 for c in group)
    assert any(text.eos_token_id in c.token_ids for c in group), "choose other seeds"


def test_seeds_decide(engine, net, text):
    # The checkpoint's own top_k of 1 would make all samples equal.
    engine.load_weights(perturbed(net, 0.1), text)
    first, second = (engine.sample(PROMPTS, SEEDS, SAMPLED) for _ in range(2))
    assert first == second
    assert len({c.token_ids for g in first for c in g}) == 7
    ((alone,),) = engine.sample([PROMPTS[2]], [[5]], SAMPLED)
    assert alone.token_ids == first[2][1].token_ids


def test_greedy_tokens_are_those_of_transformers(engine, net, text):
    engine.load_weights(net, text)
    expected = TransformersEngine()
    expected.load_weights(net, text)
    found = engine.sample(PROMPTS, [[0]] * 4, GREEDY)
    for (a,), (b,) in zip(found, expected.sample(PROMPTS, [[0]] * 4, GREEDY), strict=True):
        assert a.token_ids == b.token_ids and a.finish_reason == b.finish_reason
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


def test_replies_keep_to_a_pattern(engine, net, text):
    engine.load_weights(net, text)
    chats = [[{"role": "user", "content": f"{n} plus 3?"}] for n in range(3)]
    for reply in engine.reply(chats, ReplyParams(20, 200, "<[abc]{3}>")):
        assert re.fullmatch("<[abc]{3}>", reply.text)


# ---------------------------------------------------------------- weights


def test_a_frozen_model_is_sent_once(engine, net, text, monkeypatch):
    reloads = []
    reload = _Server.reload
    monkeypatch.setattr(_Server, "reload", lambda s, f: reloads.append(f) or reload(s, f))
    net.requires_grad_(False)
    engine.load_weights(net, text)
    engine.load_weights(net, text)
    assert len(reloads) == 2, "once for each of two servers"
    engine.load_weights(perturbed(net, 0.02).requires_grad_(True), text)
    engine.load_weights(net, text)
    assert len(reloads) == 6, "others were there in between"


def test_adapters_are_merged(engine, net, text):
    adapted = peft.get_peft_model(net, peft.LoraConfig(target_modules=["q_proj", "down_proj"]))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    engine.load_weights(adapted, text)
    groups = engine.sample(PROMPTS, SEEDS, SAMPLED)
    assert gap(adapted, groups, 0.7) < 1e-4
    with adapted.disable_adapter():
        assert gap(adapted, groups, 0.7) > 1e-2
        engine.load_weights(adapted, text)
        assert gap(adapted, engine.sample(PROMPTS, SEEDS, SAMPLED), 0.7) < 1e-4


@pytest.mark.faults
def test_the_smallest_update_that_does_not_arrive_ends_the_run(engine, net, text, monkeypatch):
    engine.load_weights(net, text)
    monkeypatch.setattr(_Server, "reload", lambda server, folder: None)
    engine.load_weights(net, text)  # it has these
    with pytest.raises(StaleWeightsError, match="exactly what they were"):
        engine.load_weights(perturbed(net, 1e-6), text)


@pytest.mark.faults
def test_weights_that_arrive_in_part_end_the_run(engine, net, text):
    engine.load_weights(net, text)
    changed = perturbed(net, 0.02)
    send = engine._send
    engine._send = lambda model: send(half)
    half = copy.deepcopy(changed)
    half.lm_head.load_state_dict(net.lm_head.state_dict())
    with pytest.raises(StaleWeightsError, match=r"nats from the trainer's on average"):
        engine.load_weights(changed, text)


@pytest.mark.parametrize(
    ("computed", "held", "distance", "stale"),
    [
        (torch.float32, torch.float32, 0.0005, False),
        (torch.float32, torch.float32, 0.002, True),
        (torch.float32, torch.bfloat16, 0.2, False),
        (torch.bfloat16, torch.float32, 0.2, False),
        (torch.bfloat16, torch.bfloat16, 0.4, True),
        (torch.float32, torch.float32, float("nan"), True),
    ],
)
def test_the_probe_allows_for_rounding(computed, held, distance, stale):
    own = probe.Probe([1, 2, 3], torch.tensor([-1.0, -2.0]), computed)
    found = own.logprobs + distance * torch.tensor([1.0, -1.0])
    if stale:
        with pytest.raises(StaleWeightsError, match="http://a"):
            probe.check(own, found, None, held, "http://a")
    else:
        probe.check(own, found, found + 1e-6, held, "http://a")
        with pytest.raises(StaleWeightsError, match="exactly"):
            probe.check(own, found, found.clone(), held, "http://a")


def test_weights_are_written_in_files_of_bounded_size(net, tmp_path, monkeypatch):
    monkeypatch.setattr("thinktuning.engines.weight_files._FILE_BYTES", 20_000)
    tmp_path.chmod(0o755)
    weights = dict(net.named_parameters())
    sums = write_weights(((n, w.detach()) for n, w in weights.items()), tmp_path, torch.bfloat16)
    assert len(sums) == len(weights)
    files = sorted(tmp_path.iterdir())
    assert {f.stat().st_mode & 0o777 for f in files} == {tmp_path.stat().st_mode & 0o666}
    largest = max(w.numel() * 2 for w in weights.values())
    assert len(files) > 3 and max(f.stat().st_size for f in files) < 20_000 + largest + 2_000
    read = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert read.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(read[name], weight.to(torch.bfloat16))


# ---------------------------------------------------------------- errors


def test_faults_of_the_arguments_come_together(monkeypatch):
    monkeypatch.delenv("SERVERS_KEY", raising=False)
    with pytest.raises(InputError) as caught:
        VLLMServerEngine(["localhost:8000"], "m", "/tmp/w", "SERVERS_KEY", 0, 0.0)
    for words in ("base_urls", "concurrency", "timeout", "SERVERS_KEY"):
        assert words in str(caught.value)
    with pytest.raises(InputError, match="at least one server"):
        VLLMServerEngine([], "m", "/tmp/w")


def test_a_model_that_is_not_served_is_named(server, net, tmp_path):
    engine = VLLMServerEngine([server.base_url], "nosuch", str(tmp_path))
    with pytest.raises(InputError, match="has no model 'nosuch'; it serves teacher"):
        engine.load_weights(net)


def test_a_folder_that_cannot_be_written_is_named(server, net, tmp_path):
    (tmp_path / "file").touch()
    engine = VLLMServerEngine([server.base_url], "teacher", str(tmp_path / "file" / "weights"))
    with pytest.raises(InputError, match=r"weights_folder .*file/weights can't be used"):
        engine.load_weights(net)


class Settings(BaseHTTPRequestHandler):
    """Answers as vLLM's server does about itself."""

    pages: ClassVar[dict[str, dict[str, Any]]] = {}
    keys: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        self.keys.append(self.headers["Authorization"])
        page = self.pages.get(self.path.partition("?")[0])
        body = json.dumps(page or {"detail": "Not Found"}).encode()
        self.send_response(404 if page is None else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def started() -> Iterator[Callable[..., str]]:
    """A function that makes a server which was started in some way, and returns its address."""
    made = []

    def start(**config: Any) -> str:
        pages = {"/v1/models": {"data": [{"id": "m"}]}}
        if config:
            pages["/server_info"] = {"vllm_config": {"model_config": config}}
        handler = type("Handler", (Settings,), {"pages": pages})
        made.append(ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=made[-1].serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{made[-1].server_port}"

    yield start
    for one in made:
        one.shutdown()
        one.server_close()


FLOAT = {"dtype": "torch.float32", "logprobs_mode": "processed_logprobs", "max_model_len": 99}


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        ([{}], "VLLM_SERVER_DEV_MODE=1"),
        ([{**FLOAT, "logprobs_mode": "raw_logprobs"}], "--logprobs-mode processed_logprobs"),
        ([FLOAT, {**FLOAT, "dtype": "torch.bfloat16"}], "bfloat16, torch.float32.* same --dtype"),
    ],
)
def test_how_a_server_must_be_started_is_said(started, net, tmp_path, configs, message):
    engine = VLLMServerEngine([started(**c) for c in configs], "m", str(tmp_path))
    with pytest.raises(InputError, match=message):
        engine.load_weights(net)


def test_the_key_is_sent(started, net, tmp_path, monkeypatch):
    monkeypatch.setenv("SERVERS_KEY", "s3cret")
    Settings.keys.clear()
    engine = VLLMServerEngine([started()], "m", str(tmp_path), api_key_env="SERVERS_KEY")
    with pytest.raises(InputError):
        engine.load_weights(net)
    assert set(Settings.keys) == {"Bearer s3cret"}


def test_more_tokens_than_the_server_has_room_for_are_refused(engine, net, text):
    engine.load_weights(net, text)
    with pytest.raises(InputError, match=r"up to 1025 tokens, and the servers have room for 1024"):
        engine.sample(PROMPTS, SEEDS, SamplingParams(725, (), 1.0))


def test_leftovers_of_a_killed_run_go(engine, net, text):
    left = engine.weights_folder / "thinktuning-weights-dead"
    left.mkdir(parents=True)
    (left / "model-00000.safetensors").touch()
    (engine.weights_folder / "mine").touch()
    engine.load_weights(net, text)
    assert [path.name for path in engine.weights_folder.iterdir()] == ["mine"]


# ---------------------------------------------------------------- the command line


def served(server: VllmServer, root: Path) -> list[str]:
    return [
        "--engine=thinktuning.engines.VLLMServerEngine",
        f"--engine.base_urls=[{server.base_url}]",
        "--engine.model=teacher",
        f"--engine.weights_folder={root / 'weights'}",
    ]


def test_a_run_samples_on_the_server(server, folder, questions, tmp_path):
    # The reference and the student take turns on the server.
    guided = ["--guidance.behaviors=[self_agreement]", "--model.max_new_tokens=96"]
    arguments = fit_arguments(folder, questions, tmp_path, *served(server, tmp_path), *guided)
    main([a for a in arguments if not a.startswith("--guidance.teacher")])
    logged = scalars(tmp_path / "version_0")
    assert len(logged["engine/logprob_gap_max"]) == 3
    assert max(logged["engine/logprob_gap_max"]) < 1e-3
    assert logged["guidance/parsed"] == [1.0] * 3
    assert {row["step"] for row in audit(tmp_path / "version_0")} == {0, 1, 2}


def test_ranks_that_share_a_model_sample_on_the_server(server, folder, questions, tmp_path):
    ranks = ["--trainer.strategy=fsdp2", "--trainer.devices=2", "--data.val_size=0"]
    arguments = fit_arguments(folder, questions, tmp_path, *served(server, tmp_path), *ranks)
    done = run([sys.executable, "-m", "thinktuning.cli", *arguments])
    assert done.returncode == 0, done.stderr[-3000:]
    logged = scalars(tmp_path / "version_0")
    assert len(logged["engine/logprob_gap_max"]) == 3
    assert max(logged["engine/logprob_gap_max"]) < 1e-3


@pytest.mark.faults
def test_a_server_that_is_away_ends_the_run_in_short_words(folder, questions, tmp_path, server):
    arguments = fit_arguments(folder, questions, tmp_path, *served(server, tmp_path))
    away = [a.replace(str(server.port), "9") for a in arguments]
    with pytest.raises(SystemExit) as caught:
        main(away)
    assert str(caught.value.code).startswith(
        "error: the server at http://127.0.0.1:9 doesn't answer"
    )


@pytest.mark.faults
def test_a_server_that_dies_is_named(server, net, text, tmp_path):
    """The last one: it ends the server."""
    engine = VLLMServerEngine([server.base_url], "teacher", str(tmp_path))
    engine.load_weights(net, text)
    server.kill()
    with pytest.raises(InputError, match="doesn't answer"):
        engine.sample(PROMPTS, SEEDS, SAMPLED)
