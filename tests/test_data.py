"""Questions: sources, prompt text, the loader and the data module."""

import json
import logging
import re
from collections import Counter
from itertools import chain, islice
from pathlib import Path

import datasets
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from thinktuning.data import (
    GSM8KDataModule,
    PromptLoader,
    load_questions,
    parse_gold,
)
from thinktuning.data.gsm8k import PromptExample
from thinktuning.data.sources import Question
from thinktuning.errors import InputError
from thinktuning.policy import render_prompt
from thinktuning.types import Prompt

# The whole training split, where this machine has it beside the repository.
WHOLE_SPLIT = Path(__file__).parents[2] / "shared" / "data" / "gsm8k" / "train.jsonl"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Keeps what ``datasets`` stores out of the user's home."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("datasets")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        yield


def upstream_row(number, gold):
    return {
        "question": f"Ada packs {number} boxes. How many?",
        "answer": f"She packs {number}*1=<<{number}*1={number}>>{number} boxes.\n#### {gold}",
    }


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# -------------------------------------------------------------------- sources


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("3+4=<<3+4=7>>7\n#### 7", "7"),
        ("#### 7", "7"),
        ("####7", "7"),
        ("####   7  \n", "7"),
        ("#### 1 is not it\n#### 2", "2"),
        ("#### 1,000", "1000"),
        ("#### 12,345,678", "12345678"),
        ("#### 1,000.50", "1000.50"),
        ("#### +7", "7"),
        ("#### -7", "-7"),
        ("#### - 3", "-3"),
        ("#### \N{MINUS SIGN}3", "-3"),
        ("#### $18", "18"),
        ("#### -$18", "-18"),
        ("#### $1,000.", "1000"),
        ("#### 7.", "7"),
        ("#### 0.5", "0.5"),
        ("#### .5", ".5"),
        ("7", "7"),
        ("1,000", "1000"),
        (r"\frac{1}{2}", r"\frac{1}{2}"),
        ("#### 1/2", "1/2"),
        ("(1, 2)", "(1, 2)"),
        ("####", None),
        ("####  \n", None),
        ("", None),
    ],
)
def test_the_gold_answer_follows_the_last_mark_and_is_normalised(answer, gold):
    assert parse_gold(answer) == gold


@pytest.mark.parametrize("answer", ["1, 2", "3, 5, 7", "1,2,3", "1 2"])
def test_a_list_of_numbers_is_not_read_as_one_number(answer):
    assert parse_gold(f"#### {answer}") == answer


ROWS = [upstream_row(1, "1"), upstream_row(2, "1,002"), upstream_row(3, "$-3.")]
QUESTIONS = [
    Question(i, row["question"], gold, f"She packs {i + 1}*1={i + 1} boxes.")
    for i, (row, gold) in enumerate(zip(ROWS, ["1", "1002", "-3"], strict=True))
]


def write_parquet(path, rows):
    datasets.Dataset.from_list(rows).to_parquet(path)
    return str(path)


FORMATS = [("rows.jsonl", write_jsonl), ("rows.parquet", write_parquet)]
both_formats = pytest.mark.parametrize(("name", "write"), FORMATS, ids=["jsonl", "parquet"])


@both_formats
def test_files_in_upstreams_form_are_read_in_order(tmp_path, name, write):
    path = write(tmp_path / name, ROWS)
    assert load_questions(path, "train") == QUESTIONS
    assert load_questions(path, "test") == QUESTIONS
    assert load_questions(path, "train", limit=2) == QUESTIONS[:2]
    assert load_questions(path, "train", limit=50) == QUESTIONS


@both_formats
def test_columns_that_nobody_asked_for_are_ignored(tmp_path, name, write):
    path = write(tmp_path / name, [row | {"level": 5} for row in ROWS])
    assert load_questions(path, "train") == QUESTIONS


def test_space_around_a_question_is_dropped(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "\n  How many? ", "answer": "#### 1"}])
    assert load_questions(path, "train") == [Question(0, "How many?", "1")]


def every_row_file(folder):
    """A file as large as the real one is awkward; every form of number that it has."""
    golds = ["0", "7", "1,000", "1,234,567", "-2", "3.5", "$10", "10."] * 25
    return write_jsonl(folder / "train.jsonl", [upstream_row(*g) for g in enumerate(golds)])


@pytest.mark.parametrize("path", [None, *([WHOLE_SPLIT] if WHOLE_SPLIT.exists() else [])], ids=str)
def test_every_row_of_a_split_is_read_and_has_a_number_as_its_gold_answer(tmp_path, path):
    path = path or every_row_file(tmp_path)
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    questions = load_questions(str(path), "train")
    assert len(questions) == len(lines) == (7473 if path == WHOLE_SPLIT else 200)
    assert [q.index for q in questions] == list(range(len(lines)))
    for question, line in zip(questions, lines, strict=True):
        assert question.text == json.loads(line)["question"].strip()
        assert float(question.answer) == float(
            json.loads(line)["answer"].split("#### ")[1].translate({ord(c): None for c in "$,"})
        )


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("empty.jsonl", b"", "no rows|no data"),
        ("blank.jsonl", b"\n\n", "no rows|no data"),
        ("malformed.jsonl", b'{"question": "a", "answer": "#### 1"}\n{nope\n', "cannot read"),
        ("prose.jsonl", b"hello world\n", "cannot read"),
        ("latin.jsonl", b'{"question": "caf\xe9", "answer": "#### 1"}\n', "cannot read"),
        ("text.parquet", b"not a parquet file", "cannot read"),
        ("missing.jsonl", b'{"prompt": "a", "answer": "#### 1"}\n', "no column 'question'"),
        ("other.jsonl", b'{"a": 1}\n', "'answer' and 'question'"),
    ],
)
def test_a_file_that_holds_no_questions_is_refused_by_name(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        load_questions(str(tmp_path / name), "train")
    assert name in str(error.value) and re.search(told, str(error.value))


@pytest.mark.parametrize("name", ["none.jsonl", "none.json", "none.parquet", "folder.jsonl"])
def test_a_missing_file_is_named(tmp_path, name):
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(InputError, match="there is no file") as error:
        load_questions(str(tmp_path / name), "train")
    assert str(tmp_path / name) in str(error.value)


def test_faulty_rows_are_named_together(tmp_path):
    rows = [
        upstream_row(1, "1"),
        {"question": "", "answer": "#### 1"},
        {"question": "How many?", "answer": "I don't know.\n####"},
        {"question": "  ", "answer": "#### 1"},
        {"question": None, "answer": "#### 1"},
        {"question": "How many?", "answer": None},
        {"answer": "#### 1"},
    ]
    path = write_jsonl(tmp_path / "faulty.jsonl", rows)
    with pytest.raises(InputError) as error:
        load_questions(path, "train")
    message = str(error.value)
    assert path in message and "6 faulty rows" in message
    lines = message.splitlines()[1:]
    assert [line.split(":")[0].strip() for line in lines] == [f"row {n}" for n in (2, 3, 4, 5, 6)]
    faulty = ["question", "answer", "question", "question", "answer"]
    assert [line.split("'")[1] for line in lines] == faulty


def test_a_limit_below_one_is_refused(tmp_path):
    with pytest.raises(InputError, match="limit"):
        load_questions(write_jsonl(tmp_path / "a.jsonl", ROWS), "train", limit=0)


def test_word_problems_are_generated_without_a_network():
    train = load_questions("reasoning-gym:gsm_symbolic", "train", seed=3, limit=20)
    assert [q.index for q in train] == list(range(20))
    assert all(q.text and float(q.answer) is not None for q in train)
    assert len({q.text for q in train}) == 20
    assert load_questions("reasoning-gym:gsm_symbolic", "train", seed=3, limit=20) == train
    assert load_questions("reasoning-gym:gsm_symbolic", "train", seed=3, limit=5) == train[:5]
    for other in (
        load_questions("reasoning-gym:gsm_symbolic", "test", seed=3, limit=20),
        load_questions("reasoning-gym:gsm_symbolic", "train", seed=4000, limit=20),
    ):
        assert {q.text for q in other}.isdisjoint(q.text for q in train)


def test_a_generator_takes_settings():
    source = "reasoning-gym:chain_sum?min_terms=3&max_terms=3&max_digits=1"
    for question in load_questions(source, "train", seed=3, limit=20):
        terms = re.findall(r"(?:^|[+-] )(\d)(?= )", question.text.partition(": ")[2])
        assert len(terms) == 3
        assert eval(question.text.partition(": ")[2].removesuffix("=")) == int(question.answer)


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("terms=3", "unexpected keyword argument 'terms'"),
        ("max_terms", "bad query field"),
        ("max_terms=-1", "max_terms must be"),
        ("max_terms=three", "not supported between"),
        ("max_terms=[", "flow"),
    ],
)
def test_a_wrong_setting_of_a_generator_is_told(query, said):
    with pytest.raises(InputError, match=f"chain_sum doesn't take the settings .*{said}"):
        load_questions(f"reasoning-gym:chain_sum?{query}", "train")


def test_an_unknown_generator_is_named():
    with pytest.raises(InputError, match="no generator 'gsm_symbolical'"):
        load_questions("reasoning-gym:gsm_symbolical", "train")


@pytest.mark.parametrize("name", ["countdown", "puzzle24"])
def test_a_generator_with_many_right_answers_is_refused(name):
    with pytest.raises(InputError, match=f"{name} asks for a calculation, such as .*one right"):
        load_questions(f"reasoning-gym:{name}", "train", limit=5)


# ---------------------------------------------------------------- prompt text

CHAT = [
    {"role": "system", "content": "Add."},
    {"role": "user", "content": "3 plus 4?"},
]
RENDERED = "<|start|>system\nAdd.<|end|><|start|>user\n3 plus 4?<|end|><|start|>assistant\n"
REFUSING = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    + tiny.CHAT_TEMPLATE
)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("own_pad", "<|bos|>" + RENDERED),
        ("pad_is_eos", RENDERED),
        ("no_template", "Add.\n\n3 plus 4?\n\n"),
    ],
)
def test_a_prompt_is_what_the_model_expects_up_to_its_own_turn(kind, expected):
    text = tiny.tokenizer(kind)
    ids = render_prompt(text, CHAT)
    assert text.decode(ids) == expected
    assert ids.count(text.convert_tokens_to_ids("<|bos|>")) == (kind == "own_pad")


@pytest.mark.parametrize("opening", ["", "{{ bos_token }}", "{{ bos_token }}{{ bos_token }}"])
def test_there_is_one_bos_however_many_the_template_writes(opening):
    text = tiny.tokenizer("own_pad")
    text.chat_template = tiny.CHAT_TEMPLATE.replace("{{ bos_token }}", opening)
    assert text.decode(render_prompt(text, CHAT)) == "<|bos|>" + RENDERED


def test_there_is_one_bos_without_a_chat_template():
    text = tiny.tokenizer("own_pad")
    text.chat_template = None
    assert text.decode(render_prompt(text, CHAT)) == "<|bos|>Add.\n\n3 plus 4?\n\n"


def test_a_bos_that_the_tokenizer_names_but_never_adds_stays_where_the_template_put_it():
    # As SmolLM2's <|im_start|>, which opens every turn.
    text = tiny.tokenizer("pad_is_eos")
    text.bos_token = "<|start|>"
    text.chat_template = tiny.CHAT_TEMPLATE.replace("{{ bos_token }}", "")
    ids = render_prompt(text, CHAT)
    assert text.decode(ids) == RENDERED
    assert ids.count(text.bos_token_id) == 3
    text.chat_template = None
    assert text.bos_token_id not in render_prompt(text, CHAT)


def test_control_tokens_of_the_template_become_single_ids():
    text = tiny.tokenizer("own_pad")
    ids = render_prompt(text, CHAT)
    assert ids.count(text.convert_tokens_to_ids("<|start|>")) == 3
    assert ids.count(text.eos_token_id) == 2


def test_a_template_without_a_system_role_gets_it_in_the_first_user_message():
    text = tiny.tokenizer("own_pad")
    text.chat_template = REFUSING
    more = [{"role": "assistant", "content": "7"}, {"role": "user", "content": "Sure?"}]
    with pytest.warns(UserWarning, match="no system role"):
        ids = render_prompt(text, CHAT + more)
    assert text.decode(ids) == (
        "<|bos|><|start|>user\nAdd.\n\n3 plus 4?<|end|><|start|>assistant\n7<|end|>"
        "<|start|>user\nSure?<|end|><|start|>assistant\n"
    )
    assert [m["content"] for m in CHAT] == ["Add.", "3 plus 4?"], "the messages stay as they were"


# --------------------------------------------------------------------- loader


def prompts(count):
    return [Prompt(i, f"q{i}", str(i), [i]) for i in range(count)]


def stream(loader):
    """Batches for ever, as row numbers."""
    while True:
        for batch in loader:
            yield [p.index for p in batch]


def served(loader, batches):
    return list(islice(stream(loader), batches))


@pytest.mark.parametrize(("count", "batch_size"), [(12, 4), (12, 12), (5, 1), (13, 4), (7, 5)])
def test_an_epoch_serves_every_row_at_most_once_in_whole_batches(count, batch_size):
    loader = PromptLoader(prompts(count), batch_size, seed=1)
    assert len(loader) == count // batch_size
    for _ in range(3):
        batches = [[p.index for p in batch] for batch in loader]
        assert [len(batch) for batch in batches] == [batch_size] * (count // batch_size)
        rows = list(chain(*batches))
        assert len(set(rows)) == len(rows)
        if count % batch_size == 0:
            assert sorted(rows) == list(range(count))


def test_rows_left_out_of_one_epoch_come_in_another():
    loader = PromptLoader(prompts(7), 5, seed=1)
    seen = Counter(chain(*served(loader, 40)))
    assert set(seen) == set(range(7))
    assert max(seen.values()) < 40, "no row is always in the batch"


def test_the_order_is_new_every_epoch_and_fixed_by_the_seed():
    loader = PromptLoader(prompts(20), 20, seed=1)
    epochs = served(loader, 4)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert list(range(20)) not in epochs
    assert served(PromptLoader(prompts(20), 20, seed=1), 4) == epochs
    assert served(PromptLoader(prompts(20), 20, seed=2), 4) != epochs


@pytest.mark.parametrize("seed", [1, None])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_share_a_batch_without_overlap(seed, ranks):
    whole = served(PromptLoader(prompts(24), 8, seed), 7)
    shares = [served(PromptLoader(prompts(24), 8, seed, r, ranks), 7) for r in range(ranks)]
    for number, batch in enumerate(whole):
        assert all(len(share[number]) == 8 // ranks for share in shares)
        assert sorted(chain(*(share[number] for share in shares))) == sorted(batch)


sizes = st.integers(1, 12).flatmap(lambda b: st.tuples(st.just(b), st.integers(b, 40)))


@given(sizes, st.integers(0, 30), st.integers(0, 3))
def test_a_resumed_loader_goes_on_at_the_next_row(size, done, seed):
    batch_size, count = size
    loader = PromptLoader(prompts(count), batch_size, seed)
    unbroken = stream(loader)
    for _ in range(done):
        next(unbroken)
    state = json.loads(json.dumps(loader.state_dict()))  # as it lies in a checkpoint
    resumed = PromptLoader(prompts(count), batch_size, seed)
    resumed.load_state_dict(state)
    ahead = 2 * len(loader) + 1
    assert served(resumed, ahead) == list(islice(unbroken, ahead))


@given(st.integers(0, 9), st.sampled_from([(1, 2), (2, 1), (4, 2), (1, 4)]))
def test_a_run_resumes_on_another_number_of_ranks(done, ranks):
    before, after = ranks
    loaders = [PromptLoader(prompts(13), 4, 7, r, before) for r in range(before)]
    for loader in loaders:
        served(loader, done)
    (state,) = {tuple(loader.state_dict().items()) for loader in loaders}
    resumed = [PromptLoader(prompts(13), 4, 7, r, after) for r in range(after)]
    for loader in resumed:
        loader.load_state_dict(dict(state))
    whole = served(PromptLoader(prompts(13), 4, 7), done + 5)[done:]
    shares = [served(loader, 5) for loader in resumed]
    got = [sorted(chain(*parts)) for parts in zip(*shares, strict=True)]
    assert got == [sorted(batch) for batch in whole]


def test_an_epoch_that_was_left_early_goes_on():
    loader = PromptLoader(prompts(12), 4, seed=1)
    expected = served(PromptLoader(prompts(12), 4, seed=1), 3)
    first = [p.index for p in next(iter(loader))]
    rest = [[p.index for p in batch] for batch in loader]
    assert [first, *rest] == expected


def test_validation_serves_every_row_in_order_every_time():
    loader = PromptLoader(prompts(7), 3, seed=None)
    assert len(loader) == 3
    for _ in range(2):
        assert [[p.index for p in b] for b in loader] == [[0, 1, 2], [3, 4, 5], [6]]
    next(iter(loader))
    assert [[p.index for p in b] for b in loader] == [[0, 1, 2], [3, 4, 5], [6]]


def test_fewer_validation_prompts_than_a_batch_are_one_batch():
    assert [len(b) for b in PromptLoader(prompts(2), 8, seed=None)] == [2]


def test_a_batch_that_ranks_cannot_share_is_refused():
    with pytest.raises(InputError, match=r"batch_size=5 on 2 ranks"):
        PromptLoader(prompts(10), 5, 1, 0, 2)


def test_too_few_prompts_for_a_batch_are_refused():
    with pytest.raises(InputError, match="7 prompts don't fill a batch of 8"):
        PromptLoader(prompts(7), 8, seed=1)


# ---------------------------------------------------------------- data module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny.save(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture
def source(tmp_path):
    return write_jsonl(tmp_path / "sums.jsonl", [upstream_row(n, n) for n in range(10)])


def data_module(tokenizer, source, **changes):
    settings = {"val_size": 3, "batch_size": 2, "system_message": "Add.", "instruction": "Box it."}
    data = GSM8KDataModule(tokenizer, source, **settings | changes)
    data.setup("fit")
    return data


def rows(batch):
    return [p.index for p in batch]


def test_validation_rows_are_never_trained_on(folder, source):
    data = data_module(folder, source)
    assert rows(data.train_prompts) == list(range(7))
    assert rows(data.val_prompts) == [7, 8, 9]
    assert {p.question for p in data.train_prompts}.isdisjoint(p.question for p in data.val_prompts)
    trained = list(chain(*map(rows, data.train_dataloader())))
    assert len(trained) == 6 and set(trained) < set(range(7))
    assert list(map(rows, data.val_dataloader())) == [[7, 8, 9]]
    assert list(map(rows, data.test_dataloader())) == [[7, 8, 9]]


def test_a_prompt_is_system_message_question_and_instruction(folder, source):
    data = data_module(folder, source, system_message="Only add.", instruction="Use a box.")
    prompt = data.train_prompts[4]
    question = "Ada packs 4 boxes. How many?"
    assert (prompt.question, prompt.answer) == (question, "4")
    assert tiny.tokenizer("own_pad").decode(prompt.token_ids) == (
        f"<|bos|><|start|>system\nOnly add.<|end|><|start|>user\n{question}\n\nUse a box.<|end|>"
        "<|start|>assistant\n"
    )


def test_without_an_instruction_the_question_stands_alone(folder, source):
    text = tiny.tokenizer("own_pad").decode(
        data_module(folder, source, instruction="").train_prompts[4].token_ids
    )
    assert "<|start|>user\nAda packs 4 boxes. How many?<|end|>" in text


def test_examples_are_earlier_turns_of_the_chat(folder, source):
    shown = [PromptExample("1 plus 1?", r"\boxed{2}"), PromptExample("2 plus 2?", r"\boxed{4}")]
    data = data_module(folder, source, examples=shown)
    assert tiny.tokenizer("own_pad").decode(data.train_prompts[0].token_ids) == (
        "<|bos|><|start|>system\nAdd.<|end|>"
        "<|start|>user\n1 plus 1?\n\nBox it.<|end|><|start|>assistant\n\\boxed{2}<|end|>"
        "<|start|>user\n2 plus 2?\n\nBox it.<|end|><|start|>assistant\n\\boxed{4}<|end|>"
        "<|start|>user\nAda packs 0 boxes. How many?\n\nBox it.<|end|><|start|>assistant\n"
    )


def test_limit_counts_training_questions(folder, source):
    data = data_module(folder, source, limit=4)
    assert rows(data.train_prompts) == [0, 1, 2, 3]
    assert rows(data.val_prompts) == [4, 5, 6]


def test_validation_questions_can_come_from_a_file_of_their_own(folder, source, tmp_path):
    others = write_jsonl(tmp_path / "val.jsonl", [upstream_row(n, n) for n in range(50, 60)])
    data = data_module(folder, source, val_source=others)
    assert len(data.train_prompts) == 10
    assert [p.answer for p in data.val_prompts] == ["50", "51", "52"]


def test_there_need_not_be_any_validation(folder, source):
    data = data_module(folder, source, val_size=0)
    assert len(data.train_prompts) == 10
    assert list(data.val_dataloader()) == []


def test_no_question_is_in_training_and_in_validation(folder, tmp_path, caplog):
    made = [upstream_row(n % 8, n) for n in range(10)]  # the last two repeat the first two
    source = write_jsonl(tmp_path / "again.jsonl", made)
    with caplog.at_level(logging.WARNING, logger="thinktuning"):
        data = data_module(folder, source)
    assert rows(data.val_prompts) == [7, 8, 9]
    assert rows(data.train_prompts) == [2, 3, 4, 5, 6]
    assert [r.getMessage() for r in caplog.records] == [
        "2 of 7 training questions are asked in validation, too, and left out"
    ]
    others = write_jsonl(tmp_path / "others.jsonl", made)
    with pytest.raises(InputError, match="every training question is asked in validation, too"):
        data_module(folder, source, val_source=others, val_size=10)


def test_generated_questions_for_training_and_validation_differ(folder):
    data = data_module(folder, "reasoning-gym:gsm_symbolic", limit=6, max_prompt_tokens=5000)
    assert (len(data.train_prompts), len(data.val_prompts)) == (6, 3)
    assert len({p.question for p in data.train_prompts + data.val_prompts}) == 9


def test_overlong_prompts_are_left_out_and_counted_in_the_log(folder, tmp_path, caplog):
    made = [upstream_row(n, n) for n in range(10)]
    for n in (2, 5, 8):
        made[n]["question"] += " Please tell me." * 60
    source = write_jsonl(tmp_path / "long.jsonl", made)
    with caplog.at_level(logging.WARNING, logger="thinktuning"):
        data = data_module(folder, source, max_prompt_tokens=200)
    assert rows(data.train_prompts) == [0, 1, 3, 4, 6]
    assert rows(data.val_prompts) == [7, 9]
    assert [r.getMessage() for r in caplog.records] == [
        "2 of 7 training prompts are longer than max_prompt_tokens=200 and left out",
        "1 of 3 validation prompts are longer than max_prompt_tokens=200 and left out",
    ]


def test_the_limit_of_a_prompt_is_inclusive_and_nothing_is_logged_without_need(
    folder, source, caplog
):
    longest = max(len(p.token_ids) for p in data_module(folder, source).train_prompts)
    with caplog.at_level(logging.WARNING, logger="thinktuning"):
        data = data_module(folder, source, max_prompt_tokens=longest)
    assert len(data.train_prompts) == 7
    assert not caplog.records


def test_prompts_that_are_all_too_long_are_an_error_that_tells_the_shortest(folder, source):
    shortest = min(len(p.token_ids) for p in data_module(folder, source).train_prompts)
    with pytest.raises(InputError, match=f"the shortest has {shortest} tokens"):
        data_module(folder, source, max_prompt_tokens=shortest - 1)


def test_validation_that_would_take_every_question_is_refused(folder, source):
    with pytest.raises(InputError, match="10 questions, and validation takes 10"):
        data_module(folder, source, val_size=10)


def test_settings_out_of_range_are_told_together():
    with pytest.raises(InputError) as error:
        GSM8KDataModule(
            "unused", batch_size=0, val_batch_size=0, val_size=-1, max_prompt_tokens=0, limit=-5
        )
    for name in ("batch_size", "val_batch_size", "val_size", "max_prompt_tokens", "limit"):
        assert f"{name} must be at least" in str(error.value)


def test_questions_are_read_once(folder, source):
    data = data_module(folder, source)
    Path(source).unlink()
    data.setup("test")
    assert len(data.train_prompts) == 7


def test_the_seed_fixes_the_order_of_training(folder, source):
    orders = [
        list(map(rows, data_module(folder, source, seed=seed).train_dataloader()))
        for seed in (1, 1, 2)
    ]
    assert orders[0] == orders[1] != orders[2]
