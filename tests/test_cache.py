"""Replies on the disk: asked once, whatever happens to the files."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from running import room
from transformers import AutoModelForCausalLM

from thinktuning.engines import TransformersEngine
from thinktuning.engines.base import model_identity, revision
from thinktuning.errors import InputError
from thinktuning.teaching import CachedTeacher, Reply, ReplyParams, Teacher


class CountingTeacher(Teacher):
    """Repeats the question, and what it is limited to, and counts; never says the same twice."""

    def __init__(self, name="counting", answer="{question} {count}"):
        self.name = name
        self.answer = answer
        self.asked = []

    @property
    def identity(self):
        return self.name

    def reply(self, chats, params):
        replies = []
        for chat in chats:
            self.asked.append(chat)
            question = chat[-1]["content"]
            if question.startswith("skip"):
                replies.append(Reply(skipped="unavailable"))
                continue
            text = self.answer.format(question=question, count=len(self.asked))
            replies.append(Reply(text, cut_off=len(question) > 20))
        return replies


def chat(question="3 plus 4?", system="Help.", role="user"):
    return [{"role": "system", "content": system}, {"role": role, "content": question}]


PARAMS = ReplyParams(100, 1000)


def ask(folder, *chats, teacher=None, params=PARAMS):
    """Replies of a cache that was just opened, and the cache."""
    cached = CachedTeacher(CountingTeacher() if teacher is None else teacher, folder)
    return cached.reply(chats, params), cached


def entries(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if not path.is_dir()]


# ---------------------------------------------------------------- asked once


def test_a_repeated_question_is_not_asked_again(tmp_path):
    teacher = CountingTeacher()
    cached = CachedTeacher(teacher, tmp_path)
    (first,) = cached.reply([chat()], PARAMS)
    (second,) = cached.reply([chat()], PARAMS)
    ((third,), _) = ask(tmp_path, chat(), teacher=teacher)
    assert len(teacher.asked) == 1
    assert first == Reply("3 plus 4? 1")
    assert second == third == Reply("3 plus 4? 1", cached=True)


def test_a_reply_that_was_cut_off_is_still_so(tmp_path):
    long = chat("a question of more than 20 characters")
    assert [r.cut_off for r in ask(tmp_path, long, chat())[0]] == [True, False]
    assert [(r.cut_off, r.cached) for r in ask(tmp_path, long, chat())[0]] == [
        (True, True),
        (False, True),
    ]


def test_known_and_new_questions_come_back_in_their_order(tmp_path):
    ask(tmp_path, chat("b"), chat("d"))
    replies, cached = ask(tmp_path, *(chat(q) for q in "abcde"))
    assert [r.text[0] for r in replies] == list("abcde")
    assert [r.cached for r in replies] == [False, True, False, True, False]
    assert [c[-1]["content"] for c in cached.teacher.asked] == list("ace")


def test_the_same_question_twice_in_a_batch_is_asked_once(tmp_path):
    replies, cached = ask(tmp_path, chat(), chat("other"), chat())
    assert len(cached.teacher.asked) == 2
    assert replies[0] == replies[2]
    assert len(entries(tmp_path)) == 2


def test_no_questions_ask_nobody(tmp_path):
    assert ask(tmp_path)[0] == []


@pytest.mark.parametrize(
    "changed",
    [
        {"teacher": CountingTeacher("another")},
        {"params": ReplyParams(101, 1000)},
        # a prompt that would now be too long must not be answered from the disk
        {"params": ReplyParams(100, 999)},
        {"params": ReplyParams(100, 1000, "[a-z]+")},
        {"chat": chat("3 plus 5?")},
        {"chat": chat(system="Do help.")},
        {"chat": chat(role="assistant")},
        {"chat": chat()[1:]},
        {"chat": chat()[::-1]},
        {"chat": [*chat(), {"role": "assistant", "content": ""}]},
    ],
    ids=lambda changed: str({k: "another" if k == "teacher" else v for k, v in changed.items()}),
)
def test_whatever_a_reply_depends_on_makes_it_another_question(tmp_path, changed):
    ask(tmp_path, chat())
    changed = dict(changed)
    replies, cached = ask(tmp_path, changed.pop("chat", chat()), **changed)
    assert not replies[0].cached
    assert cached.damaged == 0
    assert len(entries(tmp_path)) == 2


def test_two_patterns_are_two_questions(tmp_path):
    for pattern in ("[a-z]+", "[a-z]*"):
        replies, _ = ask(tmp_path, chat(), params=ReplyParams(100, 1000, pattern))
        assert not replies[0].cached


def test_a_reply_that_is_not_there_is_not_kept(tmp_path):
    replies, cached = ask(tmp_path, chat("skip this"), chat())
    assert [r.skipped for r in replies] == ["unavailable", None]
    replies = cached.reply([chat("skip this"), chat()], PARAMS)
    assert [r.cached for r in replies] == [False, True]
    assert [c[-1]["content"] for c in cached.teacher.asked].count("skip this") == 2
    assert len(entries(tmp_path)) == 1


@pytest.mark.parametrize("can_continue", [True, False])
def test_it_continues_what_its_teacher_can(tmp_path, can_continue):
    teacher = CountingTeacher()
    teacher.can_continue = can_continue
    assert CachedTeacher(teacher, tmp_path).can_continue is can_continue


# ---------------------------------------------------------------- any text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "two\nlines\r\nand \u2028 more\x85\x00\t",
        "𝔸 👩‍👩‍👧 é e\u0301 \u202e",
        "half \ud835",
        "halves that belong together \ud83d\ude00",
        '"quotes" \\boxed{5} {"text": 1} </phrase>',
    ],
    ids=ascii,
)
def test_any_text_comes_back_as_it_was(tmp_path, text):
    teacher = CountingTeacher(answer="{question}")
    ask(tmp_path, chat(text), teacher=teacher)
    replies, cached = ask(tmp_path, chat(text), teacher=teacher)
    assert replies[0].cached and cached.damaged == 0
    assert [ord(c) for c in replies[0].text] == [ord(c) for c in text]


# ---------------------------------------------------------------- damaged entries


def entry(**changed):
    """A whole entry for ``chat()``, but for what is changed."""

    def change(path):
        whole = json.loads(path.read_bytes()) | changed
        path.write_text(json.dumps({k: v for k, v in whole.items() if v is not None}))

    return change


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "empty": lambda path: path.write_bytes(b""),
    "no JSON": lambda path: path.write_text("reply: 7"),
    "no UTF-8": lambda path: path.write_bytes(b'{"text": "\xff\xfe"}'),
    "zeros": lambda path: path.write_bytes(bytes(512)),
    "null": lambda path: path.write_text("null"),
    "a list": lambda path: path.write_text("[1, 2]"),
    "text missing": entry(text=None),
    "cut_off missing": entry(cut_off=None),
    "key missing": entry(key=None),
    "text of another type": entry(text=7),
    "cut_off of another type": entry(cut_off="no"),
    "another question's": entry(key="other"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_entry_is_counted_asked_again_and_replaced(tmp_path, damage):
    ask(tmp_path, chat())
    (path,) = entries(tmp_path)
    damage(path)
    # twice in one batch: it is damaged once
    replies, cached = ask(tmp_path, chat(), chat())
    assert [r.cached for r in replies] == [False, False]
    assert (cached.damaged, len(cached.teacher.asked)) == (1, 1)
    replies, cached = ask(tmp_path, chat())
    assert replies[0].cached
    assert cached.damaged == 0


def test_a_damaged_entry_leaves_the_others_alone(tmp_path):
    ask(tmp_path, chat("a"), chat("b"), chat("c"))
    entries(tmp_path)[1].write_text("{")
    replies, cached = ask(tmp_path, chat("a"), chat("b"), chat("c"))
    assert sorted(r.cached for r in replies) == [False, True, True]
    assert cached.damaged == 1


def test_a_folder_in_an_entrys_place_stays_and_is_not_fatal(tmp_path):
    ask(tmp_path, chat())
    (path,) = entries(tmp_path)
    path.unlink()
    (path / "somebody's").mkdir(parents=True)
    for _ in range(2):
        with pytest.warns(UserWarning, match="can't be kept"):
            replies, cached = ask(tmp_path, chat())
        assert replies == [Reply("3 plus 4? 1")]
        assert (cached.damaged, cached.unwritten) == (1, 1)
    assert (path / "somebody's").is_dir()
    assert entries(tmp_path) == [], "no scratch stays behind"


# ---------------------------------------------------------------- a disk that takes nothing


def test_a_full_disk_costs_no_reply_and_warns_once(tmp_path):
    ask(tmp_path, chat("known"))
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        for step in range(3):
            # A new object for every step, as TeacherGuidance makes them.
            cached = CachedTeacher(CountingTeacher(), tmp_path)
            with room(10):
                replies = cached.reply([chat("known"), chat("a"), chat("b")], PARAMS)
            assert [r.text for r in replies] == ["known 1", "a 1", "b 2"], step
            assert [r.cached for r in replies] == [True, False, False]
            assert cached.unwritten == 2
    assert len(shown) == 1
    assert str(tmp_path) in str(shown[0].message)
    assert len(entries(tmp_path)) == 1, "nothing half written stays behind"
    replies, cached = ask(tmp_path, chat("a"))
    assert not replies[0].cached
    assert (cached.damaged, cached.unwritten) == (0, 0)


def test_a_file_in_a_subfolders_place_is_not_fatal(tmp_path):
    ask(tmp_path, chat())
    (path,) = entries(tmp_path)
    path.unlink()
    path.parent.rmdir()
    path.parent.write_text("mine")
    with pytest.warns(UserWarning, match="can't be kept"):
        replies, cached = ask(tmp_path, chat())
    assert replies == [Reply("3 plus 4? 1")]
    assert cached.unwritten == 1
    assert path.parent.read_text() == "mine"


def test_a_folder_that_is_missing_is_made(tmp_path):
    ask(tmp_path / "a" / "b", chat())
    assert ask(tmp_path / "a" / "b", chat())[0][0].cached


@pytest.mark.parametrize("below", ["", "replies", "a/b"])
def test_a_file_in_the_folders_place_is_refused_at_once(tmp_path, below):
    (tmp_path / "file").write_text("mine")
    folder = tmp_path / "file" / below
    with pytest.raises(InputError) as refusal:
        CachedTeacher(CountingTeacher(), folder)
    assert str(folder) in str(refusal.value)
    assert "guidance.cache" in str(refusal.value)
    assert (tmp_path / "file").read_text() == "mine"


def test_others_may_read_what_the_umask_lets_them(tmp_path):
    before = os.umask(0o022)
    try:
        ask(tmp_path, chat())
    finally:
        os.umask(before)
    (path,) = entries(tmp_path)
    assert path.stat().st_mode & 0o777 == 0o644


# ---------------------------------------------------------------- several processes

WRITER = """
import sys
from pathlib import Path
from thinktuning.teaching import CachedTeacher, Reply, ReplyParams, Teacher

folder, name = Path(sys.argv[1]), sys.argv[2]


class Writer(Teacher):
    identity = "counting"

    def reply(self, chats, params):
        return [Reply(c[-1]["content"] + " " + name * 5000) for c in chats]


print("ready", flush=True)
sys.stdin.readline()
system = {"role": "system", "content": "Help."}
for round in range(30):
    # Without looking, so that both write every entry again and again.
    cached = CachedTeacher(Writer(), folder)
    cached._read = lambda key: None
    chats = [[system, {"role": "user", "content": str(i)}] for i in range(8)]
    cached.reply(chats, ReplyParams(100, 1000))
"""


def test_processes_that_write_the_same_entries_at_once_leave_whole_ones(tmp_path):
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in "xy"
    ]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    # A reader meanwhile finds whole entries or none.
    found, damaged = set(), 0
    while any(writer.poll() is None for writer in writers):
        reader = CachedTeacher(CountingTeacher(answer="skip"), tmp_path)
        reader._write = lambda key, reply: None
        found |= {r.text for r in reader.reply([chat(str(i)) for i in range(8)], PARAMS)}
        damaged += reader.damaged
    for writer in writers:
        writer.communicate()
    assert [writer.returncode for writer in writers] == [0, 0]
    whole = {f"{i} {name * 5000}" for i in range(8) for name in "xy"}
    assert damaged == 0
    assert found - {"skip"} <= whole
    replies, cached = ask(tmp_path, *(chat(str(i)) for i in range(8)))
    assert all(r.cached and r.text in whole for r in replies)
    assert cached.damaged == 0
    assert len(entries(tmp_path)) == 8
    assert {path.suffix for path in entries(tmp_path)} == {".json"}


# ---------------------------------------------------------------- whose reply it is


def started(folder, **options):
    engine = TransformersEngine(pretrained=str(folder), **options)
    engine.start()
    return engine


def test_an_engine_whose_weights_were_rewritten_is_another_teacher(tmp_path):
    folder = tiny.save(tmp_path / "teacher", seed=0)
    first = started(folder).identity
    assert started(folder).identity == first
    tiny.save(folder, seed=1)
    assert started(folder).identity != first


def test_the_cache_follows_the_weights_of_a_folder(tmp_path):
    folder = tiny.save(tmp_path / "teacher", seed=0)
    short = ReplyParams(4, 500)
    for seed, cached in [(0, False), (0, True), (1, False)]:
        if seed == 1:
            tiny.save(folder, seed=1)
        engine = started(folder)
        ((reply,), _) = ask(tmp_path / "cache", chat(), teacher=engine, params=short)
        assert reply.cached is cached
        assert reply.text == engine.reply([chat()], short)[0].text


def test_another_folder_precision_or_quantization_is_another_teacher(tmp_path):
    folders = [tiny.save(tmp_path / name, width=64, heads=2) for name in ("a", "b")]
    nets = [AutoModelForCausalLM.from_pretrained(folder) for folder in folders]
    names = {model_identity(net) for net in nets}
    names.add(model_identity(nets[0].to(torch.bfloat16)))
    assert len(names) == 3
    engines = [started(folders[0], quantization=q) for q in (None, "4bit", "8bit")]
    assert len({engine.identity for engine in engines}) == 3
    assert engines[1].identity == started(folders[0], quantization="4bit").identity


def test_a_revision_follows_every_file_of_a_folder(tmp_path):
    folder = tiny.save(tmp_path / "teacher")
    seen = {revision(str(folder))}
    assert revision(str(folder)) in seen
    weights = folder / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1  # the size stays
    weights.write_bytes(bytes(changed))
    seen.add(revision(str(folder)))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    seen.add(revision(str(folder)))
    (folder / "generation_config.json").unlink()
    seen.add(revision(str(folder)))
    assert len(seen) == 4
    assert None not in seen


def test_a_name_that_is_nowhere_has_no_revision():
    assert revision("nobody/has-this-model") is None
