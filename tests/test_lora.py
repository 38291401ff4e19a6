"""A LoRA student: adapters alone are trained and saved, and without them it is the reference."""

import pytest
import torch
from running import checkpoint, fit_arguments, scalars
from transformers import AutoModelForCausalLM

from thinktuning.cli import main
from thinktuning.module import ThinkTuningModule

pytestmark = pytest.mark.slow

LORA = [
    "--model.lora.rank=4",
    "--model.optimizer.lr=1e-2",
    "--model.objective.kl_coef=0.01",
]


def trained_weights(monkeypatch) -> list[ThinkTuningModule]:
    """Modules whose training has ended."""
    ended: list[ThinkTuningModule] = []
    monkeypatch.setattr(ThinkTuningModule, "on_train_end", lambda self: ended.append(self))
    return ended


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_only_adapters_are_trained_and_saved(student, questions, tmp_path, monkeypatch, family):
    ended = trained_weights(monkeypatch)
    folder = student(family)
    main(fit_arguments(folder, questions, tmp_path, *LORA))
    saved = checkpoint(tmp_path)["state_dict"]
    assert saved and all(".lora_" in name for name in saved)
    assert any(w.abs().max() > 0 for name, w in saved.items() if "lora_B" in name)
    (module,) = ended
    assert not hasattr(module, "reference"), "one copy of the frozen weights is enough"
    before = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        expected = plain(input_ids=ids).logits
        with module.as_reference() as reference:
            assert torch.equal(reference(input_ids=ids).logits, expected)
        assert not torch.equal(module.policy(input_ids=ids).logits, expected)
    after = dict(module.policy.get_base_model().named_parameters())
    for name, weight in after.items():
        if "lora_" not in name:
            assert torch.equal(weight, before[name.replace(".base_layer", "")]), name


def test_the_kl_term_and_the_teacher_read_the_reference(student, questions, tmp_path):
    teacher = "--guidance.teacher=null"
    form = ("--guidance.behaviors=[self_agreement]", "--model.max_new_tokens=160")
    more = (teacher, *form)
    folder = student(max_position_embeddings=2048)
    main(fit_arguments(folder, questions, tmp_path / "lora", *LORA, *more))
    logged = scalars(tmp_path / "lora" / "version_0")
    assert logged["objective/kl"][0] == 0 and logged["objective/kl"][-1] > 0
    assert logged["guidance/parsed"] == [1.0] * 3


def test_a_run_resumes_with_its_adapters_and_exports_them_merged(student, questions, tmp_path):
    main(fit_arguments(student(), questions, tmp_path, *LORA, "--trainer.max_steps=2"))
    spelled = f"--model.pretrained={student()}/."
    main(fit_arguments(student(), questions, tmp_path, *LORA, spelled, "--ckpt_path=last"))
    assert checkpoint(tmp_path)["global_step"] == 3
    whole = tmp_path / "whole"
    main(fit_arguments(student(), questions, whole, *LORA))
    for name, weight in checkpoint(whole)["state_dict"].items():
        assert torch.equal(weight, checkpoint(tmp_path)["state_dict"][name]), name

    with pytest.raises(SystemExit, match=r"made with model\.lora .*alpha"):
        other = ("--model.lora.alpha=1", "--ckpt_path=last", "--trainer.max_steps=4")
        main(fit_arguments(student(), questions, tmp_path, *LORA, *other))

    last = tmp_path / "version_0" / "checkpoints" / "last.ckpt"
    main(["export", f"--ckpt_path={last}", f"--output={tmp_path / 'out'}"])
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    base = AutoModelForCausalLM.from_pretrained(student()).state_dict()
    assert set(exported) == set(base)
    adapters = checkpoint(tmp_path)["state_dict"]
    prefix = "policy.base_model.model.model.layers.0.self_attn.q_proj"
    a, b = (adapters[f"{prefix}.lora_{x}.default.weight"] for x in "AB")
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(exported[name], base[name] + b @ a * (32 / 4))


def test_a_model_without_such_layers_is_an_input_error(student, questions, tmp_path):
    with pytest.raises(SystemExit, match=r"model\.lora: .*nonsense"):
        main(
            fit_arguments(
                student(), questions, tmp_path, *LORA, "--model.lora.target_modules=[nonsense]"
            )
        )
