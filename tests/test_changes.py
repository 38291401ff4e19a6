"""What a run notes of its data, tokenizer and files, and what it says of other ones as it resumes.

Starts of runs without their training; test_stopping.py has whole ones.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from running import fit_arguments
from safetensors.torch import load_file, save_file

from thinktuning.callbacks import ResumeCheck, TeacherGuidance
from thinktuning.cli import main
from thinktuning.data import GSM8KDataModule
from thinktuning.errors import InputError
from thinktuning.policy import LoraSettings, load_tokenizer

pytestmark = pytest.mark.faults

BEHAVIOR = """\
name: adding
instruction: add the numbers once more.
examples:
  - question: 1 plus 1?
    response: It is 2.
    opinion: correct
    reason: I have counted.
    phrase: So it is 2.
"""


@pytest.fixture
def start(tmp_path):
    """What a run begins from: a model, questions for training and validation, a behavior."""
    folder = tiny.save(tmp_path / "model")
    for name in ("train", "val"):
        rows = [{"question": f"{name} {n}?", "answer": f"It is {n}.\n#### {n}"} for n in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "mine.yaml").write_text(BEHAVIOR)
    return SimpleNamespace(
        folder=tmp_path,
        model=folder,
        train=tmp_path / "train.jsonl",
        val=tmp_path / "val.jsonl",
        behavior=tmp_path / "mine.yaml",
    )


def started(start, lora=None):
    """The parts of a run that the check looks at."""
    source, val = str(start.train), str(start.val)
    data = GSM8KDataModule(str(start.model), source=source, val_source=val, val_size=4)
    data.setup("fit")
    guidance = TeacherGuidance(behaviors=[str(start.behavior), "self_critique"])
    fitting = SimpleNamespace(fn="fit")
    trainer = SimpleNamespace(datamodule=data, state=fitting, callbacks=[guidance])
    text = load_tokenizer(str(start.model))
    return trainer, SimpleNamespace(tokenizer=text, pretrained=str(start.model), lora=lora)


def saved(start) -> dict:
    checkpoint: dict = {}
    ResumeCheck().on_save_checkpoint(*started(start), checkpoint)
    return checkpoint


def told_on_resume(start, checkpoint, caplog) -> list[str]:
    """Lines about what has changed; an error if it is refused."""
    caplog.clear()
    ResumeCheck().on_load_checkpoint(*started(start), checkpoint)
    return [line.strip() for r in caplog.records for line in r.getMessage().splitlines()[1:]]


def edit(path: Path, before: str, after: str) -> None:
    content = path.read_text()
    assert before in content
    path.write_text(content.replace(before, after))


def test_the_same_start_is_neither_refused_nor_told_of(start, caplog):
    assert not told_on_resume(start, saved(start), caplog)


def test_a_call_of_the_tokenizer_is_no_change(start, caplog):
    trainer, module = started(start)
    before: dict = {}
    module.tokenizer(["3", "3 plus"], padding=True, truncation=True, max_length=2)
    ResumeCheck().on_save_checkpoint(trainer, module, before)
    assert not told_on_resume(start, before, caplog)


# ------------------------------------------------------------------ questions


@pytest.mark.parametrize(
    ("before", "after"), [("train 2?", "train two?"), ("#### 2", "#### 7"), ("It is 2.", "It's 2.")]
)
def test_another_question_answer_or_solution_is_refused(start, caplog, before, after):
    checkpoint = saved(start)
    edit(start.train, before, after)
    with pytest.raises(InputError, match=r"training questions aren't those .* worked solutions"):
        told_on_resume(start, checkpoint, caplog)


@pytest.mark.parametrize(("before", "after"), [("val 2?", "val two?"), ("#### 2", "#### 7")])
def test_another_validation_question_is_told(start, caplog, before, after):
    checkpoint = saved(start)
    edit(start.val, before, after)
    assert told_on_resume(start, checkpoint, caplog) == ["validation questions: other contents"]


# ------------------------------------------------------------------ tokenizer


def fewer_merges(rules: dict) -> None:
    del rules["model"]["merges"][-20:]


def other_normalizer(rules: dict) -> None:
    rules["normalizer"] = {"type": "Lowercase"}


def other_pre_tokenizer(rules: dict) -> None:
    rules["pre_tokenizer"]["add_prefix_space"] = True


def no_bos(rules: dict) -> None:
    rules["post_processor"] = None


def another_token(rules: dict) -> None:
    vocabulary, merges = rules["model"]["vocab"], rules["model"]["merges"]
    del vocabulary["".join(merges.pop())]


@pytest.mark.parametrize(
    "change", [fewer_merges, other_normalizer, other_pre_tokenizer, no_bos, another_token]
)
def test_another_tokenizer_is_refused(start, caplog, change):
    checkpoint, before = saved(start), load_tokenizer(str(start.model))
    path = start.model / "tokenizer.json"
    rules = json.loads(path.read_text())
    change(rules)
    path.write_text(json.dumps(rules))
    now = load_tokenizer(str(start.model))
    assert now.chat_template == before.chat_template
    assert (now.get_vocab() == before.get_vocab()) == (change is not another_token)
    text = " ".join(tiny.CORPUS)
    assert change is another_token or now.encode(text) != before.encode(text)
    with pytest.raises(InputError, match=r"the tokenizer or its chat template isn't that of"):
        told_on_resume(start, checkpoint, caplog)


# ---------------------------------------------------------------------- files


def test_another_behavior_under_the_same_path_is_told(start, caplog):
    checkpoint = saved(start)
    edit(start.behavior, "I have counted.", "I have counted again.")
    assert told_on_resume(start, checkpoint, caplog) == ["behavior adding: other contents"]


def other_weights(model: Path) -> None:
    path = model / "model.safetensors"
    size = path.stat().st_size
    weights = {name: weight + 1e-3 for name, weight in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    assert path.stat().st_size == size


def other_settings(model: Path) -> None:
    edit(model / "config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05')


@pytest.mark.parametrize("change", [other_weights, other_settings])
def test_another_model_under_the_same_path_is_told(start, caplog, change):
    checkpoint = saved(start)
    change(start.model)
    assert told_on_resume(start, checkpoint, caplog) == ["model.pretrained: other contents"]


def test_adapters_do_not_go_on_on_other_weights(start):
    lora = LoraSettings()
    check, checkpoint = ResumeCheck(), {}
    check.on_save_checkpoint(*started(start, lora), checkpoint)
    other_weights(start.model)
    with pytest.raises(InputError, match="the checkpoint has adapters only"):
        ResumeCheck().on_load_checkpoint(*started(start, lora), checkpoint)


def test_what_is_changed_while_a_run_goes_on_is_told_when_it_resumes(start, caplog):
    """The run has read the files that were there as it began."""
    check, parts, checkpoint = ResumeCheck(), started(start), {}
    check.on_fit_start(*parts)
    other_weights(start.model)
    check.on_save_checkpoint(*parts, checkpoint)
    assert told_on_resume(start, checkpoint, caplog) == ["model.pretrained: other contents"]


# ------------------------------------------------------------- older versions


def test_what_an_older_version_did_not_note_is_not_compared(start, caplog):
    checkpoint = saved(start)
    noted = checkpoint["made_of"]
    for key in ("solutions", "tokenizer_rules", "contents"):
        del noted[key]
    edit(start.train, "It is 2.", "It's 2.")
    edit(start.val, "val 2?", "val two?")
    other_weights(start.model)
    assert not told_on_resume(start, checkpoint, caplog)
    edit(start.train, "train 2?", "train two?")
    with pytest.raises(InputError, match="training questions"):
        told_on_resume(start, checkpoint, caplog)


# ------------------------------------------------------------------ whole runs


@pytest.mark.slow
def test_a_run_tells_of_other_files_as_it_resumes(start, questions, tmp_path, caplog):
    behavior = f"--guidance.behaviors=[{start.behavior}]"
    arguments = fit_arguments(start.model, questions, tmp_path / "runs", behavior)
    main([*arguments, "--trainer.max_steps=1"])
    edit(start.behavior, "I have counted.", "I have counted again.")
    other_weights(start.model)
    caplog.clear()
    main([*arguments, "--trainer.max_steps=1", "--ckpt_path=last"])
    (told,) = [r.getMessage() for r in caplog.records if "changed since" in r.getMessage()]
    assert told.splitlines()[1:] == [
        "  behavior adding: other contents",
        "  model.pretrained: other contents",
    ]
