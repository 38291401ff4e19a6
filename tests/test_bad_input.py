"""A catalogue of what users get wrong: each row ends in one message, or is handled right.

A row says what is done to a good setup, and what the message must say of it: what was wrong, what
was expected, what to do. Rows that the trainer handles stand at the end, with what right is.
"""

import json
import logging
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest
import tiny
import torch
from lightning.pytorch import Callback
from peft import LoraConfig, get_peft_model
from running import audit, fit_arguments, run
from transformers import AutoModelForCausalLM, AutoTokenizer

from thinktuning.cli import main
from thinktuning.policy import end_of_turn_ids, load_generation_config
from thinktuning.tensors import policy_inputs
from thinktuning.types import RolloutBatch

pytestmark = [pytest.mark.slow, pytest.mark.faults]


@dataclass(frozen=True)
class Setup:
    """What a row may spoil."""

    folder: Path
    student: Callable[..., Path]
    questions: Path
    trained: Path  # a checkpoint of such a run

    def fit(self, *more: str) -> list[str]:
        short = ("--trainer.max_steps=1", "--data.val_size=0")
        return fit_arguments(self.student(), self.questions, self.folder / "runs", *short, *more)

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path


Spoil = Callable[[Setup], list[str]]


class Row(NamedTuple):
    """One thing that a user may get wrong.

    ``spoil``: flags that are added to a good ``fit``, or a function that makes them; ``alone``: the
    whole command line. ``says``: what the message must say; case and line breaks don't count.
    """

    name: str
    spoil: list[str] | Spoil
    says: tuple[str, ...]
    alone: bool = False
    code: int = 1

    def arguments(self, setup: Setup) -> list[str]:
        more = self.spoil if isinstance(self.spoil, list) else self.spoil(setup)
        return more if self.alone else setup.fit(*more)


def config(content: str | bytes) -> Spoil:
    """A configuration file beside the flags."""
    return lambda setup: [f"--config={setup.write('mine.yaml', content)}"]


def data(content: str | bytes, name: str = "mine.jsonl") -> Spoil:
    """Another file of questions."""
    return lambda setup: [f"--data.source={setup.write(name, content)}"]


def rows(*made: Any) -> Spoil:
    return data("".join(json.dumps(row) + "\n" for row in made))


def sums(count: int) -> list[dict[str, str]]:
    return [{"question": f"{n} plus 1?", "answer": f"#### {n + 1}"} for n in range(count)]


def behavior(content: str | bytes) -> Spoil:
    """A behavior file of the user's."""
    return lambda setup: [f"--guidance.behaviors=[{setup.write('mine.behavior.yaml', content)}]"]


BEHAVIOR = """\
name: mine
instruction: look twice
examples:
- {question: '1 plus 1?', response: 'It is 3.', opinion: incorrect, reason: No., phrase: It is 2.}
"""


def model(change: Callable[[Path], Any]) -> Spoil:
    """A copy of the student's folder, changed."""

    def spoil(setup: Setup) -> list[str]:
        folder = setup.folder / "model"
        shutil.copytree(setup.student(), folder)
        change(folder)
        return [f"--model.pretrained={folder}"]

    return spoil


def edit(file: str, **values: Any) -> Callable[[Path], None]:
    """Set keys of a JSON file; None takes one out."""

    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text()) | values
        kept = {key: value for key, value in content.items() if value is not None}
        (folder / file).write_text(json.dumps(kept))

    return change


def template(text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / "chat_template.jinja").write_text(text)


def no_end_of_turn(folder: Path) -> None:
    edit("tokenizer_config.json", eos_token=None)(folder)
    edit("generation_config.json", eos_token_id=None)(folder)
    edit("config.json", eos_token_id=None)(folder)


def more_tokens_than_weights(folder: Path) -> None:
    text = AutoTokenizer.from_pretrained(folder)
    text.add_tokens(["Box it"])
    text.save_pretrained(folder)


def as_adapter(folder: Path) -> None:
    base = folder.with_name("base")
    shutil.copytree(folder, base)
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig()).save_pretrained(folder)


def cut_off(file: str) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[: len(content) // 2])

    return change


def below_a_file(setup: Setup) -> str:
    """A path that nobody can write to, not even root."""
    return str(setup.write("file", "") / "runs")


TEACHER = "thinktuning.engines.OpenAIEngine"


def teacher(**values: Any) -> list[str]:
    """A teacher behind a server."""
    good = {"base_url": "http://127.0.0.1:9/v1", "model": "judge", "max_retries": 0}
    given = {k: v for k, v in (good | values).items() if v is not None}
    flags = [f"--guidance.teacher.{key}={value}" for key, value in given.items()]
    return [f"--guidance.teacher={TEACHER}", *flags]


COMMAND_LINE = [
    Row("no command", [], ("one of fit, validate, test, plan", "got ''"), alone=True),
    Row("an unknown command", ["train"], ("compare, got 'train'", "--help"), alone=True),
    Row("a flag that isn't there", ["--model.grup_size=3"], ("model.grup_size", "--help")),
    Row("a key that isn't there", config("model: {grup_size: 3}\n"), ("grup_size", "--help")),
    Row("a section that isn't there", config("modell: {group_size: 3}\n"), ("modell", "--help")),
    Row("a configuration that isn't there", ["--config=no.yaml"], ("no.yaml",)),
    Row(
        "a folder as configuration", lambda s: [f"--config={s.folder}"], ("config", "is not a file")
    ),
    Row("YAML that isn't YAML", config("model: {group_size: 4\n"), ("flow mapping", "line 1")),
    Row(
        "YAML with tabs", config("model:\n\tgroup_size: 4\n"), ("cannot start any token", "line 2")
    ),
    Row("a list as configuration", config("- model\n- data\n"), ("config",)),
    Row("an unknown method", ["--method=ppo"], ("method must be one of thinktuning, sft", "'ppo'")),
    Row("two methods", lambda s: ["--method=sft", *config("method: star\n")(s)], ("sft", "star")),
    Row("an option of another method", ["--method=sft", "--model.group_size=4"], ("group_size",)),
    Row("a seed that isn't a number", ["--seed_everything=true"], ("must be an integer",)),
    Row("what another option decides", ["--data.tokenizer=gpt2"], ("data.tokenizer",)),
]

MODEL = [
    Row("a text for a number", ["--model.group_size=three"], ("group_size", "three", "int")),
    Row("a fraction for a number", ["--model.group_size=4.5"], ("group_size", "4.5", "int")),
    Row("a list for a number", ["--data.batch_size=[4]"], ("batch_size", "[4]", "int")),
    Row("nothing for a number", ["--model.group_size=null"], ("group_size", "int")),
    Row("a group of 1", ["--model.group_size=1"], ("group_size must be at least 2, got 1",)),
    Row("temperature 0", ["--model.temperature=0"], ("temperature must be positive, got 0",)),
    Row("top-p", ["--model.top_p=0.9"], ("top_p", "use model.temperature")),
    Row(
        "no gradient norm", ["--model.max_grad_norm=0"], ("max_grad_norm must be positive or null",)
    ),
    Row(
        "many faults of one section",
        [
            "--model.group_size=0",
            "--model.temperature=-1",
            "--model.num_mini_batches=0",
            "--model.max_new_tokens=0",
            "--model.micro_batch_size=0",
            "--model.micro_batch_tokens=0",
            "--model.warmup_steps=-1",
            "--model.max_grad_norm=-1",
        ],
        (
            "group_size must be at least 2, got 0",
            "temperature must be positive, got -1",
            "num_mini_batches must be at least 1, got 0",
            "max_new_tokens must be at least 1, got 0",
            "micro_batch_size must be at least 1, got 0",
            "micro_batch_tokens must be at least 1, got 0",
            "warmup_steps must be at least 0, got -1",
            "max_grad_norm must be positive or null, got -1",
        ),
    ),
    Row(
        "mini-batches that don't divide",
        ["--model.num_mini_batches=3"],
        ("num_mini_batches=3 must divide", "on each rank, 4"),
    ),
    Row(
        "answers that are too long for the model",
        ["--model.max_new_tokens=1020"],
        ("more than the 1024 positions", "lower model.max_new_tokens"),
    ),
    Row("an unknown reward", ["--model.rewards=[Kindness]"], ("Kindness",)),
    Row(
        "an empty phrase to reward",
        config(
            "model: {rewards: [{class_path: thinktuning.rewards.PhraseReward, "
            "init_args: {phrase: ' '}}]}\n"
        ),
        ("phrase must not be empty",),
    ),
    Row("an unknown optimizer", ["--model.optimizer=torch.optim.Adamw"], ("Adamw",)),
    Row("an option that the optimizer lacks", ["--model.optimizer.lrr=1"], ("lrr",)),
    Row("an unknown attention", ["--model.attention=magic"], ("model.attention magic", "sdpa")),
    Row("objective: no clipping range", ["--model.objective.clip_eps=0"], ("clip_eps", "got 0")),
    Row("objective: a pole", ["--model.objective.c_max=0.5"], ("pole", "c_max=0.5")),
    Row("objective: an unknown shaping", ["--model.objective.shaping=magic"], ("shaping", "aas")),
    Row(
        "many faults of the objective",
        [
            "--model.objective.clip_eps=2",
            "--model.objective.clip_eps_high=-1",
            "--model.objective.dual_clip=1",
            "--model.objective.kl_coef=-1",
            "--model.objective.importance_cap=0",
        ],
        (
            "clip_eps must be between 0 and 1, got 2",
            "clip_eps_high must be positive or null, got -1",
            "dual_clip must be above 1 or null, got 1",
            "kl_coef must not be negative, got -1",
            "importance_cap must be positive, got 0",
        ),
    ),
    Row(
        "lora: many faults",
        ["--model.lora.rank=0", "--model.lora.alpha=0"],
        ("rank must be at least 1, got 0", "alpha must be positive, got 0"),
    ),
    Row("lora: an unknown base", ["--model.lora.base=2bit"], ("base", "4bit", "2bit")),
    Row(
        "lora: layers that aren't there",
        ["--model.lora.target_modules=[c_attn]"],
        ("model.lora", "c_attn"),
    ),
    Row("lora: no layers", ["--model.lora.target_modules=[]"], ("model.lora", "target_modules")),
    Row("lora: a broken pattern", ["--model.lora.target_modules=(q_proj"], ("model.lora",)),
    Row(
        "lora: layers that don't fit into 4 bits",
        ["--model.lora.base=4bit"],
        ("can't be used in 4 bits on a CPU", "multiple of 64", "use 8bit"),
    ),
]

FOLDERS = [
    Row(
        "a model that isn't there",
        ["--model.pretrained=/nowhere"],
        ("cannot load the", "'/nowhere'", "expected a folder with config.json"),
    ),
    Row(
        "an empty folder as model",
        lambda s: [f"--model.pretrained={s.folder}"],
        ("cannot load the", "expected a folder with config.json"),
    ),
    Row(
        "a model without weights",
        model(lambda f: (f / "model.safetensors").unlink()),
        ("cannot load the model", "model.safetensors", "expected a folder with config.json"),
    ),
    Row(
        "a model without a tokenizer",
        model(lambda f: [p.unlink() for p in f.glob("*token*")]),
        ("cannot load the tokenizer", "expected a folder with config.json"),
    ),
    Row(
        "an adapter alone",
        model(as_adapter),
        ("it is an adapter", "thinktuning export", "--ckpt_path"),
    ),
    Row(
        "weights that are cut off",
        model(cut_off("model.safetensors")),
        ("cannot load the model", "expected a folder with config.json"),
    ),
    Row(
        "a model's config that is cut off",
        model(cut_off("config.json")),
        ("cannot load the", "config.json", "expected a folder with config.json"),
    ),
    Row(
        "weights of another shape",
        model(edit("config.json", hidden_size=64)),
        ("cannot load the model",),
    ),
    Row(
        "weights with more layers asked of them",
        model(edit("config.json", num_hidden_layers=3)),
        ("cannot load the model", "it has no weights for model.layers.2"),
    ),
    Row(
        "a model of an unknown kind",
        model(edit("config.json", model_type="mind")),
        ("cannot load the", "mind"),
    ),
    Row(
        "a tokenizer without an end-of-turn token",
        model(no_end_of_turn),
        ("no end-of-turn token", "set eos_token in tokenizer_config.json"),
    ),
]

DATA = [
    Row("no such file", ["--data.source=no.jsonl"], ("there is no file 'no.jsonl'",)),
    Row("a folder as data", lambda s: [f"--data.source={s.folder}"], ("cannot read", "expected a")),
    Row("prose as data", data("Hello.\n", "mine.txt"), ("cannot read", "expected a .jsonl")),
    Row("an empty file", data(""), ("mine.jsonl", "has no rows")),
    Row(
        "a row that is cut off", data(b'{"question": "1 plus'), ("cannot read", "expected a .jsonl")
    ),
    Row(
        "a file that isn't UTF-8",
        data(b'{"question": "caf\xe9", "answer": "#### 1"}\n'),
        ("cannot read", "mine.jsonl", "expected a .jsonl"),
    ),
    Row("rows that are numbers", data("3\n4\n"), ("mine.jsonl",)),
    Row("Parquet that isn't", data("PAR1", "mine.parquet"), ("cannot read", "expected a .jsonl")),
    Row(
        "other columns",
        rows({"prompt": "1 plus 1?", "answer": "#### 2"}),
        ("no column 'question'", "its columns are ['prompt', 'answer']"),
    ),
    Row(
        "faulty rows of several kinds",
        rows(
            *sums(4),
            {"question": "", "answer": "#### 1"},
            {"question": "1 plus 1?", "answer": "####"},
            {"question": "1 plus 1?", "answer": ""},
            {"question": None, "answer": "#### 1"},
            {"question": "1 plus 1?"},
        ),
        (
            "has 5 faulty rows",
            "row 5: 'question' must be a text, got ''",
            "row 6: 'answer' has no gold answer, got '####'",
            "row 7: 'answer' has no gold answer, got ''",
            "row 8: 'question' must be a text, got None",
            "row 9: 'answer' must be a text, got None",
        ),
    ),
    Row(
        "a gold answer that is a number",
        rows({"question": "1?", "answer": 1}),
        ("'answer' must be a text, got 1",),
    ),
    Row(
        "a question that is a number",
        rows({"question": 1, "answer": "1"}),
        ("must be a text, got 1",),
    ),
    Row(
        "prompts that are all too long",
        ["--data.max_prompt_tokens=5"],
        ("every training prompt is longer than max_prompt_tokens=5", "the shortest has"),
    ),
    Row(
        "fewer rows than a batch",
        rows(*sums(3)),
        ("3 prompts don't fill a batch of 4", "give more data or a smaller batch_size"),
    ),
    Row(
        "validation takes all rows",
        ["--data.val_size=16"],
        ("has 16 questions, and validation takes 16", "a smaller val_size"),
    ),
    Row(
        "validation on the training rows",
        lambda s: [f"--data.val_source={s.questions}", "--data.val_size=4"],
        ("val_source is the same as source", "leave val_source out"),
    ),
    Row("an unknown generator", ["--data.source=reasoning-gym:sums"], ("no generator 'sums'",)),
    Row(
        "a generator with many right answers",
        ["--data.source=reasoning-gym:countdown"],
        ("countdown asks for a calculation", "a generator with one right answer"),
    ),
    Row("no source", ["--data.source="], ("source is empty", "give a file, a hub id")),
    Row(
        "a limit of 0",
        ["--data.limit=0", "--data.val_size=64"],
        ("limit must be at least 1 or null, got 0",),
    ),
    Row(
        "a source of validation, and none of its questions",
        ["--data.val_source=others.jsonl", "--data.val_size=0"],
        ("val_size=0 asks nothing of val_source='others.jsonl'",),
    ),
    Row(
        "a dataset that is a script",
        lambda s: [f"--data.source={s.write('mine.py', 'print(1)')}"],
        ("cannot read", "mine.py", "expected a .jsonl"),
    ),
    Row(
        "many faults of the data",
        [
            "--data.batch_size=0",
            "--data.val_batch_size=0",
            "--data.val_size=-1",
            "--data.max_prompt_tokens=0",
        ],
        (
            "batch_size must be at least 1, got 0",
            "val_batch_size must be at least 1, got 0",
            "val_size must be at least 0, got -1",
            "max_prompt_tokens must be at least 1, got 0",
        ),
    ),
    Row(
        "half an example",
        config("data: {examples: [{question: 1?}]}\n"),
        ("arguments are required: response",),
    ),
    Row(
        "SFT without solutions",
        lambda s: sft(s, *rows(*sums(8))(s)),
        ("have no worked solution to train on", "GSM8K's form"),
        alone=True,
    ),
]

GUIDANCE = [
    Row("gamma above 1", ["--guidance.gamma.start=2"], ("start must be between 0 and 1, got 2",)),
    Row("gamma below 0", ["--guidance.gamma.start=-0.1"], ("between 0 and 1, got -0.1",)),
    Row("gamma nan", ["--guidance.gamma.start=.nan"], ("between 0 and 1, got nan",)),
    Row("an unknown schedule", ["--guidance.gamma.kind=sudden"], ("kind", "linear", "sudden")),
    Row(
        "many faults of gamma",
        [
            "--guidance.gamma.kind=exponential",
            "--guidance.gamma.start=1.5",
            "--guidance.gamma.end=-1",
            "--guidance.gamma.fraction=0",
        ],
        (
            "start must be between 0 and 1, got 1.5",
            "end must be between 0 and 1, got -1",
            "fraction must be above 0 and at most 1, got 0",
            "end must be positive for kind exponential",
        ),
    ),
    Row(
        "guidance over a run without an end",
        ["--trainer.max_steps=-1", "--trainer.max_epochs=-1"],
        ("how long the run is", "set trainer.max_steps or trainer.max_epochs"),
    ),
    Row("no behaviors", ["--guidance.behaviors=[]"], ("at least one behavior is needed",)),
    Row("a text for behaviors", ["--guidance.behaviors=self_critique"], ("behaviors", "list")),
    Row(
        "unknown behaviors",
        ["--guidance.behaviors=[self_doubt,self_pity]"],
        ("'self_doubt' is unknown", "'self_pity' is unknown", "expected one of", "self_critique"),
    ),
    Row("a behavior that isn't there", ["--guidance.behaviors=[no.yaml]"], ("no.yaml", "be read")),
    Row("a behavior that isn't YAML", behavior("name: [\n"), ("mine.behavior.yaml", "be read")),
    Row("a behavior that isn't UTF-8", behavior(b"name: caf\xe9\n"), ("be read", "utf-8")),
    Row("an empty behavior", behavior(""), ("must have the keys", "examples")),
    Row(
        "a behavior with another key",
        behavior(BEHAVIOR + "nmae: x\n"),
        ("nmae", "must have the keys"),
    ),
    Row(
        "many faults of a behavior",
        behavior(
            BEHAVIOR.replace("mine", "''").replace("incorrect", "maybe")
            + "patterns: ['(again', 'x*', 3]\n"
        ),
        (
            "name must be a text",
            "opinion must be one of correct, incorrect",
            "'(again' is not a regular expression",
            "'x*' matches an empty text",
            "pattern 3: must be a text",
        ),
    ),
    Row(
        "replies that can't be closed in time",
        ["--guidance.max_new_tokens=40"],
        ("constrained replies need max_new_tokens of at least", "got 40"),
    ),
    Row(
        "boxed without a form",
        ["--guidance.boxed=true", "--guidance.constrained=false"],
        ("boxed needs constrained",),
    ),
    Row(
        "no room for the teacher's prompt",
        ["--guidance.teacher=null", "--guidance.max_new_tokens=1024"],
        ("leave no room for a prompt in the 1024 positions", "lower guidance.max_new_tokens"),
    ),
    Row("an unknown injection", ["--injection.overlong=trim"], ("overlong", "unguided", "trim")),
    Row("an unknown teacher", ["--guidance.teacher=Socrates"], ("Socrates",)),
    Row(
        "a cache that can't be written",
        lambda s: [f"--guidance.cache={below_a_file(s)}"],
        ("cache of replies needs a folder", "give another path as guidance.cache"),
    ),
    Row(
        "many faults of a remote teacher",
        teacher(base_url="localhost:8000", concurrency=0, timeout=0, max_retries=-1),
        (
            "base_url must be like http://127.0.0.1:8000/v1, got 'localhost:8000'",
            "concurrency must be at least 1, got 0",
            "timeout must be positive and finite, got 0",
            "max_retries must not be negative, got -1",
        ),
    ),
    Row("a remote teacher without a model", teacher(model=None), ("model",)),
    Row("a remote teacher without a server", teacher(base_url=None), ("base_url",)),
    Row(
        "a key in a server's address",
        teacher(base_url="https://me:sk-s3cret@host/v1"),
        ("base_url may have no name, password", "api_key_env"),
    ),
    Row(
        "a key in a server's address that is none",
        teacher(base_url="me:sk-s3cret@host:80a/v1"),
        ("base_url may have no name, password", "api_key_env"),
    ),
    Row(
        "a key behind a server's address",
        teacher(base_url="https://host/v1?api_key=sk-s3cret"),
        ("base_url may have no name, password, query", "api_key_env"),
    ),
    Row(
        "a server without a port number",
        teacher(base_url="http://host:port/v1"),
        ("base_url must",),
    ),
    Row(
        "a key that isn't in the environment",
        teacher(api_key_env="NO_SUCH_KEY"),
        ("the environment variable NO_SUCH_KEY with the key isn't set",),
    ),
]

ENGINE = [
    Row("an unknown engine", ["--engine=Magic"], ("Magic",)),
    Row("an engine without places", ["--engine.max_batch_size=0"], ("at least 1, got 0",)),
    Row(
        "a remote teacher as the student's engine",
        [f"--engine={TEACHER}", "--engine.base_url=http://x/v1", "--engine.model=y"],
        ("engine", "OpenAIEngine"),
    ),
    Row(
        "a student's engine with weights of its own",
        ["--engine.pretrained=gpt2"],
        ("leave out engine.pretrained", "guidance.teacher"),
    ),
    Row(
        "quantization without weights",
        ["--engine.quantization=4bit"],
        ("quantization needs pretrained",),
    ),
    Row(
        "no servers",
        [
            "--engine=thinktuning.engines.VLLMServerEngine",
            "--engine.base_urls=[]",
            "--engine.model=x",
            "--engine.weights_folder=/dev/shm/x",
            "--engine.timeout=-1",
        ],
        ("base_urls must name at least one server", "timeout must be positive and finite, got -1"),
    ),
    Row(
        "servers that don't answer",
        [
            "--engine=thinktuning.engines.VLLMServerEngine",
            "--engine.base_urls=[http://127.0.0.1:9]",
            "--engine.model=x",
            "--engine.weights_folder=/dev/shm/x",
        ],
        ("the server at http://127.0.0.1:9 doesn't answer", "start it"),
    ),
]

TRAINER = [
    Row(
        "fewer bits", ["--trainer.precision=bf16-true"], ("bf16-true isn't", "expected bf16-mixed")
    ),
    Row("an unknown precision", ["--trainer.precision=fp9"], ("precision", "fp9")),
    Row("FSDP1", ["--trainer.strategy=fsdp"], ("fsdp isn't supported", "strategy: fsdp2")),
    Row("DeepSpeed", ["--trainer.strategy=deepspeed"], ("isn't supported", "strategy: fsdp2")),
    Row("an unknown strategy", ["--trainer.strategy=magic"], ("magic isn't", "strategy: fsdp2")),
    Row("no devices", ["--trainer.devices=0"], ("devices",)),
    Row("clipping by the trainer", ["--trainer.gradient_clip_val=1"], ("gradient_clip_val",)),
    Row(
        "accumulating batches",
        ["--trainer.accumulate_grad_batches=2"],
        ("accumulate_grad_batches",),
    ),
    Row("fewer than no steps", ["--trainer.max_steps=-5"], ("max_steps", "-5")),
    Row("too much of the data", ["--trainer.limit_train_batches=2.5"], ("limit_train_batches",)),
    Row("an unknown callback", ["--trainer.callbacks+=Magic"], ("Magic",)),
    Row("an unknown logger", ["--trainer.logger=Magic"], ("Magic",)),
    Row("checkpoints never", ["--checkpoint.every_n_train_steps=-1"], ("every_n_train_steps",)),
    Row(
        "two intervals",
        ["--checkpoint.every_n_epochs=1"],
        ("every_n_train_steps", "every_n_epochs"),
    ),
    Row(
        "a metric that isn't there",
        [
            "--checkpoint.monitor=luck",
            "--data.val_size=4",
            "--trainer.val_check_interval=1",
            "--trainer.max_steps=2",
        ],
        ("luck",),
    ),
    Row("the best by no metric", ["--checkpoint.save_top_k=2"], ("save_top_k", "monitor")),
]

CHECKPOINTS = [
    Row(
        "a checkpoint that isn't there",
        ["--ckpt_path=no.ckpt"],
        ("there is no checkpoint 'no.ckpt'", "expected a file, a folder or 'last'"),
    ),
    Row(
        "a folder that isn't a checkpoint",
        lambda s: [f"--ckpt_path={s.student()}"],
        ("meta.pt", "checkpoint"),
    ),
    Row(
        "prose as checkpoint",
        lambda s: [f"--ckpt_path={s.write('mine.ckpt', 'Hello.')}"],
        ("mine.ckpt", "was not written by `thinktuning fit`"),
    ),
    Row(
        "a checkpoint that is cut off",
        lambda s: [f"--ckpt_path={s.write('a.ckpt', s.trained.read_bytes()[:9999])}"],
        ("a.ckpt", "is damaged"),
    ),
    Row(
        "weights as checkpoint",
        lambda s: [f"--ckpt_path={s.student() / 'model.safetensors'}"],
        ("model.safetensors", "was not written by `thinktuning fit`"),
    ),
    Row(
        "a checkpoint of another model",
        lambda s: [
            f"--ckpt_path={s.trained}",
            f"--model.pretrained={tiny.save(s.folder / 'gpt2', 'gpt2')}",
        ],
        ("isn't one of this model", "give the configuration it was made with"),
    ),
    Row(
        "a checkpoint of another kind of training",
        lambda s: [f"--ckpt_path={s.trained}", "--model.lora.rank=4"],
        ("was made with model.lora None",),
    ),
    Row(
        "other questions than the checkpoint's",
        lambda s: [f"--ckpt_path={s.trained}", *rows(*sums(8))(s)],
        (
            "the training questions aren't those of the checkpoint",
            "give the same data.source",
            "data.max_prompt_tokens",
        ),
    ),
    Row(
        "another tokenizer than the checkpoint's",
        lambda s: [f"--ckpt_path={s.trained}", *model(template(tiny.CHAT_TEMPLATE + " "))(s)],
        ("the tokenizer or its chat template isn't that of the checkpoint", "the model folder"),
    ),
    Row(
        "exporting what isn't there",
        lambda s: ["export", "--ckpt_path=no.ckpt", f"--output={s.folder / 'new'}"],
        ("there is no checkpoint 'no.ckpt'", "give the path of one"),
        alone=True,
    ),
    Row(
        "exporting a file of torch",
        lambda s: ["export", f"--ckpt_path={torch_file(s, {})}", f"--output={s.folder / 'new'}"],
        ("was not written by `thinktuning fit`",),
        alone=True,
    ),
    Row(
        "exporting into a full folder",
        lambda s: ["export", f"--ckpt_path={s.trained}", f"--output={s.student()}"],
        ("isn't an empty folder", "choose another --output"),
        alone=True,
    ),
    Row(
        "exporting to where nobody can write",
        lambda s: ["export", f"--ckpt_path={s.trained}", f"--output={below_a_file(s)}"],
        ("cannot write",),
        alone=True,
    ),
    Row(
        "exporting adapters that aren't there",
        lambda s: [
            "export",
            f"--ckpt_path={s.trained}",
            f"--output={s.folder / 'new'}",
            "--adapter=true",
        ],
        ("has no LoRA to write", "leave out --adapter"),
        alone=True,
    ),
    Row(
        "exporting to nowhere",
        lambda s: ["export", f"--ckpt_path={s.trained}"],
        ("output", "required"),
        alone=True,
        code=2,
    ),
]

EVALUATION = [
    Row(
        "planning another method",
        ["plan", "--method=sft"],
        ("plan is for method thinktuning, got sft",),
        alone=True,
    ),
    Row(
        "fitting an evaluation",
        ["fit", "--method=evaluation"],
        ("method evaluation has only test",),
        alone=True,
    ),
    Row(
        "unknown benchmarks",
        lambda s: evaluation(s, "--data.benchmarks=[gsm9k,aime30]"),
        ("'gsm9k' is unknown", "'aime30' is unknown", "expected NAME or NAME=FILE"),
        alone=True,
    ),
    Row(
        "a benchmark's file that isn't there",
        lambda s: evaluation(s, "--data.benchmarks=[gsm8k=no.jsonl]"),
        ("no.jsonl",),
        alone=True,
    ),
    Row(
        "unknown strategies",
        lambda s: evaluation(s, "--model.strategies=[vote]"),
        ("'vote'", "zero_shot"),
        alone=True,
    ),
    Row(
        "comparing nothing",
        ["compare", "--models=[]", "--output=x"],
        ("models",),
        alone=True,
    ),
    Row(
        "comparing into a folder that can't be made",
        lambda s: [
            "compare",
            f"--models=[{{name: a, pretrained: {s.student()}}}]",
            f"--output={below_a_file(s)}",
        ],
        ("output", "can't be written into"),
        alone=True,
    ),
    Row(
        "an evaluation into a folder that can't be made",
        lambda s: evaluation(s, f"--trainer.default_root_dir={below_a_file(s)}"),
        ("default_root_dir", "can't be written into"),
        alone=True,
    ),
    Row(
        "validating without questions",
        lambda s: ["validate", *s.fit()[1:]],
        ("validate has no questions", "data.val_size"),
        alone=True,
    ),
    Row(
        "validating the last checkpoint where there is none",
        lambda s: ["validate", *s.fit("--ckpt_path=last", "--data.val_size=4")[1:]],
        ("there is no checkpoint under", "to validate"),
        alone=True,
    ),
]


def sft(setup: Setup, *more: str) -> list[str]:
    kept = [a for a in setup.fit() if not a.startswith(("--guidance", "--model.group_size"))]
    return [*kept, "--method=sft", *more]


def evaluation(setup: Setup, *more: str) -> list[str]:
    root = f"--trainer.default_root_dir={setup.folder / 'runs'}"
    file = f"--data.benchmarks=[gsm8k={setup.questions}]"
    good = ["--method=evaluation", f"--model.pretrained={setup.student()}", file, root]
    return ["test", *good, "--trainer.accelerator=cpu", *more]


def torch_file(setup: Setup, content: Any) -> Path:
    torch.save(content, setup.folder / "other.ckpt")
    return setup.folder / "other.ckpt"


# What the libraries below take in silence, or answer with a traceback.
LIBRARIES = [
    Row("one of several files isn't YAML", config("model: {\n"), ("mine.yaml",)),
    Row("a section that is a number", config("model: 3\n"), ("model", "3")),
    Row("a configuration that isn't UTF-8", config(b"# caf\xe9\n"), ("mine.yaml", "utf-8")),
    Row("a checkpoint as configuration", lambda s: [f"--config={s.trained}"], ("config",)),
    Row("a section twice", config("model: {}\nmodel: {}\n"), ("model", "twice")),
    Row("a negative seed", ["--seed_everything=-1"], ("seed_everything", "-1")),
    Row("temperature nan", ["--model.temperature=.nan"], ("temperature must be positive", "nan")),
    Row("gradient norm nan", ["--model.max_grad_norm=.nan"], ("max_grad_norm must be positive",)),
    Row(
        "deadline and gap nan",
        ["--model.reward_seconds=.nan", "--model.max_logprob_gap=.nan"],
        (
            "reward_seconds must be positive and",
            "max_logprob_gap must be positive or null, got nan",
        ),
    ),
    Row(
        "an endless deadline",
        ["--model.reward_seconds=.inf"],
        ("reward_seconds must be positive and at most", "inf"),
    ),
    Row("a deadline of centuries", ["--model.reward_seconds=1e10"], ("reward_seconds", "1000000")),
    Row("no rewards", ["--model.rewards=[]"], ("rewards", "at least one")),
    Row("a negative learning rate", ["--model.optimizer.lr=-1"], ("model.optimizer", "-1")),
    Row(
        "an optimizer with a closure", ["--model.optimizer=torch.optim.LBFGS"], ("model.optimizer",)
    ),
    Row("lora: alpha nan", ["--model.lora.alpha=.nan"], ("alpha must be positive", "nan")),
    Row(
        "a tokenizer with more tokens than the model",
        model(more_tokens_than_weights),
        ("tokenizer", "vocab"),
    ),
    Row(
        "a chat template that is broken",
        model(template("{% for m in messages %}")),
        ("chat template",),
    ),
    Row(
        "a chat template that takes no such chat",
        model(template("{{ raise_exception('only images') }}")),
        ("chat template", "only images"),
    ),
    Row(
        "the key itself for its variable",
        teacher(api_key_env="sk-s3cret"),
        ("api_key_env", "name of"),
    ),
    Row(
        "a key that could be a variable",
        teacher(api_key_env="hf_AbCs3cret"),
        ("api_key_env", "name of"),
    ),
    Row("a device that isn't there", ["--trainer.accelerator=tpu"], ("torch_xla",)),
    Row("an unknown device", ["--trainer.accelerator=abacus"], ("abacus", "cpu")),
    Row(
        "validation after the end",
        ["--data.val_size=4", "--trainer.val_check_interval=100"],
        ("val_check_interval", "100", "number of the training batches (3)"),
    ),
    Row("validation never", ["--trainer.check_val_every_n_epoch=0"], ("check_val_every_n_epoch",)),
    Row("barebones", ["--trainer.barebones=true"], ("barebones",)),
    Row(
        "a run's folder that can't be made",
        lambda s: [f"--trainer.default_root_dir={below_a_file(s)}"],
        ("default_root_dir",),
    ),
    Row(
        "a run's folder in /proc",
        ["--trainer.default_root_dir=/proc/runs"],
        ("default_root_dir", "/proc/runs"),
    ),
    Row("a folder for checkpoints", ["--checkpoint.dirpath=mine"], ("checkpoint.dirpath",)),
    Row(
        "a file of torch as checkpoint",
        lambda s: [f"--ckpt_path={torch_file(s, {'weight': torch.ones(2)})}"],
        ("other.ckpt", "was not written by `thinktuning fit`"),
    ),
    Row(
        "a file of torch that isn't a dictionary",
        lambda s: [f"--ckpt_path={torch_file(s, [1, 2])}"],
        ("other.ckpt", "was not written by `thinktuning fit`"),
    ),
    Row(
        "a checkpoint of another optimizer",
        lambda s: [
            f"--ckpt_path={s.trained}",
            "--model.optimizer=torch.optim.SGD",
            "--trainer.max_steps=2",
        ],
        ("optimizer",),
    ),
]

CATALOGUE = [
    *COMMAND_LINE,
    *MODEL,
    *FOLDERS,
    *DATA,
    *GUIDANCE,
    *ENGINE,
    *TRAINER,
    *CHECKPOINTS,
    *EVALUATION,
    *LIBRARIES,
]


@pytest.fixture(scope="module")
def trained(student, questions, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("trained")
    main(fit_arguments(student(), questions, root, "--trainer.max_steps=1", "--data.val_size=0"))
    return (root / "version_0" / "checkpoints" / "last.ckpt").resolve()


@pytest.fixture
def setup(student, questions, trained, tmp_path) -> Setup:
    return Setup(tmp_path, student, questions, trained)


def told(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and standard error of a command, as a shell would have them."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    shown, code = capsys.readouterr().err, ended.value.code
    if isinstance(code, str):  # which the interpreter prints
        return 1, f"{shown}\n{code}"
    return int(code or 0), shown


def plain(text: str) -> str:
    return " ".join(text.split()).lower()


@pytest.mark.parametrize("row", CATALOGUE, ids=lambda row: row.name)
def test_what_is_wrong_is_told_in_one_message(row, setup, capsys):
    code, shown = told(row.arguments(setup), capsys)
    assert code == row.code
    assert "Traceback" not in shown
    (message,) = re.split(r"^error: ", shown, flags=re.MULTILINE)[1:]
    assert "s3cret" not in shown
    assert len(message.splitlines()) < 15
    assert not [words for words in row.says if plain(words) not in plain(message)], message


def test_the_catalogue_is_as_long_as_was_promised():
    names = [row.name for row in CATALOGUE]
    assert len(names) == len(set(names)) >= 65


# ------------------------------------------------------------ several ranks

RANKS = """
import json, os, sys
from pathlib import Path
from thinktuning.cli import main

listed, told = Path(sys.argv[1]), []
for arguments in json.loads(listed.read_text()):
    try:
        main(arguments)
        told.append("nothing")
    except SystemExit as ended:
        told.append(ended.code)
listed.with_name(f"told.{os.environ['RANK']}.json").write_text(json.dumps(told))
"""

FSDP2 = "--trainer.strategy=fsdp2"
ON_TWO_RANKS = [
    Row(
        "8-bit optimizer under FSDP2",
        [FSDP2, "--model.optimizer=bitsandbytes.optim.AdamW8bit"],
        ("AdamW8bit can't step weights that are cut over ranks", "use torch.optim.AdamW"),
    ),
    Row(
        "8-bit weights under FSDP2",
        [FSDP2, "--model.lora.base=8bit"],
        ("8bit can't be cut over ranks", "use 4bit, bfloat16, or trainer.strategy ddp"),
    ),
    Row(
        "more ranks than rows",
        lambda s: [*rows(*sums(1))(s), "--data.batch_size=2"],
        ("1 prompts don't fill a batch of 2", "give more data"),
    ),
    Row(
        "a batch that the ranks can't share",
        ["--data.batch_size=3"],
        ("must be a multiple of their number; got batch_size=3 on 2 ranks",),
    ),
]


def test_what_two_ranks_cannot_do(setup):
    """In processes of their own: the groups that ranks make would stay in this one."""
    driver = setup.write("driver.py", RANKS)
    two = ("--trainer.devices=2", "--trainer.strategy=ddp")
    lines = [setup.fit(*two, *row.arguments(setup)[len(setup.fit()) :]) for row in ON_TWO_RANKS]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    listed = setup.write("runs.json", json.dumps(lines))
    done = run([sys.executable, *launch, str(driver), str(listed)])
    assert "Traceback" not in done.stderr
    for rank in (0, 1):
        told_it = json.loads((setup.folder / f"told.{rank}.json").read_text())
        for row, message in zip(ON_TWO_RANKS, told_it, strict=True):
            assert message.startswith("error: "), row.name
            assert not [words for words in row.says if plain(words) not in plain(message)], message


# ------------------------------------------------------------- handled right


class Keeper(Callback):
    """Keeps what a run was trained on."""

    batches: ClassVar[list[RolloutBatch]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.batches.append(outputs["rollouts"])


@pytest.fixture
def train(setup):
    """Run a fit with more flags; returns the rollouts of its steps."""
    Keeper.batches.clear()

    def run_it(*more: str) -> list[RolloutBatch]:
        main(setup.fit("--trainer.callbacks+=test_bad_input.Keeper", *more))
        assert Keeper.batches, "the run has trained"
        return list(Keeper.batches)

    return run_it


def audited(setup: Setup) -> list[dict[str, Any]]:
    return audit(setup.folder / "runs" / "version_0")


def test_pad_that_is_eos(setup, train):
    """The token that ends a turn is trained on, though padding looks like it."""
    changed = model(edit("tokenizer_config.json", pad_token="<|end|>"))(setup)
    (batch,) = train(*changed)
    text = AutoTokenizer.from_pretrained(changed[0].partition("=")[2])
    assert text.pad_token_id == text.eos_token_id
    finished = [r for r in batch.rollouts if r.finished]
    assert finished and all(r.completion_ids[-1] == text.eos_token_id for r in finished)
    inputs = policy_inputs(batch, torch.device("cpu"))
    counted = inputs.completion_mask.sum(dim=1).tolist()
    assert counted == [len(r.completion_ids) for r in batch.rollouts]
    assert len(set(counted)) > 1, "some are padded"


def test_several_eos_ids(setup, train):
    """Each of them ends a turn, and none stands inside of one."""
    text = tiny.tokenizer("own_pad")
    *_, period = text.encode("It is \\boxed{3}.", add_special_tokens=False)
    both = [text.eos_token_id, period]
    changed = model(edit("generation_config.json", eos_token_id=both))(setup)
    (batch,) = train(*changed, "--guidance.gamma.start=0")
    folder = changed[0].partition("=")[2]
    assert end_of_turn_ids(text, load_generation_config(folder)) == tuple(sorted(both))
    finished = [r.completion_ids for r in batch.rollouts if r.finished]
    assert period in {ids[-1] for ids in finished}
    assert all(ids[-1] in both and not set(both) & set(ids[:-1]) for ids in finished)


def test_doubled_bos(setup, train):
    """A template that writes BOS, and a tokenizer that adds it: the prompt has one."""
    changed = model(template("{{ bos_token }}{{ bos_token }}" + tiny.CHAT_TEMPLATE))(setup)
    (batch,) = train(*changed)
    bos = tiny.tokenizer("own_pad").bos_token_id
    for rollout in batch.rollouts:
        assert rollout.prompt.token_ids[0] == bos
        assert rollout.prompt.token_ids.count(bos) == 1


def test_no_chat_template(setup, train):
    """The messages stand as paragraphs."""
    folder = tiny.save(setup.folder / "model", kind="no_template")
    (batch,) = train(f"--model.pretrained={folder}", "--model.max_new_tokens=8")
    text = tiny.tokenizer("no_template")
    for rollout in batch.rollouts:
        shown = text.decode(rollout.prompt.token_ids)
        assert shown == f"Add.\n\n{rollout.prompt.question}\n\nBox it.\n\n"


def test_no_pad_token(setup, train):
    """Nothing of the tokenizer's is asked for: padding is masked."""
    changed = model(edit("tokenizer_config.json", pad_token=None))(setup)
    (batch,) = train(*changed)
    assert all(r.advantage is not None for r in batch.rollouts)


def test_duplicate_rows(train, setup):
    """Each is a question of its own, with a group and random numbers of its own."""
    (batch,) = train(*rows(*[sums(3)[2]] * 4)(setup), "--guidance.gamma.start=0")
    assert sorted({r.prompt.index for r in batch.rollouts}) == [0, 1, 2, 3]
    assert len({tuple(r.prompt.token_ids) for r in batch.rollouts}) == 1
    groups = {tuple(r.completion_ids for r in group) for group in batch.groups()}
    assert len(groups) == 4


def test_a_huge_row(train, setup, caplog):
    """It is left out, counted and logged; the others are trained on."""
    huge = {"question": "1 plus 1? " * 20_000, "answer": "#### 2"}
    with caplog.at_level(logging.WARNING, logger="thinktuning"):
        (batch,) = train(*rows(huge, *sums(4))(setup))
    assert "1 of 5 training prompts are longer than max_prompt_tokens=512" in caplog.text
    assert {r.prompt.index for r in batch.rollouts} == {1, 2, 3, 4}


def test_a_file_from_another_system(train, setup):
    """A byte order mark, Windows' line ends and empty lines are no part of the rows."""
    lines = "\r\n\r\n".join(json.dumps(row) for row in sums(4))
    (batch,) = train(*data(b"\xef\xbb\xbf" + lines.encode() + b"\r\n\r\n")(setup))
    assert {r.prompt.question for r in batch.rollouts} == {row["question"] for row in sums(4)}


def test_a_teacher_that_is_not_there(train, setup, caplog):
    """Its rollouts stay unguided, are counted and logged, and the run goes on."""
    with caplog.at_level(logging.WARNING, logger="thinktuning"):
        (batch,) = train(*teacher())
    assert not any(r.guided for r in batch.rollouts)
    assert {row["skipped"] for row in audited(setup)} == {"unavailable"}
    assert "http://127.0.0.1:9/v1 doesn't answer" in caplog.text


def test_no_room_for_the_teacher_s_examples(train, setup):
    """Rollouts stay unguided, and the audit says why."""
    (batch,) = train("--guidance.teacher=null", "--guidance.max_prompt_tokens=5")
    assert not any(r.guided for r in batch.rollouts)
    assert {row["skipped"] for row in audited(setup)} == {"prompt_too_long"}


def test_resuming_where_there_is_no_run(train, setup):
    """``last`` under a root without runs starts afresh, and says so."""
    with pytest.warns(UserWarning, match="starts afresh"):
        assert train("--ckpt_path=last")[0].step == 0
