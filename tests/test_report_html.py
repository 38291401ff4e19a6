"""Numbers of a cell by hand, and the three files of a report as other programs read them."""

import csv
import re
from html.parser import HTMLParser
from itertools import combinations, pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from thinktuning.errors import InputError
from thinktuning.evaluation.records import ItemResult, Sample, Turn
from thinktuning.evaluation.report import write_report
from thinktuning.evaluation.report.numbers import Run, count
from thinktuning.evaluation.report.paper import beside_ours
from thinktuning.evaluation.report.sections import overview
from thinktuning.evaluation.report.svg import round_ticks
from thinktuning.evaluation.report.table import points
from thinktuning.evaluation.summary import Cell, majority_vote, pass_at, summarise
from thinktuning.teaching.behaviors import Behavior
from thinktuning.types import Outcome

WAITING = Behavior("waiting", "wait", (), (r"\bwait\b",))
EVIL = '<script>alert("1 & 2")</script>'


def sample(outcome: str, extracted: str | None = None, tokens: int = 10, text: str = "") -> Sample:
    return Sample((Turn("q", text),), text, extracted, Outcome(outcome), tokens)


def answers(letters: str, tokens: int = 10) -> tuple[Sample, ...]:
    """``c`` for a correct sample, ``-`` for none, any other letter for that wrong answer."""
    found = {"c": ("correct", "7"), "-": ("no_answer", None)}
    return tuple(sample(*found.get(letter, ("wrong", letter)), tokens) for letter in letters)


def cell(model: str, strategy: str, benchmark: str, items: list[str], tokens: int = 10, **settings):
    results = tuple(
        ItemResult(f"{benchmark}/{i}", "q", "7", answers(letters, tokens))
        for i, letters in enumerate(items)
    )
    return Cell(model, strategy, benchmark, results, settings)


def test_summary_by_hand():
    results = (
        ItemResult("1", "q", "7", (
            sample("correct", "7", 10, "Wait. No, wait!"), sample("wrong", "8", 20, "Waiting"),
        )),
        ItemResult("2", "q", "7", (
            sample("cut_off", None, 40, "wait"), sample("timeout", "9", 30),
        )),
    )  # fmt: skip
    found = summarise(Cell("m", "zero_shot", "gsm8k", results), (WAITING,))
    assert (found.items, found.samples) == (2, 2)
    assert found.accuracy.value == 0.25
    assert found.majority == 0.25  # a tie of 7 and 8 in the first item; 9 has it in the second
    assert found.pass_at == {1: 0.25, 2: 0.5}
    assert found.tokens.value == 25
    assert found.outcomes == {
        Outcome.CORRECT: 0.25, Outcome.WRONG: 0.25, Outcome.NO_ANSWER: 0,
        Outcome.CUT_OFF: 0.25, Outcome.TIMEOUT: 0.25,
    }  # fmt: skip
    assert found.behaviors["waiting"].share == 0.5
    assert found.behaviors["waiting"].mean == 0.75


@pytest.mark.parametrize("samples", range(1, 8))
def test_pass_at_agrees_with_all_draws(samples):
    for correct in range(samples + 1):
        right = [i < correct for i in range(samples)]
        for draws in range(1, samples + 1):
            subsets = list(combinations(right, draws))
            expected = sum(any(subset) for subset in subsets) / len(subsets)
            assert pass_at(samples, correct, draws) == pytest.approx(expected)


def test_pass_at_is_for_powers_of_two_and_k():
    for k, draws in ((1, [1]), (4, [1, 2, 4]), (6, [1, 2, 4, 6])):
        found = summarise(cell("m", "s", "b", ["c" * k]), ())
        assert list(found.pass_at) == draws


@pytest.mark.parametrize(
    ("letters", "chance"),
    [
        ("c", 1),
        ("x", 0),
        ("-", 0),
        ("cxy", 1 / 3),  # each of three answers once
        ("ccxxy", 0.5),
        ("cxxc-", 0.5),
        ("cxx", 0),
        ("c---", 1),  # no answer has no vote
        ("c-xx", 0),
        ("cxyz" * 2 + "c", 1),
    ],
)
def test_majority_vote(letters, chance):
    assert majority_vote(answers(letters)) == pytest.approx(chance)


def test_correct_samples_vote_together_however_they_are_written():
    samples = (sample("correct", "1/2"), sample("correct", "0.5"), sample("wrong", "2"))
    assert majority_vote((*samples, sample("wrong", "2"))) == 0.5


@pytest.mark.parametrize(
    ("items", "says"),
    [([], "no items"), (["c", "cc"], "1, 2"), ([""], "at least 1")],
)
def test_cells_that_make_no_sense_are_refused(items, says):
    with pytest.raises(InputError, match=says):
        summarise(cell("m", "s", "b", items), ())


def test_an_item_that_is_there_twice_is_refused():
    once = cell("m", "s", "b", ["c"])
    with pytest.raises(InputError, match="b/0"):
        summarise(Cell("m", "s", "b", once.results * 2), ())


def two_runs() -> list[Cell]:
    """GRPO and ThinkTuning on three benchmarks, of which GRPO lacks one."""
    return [
        cell("grpo", "zero_shot", "math500", list("ccxx"), tokens=10, seed="0"),
        cell("grpo", "zero_shot", "gsm8k", list("cccccccccx"), tokens=20, seed="0"),
        cell("thinktuning", "zero_shot", "math500", list("cccx-"), tokens=15, seed="1"),
        cell("thinktuning", "zero_shot", "gsm8k", list("cccccccccc"), tokens=10, seed="1"),
        cell("thinktuning", "zero_shot", "aime24", list("xc"), tokens=99, seed="1"),
    ]


def test_averages_are_over_benchmarks_that_all_runs_have():
    numbers = count(two_runs(), None, ())
    grpo, ours = numbers.runs
    assert numbers.common == ("math500", "gsm8k")
    assert numbers.averages[grpo].value == pytest.approx((0.5 + 0.9) / 2)
    assert numbers.averages[ours].value == pytest.approx((0.6 + 1) / 2)
    # The fifth item of math500 is unpaired: 3 of 4 against 2 of 4, and 10 of 10 against 9 of 10.
    assert numbers.difference_of_averages(ours, grpo).value == pytest.approx((0.25 + 0.1) / 2)
    assert numbers.against_baseline[ours, "math500"].paired.unpaired == 1
    assert (ours, "aime24") not in numbers.against_baseline
    assert numbers.token_ratios[ours, "math500"].value == 1.5


def test_the_baseline_is_named_by_model_and_strategy():
    assert count(two_runs(), None, ()).baseline == Run("grpo", "zero_shot")
    found = count(two_runs(), "thinktuning/zero_shot", ())
    assert found.baseline == Run("thinktuning", "zero_shot")
    with pytest.raises(InputError, match="grpo/zero_shot, thinktuning/zero_shot"):
        count(two_runs(), "thinktuning", ())


def test_cells_that_are_there_twice_and_no_cells_are_refused():
    with pytest.raises(InputError, match="grpo/zero_shot on math500"):
        count([*two_runs(), two_runs()[0]], None, ())
    with pytest.raises(InputError, match="no finished cell"):
        count([], None, ())


def test_items_with_the_same_id_must_be_the_same():
    cells = two_runs()
    other = ItemResult("gsm8k/0", "another q", "7", cells[3].results[0].samples)
    cells[3] = Cell("thinktuning", "zero_shot", "gsm8k", (other, *cells[3].results[1:]))
    with pytest.raises(InputError, match="'gsm8k/0' of gsm8k"):
        count(cells, None, ())


def test_adjusted_p_is_over_all_tests_of_the_table():
    def run(model: str, wins: int) -> list[Cell]:
        return [cell(model, "s", b, ["c"] * wins + ["x"] * (9 - wins)) for b in ("one", "two")]

    numbers = count([*run("base", 0), *run("a", 8), *run("b", 6)], None, ())
    found = {(r.model, b): c for (r, b), c in numbers.against_baseline.items()}
    assert found["a", "one"].paired.p == pytest.approx(2 / 2**8)
    assert found["a", "one"].adjusted_p == pytest.approx(4 * 2 / 2**8)
    assert found["b", "two"].adjusted_p == pytest.approx(2 * 2 / 2**6)


def test_ours_stands_beside_the_papers_figure_where_labels_leave_no_doubt():
    def found(cells):
        claims = beside_ours(count(cells, "base/zero_shot", ()))
        return {b.claim.what: b.difference.value for b in claims if b.difference is not None}

    base = [cell("base", "zero_shot", c.benchmark, list("xxxx")) for c in two_runs()[:2]]
    assert found([*base, *two_runs()]) == pytest.approx(
        {"ThinkTuning − zero-shot, average of 8": 0.875, "ThinkTuning − GRPO, MATH-500": 0.25}
    )
    rival = cell("GRPO 2", "zero_shot", "math500", list("xxxx"))
    assert "ThinkTuning − GRPO, MATH-500" in found([*base, *two_runs(), rival])
    renamed = [Cell(f"my {c.model}", *list(vars(c).values())[1:5]) for c in two_runs()]
    assert "ThinkTuning − GRPO, MATH-500" not in found([*base, *renamed, rival])


def test_overview_says_what_was_run():
    said = overview(count(two_runs(), None, ()))
    assert said.startswith("2 runs (2 models, 1 prompting strategy) on 3 benchmarks with 17 items")
    assert "1 cell of the table is missing" in said
    assert "80.0 %" in said and "+17.5 points" in said and "baseline, grpo/zero_shot" in said


class Page(HTMLParser):
    """All elements with their attributes, and all text, as a browser's parser sees them."""

    def __init__(self, text: str):
        super().__init__()
        self.elements, self.text = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def evil(tmp_path_factory):
    """A report in which every text that users or models write is markup."""
    folder = tmp_path_factory.mktemp("report")
    results = cell("m", "s", "b", ["cx", "xx", "cc"]).results
    answers = tuple(
        ItemResult(EVIL, EVIL, EVIL, r.samples) if i == 0 else r for i, r in enumerate(results)
    )
    cells = [
        Cell(EVIL, f"a|{EVIL}", EVIL, answers, {EVIL: EVIL}),
        Cell("plain", "zero_shot", EVIL, results, {}),
    ]
    evil_behavior = Behavior(EVIL, "", (), ("x",))
    write_report(cells, folder, None, (evil_behavior,), True, {EVIL: f"{EVIL}\n# [x](y)"})
    return folder


def test_html_shows_markup_as_text_and_fetches_nothing(evil):
    text = (evil / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "img", "link", "iframe", "object", "embed", "base"}
    assert "<script" not in text and EVIL in "".join(page.text)
    for _, attributes in page.elements:
        assert not attributes.keys() & {"src", "href", "srcset", "action"}
        assert not any(name.startswith("on") for name in attributes)
    assert "url(" not in text and "@import" not in text


def test_html_can_be_read_without_seeing_it(evil):
    page = Page((evil / "report.html").read_text(encoding="utf-8"))
    tags = [tag for tag, _ in page.elements]
    assert tags.count("caption") == tags.count("table") > 5
    assert tags.count("h1") == 1 and ("html", {"lang": "en"}) in page.elements
    plots = [a for tag, a in page.elements if tag == "svg" and a.get("class") == "plot"]
    assert len(plots) == 3
    assert all(a["role"] == "img" and a["aria-label"].startswith(EVIL) for a in plots)
    # Accuracies of both runs: 3 of 6 samples.
    assert "50.0" in plots[0]["aria-label"]


def test_markdown_shows_markup_as_text(evil):
    text = (evil / "report.md").read_text(encoding="utf-8")
    assert "<script" not in text
    assert re.sub(r"</?(details|summary|sub)>|<br>", "", text).count("<") == 0
    assert r"\[x\](y)" in text and "\n#" not in text.replace("\n# ", "").replace("\n## ", "")
    for block in re.findall(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1, block


def test_plots_of_markdown_are_there_and_are_xml(evil):
    linked = re.findall(r"!\[[^\]]*\]\((plots/\w+\.svg)\)", (evil / "report.md").read_text())
    assert linked == ["plots/accuracy.svg", "plots/tokens.svg", "plots/outcomes.svg"]
    for name in linked:
        root = ElementTree.parse(evil / name).getroot()
        assert root.tag.endswith("svg")
        assert not any(e.tag.endswith("script") for e in root.iter())
        assert EVIL in "".join(root.itertext())


def test_csv_has_a_row_per_cell_that_goes_back_to_the_numbers(tmp_path):
    write_report(two_runs(), tmp_path / "new" / "folder", None, (WAITING,), False, {})
    with (tmp_path / "new" / "folder" / "report.csv").open(newline="", encoding="utf-8") as file:
        rows = {(r["model"], r["benchmark"]): r for r in csv.DictReader(file)}
    assert len(rows) == 5
    row = rows["thinktuning", "math500"]
    assert (row["items"], row["samples"], row["setting_seed"]) == ("5", "1", "1")
    assert (float(row["accuracy"]), float(row["difference"])) == (0.6, 0.25)
    assert (row["wins"], row["losses"], row["ties"], row["unpaired_items"]) == ("1", "0", "3", "1")
    assert float(row["outcome_no_answer"]) == 0.2 and float(row["behavior_waiting_share"]) == 0
    assert rows["grpo", "math500"]["difference"] == ""


def test_the_papers_figures_are_shown_on_demand_and_named_as_the_papers(tmp_path):
    for paper in (True, False):
        write_report(two_runs(), tmp_path, None, (), paper, {})
        for name in ("report.html", "report.md"):
            text = (tmp_path / name).read_text(encoding="utf-8")
            assert ("+3.85" in text) is paper
            assert ("other model, other data: not comparable" in text) is paper


def test_a_cell_that_is_missing_is_a_dash_and_the_best_is_bold(tmp_path):
    write_report(two_runs(), tmp_path, None, (), False, {})
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    first, second = re.findall(r"^\| (?:grpo|thinktuning)<br>.*$", text, re.MULTILINE)[:2]
    assert first.split(" | ")[-1] == "— |"
    assert [cell.startswith("**") for cell in second.split(" | ")[1:]] == [True] * 4
    assert "benchmarks that have all runs: math500, gsm8k" in text


def test_one_run_alone_has_nothing_to_be_compared_with(tmp_path):
    write_report(two_runs()[:1], tmp_path, None, (), True, {})
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "Item by item" not in text and "1 run (1 model" in text
    assert "| Average |" not in text and "The highest" not in text


@given(st.floats(0, 5000), st.floats(0, 5000))
@example(0, 0)
@example(0.2, 0.2)
@example(99.7, 100)
def test_ticks_are_few_and_cover_what_is_drawn(one, other):
    low, high = sorted((one, other))
    ticks = round_ticks(low, high)
    assert 2 <= len(ticks) <= 6
    assert ticks[0] <= low + 1e-6 and high <= ticks[-1] + 1e-6
    step = ticks[1] - ticks[0]
    assert all(b - a == pytest.approx(step, abs=1e-6) for a, b in pairwise(ticks))
    assert f"{step:.0e}"[0] in "125"


def test_points_never_say_minus_zero():
    assert (points(-0.0001), points(0.0124), points(-0.02)) == ("0.0", "+1.2", "−2.0")
