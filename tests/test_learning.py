"""The claim itself, in seconds: guidance instils what reinforcement alone never samples."""

import json
from pathlib import Path

import pytest
import tiny
from conftest import prompt_ids
from running import fit_arguments, scalars
from scripted import REPLY

from thinktuning.cli import main

pytestmark = pytest.mark.slow

PHRASE = "Count twice."
REWARDS = json.dumps(
    [
        {"class_path": "thinktuning.rewards.MathReward"},
        {"class_path": "thinktuning.rewards.PhraseReward", "init_args": {"phrase": PHRASE}},
    ]
)


@pytest.fixture(scope="module")
def adder(questions, tmp_path_factory) -> Path:
    """A student trained from scratch to add; its training texts never have the phrase."""
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    golds = [int(row["answer"].split()[-1]) for row in rows]
    answers = [f"It is \\boxed{{{gold}}}" for gold in range(8)]
    texts = [row["question"] for row in rows] + answers
    reply = REPLY.format(reason="That is all.", phrase=PHRASE)
    text = tiny.word_tokenizer([*texts, f"Add. Box it. That is all. {PHRASE}", reply])
    folder = tmp_path_factory.mktemp("adder")
    text.save_pretrained(folder)
    tiny.model("llama", len(text), text.eos_token_id).save_pretrained(folder)
    pairs = []
    for row, gold in zip(rows, golds, strict=True):
        for more in ("", "", "That is all."):  # now and then it goes on after its answer
            answer = text.encode(f"{answers[gold]} {more}", add_special_tokens=False)
            pairs.append((prompt_ids(text, row["question"]), [*answer, text.eos_token_id]))
    tiny.train_on(folder, pairs, steps=500)
    return folder


def unguided_phrases(student, questions, root, *more: str) -> list[float]:
    """Reward for the phrase in unguided rollouts, step by step, 0 to 1."""
    arguments = fit_arguments(
        student,
        questions,
        root,
        f"--model.rewards={REWARDS}",
        "--model.optimizer.lr=1.5e-3",
        "--model.group_size=8",
        "--model.micro_batch_size=128",
        "--data.val_size=0",
        "--data.batch_size=16",
        "--guidance.gamma.fraction=0.75",
        "--guidance.teacher.reason=That is all.",
        f"--guidance.teacher.phrase={PHRASE}",
        "--trainer.max_steps=100",
        "--trainer.callbacks+=running.UnguidedPhrases",
        f"--trainer.callbacks.phrase={PHRASE}",
        "--checkpoint.every_n_train_steps=100",
        *more,
    )
    main(arguments)
    return scalars(root / "version_0")["unguided_phrases"]


def test_thinktuning_teaches_what_grpo_never_finds(adder, questions, tmp_path):
    alone = unguided_phrases(adder, questions, tmp_path / "grpo", "--guidance.gamma.start=0")
    guided = unguided_phrases(adder, questions, tmp_path / "thinktuning")
    assert max(alone) == 0.0, "the student samples the phrase by itself: the task shows nothing"
    assert guided[0] == 0.0
    # Guidance ends after 75 of 100 steps; what follows is the student alone.
    assert sum(guided[-10:]) / 10 >= 0.5
