"""The main job, through the command line, with tiny real models."""

import json
from pathlib import Path

import pytest
import torch
from running import audit, checkpoint, fit_arguments, scalars
from transformers import AutoModelForCausalLM, AutoTokenizer

from thinktuning import policy_module
from thinktuning.cli import main
from thinktuning.module import ThinkTuningModule
from thinktuning.update import PolicyUpdate

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("kind", ["own_pad", "pad_is_eos", "no_template"])
def test_every_family_and_kind_of_tokenizer_trains(student, questions, tmp_path, family, kind):
    folder = student(family, kind)
    main(fit_arguments(folder, questions, tmp_path))
    seen = scalars(tmp_path / "version_0")
    assert sum(seen["guidance/realised_gamma"]) > 0
    assert max(seen["optimizer/grad_norm"]) > 0
    before = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    after = checkpoint(tmp_path)["state_dict"]
    assert any(not torch.equal(before[k], after[f"policy.{k}"]) for k in before)
    assert all(torch.isfinite(w).all() for w in after.values())


def test_a_user_sees_scalars_samples_and_an_account(student, questions, tmp_path, capsys):
    main(fit_arguments(student(), questions, tmp_path, "--model.objective.kl_coef=0.01"))
    run = tmp_path / "version_0"
    seen = scalars(run)
    for tag in [
        "reward",
        "reward/guided",
        "reward/unguided",
        "accuracy/student",
        "accuracy/before_guidance",
        "accuracy/after_guidance",
        "guidance/wrong_to_right",
        "guidance/right_to_wrong",
        "guidance/gamma",
        "guidance/realised_gamma",
        "guidance/parsed",
        "guidance/eligible",
        "guidance/verdict_agrees",
        "length/completion",
        "length/injected",
        "length/cut_off",
        "objective/kl",
        "objective/entropy",
        "objective/clip_fraction",
        "shaping/weight",
        "shaping/weight_max",
        "shaping/masked",
        "shaping/gradient_share",
        "groups/zero_variance",
        "seconds/rollout",
        "seconds/guidance",
        "seconds/update",
        "tokens_per_second/rollout",
        "tokens_per_second/guidance",
        "tokens_per_second/update",
        "time_share/guidance",
        "val/accuracy",
    ]:
        assert tag in seen, tag
    assert len(seen["reward"]) == 3, "one point per rollout batch"
    assert seen["guidance/parsed"] == [1.0] * 3
    assert seen["guidance/realised_gamma"][0] == pytest.approx(0.5, abs=0.13)

    rows = audit(run)
    guided = [row for row in rows if row["after"]]
    assert {row["step"] for row in rows} == {0, 1, 2}
    assert guided
    for row in guided:
        assert row["injected"].startswith("Wait, let me check.")
        assert row["before"]["reward"] == float(row["before"]["outcome"] == "correct")
        assert row["injected_span"][1] == row["after"]["tokens"]
        assert row["injected_span"][0] == row["before"]["tokens"] - 1
    texts = (run / "config.yaml").read_text()
    assert "group_size: 4" in texts
    printed = capsys.readouterr().out
    assert "Trained for 3 steps" in printed
    assert "last.ckpt" in printed
    assert "tensorboard --logdir" in printed
    assert "step 3" in printed
    assert "mfu/update" not in seen, "nobody knows what this CPU can do"


@pytest.mark.parametrize("lora", [False, True])
def test_the_share_of_the_arithmetic_where_the_devices_speed_is_known(
    student, questions, tmp_path, monkeypatch, lora
):
    monkeypatch.setattr(policy_module, "get_available_flops", lambda device, dtype: 10**12)
    updated, real = [], PolicyUpdate.run
    monkeypatch.setattr(
        PolicyUpdate, "run", lambda self, inputs: updated.append(inputs) or real(self, inputs)
    )
    more = ["--model.lora.rank=4"] if lora else []
    main(fit_arguments(student(), questions, tmp_path, "--model.objective.kl_coef=0.01", *more))
    weights = AutoModelForCausalLM.from_pretrained(student()).num_parameters()
    if lora:
        weights += sum(w.numel() for w in checkpoint(tmp_path)["state_dict"].values())
    factor = 2 if lora else 3  # frozen weights have no gradient of their own
    seen = scalars(tmp_path / "version_0")
    assert len(seen["mfu/update"]) == len(updated) == 3
    for inputs, mfu, seconds in zip(
        updated, seen["mfu/update"], seen["seconds/update"], strict=True
    ):
        flop = 0
        for i, mask in enumerate(inputs.attention_mask):
            prompt = int(mask.sum() - inputs.completion_mask[i].sum())
            for place in range(int(mask.sum())):
                if place >= prompt or i % 4 == 0:  # a prompt counts once for its four rollouts
                    flop += factor * (2 * weights + 4 * 2 * 48 * (place + 1))
        assert mfu * seconds * 10**12 == pytest.approx(flop, rel=1e-4)


def test_a_mean_over_nothing_is_not_logged(student, questions, tmp_path):
    # Guidance ends after the first of three steps: later ones have no guided rollouts.
    main(fit_arguments(student(), questions, tmp_path, "--guidance.gamma.fraction=0.2"))
    seen = scalars(tmp_path / "version_0")
    assert len(seen["reward/guided"]) == len(seen["length/injected"]) == 1
    assert len(seen["reward/unguided"]) == 3


def test_the_reference_is_frozen_and_not_in_the_checkpoint(student, questions, tmp_path):
    main(fit_arguments(student(), questions, tmp_path))
    names = checkpoint(tmp_path)["state_dict"]
    assert names
    assert all(name.startswith("policy.") for name in names)


def test_gamma_zero_loads_no_reference_and_guides_nothing(
    student, questions, tmp_path, monkeypatch
):
    loaded = []
    from thinktuning import module

    real = module.load_model
    monkeypatch.setattr(
        module, "load_model", lambda *args, **more: loaded.append(args) or real(*args, **more)
    )
    main(fit_arguments(student(), questions, tmp_path, "--guidance.gamma.start=0"))
    assert not loaded, "no reference beside the policy"
    assert sum(scalars(tmp_path / "version_0")["guidance/realised_gamma"]) == 0
    assert audit(tmp_path / "version_0") == []


def test_gamma_zero_is_grpo_bit_for_bit(student, questions, tmp_path, monkeypatch):
    def weights(name, gamma):
        main(
            fit_arguments(student(), questions, tmp_path / name, f"--guidance.gamma.start={gamma}")
        )
        return checkpoint(tmp_path / name)["state_dict"]

    guided, unguided = weights("guided", 0.5), weights("unguided", 0)
    monkeypatch.setattr(ThinkTuningModule, "_stages", lambda self: [])
    plain = weights("plain", 0)
    assert all(torch.equal(plain[name], unguided[name]) for name in plain)
    assert not all(torch.equal(plain[name], guided[name]) for name in plain)


def test_mini_batches_step_more_often_but_count_rollout_batches(student, questions, tmp_path):
    main(fit_arguments(student(), questions, tmp_path, "--model.num_mini_batches=2"))
    saved = checkpoint(tmp_path)
    assert saved["global_step"] == 3
    steps = {int(s["step"]) for s in saved["optimizer_states"][0]["state"].values()}
    assert steps == {6}
    # From the second mini-batch on the policy has moved away from the one that sampled.
    assert len(scalars(tmp_path / "version_0")["reward"]) == 3


def test_micro_batches_do_not_change_the_weights(student, questions, tmp_path):
    weights = []
    for size in (1, 16):
        root = tmp_path / str(size)
        more = (f"--model.micro_batch_size={size}", "--trainer.max_steps=1")
        main(fit_arguments(student(), questions, root, *more))
        weights.append(checkpoint(root)["state_dict"])
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=0, atol=2e-5)


def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing(
    student, questions, tmp_path, monkeypatch
):
    from thinktuning.module import ThinkTuningModule

    real = ThinkTuningModule.manual_backward

    def poisoned(self, loss):
        real(self, loss * float("inf"))

    monkeypatch.setattr(ThinkTuningModule, "manual_backward", poisoned)
    main(fit_arguments(student(), questions, tmp_path))
    before = AutoModelForCausalLM.from_pretrained(student()).state_dict()
    saved = checkpoint(tmp_path)
    assert saved["global_step"] == 3
    assert all(torch.equal(before[k], saved["state_dict"][f"policy.{k}"]) for k in before)
    assert scalars(tmp_path / "version_0")["optimizer/skipped_steps"] == [1.0] * 3


def test_warm_up_raises_the_learning_rate_to_a_constant(student, questions, tmp_path):
    main(fit_arguments(student(), questions, tmp_path, "--model.warmup_steps=2"))
    rates = scalars(tmp_path / "version_0")["optimizer/learning_rate"]
    assert rates == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3])


def test_guidance_ends_where_its_schedule_does(student, questions, tmp_path):
    main(fit_arguments(student(), questions, tmp_path, "--guidance.gamma.fraction=0.34"))
    gammas = scalars(tmp_path / "version_0")["guidance/gamma"]
    assert gammas == [0.5, 0.5, 0.0]


def test_validate_and_export(student, questions, tmp_path, capsys):
    arguments = fit_arguments(student(), questions, tmp_path)
    main(arguments)
    last = tmp_path / "version_0" / "checkpoints" / "last.ckpt"
    main(["validate", *arguments[1:], f"--ckpt_path={last}"])
    assert "val/accuracy" in capsys.readouterr().out

    output = tmp_path / "exported"
    main(["export", f"--ckpt_path={last}", f"--output={output}"])
    exported = AutoModelForCausalLM.from_pretrained(output).state_dict()
    trained = checkpoint(tmp_path)["state_dict"]
    assert all(torch.equal(exported[k], trained[f"policy.{k}"]) for k in exported)
    assert AutoTokenizer.from_pretrained(output).chat_template
    with pytest.raises(SystemExit, match="isn't an empty folder"):
        main(["export", f"--ckpt_path={last}", f"--output={output}"])


def test_a_stage_of_ones_own_is_a_callback_and_profiled(student, questions, tmp_path):
    more = (
        "--trainer.callbacks+=running.ShoutingStage",
        "--trainer.profiler=SimpleProfiler",
        f"--trainer.profiler.dirpath={tmp_path}",
        "--trainer.profiler.filename=seconds",
    )
    main(fit_arguments(student(), questions, tmp_path, *more))
    assert "seconds/shouting" in scalars(tmp_path / "version_0")
    profiled = (tmp_path / "fit-seconds.txt").read_text()
    for stage in ("sync", "rollout", "guidance", "shouting", "reward", "logprobs", "update"):
        assert f"[stage]{stage} " in profiled


def test_a_run_without_a_checkpoint_to_resume_starts_afresh(student, questions, tmp_path):
    with pytest.warns(UserWarning, match="starts afresh"):
        main(fit_arguments(student(), questions, tmp_path, "--ckpt_path=last"))
    assert checkpoint(tmp_path)["global_step"] == 3


def test_a_checkpoint_of_another_model_is_refused(student, questions, tmp_path):
    main(fit_arguments(student(), questions, tmp_path))
    more = ("--ckpt_path=last", "--trainer.max_steps=4")
    with pytest.raises(SystemExit, match="isn't one of this model"):
        main(fit_arguments(student("gpt2"), questions, tmp_path, *more))


def test_configurations_of_every_start_are_kept(student, questions, tmp_path):
    main(fit_arguments(student(), questions, tmp_path))
    main(fit_arguments(student(), questions, tmp_path, "--ckpt_path=last", "--trainer.max_steps=4"))
    run = tmp_path / "version_0"
    assert "max_steps: 3" in (run / "config.yaml").read_text()
    assert "max_steps: 4" in (run / "config.resumed_1.yaml").read_text()
    assert checkpoint(tmp_path)["global_step"] == 4
    assert [row["step"] for row in audit(run)] == sorted(row["step"] for row in audit(run))
    main(fit_arguments(student(), questions, tmp_path))
    assert (tmp_path / "version_1" / "checkpoints" / "last.ckpt").exists()
    assert json.loads((Path(student()) / "config.json").read_text())


@pytest.mark.parametrize("native", [True, False])
def test_a_device_that_is_slow_in_bfloat16_is_told(
    student, questions, tmp_path, monkeypatch, caplog, native
):
    monkeypatch.setattr(policy_module, "native_bfloat16", lambda device: native)
    more = ("--trainer.precision=bf16-mixed", "--trainer.max_steps=1", "--data.val_size=0")
    main(fit_arguments(student(), questions, tmp_path, *more))
    assert caplog.text.count("no instructions for bfloat16") == (not native)


@pytest.mark.parametrize(("steps", "told"), [(4, 0), (5, 1), (7, 1)])
def test_answers_that_never_end_are_told_once(student, questions, tmp_path, caplog, steps, told):
    more = ("--model.max_new_tokens=1", f"--trainer.max_steps={steps}", "--data.val_size=0")
    main(fit_arguments(student(), questions, tmp_path, *more))
    assert caplog.text.count("rollout batches has ended") == told


@pytest.mark.parametrize(("limit", "told"), [(160, 0), (150, 1)])
def test_replies_shorter_than_the_worked_examples_are_told(
    student, questions, tmp_path, caplog, limit, told
):
    more = (f"--guidance.max_new_tokens={limit}", "--trainer.max_steps=1", "--data.val_size=0")
    main(fit_arguments(student(), questions, tmp_path, *more))
    assert caplog.text.count("worked examples of self_agreement, self_critique") == told
