"""Configurations, help and errors of the command line; nothing trains here."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from lightning.pytorch.strategies import SingleDeviceStrategy

from thinktuning.cli import main
from thinktuning.errors import InputError
from thinktuning.module import ThinkTuningModule

FOLDER = Path(__file__).parents[1] / "configs"
CONFIGS = sorted(path for path in FOLDER.glob("*.yaml") if path.stem != "compare")


def printed_config(capsys, *arguments: str, command: str = "fit") -> dict:
    with pytest.raises(SystemExit) as ended:
        main([command, *arguments, "--print_config"])
    assert ended.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def refused(*arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["fit", *arguments])
    assert ended.value.code not in (0, None)
    return str(ended.value.code)


STAGES = {"guidance", "injection"}
SECTIONS = {
    "sft": {"model", "data", "engine", "trainer", "checkpoint"},
    "star": {"model", "data", "engine", "trainer", "checkpoint"},
    "eval": {"model", "data", "engine", "trainer"},
}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_configuration_parses(capsys, path):
    command = "test" if path.stem == "eval" else "fit"
    config = printed_config(capsys, f"--config={path}", command=command)
    expected = SECTIONS.get(path.stem, SECTIONS["sft"] | STAGES)
    assert config.keys() & (SECTIONS["sft"] | STAGES) == expected


@pytest.mark.parametrize("name", ["sft", "star"])
def test_baselines_train_on_what_the_recipe_trains_on(capsys, name):
    recipe = printed_config(capsys, "--config=configs/gsm8k.yaml")
    other = printed_config(capsys, f"--config=configs/{name}.yaml")
    same = ("source", "batch_size", "max_prompt_tokens", "system_message", "instruction")
    assert [other["data"][key] for key in same] == [recipe["data"][key] for key in same]
    assert other["model"]["pretrained"] == recipe["model"]["pretrained"]


def test_the_last_file_that_names_a_method_decides(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("method: sft\nmodel: {pretrained: embedded}\n")
    files = ["--config=configs/star.yaml", f"--config={tmp_path / 'mine.yaml'}"]
    assert refused(*files).startswith("error: ")  # STaR's own options
    config = printed_config(capsys, f"--config={tmp_path / 'mine.yaml'}")
    assert config["method"] == "sft" and "guidance" not in config
    assert "guidance" in printed_config(
        capsys, f"--config={tmp_path / 'mine.yaml'}", "--method=thinktuning"
    )
    assert "method must be one of" in refused("--method=rft")


def test_the_recipe_has_the_paper_s_numbers(capsys):
    config = printed_config(capsys, "--config=configs/gsm8k.yaml")
    model = config["model"]
    assert model["pretrained"] == "meta-llama/Llama-3.2-3B-Instruct"
    assert (model["group_size"], model["num_mini_batches"], model["max_new_tokens"]) == (5, 4, 1024)
    assert model["optimizer"]["init_args"]["lr"] == 1e-6
    assert model["optimizer"]["init_args"]["weight_decay"] == 0.01
    assert model["objective"]["shaping"] == "aas"
    assert config["data"]["batch_size"] == 128
    gamma = {"kind": "linear", "start": 0.10, "end": 0.01, "fraction": 0.3333}
    assert config["guidance"]["gamma"] == gamma


def test_grpo_is_the_recipe_without_guidance(capsys):
    recipe = printed_config(capsys, "--config=configs/gsm8k.yaml")
    grpo = printed_config(capsys, "--config=configs/grpo.yaml")
    assert grpo["guidance"]["gamma"]["start"] == 0.0
    for config in (recipe, grpo):
        del config["guidance"]["gamma"], config["trainer"]["default_root_dir"]
    assert grpo == recipe


def test_files_are_composed_and_flags_come_last(capsys):
    files = ("--config=configs/quickstart.yaml", "--config=configs/grpo.yaml")
    config = printed_config(capsys, *files, "--model.group_size=7")
    assert config["guidance"]["gamma"]["start"] == 0.0
    assert config["data"]["batch_size"] == 128, "the later file's"
    assert config["data"]["limit"] == 64, "the earlier file's"
    assert config["model"]["group_size"] == 7


def test_a_saved_configuration_can_be_read_again(capsys, tmp_path):
    config = printed_config(capsys, "--config=configs/catchphrase.yaml")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert printed_config(capsys, f"--config={tmp_path / 'config.yaml'}") == config


def test_help_is_a_manual(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Length limit of an answer, injected parts" in text
    assert "Bound of the AAS coefficient" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.grup_size=3"], "--model.grup_size"),
        (["--model.group_size=three"], "group_size"),
        (["--model.group_size=1", "--model.temperature=0"], "group_size must be at least 2"),
        (["--model.group_size=1", "--model.temperature=0"], "temperature must be positive"),
        (["--guidance.gamma.start=2"], "start must be between 0 and 1"),
        (["--guidance.behaviors=[self_doubt]"], "'self_doubt' is unknown"),
        (["--model.objective.c_max=0.5"], "pole"),
        (["--model.objective.shaping=magic"], "shaping"),
        (["--engine=Magic"], "Magic"),
        (["--data.batch_size=0"], "batch_size must be at least 1"),
        (["--seed_everything=true"], "must be an integer"),
        (["--ckpt_path=nowhere.ckpt"], "there is no checkpoint 'nowhere.ckpt'"),
        (["--config=nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_errors_say_what_is_wrong_on_one_screen(arguments, message, tmp_path):
    said = refused(f"--trainer.default_root_dir={tmp_path}", *arguments)
    assert message in said
    assert said.startswith("error: ")
    assert len(said.splitlines()) < 15


def test_unknown_keys_of_a_file_are_refused_by_name(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("model: {group_size: 4, grup_size: 5}\n")
    assert "grup_size" in refused(f"--config={path}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.pretrained=/nowhere"], "cannot load the"),
        (["--data.source=nowhere.jsonl"], "there is no file 'nowhere.jsonl'"),
        (["--trainer.gradient_clip_val=1"], "gradient_clip_val"),
        (["--model.num_mini_batches=3"], "num_mini_batches=3 must divide"),
        (["--trainer.max_epochs=-1", "--trainer.max_steps=-1"], "set trainer.max_steps"),
        (["--data.batch_size=64"], "don't fill a batch of 64"),
    ],
)
def test_faults_that_show_at_the_start_of_a_run(student, questions, tmp_path, arguments, message):
    from running import fit_arguments

    said = refused(*fit_arguments(student(), questions, tmp_path, *arguments)[1:])
    assert said.startswith("error: ")
    assert message in said


def test_scaled_losses_are_refused():
    module = ThinkTuningModule()
    # Lightning makes another precision of it on a CPU.
    strategy = SingleDeviceStrategy(device=torch.device("cpu"))
    module._trainer = SimpleNamespace(precision="16-mixed", strategy=strategy)
    with pytest.raises(InputError, match=r"expected bf16-mixed .* a scaled loss"):
        module.setup("fit")


def test_classes_of_one_s_own_lie_in_the_working_folder(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_rewards.py").write_text(
        "from thinktuning.rewards import Reward\n"
        "class Short(Reward):\n"
        "    def score(self, responses):\n"
        "        return [float(len(r.text) < 80) for r in responses]\n"
    )
    (tmp_path / "torch.py").write_text("raise RuntimeError('hides a package')\n")
    monkeypatch.setattr("sys.path", [p for p in sys.path if p])
    monkeypatch.chdir(tmp_path)
    config = printed_config(capsys, "--model.rewards=[{class_path: my_rewards.Short}]")
    assert [reward["class_path"] for reward in config["model"]["rewards"]] == ["my_rewards.Short"]
