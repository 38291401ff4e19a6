"""What validation says of held-out answers: accuracy, rewards, and the behaviors taught."""

import json
import re
from dataclasses import replace

import pytest
import scripted
import yaml
from lightning.pytorch import Callback
from running import fit_arguments, scalars

from thinktuning.cli import main
from thinktuning.engines import TransformersEngine
from thinktuning.rewards import MathReward, PhraseReward, Reward, reward_names

pytestmark = pytest.mark.slow


class Uneven(TransformersEngine):
    """Gives half of the held-out answers up behind their second token."""

    def sample(self, prompts, seeds, params):
        groups = super().sample(prompts, seeds, params)
        if params.temperature:
            return groups
        return [
            group if i % 2 else [replace(c, token_ids=c.token_ids[:2], logprobs=c.logprobs[:2])]
            for i, group in enumerate(groups)
            for c in group
        ]


class Odd(Reward):
    """Fails on whole answers, and gives nothing for the others."""

    name = "odd.name"

    def score(self, responses):
        return [0 if "box" not in r.text else "?" for r in responses]


class Witness(Callback):
    """Keeps the texts of the answers."""

    texts: list[list[str]]

    def on_validation_epoch_start(self, trainer, pl_module):
        Witness.texts.append([])

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, *_):
        Witness.texts[-1] += [r.text for r in outputs["rollouts"]]


def test_rewards_and_behaviors_of_held_out_answers(student, questions, tmp_path, monkeypatch):
    for part in (Witness, Uneven, Odd):
        monkeypatch.setattr(scripted, part.__name__, part, raising=False)
    Witness.texts = []
    example = {"question": "q", "response": "r", "opinion": "correct", "reason": "r", "phrase": "p"}
    content = {"instruction": "count", "examples": [example]}
    for name, patterns in (("box", ["[a-z]{4}", "box"]), ("it", ["^it"]), ("uncounted", [])):
        behavior = content | {"name": name, "patterns": patterns}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(behavior))
    names = [str(tmp_path / f"{n}.yaml") for n in ("box", "it", "uncounted")]
    more = (
        "--data.val_size=5",
        "--data.val_batch_size=2",
        "--trainer.val_check_interval=1",
        "--engine=scripted.Uneven",
        "--trainer.callbacks+=scripted.Witness",
        f"--guidance.behaviors={names}",
        "--model.rewards=[{class_path: thinktuning.rewards.PhraseReward,"
        " init_args: {phrase: box, weight: 0.5}}, {class_path: thinktuning.rewards.MathReward},"
        " {class_path: scripted.Odd}]",
        "--model.max_failed_rewards=1000",
    )
    main(fit_arguments(student(), questions, tmp_path, *more))
    seen = scalars(tmp_path / "version_0")
    assert [len(texts) for texts in Witness.texts] == [5, 5, 5]

    answers = tmp_path / "version_0/answers"
    assert sorted(file.name for file in answers.iterdir()) == [
        f"step={step:06d}.jsonl" for step in (1, 2, 3)
    ]
    for texts, file in zip(Witness.texts, sorted(answers.iterdir()), strict=True):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        assert [row["text"] for row in rows] == texts
        assert [row["tokens"] for row in rows].count(2) >= 2, "given up"
        for row in rows:
            assert sum(map(int, re.findall(r"\d+", row["question"]))) == int(row["gold"])
            assert (row["outcome"] == "correct") == (f"{{{row['gold']}}}" in row["text"])
            assert row["reward"] == pytest.approx(0.5 * ("box" in row["text"]), abs=1)

    def shares(shown):
        return pytest.approx([sum(map(shown, texts)) / 5 for texts in Witness.texts])

    assert seen["val/behavior/box"] == pytest.approx([0.4] * 3)
    assert seen["val/behavior/it"] == shares(lambda t: t.startswith("It"))
    assert "val/behavior/uncounted" not in seen
    assert seen["val/reward/PhraseReward"] == pytest.approx([0.5 * 0.4] * 3)
    assert seen["val/reward/odd.name"] == [0.0] * 3
    assert seen["val/reward/failed"] == shares(lambda t: "box" in t)
    parts = zip(seen["val/reward/PhraseReward"], seen["val/reward/MathReward"], strict=True)
    assert seen["val/reward"] == pytest.approx([sum(pair) for pair in parts])
    assert seen["val/reward/MathReward"] == seen["val/accuracy"]


def test_the_second_reward_of_a_name_is_numbered():
    rewards = [PhraseReward("a"), MathReward(), PhraseReward("b"), PhraseReward("c")]
    assert reward_names(rewards) == [
        "PhraseReward",
        "MathReward",
        "PhraseReward_2",
        "PhraseReward_3",
    ]
