"""SFT and STaR: what they train on, what they leave out, and that they go on where they stopped."""

import json
import logging
import shutil
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import INSTRUCTION, prompt_ids
from lightning.pytorch import Callback
from running import CLOCKED, checkpoint, run_on_ranks, scalars
from transformers import AutoModelForCausalLM

from thinktuning.baselines.sft import gold_response, written_end_of_turn
from thinktuning.baselines.star import Rationale, RationaleLoader
from thinktuning.cli import main
from thinktuning.data import load_questions
from thinktuning.data.sources import parse_solution
from thinktuning.errors import InputError
from thinktuning.types import Prompt

SGD = [
    "--model.optimizer=torch.optim.SGD",
    "--model.optimizer.lr=0.1",
    "--model.optimizer.weight_decay=0",
]
EXACT = ["--checkpoint.save_top_k=-1", "--trainer.callbacks+=test_baselines.Trace"]
CONFIGS = Path(__file__).parents[1] / "configs"


class Trace(Callback):
    """Writes down what every step was trained on and what it logged, as hex."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        rollouts = outputs["rollouts"].rollouts
        row = {
            "step": outputs["rollouts"].step,
            "rows": [r.prompt.index for r in rollouts],
            "completions": [list(r.completion_ids) for r in rollouts],
            "metrics": {
                name: float(value).hex()
                for name, value in outputs["metrics"].items()
                if not name.startswith(CLOCKED)
            },
        }
        with (Path(trainer.log_dir) / "trace.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")


class Beginnings(Callback):
    """Keeps the trained weights as every round begins with them, and what is trained on."""

    weights: list[dict[str, torch.Tensor]]
    trained: list[Any]

    def on_train_start(self, trainer, pl_module) -> None:
        Beginnings.weights, Beginnings.trained = [], []

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        Beginnings.weights.append({k: w.clone() for k, w in pl_module.state_dict().items()})

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        Beginnings.trained.append(outputs["rollouts"])


def arguments(method: str, student: Path, source: Path, root: Path, *more: str) -> list[str]:
    return [
        "fit",
        f"--method={method}",
        "--seed_everything=3",
        f"--model.pretrained={student}",
        "--model.max_new_tokens=64",
        "--model.optimizer=torch.optim.AdamW",
        "--model.optimizer.lr=1e-3",
        f"--data.source={source}",
        "--data.val_size=0",
        "--data.batch_size=4",
        "--data.system_message=Add.",
        f"--data.instruction={INSTRUCTION}",
        "--trainer.accelerator=cpu",
        "--trainer.enable_model_summary=false",
        f"--trainer.default_root_dir={root}",
        "--checkpoint.every_n_train_steps=1",
        *more,
    ]


def trace(root: Path) -> dict[int, dict[str, Any]]:
    lines = (root / "version_0" / "trace.jsonl").read_text().splitlines()
    return {row["step"]: row for row in map(json.loads, lines)}


def kept_checkpoint(root: Path, step: int) -> Path:
    """A copy outside of its run, so that a resumed run gets a folder of its own."""
    source = root / "version_0" / "checkpoints" / f"step={step:06d}.ckpt"
    return Path(shutil.copy(source, root / f"{step}.ckpt"))


def assert_same_end(found: Path, expected: Path, after: int) -> None:
    """The runs did the same from step ``after`` on, bit for bit."""
    whole = trace(expected)
    assert trace(found) == {step: row for step, row in whole.items() if step >= after}
    ours, theirs = checkpoint(found), checkpoint(expected)
    assert ours["global_step"] == theirs["global_step"]
    for name, weight in theirs["state_dict"].items():
        assert torch.equal(ours["state_dict"][name], weight), name


def mean_loss(model, pairs: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    """Mean over all completion tokens, one sequence and one token after the other."""
    losses = []
    for prompt, completion in pairs:
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0].float()
        for i, token in enumerate(completion):
            losses.append(-logits[len(prompt) + i - 1].log_softmax(dim=-1)[token])
    return torch.stack(losses).mean()


@torch.no_grad()
def mean_entropy(model, pairs: list[tuple[list[int], list[int]]]) -> float:
    """Of what the model would have said at every completion token, in nats."""
    found = []
    for prompt, completion in pairs:
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0].float()
        behind = logits[len(prompt) - 1 : -1]
        found.append(torch.distributions.Categorical(logits=behind).entropy())
    return torch.cat(found).mean().item()


# ----------------------------------------------------------------- solutions


@pytest.mark.parametrize(
    ("answer", "solution"),
    [
        ("3+4=<<3+4=7>>7\n#### 7", "3+4=7"),
        ("a = <<1+1=2>>2, b = <<2*2=4>>4.\nSo 4.\n\n#### 4", "a = 2, b = 4.\nSo 4."),
        ("#### is no answer yet\n#### 7", "#### is no answer yet"),
        ("1 << 3 and 4 >> 2\n#### 1", "1 << 3 and 4 >> 2".replace("<< 3 and 4 >>", "")),
        ("#### 7", ""),
        ("7", ""),
    ],
)
def test_a_solution_stands_before_the_last_mark(answer, solution):
    assert parse_solution(answer) == solution


def test_questions_have_their_solutions(questions):
    first = load_questions(str(questions), "train")[5]
    assert (first.solution, first.answer) == ("1+1=2", "2")


@pytest.mark.parametrize(
    ("template", "eos", "written"),
    [
        (tiny.CHAT_TEMPLATE, "<|end|>", "<|end|>"),
        (tiny.CHAT_TEMPLATE, "<|pad|>", "<|end|>"),
        (tiny.CHAT_TEMPLATE.replace("<|end|>", "<|pad|>"), "<|end|>", "<|pad|>"),
        (None, "<|pad|>", "<|pad|>"),
    ],
)
def test_the_end_of_turn_is_the_one_that_chats_have(template, eos, written):
    text = tiny.tokenizer("own_pad")
    text.chat_template, text.eos_token = template, eos
    stop_ids = text.convert_tokens_to_ids(["<|end|>", "<|pad|>"])
    assert written_end_of_turn(text, stop_ids) == text.convert_tokens_to_ids(written)


# ----------------------------------------------------------------------- SFT


@pytest.fixture(scope="module")
def untrained(tmp_path_factory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("untrained"))


def gold_pair(text, row: dict[str, str]) -> tuple[list[int], list[int]]:
    solution, gold = row["answer"].split("\n#### ")
    solution = solution[: solution.index("<<")] + solution[solution.index(">>") + 2 :]
    response = f"{solution}\n\nThe final answer is \\boxed{{{gold}}}."
    ids = text.encode(response, add_special_tokens=False)
    return prompt_ids(text, row["question"]), [*ids, text.eos_token_id]


def rows_of(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def uneven(questions, tmp_path) -> Path:
    """Four sums: responses of different lengths, the last one very long."""
    rows = rows_of(questions)[:4]
    rows[1]["answer"] = "We count. " * 2 + rows[1]["answer"]
    rows[3]["answer"] = "We count. " * 20 + rows[3]["answer"]
    path = tmp_path / "uneven.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.slow
def test_a_step_of_sft_is_one_on_the_naive_loss_of_the_responses(
    untrained, uneven, tmp_path, caplog
):
    text = tiny.tokenizer("own_pad")
    model = AutoModelForCausalLM.from_pretrained(untrained)
    pairs = [gold_pair(text, row) for row in rows_of(uneven)]
    assert [len(completion) <= 64 for _, completion in pairs] == [True, True, True, False]
    loss = mean_loss(model, pairs[:3])
    loss.backward()
    entropy = mean_entropy(model, pairs[:3])

    more = [*SGD, "--model.max_grad_norm=null", "--trainer.max_steps=1"]
    ends = []
    for size in (1, 4):
        root = tmp_path / str(size)
        with caplog.at_level(logging.WARNING):
            main(
                arguments("sft", untrained, uneven, root, f"--model.micro_batch_size={size}", *more)
            )
        logged = scalars(root / "version_0")
        assert logged["objective/loss"] == pytest.approx([loss.item()], rel=1e-5)
        assert logged["objective/entropy"] == pytest.approx([entropy], rel=1e-4)
        assert logged["data/left_out"] == [0.25]
        ends.append(checkpoint(root)["state_dict"])
    assert "1 of 4 gold solutions of this batch are longer than max_new_tokens=64" in caplog.text
    for name, weight in model.named_parameters():
        stepped = (weight - 0.1 * weight.grad).detach()
        assert not torch.equal(stepped, weight) or "norm" in name
        for end in ends:
            torch.testing.assert_close(end[f"policy.{name}"], stepped, rtol=0, atol=2e-6)


@pytest.mark.slow
def test_a_batch_without_a_response_that_fits_changes_nothing(untrained, uneven, tmp_path):
    more = [*SGD, "--model.max_new_tokens=3", "--trainer.max_steps=1"]
    main(arguments("sft", untrained, uneven, tmp_path, *more))
    assert scalars(tmp_path / "version_0")["data/left_out"] == [1.0]
    before = AutoModelForCausalLM.from_pretrained(untrained).state_dict()
    saved = checkpoint(tmp_path)
    assert saved["global_step"] == 1
    assert all(torch.equal(saved["state_dict"][f"policy.{k}"], w) for k, w in before.items())


@pytest.mark.slow
def test_sft_teaches_the_gold_solutions(untrained, questions, tmp_path, capsys):
    few = tmp_path / "few.jsonl"
    few.write_text("".join(questions.read_text().splitlines(keepends=True)[:4]))
    more = [
        "--model.optimizer.lr=3e-3",
        "--trainer.max_epochs=200",
        "--checkpoint.every_n_train_steps=200",
    ]
    main(arguments("sft", untrained, few, tmp_path, *more))
    logged = scalars(tmp_path / "version_0")
    assert logged["objective/loss"][0] > 1 and logged["objective/loss"][-1] < 0.1
    assert "step 200  objective/loss" in capsys.readouterr().out

    last = tmp_path / "version_0" / "checkpoints" / "last.ckpt"
    main(["export", f"--ckpt_path={last}", f"--output={tmp_path / 'out'}"])
    text, model = tiny.tokenizer("own_pad"), AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for b in range(4):
        prompt = torch.tensor([prompt_ids(text, f"0 plus {b}?")])
        answer = model.generate(prompt, max_new_tokens=64, do_sample=False)[0, prompt.shape[1] :]
        expected = gold_response(Prompt(0, "", str(b), [], f"0+{b}={b}"))
        assert text.decode(answer) == f"{expected}<|end|>"


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_ranks_that_compute_in_bfloat16_add_up_their_gradients(
    untrained, questions, tmp_path, strategy
):
    mixed = [*SGD, "--data.limit=8", "--trainer.precision=bf16-mixed", "--trainer.max_steps=2"]
    mixed += ["--model.micro_batch_size=1"]
    main(arguments("sft", untrained, questions, tmp_path / "one", *mixed))
    ranks = ["--trainer.devices=2", f"--trainer.strategy={strategy}"]
    two = arguments("sft", untrained, questions, tmp_path / "two", *mixed, *ranks)
    run_on_ranks(2, [two], tmp_path)

    from thinktuning.checkpointing import AtomicCheckpointIO

    start = AutoModelForCausalLM.from_pretrained(untrained).state_dict()
    one, two = (
        AtomicCheckpointIO().load_checkpoint(
            tmp_path / name / "version_0" / "checkpoints" / "last.ckpt"
        )["state_dict"]
        for name in ("one", "two")
    )
    for name, weight in start.items():
        moved = one[f"policy.{name}"] - weight
        difference = two[f"policy.{name}"] - one[f"policy.{name}"]
        # Each rank alone would have moved elsewhere by about as much as both together.
        assert difference.norm() < 0.03 * moved.norm(), name


@pytest.mark.slow
def test_questions_without_solutions_are_refused_before_a_model_is_loaded(
    untrained, questions, tmp_path
):
    rows = rows_of(questions)
    rows[2]["answer"] = rows[5]["answer"] = "#### 4"
    path = tmp_path / "bare.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    without_weights = Path(
        shutil.copytree(
            untrained, tmp_path / "student", ignore=shutil.ignore_patterns("*.safetensors")
        )
    )
    with pytest.raises(SystemExit, match=r"2 of 16 training questions .* the first in row 3"):
        main(arguments("sft", without_weights, path, tmp_path))


@pytest.mark.slow
def test_sft_resumes_bit_for_bit_wherever_it_stopped(untrained, questions, tmp_path):
    def fit(name: str, *more: str) -> Path:
        root = tmp_path / name
        epochs = ["--data.limit=8", "--trainer.max_epochs=3", "--model.warmup_steps=4"]
        main(arguments("sft", untrained, questions, root, *EXACT, *epochs, *more))
        return root

    whole = fit("whole")
    assert len(trace(whole)) == 6
    # Step 2 ends an epoch; a run that went on from there is itself resumed within the next.
    again = fit("again", f"--ckpt_path={kept_checkpoint(whole, 2)}")
    assert_same_end(again, whole, after=2)
    assert_same_end(fit("twice", f"--ckpt_path={kept_checkpoint(again, 3)}"), whole, after=3)


# ---------------------------------------------------------------------- STaR

SOLVED, HELPED = range(4), range(4, 6)  # rows of the questions; the others stay unsolved


def letters(text, written: str) -> list[int]:
    """Ids that no encoding of the whole text would give."""
    ids = [i for sign in written for i in text.encode(sign, add_special_tokens=False)]
    assert ids != text.encode(written, add_special_tokens=False)
    return [*ids, text.eos_token_id]


def answers_of(text, row: dict[str, str], number: int) -> tuple[list[int], list[int]]:
    """What the solver says to a question alone, and to one with a hint."""
    gold = int(row["answer"].split()[-1])
    right, wrong = (f"\\boxed{{{n}}}" for n in (gold, gold + 1))
    alone = letters(text, right if number in SOLVED else wrong)
    return alone, letters(text, f"{right}!" if number in HELPED else wrong)


@pytest.fixture(scope="module")
def sums(questions, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sums") / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_of(questions)[:8]))
    return path


@pytest.fixture(scope="module")
def solver(sums, tmp_path_factory) -> Path:
    """A student that answers some questions right, some with a hint only, and some never."""
    folder = tmp_path_factory.mktemp("solver")
    tiny.save(folder)
    text = tiny.tokenizer("own_pad")
    pairs = []
    for number, row in enumerate(rows_of(sums)):
        alone, with_hint = answers_of(text, row, number)
        gold = row["answer"].split()[-1]
        pairs.append((prompt_ids(text, row["question"]), alone))
        pairs.append((prompt_ids(text, f"{row['question']}\n\nIt is {gold}."), with_hint))
    tiny.train_on(folder, pairs, steps=300)
    return folder


HINT = "--data.hint=It is {answer}."


@pytest.mark.slow
def test_star_trains_the_base_model_on_what_was_right_and_shows_no_hint(
    solver, sums, tmp_path, capsys
):
    more = [
        HINT,
        "--data.batch_size=4",
        "--data.val_batch_size=3",
        "--model.warmup_steps=1",
        "--trainer.max_epochs=2",
        "--trainer.callbacks+=test_baselines.Beginnings",
        "--model.optimizer.lr=1e-4",
    ]
    main(arguments("star", solver, sums, tmp_path, *more))
    text, rows = tiny.tokenizer("own_pad"), rows_of(sums)
    expected = {}
    for number in (*SOLVED, *HELPED):
        alone, with_hint = answers_of(text, rows[number], number)
        expected[number] = with_hint if number in HELPED else alone
    saved = checkpoint(tmp_path)
    state = saved["star"]
    parts = [ids.tolist() for ids in state["token_ids"].split(state["lengths"])]
    assert dict(zip(state["rows"], parts, strict=True)) == expected
    assert [row for row, h in zip(state["rows"], state["hinted"], strict=True) if h] == [*HELPED]
    assert state["round"] == 1

    base = AutoModelForCausalLM.from_pretrained(solver)
    steps = Beginnings.trained
    assert [len(batch.rollouts) for batch in steps] == [4, 2] * 2
    for batches in (steps[:2], steps[2:]):
        trained = [r for batch in batches for r in batch.rollouts]
        assert {r.prompt.index: list(r.completion_ids) for r in trained} == expected
        for r in trained:
            assert r.prompt.token_ids == prompt_ids(text, rows[r.prompt.index]["question"])
    for weights in Beginnings.weights:
        assert all(torch.equal(weights[f"policy.{k}"], w) for k, w in base.state_dict().items())

    logged = scalars(tmp_path / "version_0")
    for step in (0, 2):
        pairs = [(r.prompt.token_ids, list(r.completion_ids)) for r in steps[step].rollouts]
        with torch.no_grad():
            assert logged["objective/loss"][step] == pytest.approx(
                mean_loss(base, pairs).item(), rel=1e-4
            )
    assert logged["optimizer/learning_rate"] == pytest.approx([5e-5, 1e-4] * 2)
    assert {int(s["step"]) for s in saved["optimizer_states"][0]["state"].values()} == {2}
    assert saved["global_step"] == 4
    assert logged["star/solved"] == pytest.approx([4 / 8] * 2)
    assert logged["star/rationalised"] == pytest.approx([2 / 8] * 2)
    assert logged["star/kept"] == [6, 6]

    last = tmp_path / "version_0" / "checkpoints" / "last.ckpt"
    own = arguments("star", solver, sums, tmp_path, "--data.val_size=2")
    main(["validate", *own[1:], f"--ckpt_path={last}"])
    assert "val/accuracy" in capsys.readouterr().out
    main(["export", f"--ckpt_path={last}", f"--output={tmp_path / 'out'}"])
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(w, saved["state_dict"][f"policy.{k}"]) for k, w in exported.items())
    with pytest.raises(SystemExit, match="has no rationales"):
        sft = arguments("sft", solver, sums, tmp_path / "sft", "--trainer.max_steps=1")
        main(sft)
        of_sft = tmp_path / "sft" / "version_0" / "checkpoints" / "last.ckpt"
        main(arguments("star", solver, sums, tmp_path, f"--ckpt_path={of_sft}"))


@pytest.mark.slow
def test_adapters_begin_every_round_as_they_began_the_first(solver, sums, tmp_path):
    more = [
        HINT,
        "--model.lora.rank=4",
        "--trainer.max_epochs=2",
        "--trainer.callbacks+=test_baselines.Beginnings",
    ]
    main(arguments("star", solver, sums, tmp_path, *more))
    first, second = Beginnings.weights
    assert any(w.abs().max() > 0 for w in first.values())
    assert all(torch.equal(second[name], w) for name, w in first.items())
    trained = checkpoint(tmp_path)["state_dict"]
    assert any(not torch.equal(trained[name], w) for name, w in first.items())


@pytest.mark.slow
@pytest.mark.parametrize("limit", [[], ["--trainer.max_steps=14"]], ids=["epochs", "steps"])
def test_star_resumes_bit_for_bit_wherever_it_stopped(solver, sums, tmp_path, limit):
    """Rounds of different lengths, since the student's answers are drawn."""

    def fit(name: str, *more: str) -> Path:
        root = tmp_path / name
        drawn = ["--model.temperature=1.2", "--trainer.max_epochs=4", "--model.warmup_steps=2"]
        drawn.append("--data.batch_size=1")
        main(arguments("star", solver, sums, root, HINT, *EXACT, *drawn, *limit, *more))
        return root

    def round_of(step: int) -> int:
        path = whole / "version_0" / "checkpoints" / f"step={step:06d}.ckpt"
        return torch.load(path, weights_only=True)["star"]["round"]

    whole = fit("whole")
    rounds = [round_of(step + 1) for step in trace(whole)]
    lengths = Counter(rounds)
    last = next((r for r in lengths if lengths[r] < lengths[r + 1]), None)
    assert last is not None, f"no round is longer than the one before: {lengths}"
    # The end of a round, from which a run goes on that is itself resumed within the next one.
    end = sum(lengths[r] for r in range(last + 1))
    again = fit("again", f"--ckpt_path={kept_checkpoint(whole, end)}")
    assert_same_end(again, whole, after=end)
    assert_same_end(
        fit("twice", f"--ckpt_path={kept_checkpoint(again, end + 1)}"), whole, after=end + 1
    )


@pytest.mark.slow
def test_nothing_right_is_said_with_what_to_do(untrained, questions, tmp_path):
    more = ["--model.max_new_tokens=2"]
    with pytest.raises(SystemExit, match=r"round 1: of 16 questions 0 were answered right, .*max"):
        main(arguments("star", untrained, questions, tmp_path, *more))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--trainer.reload_dataloaders_every_n_epochs=0", "every_n_epochs must be 1, got 0"),
        ("--data.hint=Try again.", r"hint must say where the gold answer goes: \{answer\}"),
        ("--data.passes=0", "passes must be at least 1, got 0"),
        ("--model.temperature=-1", "temperature must not be negative"),
    ],
)
def test_what_star_cannot_do_is_refused(untrained, questions, tmp_path, option, message):
    with pytest.raises(SystemExit, match=message):
        main(arguments("star", untrained, questions, tmp_path, option))


def rationales(count: int) -> list[Rationale]:
    return [Rationale(Prompt(i, "?", "1", [i]), [i], False) for i in range(count)]


def served(loader: RationaleLoader) -> list[list[int]]:
    return [[r.prompt.index for r in batch] for batch in loader]


@pytest.mark.parametrize(("count", "passes", "size"), [(7, 1, 3), (7, 3, 4), (2, 1, 8), (6, 2, 3)])
def test_every_rationale_is_served_once_a_pass(count, passes, size):
    loader = RationaleLoader(rationales(count), passes, size, seed=5)
    number, batches = len(loader), served(loader)
    assert number == len(batches) == -(-count * passes // size)
    assert all(len(batch) == size for batch in batches[:-1])
    seen = [*chain(*batches)]
    for start in range(0, len(seen), count):
        assert sorted(seen[start : start + count]) == [*range(count)], "a pass"
    assert len({tuple(seen[s : s + count]) for s in range(0, len(seen), count)}) == passes
    assert served(RationaleLoader(rationales(count), passes, size, seed=5)) == batches
    for done in range(number):
        resumed = RationaleLoader(rationales(count), passes, size, seed=5)
        resumed.load_state_dict({"position": done * size, "number": len(seen)})
        assert served(resumed) == batches[done:]
    with pytest.raises(InputError, match=f"round serves {len(seen) + 1} rationales, this one"):
        resumed.load_state_dict({"position": 0, "number": len(seen) + 1})


def test_ranks_get_batches_of_one_size():
    whole = served(RationaleLoader(rationales(7), 1, 4, seed=5))
    shares = [served(RationaleLoader(rationales(7), 1, 4, 5, r, 2)) for r in range(2)]
    assert [[len(batch) for batch in share] for share in shares] == [[2, 1], [2, 1]]
    for number, batch in enumerate(whole):
        both = {i for share in shares for i in share[number]}
        assert both <= set(batch)


@pytest.mark.slow
def test_two_ranks_equal_one(solver, sums, tmp_path):
    plain = [*SGD, "--model.max_grad_norm=0.05", HINT, "--trainer.max_epochs=2"]
    rows = ["--data.val_batch_size=4", "--data.batch_size=2"]
    kinds = {"ddp": "ddp", "fsdp2": "fsdp2"}
    main(arguments("star", solver, sums, tmp_path / "one", *plain, *rows))
    waiting = [
        [
            *arguments("star", solver, sums, tmp_path / kind, *plain, *rows),
            "--trainer.devices=2",
            f"--trainer.strategy={strategy}",
        ]
        for kind, strategy in kinds.items()
    ]
    run_on_ranks(2, waiting, tmp_path)

    from thinktuning.checkpointing import AtomicCheckpointIO

    def saved(kind: str) -> dict[str, Any]:
        path = tmp_path / kind / "version_0" / "checkpoints" / "last.ckpt"
        return AtomicCheckpointIO().load_checkpoint(path)

    one = saved("one")
    for kind in kinds:
        two = saved(kind)
        assert two["global_step"] == one["global_step"] == 6
        assert two["star"]["rows"] == one["star"]["rows"]
        assert torch.equal(two["star"]["token_ids"], one["star"]["token_ids"])
        for name, weight in one["state_dict"].items():
            torch.testing.assert_close(two["state_dict"][name], weight, rtol=0, atol=1e-6)
        logged, expected = (scalars(tmp_path / k / "version_0") for k in (kind, "one"))
        for tag in ("objective/loss", "optimizer/grad_norm", "star/solved", "star/kept"):
            assert logged[tag] == pytest.approx(expected[tag], rel=1e-4, abs=1e-6), tag


@pytest.mark.parametrize("method", ["sft", "star"])
def test_the_configurations_are_read(method, capsys):
    with pytest.raises(SystemExit) as end:
        main(["fit", f"--config={CONFIGS / method}.yaml", "--print_config"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert f"method: {method}" in printed
    assert "pretrained: meta-llama/Llama-3.2-3B-Instruct" in printed
