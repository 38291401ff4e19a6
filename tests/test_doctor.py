"""The doctor on a healthy set-up, and on one for each thing that may be wrong with it."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from conftest import prompt_ids
from running import fit_arguments
from tokenizers import decoders

from thinktuning.cli import main
from thinktuning.data import GSM8KDataModule
from thinktuning.doctor import Status, machine, sampling, text
from thinktuning.doctor.examination import Check, run
from thinktuning.doctor.setup import Setup
from thinktuning.engines import TransformersEngine
from thinktuning.errors import InputError
from thinktuning.module import ThinkTuningModule
from thinktuning.plan.job import GIB
from thinktuning.policy import render_prompt
from thinktuning.rewards.verifier import Verifier
from thinktuning.types import Prompt
from thinktuning.wiring import DoctorCLI

QUESTION = "3 plus 4?"


class _Parsed(DoctorCLI):
    """Reads the configuration, and leaves it at that."""

    def instantiate_classes(self) -> None:
        pass


@pytest.fixture
def setup(student, questions, tmp_path, monkeypatch):
    """A function that makes a set-up that is healthy but for some flags."""
    monkeypatch.setattr(sys, "argv", ["thinktuning"])  # else Lightning warns
    made: list[Setup] = []

    def make(*flags: str) -> Setup:
        cli = _Parsed(
            ThinkTuningModule,
            GSM8KDataModule,
            args=fit_arguments(student(), questions, tmp_path, *flags)[1:],
            run=False,
            auto_configure_optimizers=False,
        )
        made.append(Setup(cli.config))
        return made[-1]

    yield make
    for one in made:
        one.close()


def doctor(capsys, *arguments: str) -> tuple[int, str]:
    """Exit code, and what was printed, in one line."""
    code = 0
    try:
        main(["doctor", *arguments])
    except SystemExit as ended:
        code = ended.code
    return code, " ".join(capsys.readouterr().out.split())


def test_a_healthy_set_up(capsys, monkeypatch, student, questions, tmp_path):
    monkeypatch.setenv("COLUMNS", "600")
    arguments = fit_arguments(student(), questions, tmp_path / "runs")[1:]
    code, said = doctor(capsys, *arguments)
    assert code == 0, said
    assert "17 checks: 17 ok." in said
    for number, name in enumerate(["versions", "devices", "checkpoint folder", "verifier"], 1):
        assert f"{number}/17 {name} …" in said, "a line as it begins"
    assert "<|bos|><|start|>system" in said, "the first prompt"
    assert "Add.<|end|><|start|>user" in said
    assert "begins with 1 BOS token (<|bos|>)" in said
    assert "3 of 3 replies parse" in said
    assert list(tmp_path.iterdir()) == [], "no run, and no folder of one"


def test_what_is_wrong_is_told_together_and_the_rest_is_checked(
    capsys, monkeypatch, questions, tmp_path
):
    monkeypatch.setenv("COLUMNS", "600")
    (tmp_path / "file").touch()
    code, said = doctor(
        capsys, *fit_arguments(Path("/nowhere"), questions, tmp_path / "file" / "runs")[1:]
    )
    assert code == 1
    assert "nothing can be written into" in said and "Not a directory" in said
    assert "cannot read the configuration of the model '/nowhere'" in said
    assert "cannot load the tokenizer '/nowhere'" in said
    assert "needs the check of: tokenizer, which has failed" in said
    assert "needs the check of: questions, which was skipped" in said
    assert "the next comparison works" in said
    assert "17 checks: 3 ok, 3 failed, 11 skipped." in said


def test_other_methods_have_no_doctor():
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--method=sft"])
    assert "doctor is for method thinktuning, got sft" in str(ended.value.code)


def test_help_is_readable(capsys):
    code, said = doctor(capsys, "--help")
    assert code == 0
    assert said.startswith("usage: thinktuning doctor [-c FILE]...")
    assert "the exit code is 1 if a check has failed" in said


# ------------------------------------------------------------------ the machine


def test_versions_against_requirements():
    here = torch.__version__
    wanted = [
        "torch==2.0",
        "rich>=14",
        "no-such-package>=1",
        'pytest==1.0; extra == "dev"',
        'no-such-vllm==1; extra == "vllm"',
        'jinja2==1.0; extra == "vllm"',
        'torch==1; python_version < "3"',
    ]
    faults = machine.version_faults(wanted)
    assert faults[:2] == [f"torch is {here}, wanted ==2.0", "no-such-package is missing"]
    assert faults[2].startswith("jinja2 is 3.") and len(faults) == 3
    assert machine.version_faults(["torch==2.13.0"]) == [], "+cpu is the same version"


def test_a_gpu_that_is_not_there(setup, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="sees no GPU"):
        machine.devices(setup("--trainer.accelerator=gpu"))
    assert machine.devices(setup("--trainer.accelerator=auto")).status is Status.OK


@pytest.mark.parametrize("native", [True, False])
def test_a_cpu_without_bfloat16_is_told(setup, monkeypatch, native):
    monkeypatch.setattr(machine, "native_bfloat16", lambda device: native)
    finding = machine.devices(setup("--trainer.precision=bf16-mixed"))
    assert (finding.status is Status.OK) == native
    assert machine.devices(setup("--trainer.precision=32-true")).status is Status.OK


def test_a_verifier_that_is_too_slow_or_does_not_start(monkeypatch):
    slow = Verifier(seconds=1e-4)
    finding = machine.hang_test(slow)
    assert finding.status is Status.FAILED
    assert "is timeout before it and timeout behind it" in finding.found
    monkeypatch.setattr(sys, "executable", "/bin/false")
    finding = machine.hang_test(Verifier())
    assert finding.status is Status.FAILED
    assert "did not start" in finding.found


def test_folders_that_can_and_cannot_be_written_to(tmp_path):
    assert machine.write_test(tmp_path / "new" / "runs").status is Status.OK
    assert machine.write_test(tmp_path).status is Status.OK
    (tmp_path / "file").touch()
    assert machine.write_test(tmp_path / "file" / "runs").status is Status.FAILED
    assert machine.write_test(tmp_path / "file").status is Status.FAILED
    assert [p.name for p in tmp_path.iterdir()] == ["file"], "all is as it was"


def test_two_checkpoints_must_fit():
    assert machine.room_for(checkpoint=GIB, number=2, free=2 * GIB).status is Status.OK
    finding = machine.room_for(checkpoint=GIB, number=2, free=2 * GIB - 1)
    assert finding.status is Status.FAILED
    assert "takes 1.00 GiB, 2.00 GiB are free: 2 don't fit" in finding.found


def test_a_checkpoint_has_the_size_of_a_real_one(setup, tmp_path):
    one = setup()
    model = one.student.policy
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "real.ckpt")
    real = (tmp_path / "real.ckpt").stat().st_size
    assert machine.checkpoint_bytes(one.plan) == pytest.approx(real, rel=0.1)


def test_batches_that_cannot_be_shared(setup):
    assert machine.batches(setup()).status is Status.OK
    for flags in (
        ["--model.num_mini_batches=3"],
        ["--trainer.strategy=ddp", "--trainer.devices=4", "--model.num_mini_batches=4"],
    ):
        finding = machine.batches(setup(*flags))
        assert finding.status is Status.FAILED
        assert "must be a multiple of" in finding.advice


def test_memory_that_does_not_suffice(setup):
    plan = setup().plan
    assert machine.fits(plan, plan.peak).status is Status.OK
    assert machine.fits(plan, plan.peak - 1).status is Status.WARNING
    small = replace(plan.job, device_memory=plan.peak - 1)
    finding = machine.fits(replace(plan, job=small, largest_micro_batch=3), plan.peak)
    assert finding.status is Status.FAILED
    assert finding.advice == "--model.micro_batch_size 3"
    finding = machine.fits(replace(plan, job=small, largest_micro_batch=0), plan.peak)
    assert "thinktuning plan" in finding.advice


def test_weights_that_do_not_fit_are_not_loaded(setup, monkeypatch):
    one = setup()
    monkeypatch.setattr(machine, "free_memory", lambda job: 1000)
    finding = machine.student(one)
    assert finding.status is Status.SKIPPED
    assert "student" not in vars(one)


# --------------------------------------------------------------- text and tokens


def rendered(tokenizer) -> text.Finding:
    return text.rendered(tokenizer, Prompt(0, QUESTION, "7", prompt_ids(tokenizer, QUESTION)))


def with_template(kind: str, template: str):
    tokenizer = tiny.tokenizer(kind)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("kind", ["own_pad", "pad_is_eos", "no_template"])
def test_prompts_of_healthy_tokenizers(kind):
    finding = rendered(tiny.tokenizer(kind))
    assert finding.status is Status.OK
    assert ("begins with 1 BOS" in finding.found) == (kind == "own_pad")
    assert QUESTION in finding.shown


def test_a_doubled_bos():
    twice = "{{ bos_token }}" + tiny.CHAT_TEMPLATE
    tokenizer = with_template("pad_is_eos", twice)
    tokenizer.bos_token = "<|bos|>"  # which this tokenizer doesn't put in front by itself
    finding = rendered(tokenizer)
    assert finding.status is Status.FAILED
    assert "begins with 2 BOS tokens" in finding.found
    finding = rendered(with_template("own_pad", twice))
    assert finding.status is Status.WARNING
    assert "begins with 1 BOS token" in finding.found
    assert "writes two, and the trainer takes one away" in finding.found


def test_a_bos_inside_of_a_prompt():
    turns = tiny.CHAT_TEMPLATE.replace("<|start|>{{", "{{ bos_token }}<|start|>{{")
    finding = rendered(with_template("own_pad", turns))
    assert finding.status is Status.WARNING
    assert "has 1 more inside" in finding.found
    # SmolLM2 opens every turn with what it names BOS.
    tokenizer = with_template("pad_is_eos", tiny.CHAT_TEMPLATE.replace("{{ bos_token }}", ""))
    tokenizer.bos_token = "<|start|>"
    assert rendered(tokenizer).status is Status.OK


def test_a_template_that_loses_the_question():
    lost = tiny.CHAT_TEMPLATE.replace("m['content']", "m['text']")
    finding = rendered(with_template("own_pad", lost))
    assert finding.status is Status.WARNING
    assert "the question isn't in the prompt" in finding.found


def test_the_template_s_end_of_turn_must_be_known():
    tokenizer = tiny.tokenizer("own_pad")
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    finding = text.ends_of_turn(tokenizer, [end])
    assert finding.status is Status.OK
    assert finding.found == f"<|end|> ({end}); the chat template writes <|end|> ({end})"
    finding = text.ends_of_turn(tokenizer, [pad])
    assert finding.status is Status.FAILED
    assert finding.advice.startswith(f"add {end} to eos_token_id")
    bare = with_template("own_pad", tiny.CHAT_TEMPLATE.replace("<|end|>", "\n"))
    assert text.ends_of_turn(bare, [end]).status is Status.WARNING
    assert text.ends_of_turn(tiny.tokenizer("no_template"), [end]).status is Status.OK


def test_a_round_trip_of_tokens():
    tokenizer = tiny.tokenizer("own_pad")
    ids = prompt_ids(tokenizer, QUESTION)
    assert text.round_trip(tokenizer, [ids]).status is Status.OK
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in "answer"]
    assert len(tokenizer.encode("answer", add_special_tokens=False)) < len(letters)
    finding = text.round_trip(tokenizer, [ids, letters])
    assert finding.status is Status.WARNING
    assert "1 of 2 come back as other ids of the same text" in finding.found
    assert text.round_trip_sampled(tokenizer, [ids, letters]).status is Status.OK


def test_a_tokenizer_that_loses_text():
    tokenizer = tiny.tokenizer("no_template")
    ids = render_prompt(tokenizer, [{"role": "user", "content": QUESTION}])
    tokenizer.backend_tokenizer.decoder = decoders.Sequence(
        [decoders.ByteLevel(), decoders.Replace("3", "33")]
    )
    for check in (text.round_trip, text.round_trip_sampled):
        finding = check(tokenizer, [ids])
        assert finding.status is Status.FAILED
        assert "1 of 1 have another text" in finding.found


def test_a_tokenizer_without_a_template_is_mentioned(setup, tmp_path):
    one = setup(f"--model.pretrained={tiny.save(tmp_path / 'model', kind='no_template')}")
    assert text.tokenizer(one).status is Status.WARNING


def test_too_few_questions(setup):
    with pytest.raises(InputError, match="don't fill a batch of 64"):
        text.questions(setup("--data.batch_size=64"))


# ---------------------------------------------------------- engine and teacher


class WarmEngine(TransformersEngine):
    """Samples from another distribution than it is asked for."""

    def sample(self, prompts, seeds, params):
        return super().sample(prompts, seeds, replace(params, temperature=9.0))


def test_engine_and_trainer_agree(setup):
    finding = sampling.engine(setup())
    assert finding.status is Status.OK


@pytest.mark.parametrize("base", ["float32", "bfloat16"])
def test_adapters_in_mixed_precision_agree(setup, base):
    lora = ("--model.lora.rank=2", f"--model.lora.base={base}")
    finding = sampling.engine(setup(*lora, "--trainer.precision=bf16-mixed"))
    assert finding.status is Status.OK


def test_an_engine_with_another_policy(setup):
    finding = sampling.engine(setup("--engine=test_doctor.WarmEngine"))
    assert finding.status is Status.FAILED
    assert "samples from another policy" in finding.found


def test_an_engine_without_room_for_the_longest_answer(setup):
    finding = sampling.engine(setup("--model.max_new_tokens=1020"))
    assert finding.status is Status.FAILED
    assert "need more than the 1024 positions" in finding.found


@pytest.mark.parametrize(
    ("mean", "exact", "status"),
    [
        (1e-4, True, Status.OK),
        (1e-2, True, Status.WARNING),
        (1e-2, False, Status.OK),
        (0.5, False, Status.FAILED),
        (float("nan"), False, Status.FAILED),
    ],
)
def test_how_far_logprobs_may_be_apart(mean, exact, status):
    assert sampling.agreement(mean, 1.0, 10, exact).status is status


def test_the_reference_as_the_teacher(setup, tmp_path):
    wide = tiny.save(tmp_path / "model", max_position_embeddings=8192)
    finding = sampling.teacher(
        setup(
            f"--model.pretrained={wide}",
            "--guidance.teacher=null",
            "--guidance.behaviors=[catchphrase]",
        )
    )
    assert finding.status is Status.OK
    assert "3 of 3 replies parse" in finding.found


@pytest.mark.parametrize(
    ("limit", "status"), [("100", Status.OK), ("99", Status.WARNING), ("80", Status.WARNING)]
)
def test_a_limit_that_ends_replies_before_the_worked_examples(setup, limit, status):
    finding = sampling.teacher(
        setup("--guidance.behaviors=[catchphrase]", f"--guidance.max_new_tokens={limit}")
    )
    assert finding.status is status
    assert ("worked examples of catchphrase" in finding.found) == (status is Status.WARNING)


def test_a_teacher_whose_prompt_is_too_long(setup):
    finding = sampling.teacher(
        setup(
            "--guidance.teacher=null",
            "--guidance.behaviors=[catchphrase]",
            "--guidance.max_prompt_tokens=20",
        )
    )
    assert finding.status is Status.FAILED
    assert finding.advice.startswith("raise guidance.max_prompt_tokens")


def test_a_teacher_whose_server_is_not_there(setup):
    finding = sampling.teacher(
        setup(
            "--guidance.teacher=thinktuning.engines.OpenAIEngine",
            "--guidance.teacher.base_url=http://127.0.0.1:9/v1",
            "--guidance.teacher.model=teacher",
        )
    )
    assert finding.status is Status.FAILED
    assert "the teacher doesn't answer" in finding.found


def test_a_teacher_without_its_key_is_a_row(setup, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    one = setup(
        "--guidance.teacher=thinktuning.engines.OpenAIEngine",
        "--guidance.teacher.base_url=http://127.0.0.1:9/v1",
        "--guidance.teacher.model=teacher",
        "--guidance.teacher.api_key_env=NO_SUCH_KEY",
    )
    finding = run(Check("teacher", sampling.teacher), one, {})
    assert finding.status is Status.FAILED
    assert "the environment variable NO_SUCH_KEY" in finding.found


@pytest.mark.parametrize(
    ("word", "status"), [("plus 1", Status.WARNING), ("never", Status.FAILED), ("plus", Status.OK)]
)
def test_replies_that_do_not_parse(setup, word, status):
    finding = sampling.teacher(
        setup(
            "--guidance.teacher=scripted.PickyTeacher",
            f"--guidance.teacher.word={word}",
        )
    )
    assert finding.status is status


def test_without_guidance_no_teacher_is_asked(setup):
    finding = sampling.teacher(setup("--guidance.gamma.start=0"))
    assert finding.status is Status.SKIPPED
