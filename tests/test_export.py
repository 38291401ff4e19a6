"""``thinktuning export``: what others load is the policy that was trained."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from conftest import prompt_ids
from huggingface_hub import ModelCard
from peft import PeftModel
from running import fit_arguments, room, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)

from thinktuning.cli import main
from thinktuning.export import export
from thinktuning.model_card import Exported, model_card

pytestmark = pytest.mark.slow

LORA = ["--model.lora.rank=4", "--model.lora.alpha=32", "--model.optimizer.lr=1e-2"]
QUESTIONS = ["1 plus 2?", "3 plus 3?", "0 plus 1?"]


@pytest.fixture(scope="module")
def base(student) -> Path:
    return student(width=64, heads=2)  # heads of 32, for vLLM's attention on CPUs


def trained_run(base: Path, questions: Path, root: Path, *more: str) -> Path:
    """The folder of a run with a checkpoint after each of its three steps."""
    main(fit_arguments(base, questions, root, "--checkpoint.save_top_k=-1", *more))
    return root / "version_0"


@pytest.fixture(scope="module")
def whole_run(base, questions, tmp_path_factory) -> Path:
    return trained_run(base, questions, tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def lora_run(base, questions, tmp_path_factory) -> Path:
    return trained_run(base, questions, tmp_path_factory.mktemp("lora"), *LORA)


def checkpoint(run: Path, step: int = 3) -> Path:
    return run / "checkpoints" / f"step={step:06d}.ckpt"


def trained_policy(base: Path, run: Path) -> PreTrainedModel:
    """The policy of a run, put together without the exporter and without peft."""
    saved = torch.load(checkpoint(run), weights_only=True)["state_dict"]
    net = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    weights = net.state_dict()
    for name in saved:
        if ".lora_A." in name:
            a, b = saved[name], saved[name.replace("lora_A", "lora_B")]
            owner = name.removeprefix("policy.base_model.model.").split(".lora_A")[0]
            weights[f"{owner}.weight"] = weights[f"{owner}.weight"] + b @ a * (32 / 4)
        elif ".lora_" not in name:
            weights[name.removeprefix("policy.")] = saved[name]
    net.load_state_dict(weights)
    return net.eval()


def untrained_checkpoint(base: Path, path: Path) -> Path:
    """A checkpoint as of a run that changed no weight."""
    net = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    weights = {f"policy.{name}": weight for name, weight in net.state_dict().items()}
    saved = {"pretrained": str(base), "lora": None, "global_step": 1, "state_dict": weights}
    torch.save(saved, path)
    return path


def greedy(net: PreTrainedModel, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    made = net.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=24)
    return made[0, len(prompt) :].tolist()


def logits(net: Any) -> torch.Tensor:
    with torch.no_grad():
        return net(input_ids=torch.arange(4, 40)[None]).logits


def load(folder: Path, **settings: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **settings).eval()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ---------------------------------------------------------------- all weights


def test_transformers_loads_the_trained_policy(base, whole_run, tmp_path):
    main(["export", f"--ckpt_path={checkpoint(whole_run)}", f"--output={tmp_path / 'out'}"])
    assert names(tmp_path) == {"out"}, "nothing is left beside the folder"
    assert names(tmp_path / "out") == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert len(modes) == 1, "whoever may read one file may read all"

    trained, loaded = trained_policy(base, whole_run), load(tmp_path / "out")
    assert loaded.dtype == torch.float32
    before, after = trained.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    untrained = load(base).state_dict()
    assert any(not torch.equal(untrained[name], after[name]) for name in after)

    text, own = AutoTokenizer.from_pretrained(tmp_path / "out"), AutoTokenizer.from_pretrained(base)
    assert text.chat_template == own.chat_template == tiny.CHAT_TEMPLATE
    for question in QUESTIONS:
        prompt = prompt_ids(own, question)
        assert prompt_ids(text, question) == prompt
        assert greedy(loaded, prompt) == greedy(trained, prompt)


VLLM = """
import json, os, sys
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
import torch, vllm
torch.compiler.set_stance("force_eager")
llm = vllm.LLM(model=sys.argv[1], dtype="float32", max_model_len=512, enforce_eager=True,
               kv_cache_memory_bytes=2**28, seed=0)
params = vllm.SamplingParams(temperature=0, max_tokens=24)
outputs = llm.chat(json.loads(sys.argv[2]), params, use_tqdm=False)
found = [[list(o.prompt_token_ids), list(o.outputs[0].token_ids)] for o in outputs]
print("found:" + json.dumps(found))
"""


def test_vllm_loads_the_folder_as_it_is(base, whole_run, tmp_path):
    export(str(checkpoint(whole_run)), str(tmp_path / "out"))
    chats = [
        [{"role": "system", "content": "Add."}, {"role": "user", "content": f"{q}\n\nBox it."}]
        for q in QUESTIONS
    ]
    done = run([sys.executable, "-c", VLLM, str(tmp_path / "out"), json.dumps(chats)])
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.split("found:")[1])
    trained, text = trained_policy(base, whole_run), AutoTokenizer.from_pretrained(base)
    for question, (prompt, completion) in zip(QUESTIONS, found, strict=True):
        assert prompt == prompt_ids(text, question)
        assert completion == greedy(trained, prompt)
        assert completion[-1] == text.eos_token_id, "the test says nothing about its end"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_written_in_the_precision_asked_for(base, whole_run, tmp_path, dtype):
    name = str(dtype).removeprefix("torch.")
    export(str(checkpoint(whole_run)), str(tmp_path / "out"), dtype=name)
    loaded = load(tmp_path / "out", dtype="auto").state_dict()
    for key, weight in trained_policy(base, whole_run).state_dict().items():
        assert loaded[key].dtype == dtype and torch.equal(loaded[key], weight.to(dtype)), key


def test_turns_end_where_the_tokenizer_says_if_the_base_says_nothing(tmp_path):
    base = tiny.save(tmp_path / "base")
    (base / "generation_config.json").unlink()
    config = json.loads((base / "config.json").read_text())
    del config["eos_token_id"]
    (base / "config.json").write_text(json.dumps(config))
    assert load(base).generation_config.eos_token_id is None
    export(str(untrained_checkpoint(base, tmp_path / "a.ckpt")), str(tmp_path / "out"))
    found = GenerationConfig.from_pretrained(tmp_path / "out")
    assert found.eos_token_id == AutoTokenizer.from_pretrained(base).eos_token_id


def test_a_base_that_transformers_would_not_save_is_exported(tmp_path):
    base = tiny.save(tmp_path / "base")
    settings = {"temperature": 0.6, "top_p": 0.9, "eos_token_id": [2, 3]}  # as Llama 2 had them
    (base / "generation_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="do_sample"):
        load(base).save_pretrained(tmp_path / "refused")
    export(str(untrained_checkpoint(base, tmp_path / "a.ckpt")), str(tmp_path / "out"))
    found = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    eos = AutoTokenizer.from_pretrained(base).eos_token_id
    assert found.items() >= {**settings, "eos_token_id": [eos, 2, 3]}.items()


# ---------------------------------------------------------------- LoRA


def test_a_lora_merged_and_as_an_adapter_are_the_trained_policy(
    base, lora_run, tmp_path, monkeypatch
):
    export(str(checkpoint(lora_run)), str(tmp_path / "merged"))
    arguments = [f"--ckpt_path={checkpoint(lora_run)}", f"--output={tmp_path / 'adapter'}"]
    main(["export", *arguments, "--adapter=true"])
    assert names(tmp_path / "adapter") == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    expected = logits(trained_policy(base, lora_run))
    assert (expected - logits(load(base))).abs().max() > 1e-2, "training changed too little"
    merged = load(tmp_path / "merged")
    assert merged.state_dict().keys() == load(base).state_dict().keys()
    torch.testing.assert_close(logits(merged), expected)
    adapted = PeftModel.from_pretrained(load(base), tmp_path / "adapter")
    torch.testing.assert_close(logits(adapted.eval()), expected)
    # Its configuration says where the base is, whatever the present folder.
    monkeypatch.chdir(tmp_path)
    torch.testing.assert_close(logits(load(Path("adapter"))), expected)
    text = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    assert text.chat_template == tiny.CHAT_TEMPLATE


def test_the_base_of_an_adapter_named_by_a_relative_path_is_found_again(
    base, lora_run, tmp_path, monkeypatch
):
    monkeypatch.chdir(base.parent)
    export(str(checkpoint(lora_run)), str(tmp_path / "out"), base=base.name, adapter=True)
    monkeypatch.chdir(tmp_path)
    expected = logits(trained_policy(base, lora_run))
    torch.testing.assert_close(logits(load(tmp_path / "out")), expected)


def test_an_adapter_of_a_run_without_lora_is_refused(whole_run, tmp_path):
    arguments = [f"--ckpt_path={checkpoint(whole_run)}", f"--output={tmp_path / 'out'}"]
    with pytest.raises(SystemExit, match=r"no LoRA .*--adapter"):
        main(["export", *arguments, "--adapter=true"])
    assert names(tmp_path) == set()


# ---------------------------------------------------------------- where things lie


@pytest.mark.parametrize("kind", ["whole", "lora"])
def test_a_base_that_was_moved_is_named(kind, base, whole_run, lora_run, tmp_path):
    made = whole_run if kind == "whole" else lora_run
    saved = torch.load(checkpoint(made), weights_only=True)
    torch.save({**saved, "pretrained": str(tmp_path / "gone")}, tmp_path / "moved.ckpt")
    arguments = ["export", f"--ckpt_path={tmp_path / 'moved.ckpt'}", f"--output={tmp_path / 'out'}"]
    with pytest.raises(SystemExit, match=r"cannot load the model .*gone"):
        main(arguments)
    main([*arguments, f"--base={base}"])
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(trained_policy(base, made)))


@pytest.mark.parametrize("kind", ["whole", "lora"])
def test_a_base_that_does_not_fit_is_refused(kind, whole_run, lora_run, tmp_path):
    made = whole_run if kind == "whole" else lora_run
    narrow = tiny.save(tmp_path / "narrow")
    arguments = ["export", f"--ckpt_path={checkpoint(made)}", f"--output={tmp_path / 'out'}"]
    misfit = r"doesn't fit the base model .*(64|128).* in the checkpoint"
    with pytest.raises(SystemExit, match=misfit):
        main([*arguments, f"--base={narrow}"])
    if kind == "whole":
        other = tiny.save(tmp_path / "other", "qwen2", width=64, heads=2)
        with pytest.raises(SystemExit, match=r"k_proj\.bias' is missing in the checkpoint"):
            main([*arguments, f"--base={other}"])
    assert not (tmp_path / "out").exists()


def test_what_is_not_a_checkpoint_is_refused(tmp_path):
    output = f"--output={tmp_path / 'out'}"
    with pytest.raises(SystemExit, match=r"there is no checkpoint .*none\.ckpt"):
        main(["export", f"--ckpt_path={tmp_path / 'none.ckpt'}", output])
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    with pytest.raises(SystemExit, match="was not written by `thinktuning fit`"):
        main(["export", f"--ckpt_path={tmp_path / 'foreign.ckpt'}", output])
    assert names(tmp_path) == {"foreign.ckpt"}


def test_a_folder_in_use_is_left_alone_and_an_empty_one_is_filled(base, tmp_path):
    path = untrained_checkpoint(base, tmp_path / "a.ckpt")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").write_text("mine")
    for taken in (tmp_path / "used", path):
        with pytest.raises(SystemExit, match="isn't an empty folder"):
            main(["export", f"--ckpt_path={path}", f"--output={taken}"])
    assert names(tmp_path / "used") == {"mine.txt"}
    (tmp_path / "empty").mkdir()
    main(["export", f"--ckpt_path={path}", f"--output={tmp_path / 'empty'}"])
    main(["export", f"--ckpt_path={path}", f"--output={tmp_path / 'new' / 'deep'}"])
    assert names(tmp_path / "empty") == names(tmp_path / "new" / "deep") > {"model.safetensors"}


def test_a_full_disk_leaves_no_half_folder(base, tmp_path):
    path = untrained_checkpoint(base, tmp_path / "a.ckpt")
    arguments = ["export", f"--ckpt_path={path}", f"--output={tmp_path / 'out'}"]
    with room(100_000), pytest.raises(SystemExit, match=r"cannot write .*out"):
        main(arguments)
    assert names(tmp_path) == {"a.ckpt"}
    main(arguments)
    assert "model.safetensors" in names(tmp_path / "out")


KILLED = """
import os, sys
from thinktuning import export
export._sync = lambda folder: os.kill(os.getpid(), 9)  # when every file is there
export.export(sys.argv[1], sys.argv[2])
"""


def test_a_kill_leaves_nothing_under_the_name(base, tmp_path):
    path = untrained_checkpoint(base, tmp_path / "a.ckpt")
    done = run([sys.executable, "-c", KILLED, str(path), str(tmp_path / "out")])
    assert done.returncode == -9, done.stderr[-2000:]
    assert not (tmp_path / "out").exists()
    assert len(names(tmp_path)) == 2, "the unfinished folder lies beside it: the kill came in time"
    export(str(path), str(tmp_path / "out"))
    assert "model.safetensors" in names(tmp_path / "out")


# ---------------------------------------------------------------- the card


def card(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def row(text: str, tag: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| `{tag}` |")]
    return [cell.strip() for cell in line.split("|")[2:4]]


def metrics_of(text: str) -> str:
    return text.split("## Metrics")[1].split("## Configuration")[0]


def test_the_card_says_what_the_policy_was_trained_with(base, whole_run, questions, tmp_path):
    logged = {}
    for path in whole_run.glob("events*"):
        events = EventAccumulator(str(path))
        events.Reload()
        logged |= {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    assert [e.step for e in logged["reward"]] == [0, 1, 2]

    export(str(checkpoint(whole_run)), str(tmp_path / "policy"))
    found = card(tmp_path / "policy")
    assert found.data.library_name == "transformers"
    assert found.data.pipeline_tag == "text-generation"
    assert "thinktuning" in found.data.tags
    assert found.data.license is None
    for fact in ("# policy", str(base), str(questions), "groups of 4 answers"):
        assert fact in found.text, fact
    assert "**Steps:** 3" in found.text
    config = (whole_run / "config.yaml").read_text()
    assert f"```yaml\n{config.rstrip()}\n```" in found.text
    for tag in ("reward", "accuracy/student", "val/accuracy", "guidance/realised_gamma"):
        assert row(found.text, tag) == [f"{logged[tag][-1].value:.4g}", "2"], tag
    assert "objective/kl" not in metrics_of(found.text), "it wasn't computed"

    export(str(checkpoint(whole_run, step=1)), str(tmp_path / "earlier"))
    first = card(tmp_path / "earlier").text
    assert row(first, "reward") == [f"{logged['reward'][0].value:.4g}", "0"]
    assert "**Steps:** 1" in first


def test_the_card_is_of_the_training_not_of_what_came_after(base, questions, tmp_path):
    more = ("--trainer.max_steps=1", "--trainer.val_check_interval=1")
    made = trained_run(base, questions, tmp_path / "runs", *more)
    export(str(checkpoint(made, 1)), str(tmp_path / "before"))
    config = made / "config.yaml"
    last = made / "checkpoints" / "last.ckpt"
    other = ["--data.val_size=8", "--model.max_new_tokens=1"]
    main(["validate", f"--config={config}", *other, f"--ckpt_path={last}"])
    assert len(list(made.glob("events*"))) == 2, "the validation was logged into the run"
    export(str(checkpoint(made, 1)), str(tmp_path / "after"))
    before, after = card(tmp_path / "before").text, card(tmp_path / "after").text
    assert row(before, "val/accuracy") and metrics_of(before) == metrics_of(after)

    main(["fit", f"--config={config}", f"--ckpt_path={last}", "--trainer.max_steps=2"])
    export(str(checkpoint(made, 2)), str(tmp_path / "resumed"))
    resumed = card(tmp_path / "resumed").text
    assert row(resumed, "reward")[1] == "1"
    assert (made / "config.resumed_1.yaml").read_text().rstrip() in resumed


def test_the_card_of_a_checkpoint_without_its_run_says_so(base, tmp_path):
    path = untrained_checkpoint(base, tmp_path / "a.ckpt")
    export(str(path), str(tmp_path / "out"))
    text = card(tmp_path / "out").text
    assert str(base) in text
    assert "**Data:** unknown" in text
    assert "Unknown: this policy was exported without the TensorBoard files" in text
    assert "Unknown: this policy was exported without the configuration" in text


def test_the_card_of_an_adapter_names_its_library_and_form(lora_run, tmp_path):
    export(str(checkpoint(lora_run)), str(tmp_path / "out"), adapter=True, dtype="bfloat16")
    found = card(tmp_path / "out")
    assert found.data.library_name == "peft" and "lora" in found.data.tags
    assert "a LoRA of rank 4 and alpha 32" in found.text and "to be loaded on it" in found.text
    assert "**Written as:** bfloat16" in found.text


def front_matter(pretrained: str, run: Path | None) -> dict[str, Any]:
    text = model_card(Exported("x", pretrained, 1, None, False, "float32"), run)
    return yaml.safe_load(text.split("---\n")[1])


@pytest.mark.parametrize(
    ("pretrained", "named"),
    [
        ("meta-llama/Llama-3.2-3B-Instruct", "meta-llama/Llama-3.2-3B-Instruct"),
        ("embedded", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("/models/Llama-3.2-3B-Instruct", None),
        ("models/llama", None),
    ],
)
def test_the_front_matter_names_bases_of_the_hub(pretrained, named, tmp_path, monkeypatch):
    (tmp_path / "models" / "llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert front_matter(pretrained, None).get("base_model") == named


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("openai/gsm8k", ["openai/gsm8k"]),
        ("reasoning-gym:gsm_symbolic", None),
        ("data/questions.jsonl", None),
    ],
)
def test_the_front_matter_names_data_of_the_hub(whole_run, tmp_path, source, named):
    config = yaml.safe_load((whole_run / "config.yaml").read_text())
    config["data"]["source"] = source
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert front_matter("embedded", tmp_path).get("datasets") == named


@pytest.mark.parametrize(
    ("gamma", "said"),
    [
        ({"kind": "constant", "start": 0.0}, "GRPO on groups of 4 answers, without guidance"),
        ({"kind": "constant", "start": 0.5}, "a share of which (0.5) a teacher continued"),
        ({"kind": "linear", "start": 0.25}, "a share of which (0.25 to 0.01, linear) a teacher"),
    ],
)
def test_the_method_is_that_of_the_configuration(whole_run, tmp_path, gamma, said):
    config = yaml.safe_load((whole_run / "config.yaml").read_text())
    config["guidance"]["gamma"].update(gamma)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    text = model_card(Exported("x", "embedded", 1, None, False, "float32"), tmp_path)
    assert said in text
