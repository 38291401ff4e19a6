"""``thinktuning fit`` with the real vLLM as the student's engine and as the teacher."""

import json
import signal
import sys
from pathlib import Path

import pytest
from running import audit, fit_arguments, run, scalars

pytestmark = pytest.mark.slow

SMALL = {"width": 64, "heads": 2}  # heads of 32, for vLLM's attention on CPUs
ENGINE = [
    "--engine=thinktuning.engines.VLLMEngine",
    "--engine.max_model_len=2048",
    "--engine.kv_cache_gib=0.25",
]
GUIDANCE = ["--guidance.behaviors=[self_agreement]", "--model.max_new_tokens=160"]


def fit(
    student: Path, questions: Path, root: Path, *more: str, ends: int = 0, **environment: str
) -> None:
    arguments = [
        a
        for a in fit_arguments(student, questions, root, *GUIDANCE)
        if not a.startswith("--guidance.teacher")
    ]
    done = run([sys.executable, "-m", "thinktuning.cli", *arguments, *more], **environment)
    assert done.returncode == ends, done.stderr[-3000:]


@pytest.fixture(scope="module")
def vllm_student(student) -> Path:
    return student(max_position_embeddings=2048, **SMALL)


def planned(root: Path) -> list[tuple]:
    """What every step was to do, whatever was sampled."""
    lines = (root / "version_0" / "trace.jsonl").read_text().splitlines()
    logged = scalars(root / "version_0")
    gammas, rates = logged["guidance/gamma"], logged["optimizer/learning_rate"]
    prompts = [(row["step"], row["prompts"]) for row in map(json.loads, lines)]
    return list(zip(prompts, gammas, rates, strict=True))


@pytest.mark.parametrize(
    "lora",
    [[], ["--model.lora.rank=4", "--model.objective.importance=token"]],
    ids=["whole", "lora"],
)
def test_student_and_teacher_in_one_engine_resumed_once(vllm_student, questions, tmp_path, lora):
    more = [*ENGINE, *lora, "--trainer.callbacks+=tracing.Trace", "--trainer.val_check_interval=2"]
    more += ["--model.warmup_steps=3", "--guidance.gamma.kind=linear", "--guidance.gamma.end=0.25"]
    more += ["--trainer.max_steps=4"]
    fit(vllm_student, questions, tmp_path, *more, KILL_AT="rollout:2", ends=-signal.SIGKILL)
    fit(vllm_student, questions, tmp_path, *more, "--ckpt_path=last")
    if not lora:
        alone = tmp_path / "alone"
        fit(vllm_student, questions, alone, *more)
        assert planned(tmp_path) == planned(alone)
    logged = scalars(tmp_path / "version_0")
    assert len(logged["reward"]) == 4
    assert len(logged["seconds/sync"]) == 4
    # The rollouts of every step come from that step's weights, after the teacher's as well.
    assert len(logged["engine/logprob_gap_max"]) == 4
    assert max(logged["engine/logprob_gap_max"]) < 1e-3
    assert logged["guidance/parsed"] == [1.0] * 4
    rows = audit(tmp_path / "version_0")
    assert {row["step"] for row in rows} == {0, 1, 2, 3}
    assert any(row["after"] is not None for row in rows)


@pytest.mark.parametrize(
    "more",
    [["--trainer.strategy=ddp"], ["--trainer.strategy=fsdp2", "--model.lora.rank=4"]],
    ids=["ddp", "fsdp2-lora"],
)
def test_every_rank_has_a_vllm_of_its_own(vllm_student, questions, tmp_path, more):
    ranks = ["--trainer.devices=2", "--data.val_size=0", *more]
    fit(vllm_student, questions, tmp_path, *ENGINE, *ranks, "--trainer.max_steps=2")
    logged = scalars(tmp_path / "version_0")
    assert max(logged["engine/logprob_gap_max"]) < 1e-3
    assert logged["guidance/parsed"] == [1.0] * 2


def test_a_transformers_student_with_a_teacher_of_its_own_in_vllm(
    student, vllm_student, questions, tmp_path
):
    teacher = student("qwen2", "pad_is_eos", max_position_embeddings=2048, **SMALL)
    fit(
        vllm_student,
        questions,
        tmp_path,
        "--guidance.teacher=thinktuning.engines.VLLMEngine",
        f"--guidance.teacher.pretrained={teacher}",
        "--guidance.teacher.max_model_len=2048",
        "--guidance.teacher.kv_cache_gib=0.25",
        f"--guidance.cache={tmp_path / 'cache'}",
        "--trainer.max_steps=2",
    )
    logged = scalars(tmp_path / "version_0")
    assert logged["guidance/parsed"] == [1.0] * 2
    assert max(logged["guidance/realised_gamma"]) > 0
    assert list((tmp_path / "cache").glob("*/*.json"))


def test_the_students_engine_cannot_have_weights_of_its_own(vllm_student, questions, tmp_path):
    arguments = fit_arguments(
        vllm_student, questions, tmp_path, *ENGINE, f"--engine.pretrained={vllm_student}"
    )
    done = run([sys.executable, "-m", "thinktuning.cli", *arguments])
    assert done.returncode != 0
    assert "leave out engine.pretrained" in done.stderr and "Traceback" not in done.stderr


def test_a_server_cannot_be_the_students_engine(vllm_student, questions, tmp_path):
    arguments = fit_arguments(
        vllm_student, questions, tmp_path, "--engine=thinktuning.engines.OpenAIEngine"
    )
    done = run([sys.executable, "-m", "thinktuning.cli", *arguments])
    assert done.returncode != 0
    assert "OpenAIEngine" in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) < 15
