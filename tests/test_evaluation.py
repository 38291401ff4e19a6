"""``thinktuning test`` with benchmarks: answered, judged, kept, gone on with."""

import csv
import json
import sys
from pathlib import Path

import pytest
import tiny
import torch
from running import calls, fit_arguments, run, run_on_ranks, scalars

from thinktuning.cli import main
from thinktuning.evaluation.records import ItemResult
from thinktuning.policy import load_model
from thinktuning.rewards import verify_math
from thinktuning.trained import load_trained
from thinktuning.types import Outcome

pytestmark = pytest.mark.slow

TEXTS = {"system": "Add.", "math": "Box it.", "choice": "Box it.", "yes_no": "Box it."}


@pytest.fixture(scope="module")
def choices(tmp_path_factory) -> Path:
    """Five sums with options, in the uniform format."""
    path = tmp_path_factory.mktemp("benchmarks") / "arc.jsonl"
    rows = [
        {
            "id": f"arc_challenge/{a}",
            "benchmark": "arc_challenge",
            "question": f"{a} plus 1?",
            "choices": [str(a), str(a + 1), "7"],
            "answer": "B",
            "source": "invented",
        }
        for a in range(5)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def arguments(student, questions, choices):
    def make(root: Path, *more: str) -> list[str]:
        return [
            "test",
            "--method=evaluation",
            "--seed_everything=3",
            f"--model.pretrained={student()}",
            f"--model.texts={json.dumps(TEXTS)}",
            "--model.max_new_tokens=24",
            "--model.budget=16",
            f"--model.cells={root / 'cells'}",
            f"--data.benchmarks=[gsm8k={questions},arc_challenge={choices}]",
            "--data.limit=7",
            "--data.batch_size=2",
            "--engine=running.LoggedEngine",
            f"--engine.log={root / 'calls'}",
            "--trainer.accelerator=cpu",
            f"--trainer.default_root_dir={root}",
            *more,
        ]

    return make


def items(root: Path, benchmark="gsm8k", strategy="zero_shot") -> Path:
    (folder,) = (root / "cells").glob(f"*.{strategy}.{benchmark}-*")
    assert not list(folder.glob("items.*.jsonl")), "parts of ranks are left"
    return folder / "items.jsonl"


def results(path: Path) -> list[ItemResult]:
    return [ItemResult.from_json(line) for line in path.read_text().splitlines()]


ALL = "--model.strategies=[zero_shot,self_verify,self_correct,s1_budget]"


def test_items_are_answered_judged_logged_and_shown(arguments, questions, tmp_path, capsys):
    main(arguments(tmp_path, ALL))
    shown = capsys.readouterr().out
    logged = scalars(tmp_path / "version_0")
    assert "accuracy in percent" in shown
    for strategy in ("zero_shot", "self_verify", "self_correct", "s1_budget"):
        assert shown.count(f" {strategy} ") == 6, "two benchmarks in three tables"
        for benchmark, number in (("gsm8k", 7), ("arc_challenge", 5)):
            found = results(items(tmp_path, benchmark, strategy))
            assert len(found) == number
            samples = [sample for result in found for sample in result.samples]
            right = sum(sample.outcome is Outcome.CORRECT for sample in samples)
            tag = f"{strategy}/{benchmark}"
            assert logged[f"{tag}/accuracy"] == [pytest.approx(right / number)]
            tokens = sum(sample.tokens for sample in samples) / number
            assert logged[f"{tag}/tokens"] == [pytest.approx(tokens)]
            assert logged[f"{tag}/outcome/correct"] == [pytest.approx(right / number)]
            assert f"{tag}/behavior/self_critique" in logged
    found = results(items(tmp_path))
    first = json.loads(questions.read_text().splitlines()[0])
    assert found[0].question == first["question"]
    assert "0 plus 0?\n\nBox it." in found[0].samples[0].turns[0].prompt
    assert {s.outcome for r in found for s in r.samples} != {Outcome.WRONG}, "a student that adds"
    for result in found:
        (sample,) = result.samples
        finished = sample.outcome is not Outcome.CUT_OFF
        assert sample.outcome is verify_math(sample.response, result.answer, finished)
    assert "1. " not in found[0].samples[0].turns[0].prompt
    (asked,) = results(items(tmp_path, "arc_challenge"))[0].samples
    assert "A. 0\nB. 1\nC. 7" in asked.turns[0].prompt


def test_ranks_have_the_results_and_numbers_of_one(arguments, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for root in (one, two):
        root.mkdir()
    main(arguments(one, ALL))
    more = ("--trainer.devices=2", "--trainer.strategy=ddp")
    run_on_ranks(2, [arguments(two, ALL, *more)], tmp_path)
    for strategy in ("zero_shot", "s1_budget"):
        for benchmark in ("gsm8k", "arc_challenge"):
            where = benchmark, strategy
            assert items(one, *where).read_bytes() == items(two, *where).read_bytes()
    assert scalars(one / "version_0") == scalars(two / "version_0")


def test_a_killed_evaluation_goes_on_behind_what_is_finished(arguments, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for root in (whole, killed):
        root.mkdir()
    main(arguments(whole))
    command = [sys.executable, "-m", "thinktuning.cli"]
    done = run([*command, *arguments(killed, "--engine.killed_before=3")])
    assert done.returncode == -9, done.stderr[-2000:]
    assert calls(killed / "calls") == [2, 2, 2]
    main(arguments(killed))
    assert calls(killed / "calls") == calls(whole / "calls") == [2, 2, 2, 1, 2, 2, 1]
    for benchmark in ("gsm8k", "arc_challenge"):
        assert items(killed, benchmark).read_bytes() == items(whole, benchmark).read_bytes()
    assert scalars(killed / "version_1") == scalars(whole / "version_0")


def test_what_is_finished_needs_no_model(arguments, tmp_path, monkeypatch, capsys):
    main(arguments(tmp_path))
    before, first = calls(tmp_path / "calls"), capsys.readouterr().out
    monkeypatch.delattr("thinktuning.evaluation.module.load_model")
    main(arguments(tmp_path))
    assert calls(tmp_path / "calls") == before
    assert capsys.readouterr().out == first


def test_other_settings_and_other_items_are_asked_again(arguments, tmp_path):
    main(arguments(tmp_path, "--data.limit=2"))
    main(arguments(tmp_path, "--data.limit=5"))
    assert calls(tmp_path / "calls") == [2, 2, 2, 1, 2, 1], "only what is new"
    assert [r.id for r in results(items(tmp_path))] == [f"gsm8k/{i}" for i in range(5)]
    main(arguments(tmp_path, "--data.limit=2", "--model.budget=8"))  # of another strategy
    assert len(calls(tmp_path / "calls")) == 6
    main(arguments(tmp_path, "--data.limit=2", "--model.max_new_tokens=23"))
    assert len(calls(tmp_path / "calls")) == 8
    path = next((tmp_path / "cells").glob("*gsm8k-*/items.jsonl"))
    path.write_text(path.read_text().replace("0 plus 0?", "0 minus 0?"))
    main(arguments(tmp_path, "--data.limit=2"))
    main(arguments(tmp_path, "--data.limit=2", "--model.max_new_tokens=23"))
    assert calls(tmp_path / "calls")[8:] == [1], "the result was of another question"


def test_lines_that_were_cut_off_or_spoilt(arguments, tmp_path, caplog):
    main(arguments(tmp_path))
    path = items(tmp_path)
    good = path.read_bytes()
    (path.parent / "items.0.jsonl").write_bytes(b'{"id": "gsm8k/0", "que')
    main(arguments(tmp_path))
    assert "cut off by a kill" in caplog.text
    assert path.read_bytes() == good
    lines = good.split(b"\n")
    path.write_bytes(b"\n".join([lines[0], b'{"id": 1}', *lines[2:]]))
    with pytest.raises(SystemExit, match=r"line 2 of .*items\.jsonl.* isn't a result"):
        main(arguments(tmp_path))


def test_several_samples_are_drawn_again_bit_for_bit(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")  # a narrow table breaks its heads
    drawn = ("--model.samples=3", "--model.temperature=1", ALL)
    for root in (tmp_path / "a", tmp_path / "b"):
        root.mkdir()
        main(arguments(root, *drawn))
    assert items(tmp_path / "a").read_bytes() == items(tmp_path / "b").read_bytes()
    shown = capsys.readouterr().out
    assert all(column in shown for column in ("mean@3", "maj@3", "pass@1", "pass@2", "pass@3"))
    found = results(items(tmp_path / "a"))
    assert any(len({s.response for s in r.samples}) > 1 for r in found)
    logged = scalars(tmp_path / "a" / "version_0")
    right = [sum(s.outcome is Outcome.CORRECT for s in r.samples) for r in found]
    assert logged["zero_shot/gsm8k/accuracy"] == [pytest.approx(sum(right) / 21)]
    assert logged["zero_shot/gsm8k/pass_at_3"] == [pytest.approx(sum(map(bool, right)) / 7)]


def test_a_checkpoint_answers_as_its_exported_policy(arguments, student, questions, tmp_path):
    main(fit_arguments(student(), questions, tmp_path / "fit", "--trainer.max_steps=2"))
    checkpoint = tmp_path / "fit" / "version_0" / "checkpoints" / "last.ckpt"
    main(["export", f"--ckpt_path={checkpoint}", f"--output={tmp_path / 'exported'}"])
    for root, model in (
        (tmp_path / "a", ("--model.pretrained=embedded", f"--ckpt_path={checkpoint}")),
        (tmp_path / "b", (f"--model.pretrained={tmp_path / 'exported'}",)),
    ):
        root.mkdir()
        main(arguments(root, *model))
    assert items(tmp_path / "a").read_bytes() == items(tmp_path / "b").read_bytes()
    other = tiny.save(tmp_path / "other", "qwen2")
    with pytest.raises(SystemExit, match=r"doesn't fit the base model .*--model\.base of test"):
        main(arguments(tmp_path, f"--model.base={other}", f"--ckpt_path={checkpoint}"))


def test_a_checkpoint_in_bfloat16_is_the_exported_policy_in_bfloat16(student, questions, tmp_path):
    main(fit_arguments(student(), questions, tmp_path, "--trainer.max_steps=1"))
    checkpoint = tmp_path / "version_0" / "checkpoints" / "last.ckpt"
    main(["export", f"--ckpt_path={checkpoint}", f"--output={tmp_path / 'exported'}"])
    found = load_trained(checkpoint, dtype=torch.bfloat16).model
    expected = load_model(str(tmp_path / "exported"), torch.bfloat16)
    row = torch.arange(5, 80)[None]
    torch.testing.assert_close(found(row).logits, expected(row).logits, rtol=0, atol=0)


def test_a_behavior_without_patterns_is_not_counted(arguments, tmp_path, capsys):
    example = {"question": "1?", "response": "2.", "opinion": "incorrect", "reason": "No."}
    content = {"name": "mine", "instruction": "reflect", "examples": [{**example, "phrase": "1."}]}
    (tmp_path / "mine.yaml").write_text(json.dumps(content))
    main(arguments(tmp_path, f"--model.behaviors=[{tmp_path / 'mine.yaml'},self_critique]"))
    shown = capsys.readouterr().out
    assert "self critique" in shown and "mine" not in shown
    main(arguments(tmp_path, f"--model.behaviors=[{tmp_path / 'mine.yaml'}]"))
    assert "by its patterns" not in capsys.readouterr().out


def test_results_follow_the_judge(arguments, tmp_path):
    main(arguments(tmp_path))
    path = items(tmp_path)
    judged, asked = path.read_bytes(), calls(tmp_path / "calls")
    path.write_bytes(judged.replace(b'"outcome": "correct"', b'"outcome": "wrong"'))
    main(arguments(tmp_path))
    assert path.read_bytes() != judged, "the same judge isn't asked again"
    (path.parent / "judge").write_text("an older one")
    main(arguments(tmp_path))
    assert path.read_bytes() == judged
    assert calls(tmp_path / "calls") == asked


def test_a_rank_may_have_nothing_to_ask(arguments, questions, tmp_path):
    more = (
        "--trainer.devices=2",
        "--trainer.strategy=ddp",
        "--data.limit=3",
        "--data.batch_size=9",
    )
    asked = arguments(tmp_path, f"--data.benchmarks=[gsm8k={questions}]", *more)
    run_on_ranks(2, [asked], tmp_path)
    assert len(results(items(tmp_path))) == 3


def test_vllm_answers_as_transformers_does(arguments, student, tmp_path):
    small = student(max_position_embeddings=2048, width=64, heads=2)  # what vLLM wants on CPUs
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for root in (ours, theirs):
        root.mkdir()
    model = f"--model.pretrained={small}"
    main(arguments(ours, ALL, model))
    settings = [a for a in arguments(theirs, ALL, model) if not a.startswith("--engine")]
    engine = ["--engine=thinktuning.engines.VLLMEngine", "--engine.max_model_len=2048"]
    more = [*settings, *engine, "--engine.kv_cache_gib=0.25"]
    done = run([sys.executable, "-m", "thinktuning.cli", *more])
    assert done.returncode == 0, done.stderr[-2000:]
    for strategy in ("zero_shot", "self_verify", "self_correct", "s1_budget"):
        where = "gsm8k", strategy
        assert items(ours, *where).read_bytes() == items(theirs, *where).read_bytes()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model.strategies=[zero_shot,guess]"], r"self_correct, s1_budget; got 'guess'"),
        (["--data.benchmarks=[gsm9k,mmlu]"], r"(?s)'gsm9k' is unknown.*'mmlu' is unknown"),
        (["--data.benchmarks=[gsm8k=/nowhere.jsonl]"], r"there is no file '/nowhere\.jsonl'"),
        (["--model.pretrained=null"], r"give model\.pretrained, or --ckpt_path"),
        (
            ["--engine=thinktuning.engines.TransformersEngine", "--engine.pretrained=embedded"],
            r"leave out engine\.pretrained",
        ),
        (["--model.attention=flash_attention_2"], r"cannot load the model"),
        (["--model.max_new_tokens=1020"], r"1024 positions .* 7 of 7 items of gsm8k"),
        (["--trainer.limit_test_batches=1"], r"has 2 of 7 results"),
        (["--ckpt_path=/nowhere.ckpt"], r"there is no checkpoint '/nowhere\.ckpt'"),
        (["--ckpt_path=last"], r"there is no checkpoint 'last'; give the path"),
        (["--model.samples=0", "--model.budget=0"], r"samples must be.*budget must be"),
        (["--model.samples=4"], r"samples=4 at temperature 0"),
        (["--data.batch_size=0", "--data.limit=0"], r"limit must be.*batch_size must be"),
        (["--model.behaviors=[shouting]"], r"behavior 'shouting' is unknown"),
        (["--model.pretrained=/nowhere"], r"cannot read the configuration of the model"),
        (["--method=guess"], r"method must be one of thinktuning, sft, star, evaluation"),
    ],
)
def test_faults_are_told_in_a_few_lines(arguments, tmp_path, more, message):
    with pytest.raises(SystemExit, match=message) as told:
        main(arguments(tmp_path, *more))
    assert str(told.value).startswith("error: ")


def test_shards_are_refused(arguments, tmp_path):
    # In a process of its own: Lightning makes a process group before it asks the module.
    sharded = arguments(tmp_path, "--trainer.strategy=fsdp2")
    done = run([sys.executable, "-m", "thinktuning.cli", *sharded])
    assert done.returncode == 1
    assert "error: an evaluation has the whole model on every rank" in done.stderr


def test_an_evaluation_has_nothing_to_fit(arguments, tmp_path):
    with pytest.raises(SystemExit, match=r"method evaluation has only test"):
        main(["fit", *arguments(tmp_path)[1:]])


def test_a_method_by_a_flag_and_another_by_a_file(tmp_path):
    (tmp_path / "sft.yaml").write_text("method: sft\n")
    file = f"--config={tmp_path / 'sft.yaml'}"
    with pytest.raises(SystemExit, match=r"method is evaluation by one flag or file and sft by"):
        main(["test", "--method=evaluation", file, "--data.benchmarks=[gsm8k]"])
    with pytest.raises(SystemExit, match=r"plan is for method thinktuning, got sft"):
        main(["plan", file])


# ------------------------------------------------------------------------------- compare


@pytest.fixture
def comparison(arguments, student, tmp_path):
    """A configuration of `thinktuning compare`: two models, one of them with two strategies."""
    evaluation = tmp_path / "eval.yaml"
    settings: dict = {}
    for option in arguments(tmp_path)[1:]:
        *path, last = option.removeprefix("--").partition("=")[0].split(".")
        level = settings
        for key in path:
            level = level.setdefault(key, {})
        value = option.partition("=")[2]
        if option.startswith("--engine"):
            continue
        if value.startswith("["):
            level[last] = value.strip("[]").split(",")
        elif value.startswith("{"):
            level[last] = json.loads(value)
        else:
            level[last] = int(value) if value.isdigit() else value
    settings["engine"] = {
        "class_path": "running.LoggedEngine",
        "init_args": {"log": str(tmp_path / "calls")},
    }
    evaluation.write_text(json.dumps(settings))
    other = tiny.save(tmp_path / "untrained")
    models = [
        {"name": "student", "pretrained": str(student()), "strategies": ["zero_shot", "s1_budget"]},
        {"name": "<untrained>", "pretrained": str(other)},
    ]
    config = tmp_path / "compare.yaml"
    content = {"models": models, "evaluation": str(evaluation), "output": str(tmp_path / "out")}
    config.write_text(json.dumps(content))
    return config


def test_a_comparison_runs_what_is_missing_and_reports_all(comparison, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    main(["compare", f"--config={comparison}"])
    asked = calls(tmp_path / "calls")
    with (tmp_path / "out" / "report.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6, "three runs on two benchmarks"
    for name in ("report.md", "report.html"):
        text = (tmp_path / "out" / name).read_text()
        assert "s1" in text and "budget" in text  # Markdown escapes what is between
        assert "<untrained>" not in text, "names are escaped"
    config = json.loads(comparison.read_text())
    config["models"][1]["strategies"] = ["zero_shot", "self_correct"]
    comparison.write_text(json.dumps(config))
    main(["compare", f"--config={comparison}"])
    turns = [2, 2, 2, 2, 2, 2, 1, 1]  # two of every batch
    assert calls(tmp_path / "calls")[len(asked) :] == [*turns, 2, 2, 2, 2, 1, 1]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"models": []}, "models must name at least one"),
        ({"baseline": "student/guess"}, "one of student/zero_shot, student/s1_budget, <untr"),
        ({"evaluation": "/nowhere.yaml", "strategies": ["guess"]}, "(?s)/nowhere.*'guess'"),
        (
            {"models": [{"name": "a"}, {"name": "a", "checkpoint": "/nowhere.ckpt"}]},
            "(?s)two models have the name 'a'.*either pretrained or checkpoint.*no checkpoint",
        ),
        ({"models": [{"name": "a", "pretrained": "/nowhere"}]}, "evaluation of a failed"),
    ],
)
def test_faults_of_a_comparison(comparison, monkeypatch, changed, message):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    comparison.write_text(json.dumps(json.loads(comparison.read_text()) | changed))
    with pytest.raises(SystemExit, match=message):
        main(["compare", f"--config={comparison}"])
