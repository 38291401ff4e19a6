"""What a run leaves behind: its folder, the account of guided rollouts, samples for people."""

import io
import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from running import room

from thinktuning.callbacks import AnswerLog, AuditLog
from thinktuning.callbacks.audit import audit_row
from thinktuning.callbacks.samples import describe, indented
from thinktuning.report import print_guidance
from thinktuning.runs import config_path, last_checkpoint, new_run, run_of, versions
from thinktuning.types import Feedback, Guidance, Outcome, Prompt, Rollout, RolloutBatch

# --------------------------------------------------------------------- folders


def made(root, *numbers):
    for number in numbers:
        (root / f"version_{number}").mkdir(parents=True)


def checkpoint(root, number, name, at):
    path = root / f"version_{number}" / "checkpoints" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    os.utime(path, (at, at))
    return path


def test_runs_are_numbered_on_from_the_largest_number(tmp_path):
    assert new_run(tmp_path / "not there yet") == tmp_path / "not there yet" / "version_0"
    assert new_run(tmp_path) == tmp_path / "version_0"
    made(tmp_path, 0, 2, 10)
    assert new_run(tmp_path) == tmp_path / "version_11"
    assert not new_run(tmp_path).exists()


def test_runs_are_ordered_by_number_and_other_folders_are_none(tmp_path):
    made(tmp_path, 10, 9, 0, "final", "1b", "")
    (tmp_path / "other_3").mkdir()
    assert [p.name for p in versions(tmp_path)] == ["version_0", "version_9", "version_10"]


def test_the_last_checkpoint_is_the_newest_of_the_newest_run_that_has_one(tmp_path):
    assert last_checkpoint(tmp_path) is None
    made(tmp_path, 11)
    assert last_checkpoint(tmp_path) is None
    checkpoint(tmp_path, 2, "step_9.ckpt", at=900)
    checkpoint(tmp_path, 10, "step_1.ckpt", at=100)
    newest = checkpoint(tmp_path, 10, "a_later_one.ckpt", at=300)
    checkpoint(tmp_path, 10, "step_2.ckpt", at=200)
    checkpoint(tmp_path, 10, "half_written.tmp", at=400)
    assert last_checkpoint(tmp_path) == newest


def test_a_link_is_no_checkpoint_of_its_own(tmp_path):
    old = checkpoint(tmp_path, 0, "old.ckpt", at=100)
    new = checkpoint(tmp_path, 0, "new.ckpt", at=200)
    (new.parent / "last.ckpt").symlink_to(new)
    assert last_checkpoint(tmp_path) == new
    (old.parent / "broken.ckpt").symlink_to(tmp_path / "gone.ckpt")
    assert last_checkpoint(tmp_path) == new


def test_a_checkpoint_knows_its_run(tmp_path, monkeypatch):
    path = checkpoint(tmp_path, 3, "last.ckpt", at=1)
    assert run_of(path) == tmp_path / "version_3"
    monkeypatch.chdir(path.parent)
    assert run_of(Path("last.ckpt")) == tmp_path / "version_3"
    assert run_of(tmp_path / "model.ckpt") is None
    assert run_of(tmp_path / "version_3" / "model.ckpt") is None
    assert run_of(tmp_path / "other" / "checkpoints" / "model.ckpt") is None


def test_a_resumed_run_keeps_its_earlier_configurations(tmp_path):
    for expected in ("config.yaml", "config.resumed_1.yaml", "config.resumed_2.yaml"):
        path = config_path(tmp_path)
        assert path == tmp_path / expected
        path.write_text("")


# --------------------------------------------------------------------- account

STUDENT = r"It is \boxed{8}."
REASON, PHRASE = "Wait, I added 1 too many.", r"So it is \boxed{7}."
REPLY = f"<opinion>incorrect</opinion>\n<reason>{REASON}</reason>\n<phrase>{PHRASE}</phrase>"
FEEDBACK = Feedback("incorrect", REASON, PHRASE)

UNGUIDED = Rollout(
    prompt=Prompt(41, "3 plus 4?", "7", [1, 2, 3]),
    sample=2,
    completion_ids=(11, 12, 13, 2),
    logprobs=(-1.0, -2.0, -3.0, -4.0),
    injected_mask=(False,) * 4,
    finished=True,
    text=STUDENT,
    outcome=Outcome.WRONG,
    reward=0.0,
    advantage=-0.5,
)
GUIDED = replace(
    UNGUIDED,
    completion_ids=(11, 12, 13, 21, 22, 23, 2),
    logprobs=(-1.0, -2.0, -3.0, *[float("nan")] * 4),
    injected_mask=(False,) * 3 + (True,) * 4,
    text=f"{STUDENT}\n\n{REASON}\n\n{PHRASE}",
    guidance=Guidance(("self_conflict", "self_critique"), REPLY, FEEDBACK),
    original=UNGUIDED,
    outcome=Outcome.CORRECT,
    reward=1.0,
    advantage=1.25,
)
SKIPPED = replace(UNGUIDED, guidance=Guidance(("self_critique",), "Hm.", None, "unparsed"))


def test_the_account_of_a_guided_rollout_has_both_sides_of_the_splice():
    assert audit_row(5, GUIDED) == {
        "step": 5,
        "prompt": 41,
        "sample": 2,
        "behaviors": ["self_conflict", "self_critique"],
        "gold": "7",
        "before": {"answer": "8", "outcome": "wrong", "reward": 0.0, "tokens": 4},
        "after": {"answer": "7", "outcome": "correct", "reward": 1.0, "tokens": 7},
        "advantage": 1.25,
        "injected_span": (3, 7),
        "skipped": None,
        "opinion": "incorrect",
        "teacher": REPLY,
        "student": STUDENT,
        "injected": f"{REASON}\n\n{PHRASE}",
    }


def test_the_account_of_a_selected_rollout_that_stays_unguided_says_why():
    assert audit_row(5, SKIPPED) == {
        "step": 5,
        "prompt": 41,
        "sample": 2,
        "behaviors": ["self_critique"],
        "gold": "7",
        "before": {"answer": "8", "outcome": "wrong", "reward": 0.0, "tokens": 4},
        "after": None,
        "advantage": -0.5,
        "injected_span": None,
        "skipped": "unparsed",
        "opinion": None,
        "teacher": "Hm.",
        "student": STUDENT,
        "injected": None,
    }


def test_parsed_feedback_that_did_not_fit_keeps_its_opinion():
    too_long = replace(UNGUIDED, guidance=replace(GUIDED.guidance, skipped="too_long"))
    row = audit_row(0, too_long)
    assert (row["opinion"], row["skipped"], row["after"]) == ("incorrect", "too_long", None)


def test_only_selected_rollouts_have_an_account():
    with pytest.raises(AssertionError):
        audit_row(0, UNGUIDED)


def write_account(folder, *steps, resumed_at=0, rank=0, ranks=1):
    """Steps as the trainer would run them; each step is its rollouts."""
    trainer = SimpleNamespace(
        world_size=ranks, global_rank=rank, log_dir=str(folder), global_step=resumed_at
    )
    log = AuditLog()
    log.on_train_start(trainer, None)
    for number, rollouts in enumerate(steps, start=resumed_at):
        outputs = {"rollouts": RolloutBatch(number, len(rollouts), tuple(rollouts))}
        log.on_train_batch_end(trainer, None, outputs, None, number)
    return folder / (f"audit.rank{rank}.jsonl" if ranks > 1 else "audit.jsonl")


def read_account(path):
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_the_account_has_a_line_for_each_selected_rollout(tmp_path):
    path = write_account(tmp_path / "run", [UNGUIDED, GUIDED], [UNGUIDED, UNGUIDED], [SKIPPED])
    rows = read_account(path)
    assert [row["step"] for row in rows] == [0, 2]
    assert rows[0] == json.loads(json.dumps(audit_row(0, GUIDED)))
    assert rows[0]["after"]["outcome"] == "correct"
    assert rows[1]["skipped"] == "unparsed"


def test_steps_that_a_resumed_run_does_again_are_written_once(tmp_path):
    write_account(tmp_path, [GUIDED], [SKIPPED], [GUIDED])
    path = write_account(tmp_path, [SKIPPED], [SKIPPED], resumed_at=1)
    rows = read_account(path)
    assert [(row["step"], row["skipped"]) for row in rows] == [
        (0, None),
        (1, "unparsed"),
        (2, "unparsed"),
    ]


@pytest.mark.parametrize("half", ['{"step": 1, "prompt"', '{"step": 1, "student": "é"'])
def test_half_a_line_of_a_killed_run_is_dropped(tmp_path, half):
    path = write_account(tmp_path, [GUIDED])
    with path.open("ab") as file:
        file.write(half.encode()[:-2])  # in the middle of the é
    assert [row["step"] for row in read_account(write_account(tmp_path, resumed_at=2))] == [0]


@pytest.mark.parametrize("odd", ["\u2028", "\u2029", "\x85", "\x0c", "\x1c", "\r", "\n", "\r\n"])
def test_every_line_separator_that_a_model_can_write_survives_a_resume(tmp_path, odd):
    rollout = replace(SKIPPED, text=f"one{odd}two")
    write_account(tmp_path, [rollout])
    (row,) = read_account(write_account(tmp_path, resumed_at=1))
    assert row["student"] == f"one{odd}two"


def test_every_rank_has_an_account_of_its_own(tmp_path):
    write_account(tmp_path, [GUIDED], rank=1, ranks=2)
    assert [p.name for p in tmp_path.iterdir()] == ["audit.rank1.jsonl"]


def accounts(folder):
    """The steps of each account, by the name of its file."""
    return {p.name: [row["step"] for row in read_account(p)] for p in folder.glob("*.jsonl")}


def test_steps_that_other_numbers_of_ranks_do_again_are_written_once(tmp_path):
    (tmp_path / "audit.copy.jsonl").write_text('{"step": 5}\n')  # a user's own
    for rank in (1, 0):
        write_account(tmp_path, [GUIDED], [GUIDED], [GUIDED], rank=rank, ranks=2)
    with (tmp_path / "audit.rank1.jsonl").open("a") as file:
        file.write('{"step": 3, "prom')  # a kill
    write_account(tmp_path, [GUIDED], [GUIDED], resumed_at=1)
    assert accounts(tmp_path) == {
        "audit.copy.jsonl": [5],
        "audit.rank0.jsonl": [0],
        "audit.rank1.jsonl": [0],
        "audit.jsonl": [1, 2],
    }
    # Rank 1 may be ahead: what it has written by the time that rank 0 cuts stays.
    for rank in (1, 0):
        write_account(tmp_path, [GUIDED], rank=rank, ranks=2, resumed_at=2)
    assert accounts(tmp_path) == {
        "audit.copy.jsonl": [5],
        "audit.rank0.jsonl": [0, 2],
        "audit.rank1.jsonl": [0, 2],
        "audit.jsonl": [1],
    }


def validate(
    folder, step, *batches, rank=0, ranks=1, fn=TrainerFn.FITTING, sanity=False, start=None
):
    """A validation behind a step, in a run that began or went on behind the step ``start``."""
    trainer = SimpleNamespace(
        world_size=ranks,
        global_rank=rank,
        log_dir=str(folder),
        global_step=start,
        state=SimpleNamespace(fn=TrainerFn(fn)),
        sanity_checking=sanity,
    )
    log = AnswerLog()
    if fn == "fit":
        log.on_train_start(trainer, None)
    trainer.global_step = step
    log.on_validation_start(trainer, None)
    for number, rollouts in enumerate(batches):
        log.on_validation_batch_end(trainer, None, {"rollouts": rollouts}, None, number)
    log.on_validation_end(trainer, None)


def answers(folder):
    """The texts of each validation, by the name of its file."""
    found = {p.name: read_account(p) for p in (folder / "answers").glob("*.jsonl")}
    return {name: [row["text"] for row in rows] for name, rows in found.items()}


def test_held_out_answers_of_each_validation_are_kept(tmp_path):
    one, two = (replace(UNGUIDED, text=text) for text in ("one\u2028", "two"))
    validate(tmp_path, 10, [one], [two, one])
    validate(tmp_path, 20, [two], start=10, rank=1, ranks=2)
    assert answers(tmp_path) == {
        "step=000010.jsonl": ["one\u2028", "two", "one\u2028"],
        "step=000020.rank1.jsonl": ["two"],
    }


def test_validations_that_a_resumed_run_does_again_are_written_once(tmp_path):
    for step in (10, 20, 30):
        validate(tmp_path, step, [UNGUIDED], start=step - 10, rank=1, ranks=2)
    validate(tmp_path, 20, [replace(UNGUIDED, text="again")], start=15)
    assert answers(tmp_path) == {
        "step=000010.rank1.jsonl": [UNGUIDED.text],
        "step=000020.jsonl": ["again"],
    }


def test_only_a_fit_keeps_its_held_out_answers(tmp_path):
    validate(tmp_path, 0, [UNGUIDED], fn="validate")
    validate(tmp_path, 0, [UNGUIDED], sanity=True)
    assert answers(tmp_path) == {}


def test_held_out_answers_that_a_full_disk_does_not_take_are_told(tmp_path, caplog):
    with room(10):  # less than a row
        validate(tmp_path, 10, [UNGUIDED, UNGUIDED])
    assert answers(tmp_path) == {"step=000010.jsonl": []}
    assert "lacks 2 answers that couldn't be written" in caplog.text


DAMAGED = [
    b'{"step": 1, "pro',
    b'"tokens": 4}',
    b"\0\0\0\0",
    b'{"step": 1, "student": "\xc3"}',
    b"7",
]


def damage(path, line):
    """Put a line in place of the second."""
    rows = path.read_bytes().split(b"\n")
    rows[1] = line
    path.write_bytes(b"\n".join(rows))


@pytest.mark.parametrize("line", DAMAGED)
def test_an_account_is_cut_where_it_is_damaged_and_says_what_is_lost(tmp_path, caplog, line):
    damage(write_account(tmp_path, [GUIDED], [GUIDED], [GUIDED], [GUIDED], [GUIDED]), line)
    path = write_account(tmp_path, [GUIDED], resumed_at=4)
    assert [row["step"] for row in read_account(path)] == [0, 4]
    assert "row 2 of" in caplog.text and "it and 2 rows of earlier steps behind it" in caplog.text


def test_damage_behind_the_step_of_a_checkpoint_loses_nothing(tmp_path, caplog):
    damage(write_account(tmp_path, [GUIDED], [GUIDED], [GUIDED]), DAMAGED[0])
    path = write_account(tmp_path, [GUIDED], resumed_at=1)
    assert [row["step"] for row in read_account(path)] == [0, 1]
    assert not caplog.records


@pytest.mark.parametrize("line", DAMAGED)
def test_the_end_of_a_run_counts_damaged_rows_apart(tmp_path, line):
    for rank in (1, 0):
        damage(write_account(tmp_path, [GUIDED], [GUIDED], [SKIPPED], rank=rank, ranks=2), line)
    (tmp_path / "audit.copy.jsonl").write_text('{"step": 5}\n')
    console = Console(file=io.StringIO(), width=1000)
    print_guidance(tmp_path, console)
    said = console.file.getvalue()
    assert "was to read 4 answers; 2 were continued" in said
    assert f"2 damaged rows of {tmp_path}/audit" in said


# --------------------------------------------------------------------- samples


def test_a_guided_sample_marks_what_the_teacher_wrote_and_what_it_changed():
    assert describe(GUIDED).split("\n") == [
        "Question: 3 plus 4?",
        "",
        rf"Student: {STUDENT}",
        "",
        "[injected from the teacher]",
        REASON,
        "",
        PHRASE,
        "[end of the injected part]",
        "",
        "gold 7 | wrong before guidance, correct after | reward 1.0 | advantage +1.250 | 7 tokens",
    ]


def test_an_unguided_sample_has_no_injected_part():
    assert describe(UNGUIDED).split("\n") == [
        "Question: 3 plus 4?",
        "",
        rf"Student: {STUDENT}",
        "",
        "gold 7 | wrong | reward 0.0 | advantage -0.500 | 4 tokens",
    ]


def test_a_sample_without_a_verdict_or_an_advantage_says_so():
    line = describe(replace(UNGUIDED, outcome=None, advantage=None)).splitlines()[-1]
    assert "| not verified |" in line and "advantage unset" in line


def test_every_line_of_a_sample_is_code_so_that_nothing_in_it_is_markup():
    text = "# Not a heading\n\n- not a list <b>\n```\n    deep"
    shown = indented(text)
    assert all(line.startswith("    ") for line in shown.split("\n"))
    assert [line[4:] for line in shown.split("\n")] == text.split("\n")
    assert indented("") == ""
