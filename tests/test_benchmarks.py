"""Benchmarks: every set in the form its authors give it, its quirks, and what may be wrong."""

import csv
import json
import logging
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import datasets
import huggingface_hub
import pytest
import yaml

from thinktuning.errors import InputError
from thinktuning.evaluation.benchmarks import (
    BENCHMARKS,
    check_benchmarks,
    load_benchmark,
    parse_spec,
)
from thinktuning.evaluation.records import Item
from thinktuning.types import AnswerKind


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Keeps what ``datasets`` and the hub's client store out of the user's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        hub = str(tmp_path_factory.mktemp("hub"))
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", hub)
        yield


def write_jsonl(path, rows):
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")


def write_json(path, rows):
    path.write_text(json.dumps(rows, indent=2), encoding="utf-8")


def write_parquet(path, rows):
    datasets.Dataset.from_list(rows).to_parquet(path)


def write_csv(path, rows):
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


WRITE = {
    ".jsonl": write_jsonl,
    ".json": write_json,
    ".parquet": write_parquet,
    ".csv": write_csv,
}


def load(folder, name, rows, suffix=".jsonl", limit=None):
    path = folder / f"{name}{suffix}"
    WRITE[suffix](path, rows)
    return load_benchmark(f"{name}={path}", limit)


def error_of(folder, name, rows, suffix=".jsonl"):
    with pytest.raises(InputError) as caught:
        load(folder, name, rows, suffix)
    return str(caught.value)


# ------------------------------------------------------- invented rows in upstream's columns

GSM8K = {
    "question": "Ida fills 9 bags with 4 nuts each and eats 6 nuts. How many are left?",
    "answer": "There are 9*4=<<9*4=36>>36 nuts.\n36-6=<<36-6=30>>30 are left.\n#### 30",
}
MATH500 = {
    "problem": "Find the positive root of $9x^2 = 16.$",
    "solution": "It is $\\boxed{\\frac{4}{3}}.$",
    "answer": "\\frac{4}{3}",
    "subject": "Algebra",
    "level": 1,
    "unique_id": "test/algebra/99902.json",
}
AIME24 = {
    "ID": "2024-I-98",
    "Problem": "Find the last two digits of $5^3$.",
    "Solution": "$5^3 = 125$.",
    "Answer": 25,
}
AIME24_H4 = {
    "id": 998,
    "problem": AIME24["Problem"],
    "solution": "$\\boxed{025}$",
    "answer": "025",
    "url": "https://example.invalid/",
    "year": "2024",
}
AIME_ALL = {
    "ID": "1999-98",
    "Year": 1999,
    "Problem Number": 98,
    "Question": "Find the last two digits of $3^4$.",
    "Answer": "81",
    "Part": None,
}
COMMONSENSE = {
    "id": "00000000000000000000000000000def",
    "question": "Where does a spoon belong?",
    "question_concept": "spoon",
    "choices": {
        "label": ["A", "B", "C", "D", "E"],
        "text": ["river", "drawer", "moon", "engine", "letter"],
    },
    "answerKey": "B",
}
ARC = {
    "id": "INVENTED_2024_7",
    "question": "Which object lets electricity through?",
    "choices": {
        "text": ["a rubber band", "a candle", "a copper wire", "a glass"],
        "label": ["1", "2", "3", "4"],
    },
    "answerKey": "3",
}
GPQA = {
    "Record ID": "recINVENTED00002",
    "Subdomain": "Mechanics",
    "Pre-Revision Question": "Not this one?",
    "Question": " A stone of 4 kg moves at 2 m/s.\nWhat is its momentum? \n",
    "Correct Answer": "8 kg m/s\n",
    "Incorrect Answer 1": " 2 kg m/s",
    "Incorrect Answer 2": "16 kg m/s",
    "Incorrect Answer 3": "4 kg m/s",
}
STRATEGYQA = {
    "qid": "0123456789abcdef9999",
    "term": "Cork",
    "description": "A light wood",
    "question": "Would a cork float in a lake?",
    "answer": True,
    "facts": "Cork is lighter than water.",
}
MMLU_PRO = {
    "question_id": 999998,
    "question": "Which of these numbers is a square?",
    "options": ["21", "33", "39", "51", "57", "62", "64", "69", "77", "87"],
    "answer": "G",
    "answer_index": 6,
    "cot_content": "",
    "category": "math",
    "src": "invented",
}

MATH, CHOICE, YES_NO = AnswerKind.MATH, AnswerKind.CHOICE, AnswerKind.YES_NO
# Each set: its row, and the item as it is written down here by hand.
UPSTREAM = {
    "gsm8k": (GSM8K, Item("gsm8k/0", "gsm8k", MATH, GSM8K["question"], None, "30")),
    "math500": (
        MATH500,
        Item(
            "math500/test/algebra/99902.json",
            "math500",
            MATH,
            "Find the positive root of $9x^2 = 16.$",
            None,
            "\\frac{4}{3}",
        ),
    ),
    "aime24": (
        AIME24,
        Item("aime24/2024-I-98", "aime24", MATH, "Find the last two digits of $5^3$.", None, "25"),
    ),
    "aime_1983_2024": (
        AIME_ALL,
        Item(
            "aime_1983_2024/1999-98",
            "aime_1983_2024",
            MATH,
            "Find the last two digits of $3^4$.",
            None,
            "81",
        ),
    ),
    "commonsense_qa": (
        COMMONSENSE,
        Item(
            "commonsense_qa/00000000000000000000000000000def",
            "commonsense_qa",
            CHOICE,
            "Where does a spoon belong?",
            ("river", "drawer", "moon", "engine", "letter"),
            "B",
        ),
    ),
    "arc_challenge": (
        ARC,
        Item(
            "arc_challenge/INVENTED_2024_7",
            "arc_challenge",
            CHOICE,
            "Which object lets electricity through?",
            ("a rubber band", "a candle", "a copper wire", "a glass"),
            "C",
        ),
    ),
    "gpqa_diamond": (
        GPQA,
        Item(
            "gpqa_diamond/recINVENTED00002",
            "gpqa_diamond",
            CHOICE,
            "A stone of 4 kg moves at 2 m/s.\nWhat is its momentum?",
            # The order that was drawn when this was written: results must stay comparable.
            ("8 kg m/s", "2 kg m/s", "4 kg m/s", "16 kg m/s"),
            "A",
        ),
    ),
    "strategyqa": (
        STRATEGYQA,
        Item(
            "strategyqa/0123456789abcdef9999",
            "strategyqa",
            YES_NO,
            "Would a cork float in a lake?",
            None,
            "yes",
        ),
    ),
    "mmlu_pro": (
        MMLU_PRO,
        Item(
            "mmlu_pro/999998",
            "mmlu_pro",
            CHOICE,
            "Which of these numbers is a square?",
            ("21", "33", "39", "51", "57", "62", "64", "69", "77", "87"),
            "G",
        ),
    ),
}
WITHOUT_LISTS = [name for name, (_, item) in UPSTREAM.items() if item.choices is None]
FILES = [(name, suffix) for name in UPSTREAM for suffix in (".jsonl", ".json", ".parquet")]
FILES += [(name, ".csv") for name in [*WITHOUT_LISTS, "gpqa_diamond"]]


@pytest.mark.parametrize(("name", "suffix"), FILES)
def test_a_file_in_upstreams_columns_is_read(tmp_path, name, suffix):
    row, item = UPSTREAM[name]
    assert load(tmp_path, name, [row], suffix) == [item]


def test_every_benchmark_of_the_table_is_tested_here():
    assert set(UPSTREAM) == set(BENCHMARKS)


# --------------------------------------------------------------------------- the uniform form


def uniform(item):
    """The row of a uniform file."""
    return {
        "id": item.id,
        "benchmark": item.benchmark,
        "question": item.question,
        "choices": list(item.choices) if item.choices else None,
        "answer": item.answer,
        "source": "invented",
    }


UNIFORM_FILES = [(n, s) for n in UPSTREAM for s in (".jsonl", ".json", ".parquet")]
UNIFORM_FILES += [(n, ".csv") for n in WITHOUT_LISTS]


@pytest.mark.parametrize(("name", "suffix"), UNIFORM_FILES)
def test_a_file_in_the_uniform_columns_is_read(tmp_path, name, suffix):
    item = UPSTREAM[name][1]
    assert load(tmp_path, name, [uniform(item)], suffix) == [item]


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("math500", {"benchmark": "gsm8k"}, "'benchmark' must be 'math500', got 'gsm8k'"),
        ("math500", {"choices": ["1", "2"]}, "'choices' must be null"),
        ("math500", {"id": None}, "'id' must be a text, got None"),
        ("strategyqa", {"answer": "maybe"}, "'answer' must be yes or no, got 'maybe'"),
        ("commonsense_qa", {"answer": "F"}, "must be one of A, B, C, D, E, got 'F'"),
        ("commonsense_qa", {"answer": "b"}, "must be one of A, B, C, D, E, got 'b'"),
        ("commonsense_qa", {"choices": None}, "choices must be a list of texts, got None"),
        ("commonsense_qa", {"choices": ["a", None]}, "choices must be a list of texts"),
        ("commonsense_qa", {"choices": ["a"], "answer": "A"}, "2 to 10 choices, got 1"),
        ("commonsense_qa", {"choices": ["a"] * 27}, "27 choices and 26 labels"),
    ],
)
def test_a_faulty_row_of_the_uniform_form_is_named(tmp_path, name, change, said):
    good = uniform(UPSTREAM[name][1])
    message = error_of(tmp_path, name, [good | {"id": "other"}, good | change])
    assert "1 faulty rows:\n  row 2: " in message
    assert said in message


# ----------------------------------------------------------------------- order, number, ids


def sums(count):
    return [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(count)]


def test_rows_without_an_id_are_numbered_in_the_sources_order(tmp_path):
    items = load(tmp_path, "gsm8k", sums(12))
    assert [item.id for item in items] == [f"gsm8k/{i}" for i in range(12)]
    assert [item.answer for item in items] == [str(i + 1) for i in range(12)]


@pytest.mark.parametrize(("limit", "count"), [(1, 1), (5, 5), (12, 12), (50, 12), (None, 12)])
def test_a_limit_takes_the_first_rows(tmp_path, limit, count):
    items = load(tmp_path, "gsm8k", sums(12), limit=limit)
    assert [item.question for item in items] == [f"{i} + 1?" for i in range(count)]


@pytest.mark.parametrize("limit", [0, -3])
def test_a_limit_below_one_is_refused(tmp_path, limit):
    with pytest.raises(InputError, match=f"limit must be at least 1 or null, got {limit}"):
        load(tmp_path, "gsm8k", sums(2), limit=limit)


def test_an_id_that_is_used_twice_is_a_fault(tmp_path):
    message = error_of(tmp_path, "math500", [MATH500, MATH500 | {"unique_id": "x"}, MATH500])
    assert "1 faulty rows:\n  row 3: the id 'math500/test/algebra/99902.json'" in message


# -------------------------------------------------------------------------------- quirks


@pytest.mark.parametrize(
    ("answer", "gold"),
    [("a #### b\n#### 1,000", "1000"), ("#### -3", "-3"), ("12", "12"), ("#### $5.", "5")],
)
def test_gsm8ks_gold_answer_follows_its_mark(tmp_path, answer, gold):
    assert load(tmp_path, "gsm8k", [GSM8K | {"answer": answer}])[0].answer == gold


@pytest.mark.parametrize("answer", [25, "25", "025", " 025 "])
def test_aime_answers_are_integers(tmp_path, answer):
    assert load(tmp_path, "aime24", [AIME24 | {"Answer": answer}])[0].answer == "25"


def test_both_publishers_columns_of_aime_2024_are_read(tmp_path):
    ours, theirs = (load(tmp_path, "aime24", [row])[0] for row in (AIME24, AIME24_H4))
    assert (theirs.question, theirs.answer) == (ours.question, ours.answer)
    assert theirs.id == "aime24/998"


def test_digits_in_a_csv_stay_as_they_are_written(tmp_path):
    rows = [AIME_ALL | {"ID": f"{i:03}", "Question": f"{i:02}"} for i in range(3)]
    items = load(tmp_path, "aime_1983_2024", rows, ".csv")
    assert [item.id for item in items] == [f"aime_1983_2024/{i:03}" for i in range(3)]
    assert [item.question for item in items] == ["00", "01", "02"]


def test_an_aime_problem_with_two_gold_answers_is_left_out_and_counted(tmp_path, caplog):
    both = AIME_ALL | {"ID": "2022-II-98", "Answer": "080 or 081 (both were accepted)"}
    with caplog.at_level(logging.WARNING):
        items = load(tmp_path, "aime_1983_2024", [both, AIME_ALL])
    assert [item.id for item in items] == ["aime_1983_2024/1999-98"]
    assert "1 rows are left out:\n  row 1: it has two gold answers, '080 or 081" in caplog.text


@pytest.mark.parametrize("answer", ["n/a", "1.5", "-3", "", None, True])
def test_an_aime_answer_that_is_no_integer_is_a_fault(tmp_path, answer):
    message = error_of(tmp_path, "aime24", [AIME24 | {"Answer": answer}])
    assert f"row 1: 'answer' must be an integer, got {answer!r}" in message


LETTERED = {"text": ["one", "two", "three"], "label": ["A", "B", "C"]}
FIVE = {"text": ["one", "two", "three", "four", "five"], "label": ["1", "2", "3", "4", "5"]}


@pytest.mark.parametrize(
    ("choices", "key", "letter"),
    [(LETTERED, "C", "C"), (FIVE, "5", "E"), (FIVE, "1", "A")],
)
def test_arcs_labels_are_mapped_by_position(tmp_path, choices, key, letter):
    row = ARC | {"choices": choices, "answerKey": key}
    item = load(tmp_path, "arc_challenge", [row])[0]
    assert (item.choices, item.answer) == (tuple(choices["text"]), letter)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answerKey": "A"}, "the answer must be one of 1, 2, 3, 4, got 'A'"),
        ({"answerKey": "5"}, "the answer must be one of 1, 2, 3, 4, got '5'"),
        ({"choices": {"text": ["a", "b"], "label": ["1"]}}, "there are 2 choices and 1 labels"),
        ({"choices": ["a", "b"]}, "'choices' must have 'label' and 'text', got ['a', 'b']"),
        ({"choices": None}, "'choices' must have 'label' and 'text', got None"),
        ({"choices": [{"label": "3"}]}, "the choices must be a list of texts, got [None]"),
        ({"question": "  "}, "'question' must be a text, got '  '"),
    ],
)
def test_faulty_choices_are_named(tmp_path, change, said):
    message = error_of(tmp_path, "arc_challenge", [ARC | change])
    assert f"1 faulty rows:\n  row 1: {said}" in message


def test_commonsense_qa_without_answers_is_refused(tmp_path):
    rows = [COMMONSENSE | {"id": f"{i}", "answerKey": ""} for i in range(8)]
    message = error_of(tmp_path, "commonsense_qa", rows)
    assert "8 faulty rows" in message
    assert [f"row {i}:" in message for i in range(1, 9)] == [True] * 5 + [False] * 3
    assert "row 5: 'answerkey' must be a text, got ''" in message


@pytest.mark.parametrize("name", ["commonsense_qa", "arc_challenge"])
def test_the_authors_own_json_lines_are_read_like_the_hubs_rows(tmp_path, name):
    row, item = UPSTREAM[name]
    choices = row["choices"]
    options = [
        {"label": label, "text": text}
        for label, text in zip(choices["label"], choices["text"], strict=True)
    ]
    nested = {
        "answerKey": row["answerKey"],
        "id": row["id"],
        "question": {"stem": row["question"], "choices": options},
    }
    assert load(tmp_path, name, [nested]) == [item]


def test_of_two_choices_with_one_text_the_labelled_one_is_gold(tmp_path):
    choices = {"label": list("ABCDE"), "text": ["bar", "inn", "bar", "bus", "hat"]}
    row = COMMONSENSE | {"choices": choices, "answerKey": "C"}
    assert load(tmp_path, "commonsense_qa", [row])[0].answer == "C"


@pytest.mark.parametrize(
    ("answer", "gold"),
    [(True, "yes"), (False, "no"), ("True", "yes"), ("false", "no"), ("Yes", "yes")],
)
def test_strategyqa_is_answered_by_yes_or_no(tmp_path, answer, gold):
    assert load(tmp_path, "strategyqa", [STRATEGYQA | {"answer": answer}])[0].answer == gold


@pytest.mark.parametrize("facts", ["one", ["one", "two"], None])
def test_facts_of_strategyqa_do_not_matter(tmp_path, facts):
    rows = [STRATEGYQA | {"facts": facts, "decomposition": ["?"], "evidence": [[["x"], []]]}]
    assert load(tmp_path, "strategyqa", rows) == [UPSTREAM["strategyqa"][1]]


@pytest.mark.parametrize("answer", [None, "maybe", 1, ""])
def test_any_other_answer_of_strategyqa_is_a_fault(tmp_path, answer):
    message = error_of(tmp_path, "strategyqa", [STRATEGYQA | {"answer": answer}])
    assert f"row 1: 'answer' must be true or false, got {answer!r}" in message


# ---- MMLU-Pro


def options(texts, letter, **more):
    index = "ABCDEFGHIJ".index(letter)
    return MMLU_PRO | {"options": texts, "answer": letter, "answer_index": index} | more


def test_fillers_are_no_options_and_the_letter_moves_up(tmp_path):
    rows = [
        options(["p", "N/A", " q\n", " N/A ", "r"], "E"),
        options(["p", "q", "r", "N/A", "N/A"], "B", question_id=2),
        options(["p", "q", "N/A or so"], "C", question_id=3),
    ]
    upstream = load(tmp_path, "mmlu_pro", rows)
    assert [(item.choices, item.answer) for item in upstream] == [
        (("p", "q", "r"), "C"),
        (("p", "q", "r"), "B"),
        (("p", "q", "N/A or so"), "C"),
    ]
    # A uniform file keeps upstream's options, and must give the same items.
    raw = [
        uniform(item) | {"choices": row["options"], "answer": row["answer"]}
        for item, row in zip(upstream, rows, strict=True)
    ]
    assert load(tmp_path, "mmlu_pro", raw) == upstream


def test_a_filler_can_not_be_the_answer(tmp_path):
    message = error_of(tmp_path, "mmlu_pro", [options(["p", "q", "N/A"], "C")])
    assert "row 1: the answer must be one of A, B, got 'C'" in message


@pytest.mark.parametrize("count", range(3, 11))
def test_three_to_ten_options_are_read(tmp_path, count):
    texts, last = [f"option {i}" for i in range(count)], "ABCDEFGHIJ"[count - 1]
    item = load(tmp_path, "mmlu_pro", [options(texts, last)])[0]
    assert (item.choices, item.answer) == (tuple(texts), last)


def test_a_letter_outside_its_options_is_a_fault(tmp_path):
    message = error_of(tmp_path, "mmlu_pro", [options(["p", "q", "r"], "D")])
    assert "row 1: the answer must be one of A, B, C, got 'D'" in message


def test_rows_whose_letter_and_index_disagree_are_left_out_and_counted(tmp_path, caplog):
    rows = [MMLU_PRO, *(MMLU_PRO | {"question_id": i, "answer": "H"} for i in range(7))]
    with caplog.at_level(logging.WARNING):
        items = load(tmp_path, "mmlu_pro", rows)
    assert items == [UPSTREAM["mmlu_pro"][1]]
    assert "7 rows are left out:\n  row 2: its answer is 'H', but its answer_index is 6" in (
        caplog.text
    )
    assert "row 6:" in caplog.text and "row 7:" not in caplog.text


def test_a_set_of_which_nothing_is_left_is_refused(tmp_path):
    message = error_of(tmp_path, "mmlu_pro", [MMLU_PRO | {"answer": "H"}])
    assert "has no usable rows:\n  row 1: its answer is 'H'" in message


def test_a_question_that_is_asked_twice_stays_twice(tmp_path):
    items = load(tmp_path, "mmlu_pro", [MMLU_PRO, MMLU_PRO | {"question_id": 7}])
    assert [item.id for item in items] == ["mmlu_pro/999998", "mmlu_pro/7"]


# ---- GPQA


def gpqa_rows(count, **more):
    return [
        GPQA | {"Record ID": f"rec{i}", "Question": f"What is {i} kg at 2 m/s?"} | more
        for i in range(count)
    ]


def test_gpqas_gold_answer_follows_its_text_to_every_place(tmp_path):
    items = load(tmp_path, "gpqa_diamond", gpqa_rows(200))
    texts = {GPQA[column].strip() for column in GPQA if "Answer" in column}
    for item in items:
        assert set(item.choices) == texts
        assert item.choices["ABCD".index(item.answer)] == "8 kg m/s"
    # 50 of each are expected, with a standard deviation of 6.
    assert all(25 < count < 75 for count in Counter(i.answer for i in items).values())
    assert len({item.choices for item in items}) == 24


def test_gpqas_order_depends_on_the_question_alone(tmp_path):
    rows = gpqa_rows(20)
    items = {item.question: item for item in load(tmp_path, "gpqa_diamond", rows)}
    backwards = load(tmp_path, "gpqa_diamond", rows[::-1])
    assert {item.question: item for item in backwards} == items
    for row in rows[::6]:
        assert load(tmp_path, "gpqa_diamond", [row]) == [items[row["Question"]]]
    renamed = [row | {"Record ID": f"other{i}"} for i, row in enumerate(rows)]
    for item in load(tmp_path, "gpqa_diamond", renamed):
        assert (item.choices, item.answer) == (
            items[item.question].choices,
            items[item.question].answer,
        )


def test_gpqas_gold_place_is_not_looked_up_by_its_text(tmp_path):
    rows = gpqa_rows(40, **{"Incorrect Answer 1": GPQA["Correct Answer"]})
    letters = [
        ("ABCD".index(item.answer), item.choices.index("8 kg m/s"))
        for item in load(tmp_path, "gpqa_diamond", rows)
    ]
    assert any(gold > first for gold, first in letters)
    assert any(gold == first for gold, first in letters)


def test_a_row_of_gpqa_without_an_answer_is_a_fault(tmp_path):
    message = error_of(tmp_path, "gpqa_diamond", [GPQA | {"Incorrect Answer 2": None}])
    assert "row 1: 'incorrect answer 2' must be a text, got None" in message


# ------------------------------------------------------------------------------ bad files


def refused(spec):
    with pytest.raises(InputError) as caught:
        load_benchmark(spec)
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
def test_missing_columns_are_named_beside_the_expected_ones(tmp_path, suffix):
    message = error_of(tmp_path, "math500", [{"Frage": "?", "problem": "x"}], suffix)
    assert "has no column 'answer'; its columns are Frage, problem\n" in message
    assert "expected problem, answer (as HuggingFaceH4/MATH-500 has them)" in message
    assert "or id, benchmark, question, choices, answer" in message


def test_missing_columns_of_the_uniform_form_are_named(tmp_path):
    rows = [{"benchmark": "gsm8k", "question": "?", "answer": "1"}]
    assert "has no column 'id' and 'choices'" in error_of(tmp_path, "gsm8k", rows)


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", ""), ("a.jsonl", "\n \n"), ("a.json", "[]"), ("a.csv", "question,answer\n")],
)
def test_an_empty_file_has_no_rows(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert refused(f"gsm8k={tmp_path / name}").endswith("has no rows")


def test_a_parquet_file_without_rows_has_no_rows(tmp_path):
    rows = datasets.Dataset.from_list([GSM8K]).select([])
    rows.to_parquet(tmp_path / "a.parquet")
    assert refused(f"gsm8k={tmp_path / 'a.parquet'}").endswith("has no rows")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"question": "a", "answer": "1"}\n{"question": \n', "line 2 is not JSON"),
        ("a.json", b'[{"question": "a"', "Expecting ',' delimiter"),
        ("a.jsonl", b'{"question": "a", "answer": "1"}\n3\n', "no JSON objects"),
        ("a.jsonl", '{"question": "caf\xe9"}'.encode("latin-1"), "'utf-8' codec can't decode"),
        ("a.csv", "question\ncaf\xe9\n".encode("latin-1"), "'utf-8' codec can't decode"),
        ("a.csv", b"question,answer\na,1,2\n", "row 1 has more cells than the header"),
        ("a.csv", b'question,answer\n"a,1\n', "unexpected end of data"),
        ("a.parquet", b"question,answer\na,1\n", "Parquet"),
    ],
)
def test_a_file_that_can_not_be_read_is_refused_with_the_reason(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    message = refused(f"gsm8k={tmp_path / name}")
    assert f"benchmark 'gsm8k': cannot read {str(tmp_path / name)!r}: " in message
    assert said in message
    assert "\nexpected UTF-8: JSON objects" in message


def test_odd_but_sound_files_are_read(tmp_path):
    path = tmp_path / "a.jsonl"
    # A line separator inside a text, a byte order mark, an empty line, no last line end.
    row = json.dumps({"question": "a\u2028b", "answer": "1"}, ensure_ascii=False)
    path.write_bytes(f"\ufeff{row}\r\n\r\n{row}".encode())
    assert [item.question for item in load_benchmark(f"gsm8k={path}")] == ["a\u2028b"] * 2
    path = tmp_path / "a.csv"
    path.write_bytes('\ufeffquestion,answer\r\n"one,\r\ntwo",NA\r\n2020-01-01,None\r\n'.encode())
    read = [(item.question, item.answer) for item in load_benchmark(f"gsm8k={path}")]
    assert read == [("one,\r\ntwo", "NA"), ("2020-01-01", "None")]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"answer": "#### 1"}, "'question' must be a text, got None"),
        ({"question": 3, "answer": "#### 1"}, "'question' must be a text, got 3"),
        ({"question": "a", "answer": "####"}, "'answer' has no gold answer"),
        ({"question": "a", "answer": None}, "'answer' must be a text, got None"),
    ],
)
def test_a_row_without_question_or_answer_is_named(tmp_path, row, said):
    message = error_of(tmp_path, "gsm8k", [GSM8K, row])
    assert f"1 faulty rows:\n  row 2: {said}" in message


def test_a_csv_can_not_hold_choices(tmp_path):
    message = error_of(tmp_path, "mmlu_pro", [MMLU_PRO], ".csv")
    assert "the choices must be a list of texts, got \"['21'," in message


# --------------------------------------------------------------------------------- specs


def test_a_spec_is_a_name_with_or_without_a_file(tmp_path):
    assert parse_spec("gsm8k") == ("gsm8k", None)
    name, file = parse_spec(f"gsm8k={tmp_path}/a=b.jsonl")
    assert (name, file) == ("gsm8k", tmp_path / "a=b.jsonl")
    assert "~" not in str(parse_spec("gsm8k=~/a.jsonl")[1])


def test_every_fault_of_the_specs_is_told_at_once(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [GSM8K])
    specs = [
        f"gsm8k={tmp_path / 'a.jsonl'}",
        "gsm8k",
        "gsm",
        "math500=nowhere.jsonl",
        "aime24=a.txt",
        "strategyqa=",
        "mmlu_pro",
    ]
    with pytest.raises(InputError) as caught:
        check_benchmarks(specs)
    message = str(caught.value)
    assert len(message.splitlines()) == 5
    assert "'gsm8k' is given 2 times" in message
    assert "'gsm' is unknown; expected NAME or NAME=FILE, NAME of gsm8k, math500" in message
    assert "'math500=nowhere.jsonl': there is no file 'nowhere.jsonl'" in message
    assert "'aime24=a.txt': expected a file that ends in .jsonl, .json, .csv, .parquet" in message
    assert "'strategyqa=': expected a file" in message
    assert "mmlu_pro=" not in message


def test_sound_specs_pass_without_being_read(tmp_path):
    (tmp_path / "a.jsonl").write_text("not JSON")
    assert check_benchmarks(["mmlu_pro", f"gsm8k={tmp_path / 'a.jsonl'}"]) is None


def test_no_benchmark_at_all_is_a_fault():
    with pytest.raises(InputError, match="at least one is needed, of gsm8k, "):
        check_benchmarks([])


def test_a_bad_spec_is_not_loaded():
    assert "'data/train.jsonl' is unknown" in refused("data/train.jsonl")


# ------------------------------------------------------------------------------- the hub

# Hub id, configuration and split of each set, and the kind of file it consists of.
HUB = {
    "gsm8k": ("openai/gsm8k", "main", "test", ".parquet"),
    "math500": ("HuggingFaceH4/MATH-500", "default", "test", ".jsonl"),
    "aime24": ("Maxwell-Jia/AIME_2024", "default", "train", ".parquet"),
    "aime_1983_2024": ("di-zhang-fdu/AIME_1983_2024", "default", "train", ".csv"),
    "commonsense_qa": ("tau/commonsense_qa", "default", "validation", ".parquet"),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "test", ".parquet"),
    "gpqa_diamond": ("Idavidrein/gpqa", "gpqa_diamond", "train", ".csv"),
    "strategyqa": ("ChilleD/StrategyQA", "default", "test", ".parquet"),
    "mmlu_pro": ("TIGER-Lab/MMLU-Pro", "default", "test", ".parquet"),
}


def decoy(row):
    """A row of the same columns that must not be read."""
    return row | {
        name: "decoy" for name in ("question", "Question", "problem", "Problem") if name in row
    }


@pytest.mark.parametrize("name", HUB)
def test_a_name_alone_loads_the_right_split_of_the_hubs_set(tmp_path, monkeypatch, name):
    """`datasets` takes a folder of the id's name for the hub's repository."""
    hub_id, config, split, suffix = HUB[name]
    row, item = UPSTREAM[name]
    folder = tmp_path / hub_id
    folder.mkdir(parents=True)
    WRITE[suffix](folder / f"right{suffix}", [row])
    WRITE[suffix](folder / f"wrong{suffix}", [decoy(row)])
    splits = {
        each: f"right{suffix}" if each == split else f"wrong{suffix}"
        for each in ("train", "validation", "test")
    }
    configs = {"decoy": dict.fromkeys(splits, f"wrong{suffix}"), config: splits}
    card = {
        "configs": [
            {
                "config_name": each,
                "data_files": [{"split": s, "path": p} for s, p in files.items()],
            }
            for each, files in configs.items()
        ]
    }
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n")
    monkeypatch.chdir(tmp_path)
    assert load_benchmark(name) == [item]


def test_without_the_hub_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = refused("math500")
    assert "benchmark 'math500': cannot read 'HuggingFaceH4/MATH-500': Couldn't reach" in message
    assert "network, HF_HUB_OFFLINE" in message
    assert message.endswith("or give a file: math500=FILE")


class GatedHub(BaseHTTPRequestHandler):
    """Answers everything as the hub answers who has not accepted a set's terms."""

    def do_HEAD(self):
        self.send_response(403)
        self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_):
        pass


def test_a_gated_set_says_how_to_get_access(tmp_path, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), GatedHub)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        datasets.config, "HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}"
    )
    try:
        message = refused("gpqa_diamond")
    finally:
        server.shutdown()
        server.server_close()
    assert "'Idavidrein/gpqa' is a gated dataset" in message
    assert "accept its terms on https://huggingface.co/datasets/Idavidrein/gpqa" in message
    assert "`hf auth login` or HF_TOKEN; or give a file: gpqa_diamond=FILE" in message
