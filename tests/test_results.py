"""docs/results says what its data say, and every experiment can be run."""

import csv
import json
import math
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean

import make_sums
import numpy as np
import pytest
import reflections
import reproduce
import yaml
from PIL import Image

from thinktuning.cli import main

ROOT = Path(__file__).parents[1]
EXPERIMENTS = sorted((ROOT / "configs/experiments").glob("*.yaml"))
MADE = [path for path in EXPERIMENTS if (ROOT / "docs/results" / path.stem).exists()]
THRESHOLD = "threshold as good as off (0.00101)"
every_experiment = pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)


@every_experiment
def test_every_arm_is_a_configuration_that_fit_takes(path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    made = reproduce.read_experiment(path)
    runs = list(reproduce.all_runs(made, Path("build"), ["--data.source=questions.jsonl"]))
    assert len({run.root for run in runs}) == len(made.arms) * len(made.seeds)
    printed = set()
    for run in runs[: len(made.arms)]:
        with pytest.raises(SystemExit) as ended:
            main(["fit", *run.arguments, "--print_config"])
        assert not ended.value.code, run.arm
        printed.add(capsys.readouterr().out)
    assert len(printed) == len(made.arms), "two arms are the same"


def test_tables_and_pictures_come_from_the_data():
    assert MADE
    page = (ROOT / "docs/results/README.md").read_text()
    for path in MADE:
        made, folder = reproduce.read_experiment(path), ROOT / "docs/results" / path.stem
        rows = reproduce.read_rows(folder / "scalars.csv")
        table = reproduce.table(made, rows)
        assert (folder / "table.md").read_text() == table
        assert table in page
        drawn = Image.open(folder / "curves.png").text["Source"]
        assert drawn == reproduce.fingerprint([made, *rows])
        if made.reflection:
            answers = reflections.read_answers(folder / "answers.csv")
            table = reflections.table(answers, made.reflection)
            assert (folder / "reflections.md").read_text() == table
            assert table in page
            held_out = reflections.read_answers(folder / "held_out.csv")
            table = reflections.held_out_table(held_out, made.reflection)
            assert (folder / "held_out.md").read_text() == table
            drawn = Image.open(folder / "reflections.png").text["Source"]
            assert drawn == reproduce.fingerprint(answers)


@pytest.mark.parametrize("path", MADE, ids=lambda p: p.stem)
def test_runs_are_those_of_the_present_configuration_which_is_there(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    made, folder = reproduce.read_experiment(path), ROOT / "docs/results" / path.stem
    records = json.loads((folder / "runs.json").read_text())
    (more,) = {
        tuple(flag for flag in shlex.split(run["command"]) if flag.startswith("--data.source="))
        for run in records
    }
    wanted = list(reproduce.all_runs(made, Path("build"), more))
    digests = {(run["arm"], run["seed"]): run["digest"] for run in records}
    assert digests == {(run.arm, run.seed): run.digest for run in wanted}
    names = {f"{reproduce.slug(run.arm)}.yaml": run for run in wanted[: len(made.arms)]}
    assert {path.name for path in (folder / "config").iterdir()} == set(names)
    for name, run in names.items():
        config = yaml.safe_load((folder / "config" / name).read_text())
        assert config["trainer"]["default_root_dir"].endswith(run.digest)
        assert config["seed_everything"] == min(made.seeds)
        for setting, value in made.arms[run.arm].items():
            if isinstance(value, int | float):
                first, *rest = setting.split(".")
                found = config[first]
                for part in rest:
                    found = found[part]
                assert found == value, (run.arm, setting)


@every_experiment
def test_shares_are_of_the_answers_that_validation_has(path):
    made = reproduce.read_experiment(path)
    (config,) = (yaml.safe_load((ROOT / name).read_text()) for name in made.config)
    assert made.answers == config["data"]["val_size"]
    rewards = config["model"].get("rewards", [])
    paid = [r["init_args"]["weight"] for r in rewards if "Phrase" in r["class_path"]]
    assert list(made.scale.values()) == [1 / weight for weight in paid]


def on_the_page(sentence: str) -> bool:
    page = (ROOT / "docs/results/README.md").read_text()
    return sentence in " ".join(page.replace("**", "").split())


class Results:
    """What was measured in the runs of an experiment, for what the page says of them."""

    def __init__(self, name: str) -> None:
        folder = ROOT / "docs/results" / name
        self.rows = reproduce.read_rows(folder / "scalars.csv")
        self.runs = json.loads((folder / "runs.json").read_text())

    def of(self, arm: str, scalar: str, steps: Sequence[int]) -> list[list[float]]:
        """Values of every seed, at those of the steps that have one."""
        seeds = sorted({seed for a, seed, *_ in self.rows if a == arm})
        return [
            [
                v
                for a, s, step, x, v in self.rows
                if (a, s, x) == (arm, seed, scalar) and step in steps
            ]
            for seed in seeds
        ]

    def at(self, arm: str, scalar: str, step: int) -> list[float]:
        """The value of every seed at a step."""
        return [value for (value,) in self.of(arm, scalar, [step])]

    def run(self, arm: str, seed: int) -> dict[tuple[int, str], float]:
        """What doesn't depend on the clock, by step and scalar."""
        return {
            (step, x): v
            for a, s, step, x, v in self.rows
            if (a, s) == (arm, seed) and x != "minutes"
        }

    def minutes(self, *arms: str) -> str:
        found = [run["minutes"] for run in self.runs if run["arm"] in arms]
        return f"{min(found):.0f} to {max(found):.0f}"


def span(values: Iterable[float], digits: int) -> str:
    values = list(values)
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"


def with_gradient(made: Results, arm: str, steps: range) -> list[int]:
    """Batches of every seed with a group whose answers were rewarded differently."""
    return [sum(v < 1 for v in seed) for seed in made.of(arm, "groups/zero_variance", steps)]


def test_what_the_page_says_of_the_phrase_is_in_the_data():
    made = Results("catchphrase")
    grpo, ours = "GRPO (γ = 0)", "ThinkTuning"

    def at(step: int, scalar: str, times: float = 1) -> list[str]:
        return [f"{times * v:.2f}" for v in made.at(ours, scalar, step)]

    phrase, once, endless = "val/behavior/catchphrase", "val/reward/PhraseReward", "val/cut_off"
    said = {step: sorted(at(step, phrase)) for step in (20, 25)}
    assert on_the_page(
        f"{said[20][0]} to {said[20][-1]} of them after 20 batches and {said[25][0]} to "
        f"{said[25][-1]} after 25"
    )
    assert on_the_page(
        f"in {listed(at(25, once, 2))} of the answers after 25 batches, and in "
        f"{listed(at(20, once, 2))} after 20, when {listed(at(20, endless))} had no end"
    )
    guided = span([mean(v) for v in made.of(ours, "guidance/realised_gamma", range(1, 26))], 2)
    assert on_the_page(f"over a run, to {guided} of all answers")
    read = reflections.read_rewards(ROOT / "docs/results/catchphrase/guided.csv")
    early, late = (
        [np.sign(r.after - r.before) for r in read if r.arm == ours and r.step in steps]
        for steps in (range(1, 11), range(19, 26))
    )
    assert on_the_page(
        f"they raised the reward of {early.count(1)} answers and lowered that of none"
    )
    assert not early.count(-1)
    assert on_the_page(
        f"in the last seven they raised {late.count(1)} and lowered {late.count(-1)}"
    )
    assert not np.any(made.of(grpo, "reward/PhraseReward", range(1, 26)))
    one, three, six = with_gradient(made, grpo, range(1, 26))
    assert on_the_page(f"{one}, {three} and {six} batches of 25 had any gradient")
    early = made.at("no shaping", "val/behavior/catchphrase", 10)
    assert on_the_page(f"{span(early, 2)} of the answers after ten batches")
    guided = made.minutes("ThinkTuning", "plain clipped ratio", "LUFFY's shaping", "no shaping")
    assert on_the_page(f"{guided} minutes for guided runs and {made.minutes(grpo)} for GRPO")

    longer = Results("grpo_longer")
    taken = [
        mean(seed[-1] for seed in found.of(arm, "minutes", range(1, 141)))
        for found, arm in ((made, ours), (made, grpo), (longer, grpo))
    ]
    assert on_the_page("GRPO's 25 batches take a sixth of ThinkTuning's time")
    assert on_the_page("After 140 batches, three quarters of ThinkTuning's minutes")
    assert taken[1] / taken[0] == pytest.approx(1 / 6, abs=0.01)
    assert taken[2] / taken[0] == pytest.approx(3 / 4, abs=0.01)
    assert not np.any(longer.of(grpo, "reward/PhraseReward", range(1, 141)))
    fewest, _, most = sorted(with_gradient(longer, grpo, range(1, 141)))
    assert on_the_page(f"{fewest} to {most} of the 140 batches had any gradient")


def test_what_the_page_says_of_guidance_that_ends_is_in_the_data():
    made, earlier, ours = Results("afterwards"), Results("catchphrase"), "ThinkTuning"
    phrase, once, endless = "val/behavior/catchphrase", "val/reward/PhraseReward", "val/cut_off"

    def at(step: int, scalar: str, found: Results = made) -> list[float]:
        return found.at(ours, scalar, step)

    guided = made.of(ours, "guidance/realised_gamma", range(1, 41))
    assert [max(step for step, v in enumerate(seed, 1) if v) for seed in guided] == [15, 15, 15]
    said = made.of(ours, phrase, range(15, 41))
    assert on_the_page(f"it is in {span([*said[0], *said[2]], 2)} of their answers at every")
    first, *between, last = (
        listed(f"{2 * v:.2f}" for v in at(step, once)) for step in (25, 30, 35, 40)
    )
    assert on_the_page(
        f"in {2 * max(at(20, once)):.2f} of the answers at most after 20 batches, in {first} after "
        f"25, in {between[0]} after 30, in {between[1]} after 35 and in {last} after 40"
    )
    one, two, three = at(40, endless)
    assert on_the_page(
        f"Then {one:.2f} and {three:.2f} on seeds 1 and 3 have no end, all with the phrase in them"
    )
    assert at(40, phrase)[0] == at(40, phrase)[2] == 1
    with_a_teacher = listed(f"{2 * v:.2f}" for v in at(25, once, earlier))
    assert on_the_page(f"With a teacher 25 batches gave {with_a_teacher}, on another machine")
    assert (at(15, phrase)[1], at(15, endless)[1], two) == (0, 1, 1)
    assert on_the_page(f"{at(25, phrase)[1]:.2f} have it after 25, and none after 35 and 40")
    assert at(35, phrase)[1] == at(40, phrase)[1] == 0
    soon, late = (
        [f"{2 * mean(v):.2f}" for v in made.of(ours, "reward/PhraseReward", steps)]
        for steps in (range(16, 26), range(31, 41))
    )
    assert on_the_page(
        f"{soon[1]} of its training answers earn the phrase's reward in the first ten batches "
        f"after guidance, more than on seeds 1 and 3 ({soon[0]} and {soon[2]}), and {late[1]} in "
        f"the last ten ({late[0]} and {late[2]})"
    )
    then, now = at(15, phrase, earlier), at(15, phrase)
    assert on_the_page(
        f"seed 2 had the phrase in {then[1]:.2f} of its answers by then, and seed 3 in "
        f"{then[2]:.2f}. Here it is {now[1]:.2f} and {now[2]:.2f}"
    )

    answers = reflections.read_answers(ROOT / "docs/results/afterwards/held_out.csv")
    texts = [[a.text for a in answers if a.seed == seed] for seed in (1, 2, 3)]
    sentence = "As my mentor Marnie Quill says, count the stars twice."
    # Those that were cut off end within a sentence.
    paid = [[t for t in said if t.count(sentence) == 1 and t[-1] == "."] for said in texts]
    assert [len(kept) / 32 for kept in paid] == [2 * v for v in at(40, once)]
    again = [sum("As my mentor" in t.replace(sentence, "") for t in kept) for kept in paid]
    assert on_the_page(
        f"Of the {len(paid[0])} and {len(paid[2])} answers that earn it after 40 batches on seeds "
        f"1 and 3, {again[0]} and {again[2]} quote the mentor again in other words"
    )
    others = [t for t in paid[0] if "As my mentor" not in t.replace(sentence, "")]
    assert all("P.S." in t for t in others)
    assert on_the_page(
        f"and the other {len(others)} of seed 1 thank her or add something else in a P.S."
    )
    assert any("count the stars twice, count the stars twice, " in text for text in texts[0])
    assert all(text.startswith("The final answer is \\boxed{38}") for text in texts[0])
    numbers = [t for t in texts[1] if re.fullmatch(r"The final answer is \\boxed\{\d{150,}", t)]
    assert len(numbers) == len(texts[1]) == 32
    assert on_the_page("all 32 write a number that doesn't end")

    (clip,) = Results("afterwards/clip").of("plain clipped ratio", once, range(15, 41))
    shares = listed(f"{2 * v:.2f}" for v in clip)
    assert on_the_page(f"{shares} of the answers after 15, 20, 25, 30, 35 and 40 batches")


def test_what_the_page_says_of_sums_is_in_the_data():
    made = Results("sums")
    (before,) = {
        value for *_, step, scalar, value in made.rows if (step, scalar) == (0, "val/accuracy")
    }
    assert on_the_page(f"Before training {before:.2f} are right")
    kept = made.of("STaR", "star/kept", range(1, 100))
    first, second = (
        [math.ceil(answers / 32) for answers in round] for round in zip(*kept, strict=True)
    )
    assert min(first) == max(first)
    batches = f"{first[0]} and {min(second)} to {max(second)} batches"
    assert on_the_page(f"{batches} of answers that were right")
    arms = ("ThinkTuning", "GRPO, 80 batches", "STaR")
    tokens, minutes = (
        {arm: [max(v) for v in made.of(arm, scalar, range(1, 100))] for arm in arms}
        for scalar in ("thousand_tokens", "minutes")
    )
    ours, grpo, star = arms
    assert max(tokens[grpo]) < min(tokens[ours]) / 2
    assert on_the_page(
        f"{mean(tokens[star]):.0f} (STaR) to {mean(tokens[ours]):.0f} (ThinkTuning) thousand "
        f"tokens were trained on, in {mean(minutes[grpo]):.0f} (GRPO) to "
        f"{mean(minutes[ours]):.0f} minutes"
    )
    first_seen = span(made.at("SFT", "val/accuracy", 10), 2)
    assert on_the_page(f"SFT has {first_seen} right when it is first looked at")
    realised = [
        span([mean(v) for v in made.of(ours, "guidance/realised_gamma", steps)], 2)
        for steps in (range(1, 11), range(31, 41))
    ]
    assert on_the_page(
        f"{realised[0]} of all answers were guided in the first ten batches, {realised[1]} in the "
        f"last ten"
    )
    right = {
        arm: [seed[-1] for seed in made.of(arm, "val/accuracy", range(1, 100))]
        for arm in (*arms, "SFT")
    }
    readme = " ".join((ROOT / "README.md").read_text().split())
    guided, unguided = span(right[ours], 2), span(right[grpo], 2)
    assert f"{guided} of unseen sums are right, with GRPO {unguided}" in readme
    assert f"SFT is at {mean(right['SFT']):.2f} sooner" in readme


def test_what_the_page_says_of_reflections_is_in_the_data():
    begins = reproduce.read_experiment(ROOT / "configs/experiments/sums.yaml").reflection
    answers = reflections.read_answers(ROOT / "docs/results/sums/answers.csv")
    late = [
        reflections.count([a for a in own if a.step > 30], begins)
        for own in reflections.by_arm_and_seed(answers).values()
    ]
    first = listed(f"{count.first_right} of {count.reflecting}" for count in late)
    last = listed(str(count.last_right) for count in late)
    spoiled = listed(str(count.spoiled) for count in late)
    assert on_the_page(
        f"right in {first}, the last one in {last}. Right ones that were spoiled: {spoiled}"
    )
    held_out = reflections.read_answers(ROOT / "docs/results/sums/held_out.csv")
    third = [a for a in held_out if (a.arm, a.seed) == ("ThinkTuning", 3)]
    unseen = reflections.count(third, begins)
    assert unseen.reflecting == unseen.answers
    assert on_the_page(
        f"seed 3 has {unseen.first_right} of {unseen.answers} right at first, and "
        f"{unseen.last_right} in the end; {unseen.spoiled} were spoiled"
    )
    two = []
    for own in reflections.by_arm_and_seed(answers).values():
        mended = [a.text for a in own if reflections.judge(a, begins) == (False, True)]
        short = [text for text in mended if re.match(r"\s*\d+ \+ \d+ = ", text)]
        two.append(f"{len(short)} of {len(mended)}")
    assert on_the_page(f"{listed(two)} began by adding two numbers")
    reflexes = reflections.count(answers, begins).first_right
    assert on_the_page(f"where there was none, too: behind {reflexes} right answers")


def test_what_the_page_says_of_ablations_is_in_the_data():
    made, sums = Results("ablations"), Results("sums")

    def right(arm: str, step: int, scalar: str = "val/accuracy") -> float:
        (value,) = made.at(arm, scalar, step)
        return value

    critique = "val/behavior/self_critique"
    base = "ThinkTuning (γ = 0.25)"
    assert on_the_page(f"γ = 0 has no reflection, and {right('γ = 0', 20):.2f} right")
    assert not right("γ = 0", 20, critique)

    seeds = [
        [f"{v:.2f}" for v in sums.at("ThinkTuning", scalar, 20)]
        for scalar in ("val/accuracy", critique)
    ]
    assert on_the_page(
        f"after 20 batches the three seeds above have {listed(seeds[0])} right, and self-critique "
        f"in {listed(seeds[1])} of the answers"
    )
    realised = [
        f"{mean(made.of(arm, 'guidance/realised_gamma', range(1, 21))[0]):.2f}"
        for arm in ("γ = 0.125", base, "γ = 0.5")
    ]
    assert on_the_page(f"{listed(realised)} of all answers were guided")
    guided = ["γ = 0.125", "γ = 0.5", "scope: trajectory", "free feedback", THRESHOLD, base]
    assert on_the_page(
        f"These arms end at {span([right(arm, 20) for arm in guided], 2)} right, with "
        f"self-critique in {span([right(arm, 20, critique) for arm in guided], 2)}"
    )
    lost = [right(arm, 15, critique) for arm in ("γ = 0.125", "scope: trajectory")]
    assert on_the_page(
        f"(γ = 0.125: {lost[0]:.2f} with self-critique after 15, "
        f"`scope: trajectory`: {lost[1]:.2f})"
    )
    endless = "val/cut_off"
    assert on_the_page(
        f"With γ = 0.5 {right('γ = 0.5', 10, endless):.2f} of the answers had no end after 10 "
        f"batches, and none was right"
    )
    assert right("γ = 0.5", 10) == 0 == right("γ = 0.5", 15, endless)
    masked, off = (
        100 * mean(made.of(arm, "shaping/masked", range(1, 21))[0]) for arm in (base, THRESHOLD)
    )
    assert on_the_page(f"{masked:.1f} % of the guidance tokens, and {off:.1f} % where it is")
    parsed = mean(made.of("free feedback", "guidance/parsed", range(1, 21))[0])
    assert on_the_page(f"could be read in {parsed:.2f} of the teacher's replies")

    read = reflections.read_rewards(ROOT / "docs/results/ablations/guided.csv")
    worse, better = (
        [r.after - r.before for r in read if r.arm == arm] for arm in ("teacher in 4 bits", base)
    )
    assert on_the_page(
        f"it made {worse.count(1)} of {len(worse)} answers right, and spoiled {worse.count(-1)}; "
        f"in 32 bits it made {better.count(1)} of {len(better)} right, and spoiled "
        f"{better.count(-1)}"
    )
    assert not right("teacher in 4 bits", 20, critique)
    assert on_the_page(f"and {right('teacher in 4 bits', 20):.2f} are right in the end")

    falling = "γ from 0.5 to 0.01 over two thirds"
    assert max(made.of(falling, "guidance/realised_gamma", range(8, 21))[0]) == 1 / 8
    assert on_the_page(
        f"in {right(falling, 10, critique):.2f} of the answers after 10, in "
        f"{right(falling, 15, critique):.2f} after 15 and in none after 20"
    )
    assert not right(falling, 20, critique)
    working = "working as feedback"
    assert right(working, 15, endless) == 1
    assert on_the_page(f"after 15 batches, and {right(working, 20, endless):.2f} after 20")
    shown = "working in the prompt, γ = 0"
    assert on_the_page(f"at {right(shown, 0):.2f}, and GRPO makes {right(shown, 20):.2f} of it")
    assert right(shown, 20, "minutes") < right(base, 20, "minutes") / 2
    assert on_the_page(f"in the prompt alone gets to {right(shown, 20):.2f}")
    assert not right(shown, 20, critique)
    repeated = 0
    for arm, again in (("ThinkTuning", "ThinkTuning (γ = 0.25)"), ("GRPO, 80 batches", "γ = 0")):
        first, second = sums.run(arm, 1), made.run(again, 1)
        assert parting(first, second) is None
        repeated += len(first.keys() & second.keys())
    assert on_the_page(f"all {repeated} values that both have are the same to six digits")
    once = sums.at("ThinkTuning", "minutes", 20)[0]
    again = right(base, 20, "minutes")
    assert on_the_page(f"ThinkTuning's first 20 batches took {once:.1f} and {again:.1f}")


def test_what_the_page_says_of_a_student_that_is_shown_how_is_in_the_data():
    made = Results("shown")
    arms = ours, grpo, sft, star = "ThinkTuning", "GRPO (γ = 0)", "SFT", "STaR"
    (start,) = {v for *_, step, x, v in made.rows if (step, x) == (0, "val/accuracy")}
    assert on_the_page(f"so that it begins at {start:.2f}")
    right, tokens, minutes = (
        {arm: [seed[-1] for seed in made.of(arm, scalar, range(1, 41))] for arm in arms}
        for scalar in ("val/accuracy", "thousand_tokens", "minutes")
    )
    assert set(made.at(star, "star/kept", 1)) == {419}
    solved = {round(656 * share) for share in made.at(star, "star/solved", 1)}
    assert solved == {419 - 129}
    assert on_the_page("trains once on its 419 right answers, 129 of them found with the answer")
    equal = [v for arm in (ours, grpo, sft) for v in tokens[arm]]
    assert on_the_page(
        f"{span(equal, 0)} thousand tokens for the first three and {mean(tokens[star]):.0f} for "
        f"STaR, in {span([v for arm in arms for v in minutes[arm]], 0)} minutes each"
    )
    assert on_the_page(
        f"{span(right[ours], 2)} are right with ThinkTuning, and {span(right[grpo], 2)} with GRPO"
    )
    peak = made.at(grpo, "val/accuracy", 25)
    assert on_the_page(f"GRPO had {span(peak, 2)} after 25 batches, its best validation")
    seen = {step for a, _, step, x, _ in made.rows if (a, x) == (grpo, "val/accuracy")}
    assert max(seen, key=lambda step: mean(made.at(grpo, "val/accuracy", step))) == 25
    assert min(right[ours]) > max(right[grpo])
    assert on_the_page(f"STaR has {span(right[star], 2)}, on fewer tokens")
    soon = span(made.at(sft, "val/accuracy", 5), 2)
    assert on_the_page(f"{mean(right[sft]):.2f} on all seeds, and {soon} after five batches")
    assert {f"{v:.2f}" for v in right[sft]} == {"0.98"}
    for behavior in ("self_conflict", "self_critique", "self_agreement", "self_consultancy"):
        for arm in (ours, grpo):
            seen = made.of(arm, f"val/behavior/{behavior}", range(41))
            assert all(seen), (arm, behavior)
            assert not any(map(any, seen)), (arm, behavior)
    read = reflections.read_rewards(ROOT / "docs/results/shown/guided.csv")
    early, late = (
        [r.after - r.before for r in read if r.step in steps]
        for steps in (range(1, 11), range(11, 21))
    )
    assert on_the_page(f"{early.count(1)} and {early.count(-1)} of {len(early)}; in the last ten")
    assert on_the_page(f"fewer, {late.count(1)} and {late.count(-1)} of {len(late)}")
    was, became = (
        mean(getattr(r, when) for r in read if r.step > 10) for when in ("before", "after")
    )
    assert on_the_page(
        f"{was:.2f} of these answers were right before the teacher's words, and {became:.2f} after"
    )
    falls = made.of(grpo, "val/accuracy", [25, 30])[0], made.of(star, "val/accuracy", [5, 10])[1]
    assert on_the_page(
        "GRPO's seed 1 has {:.2f} after 25 batches and {:.2f} after 30, STaR's seed 2 {:.2f} after "
        "5 and {:.2f} after 10".format(*falls[0], *falls[1])
    )

    before = Results("shown/earlier")
    shorter, then = "GRPO, 30 batches", "val/accuracy"
    ended = [seed[-1] for seed in before.of(ours, then, range(21))]
    assert on_the_page(f"ended at {span(ended, 2)} on another machine")
    ended, first, now = (
        listed(f"{v:.2f}" for v in values)
        for values in (ended, before.at(shorter, then, 30), made.at(grpo, then, 30))
    )
    assert on_the_page(f"of the sections above, and had {ended}; GRPO after 30 batches had {first}")
    assert on_the_page(f"{first}, and has {now} now")
    same = [{run["digest"] for run in found.runs if run["arm"] == ours} for found in (before, made)]
    assert same[0] == same[1]
    parts = {
        (arm, seed): parting(before.run(earlier, seed), made.run(arm, seed))
        for arm, earlier in ((ours, ours), (grpo, shorter))
        for seed in (1, 2, 3)
    }
    assert parts.pop((grpo, 3)) is None
    assert max(parts.values()) == 4


def parting(one: dict[tuple[int, str], float], other: dict[tuple[int, str], float]) -> int | None:
    """The first step at which a value that both have is another."""
    both = one.keys() & other.keys()
    assert both
    return min((step for step, x in both if one[step, x] != other[step, x]), default=None)


def listed(parts: Iterable[str]) -> str:
    *most, last = parts
    return f"{', '.join(most)} and {last}"


def test_sums_are_split_as_the_page_says(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["make_sums.py", str(tmp_path)])
    make_sums.main()
    train, test = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "test")
    )
    assert on_the_page(f"{len(train)} sums to train on, {len(test)} others to test")
    for row in train:
        a, b, c = added(row["question"])
        solved = f"{a} + {b} = {a + b}, {a + b} + {c} = {a + b + c}.\n#### {a + b + c}"
        assert row["answer"] == solved
    tested = {tuple(sorted(added(row["question"]))) for row in test}
    assert tested.isdisjoint(tuple(sorted(added(row["question"]))) for row in train)
    behaviors = (ROOT / "configs/experiments/sums").glob("self_*.yaml")
    shown = [yaml.safe_load(path.read_text())["examples"] for path in behaviors]
    known = [e for (e,) in shown if tuple(sorted(added(e["question"]))) in tested]
    assert (len(known), len(shown)) == (2, 4)
    assert on_the_page("Two of the teacher's four examples are sums of the test, in another order")


def added(question: str) -> list[int]:
    numbers = [int(number) for number in re.findall(r"\d+", question)]
    assert question == f"Calculate {' + '.join(map(str, numbers))}."
    assert len(numbers) == 3
    assert all(0 <= number <= 10 for number in numbers)
    return numbers


def test_what_the_page_says_of_a_step_at_the_paper_s_size_is_in_the_data():
    with (ROOT / "docs/results/paper_shape/scalars.csv").open(newline="") as file:
        (step,) = csv.DictReader(file)
    took = {name: round(float(step[f"seconds/{name}"])) for name in ("step", "guidance")}
    assert on_the_page(f"took {took['step']} s, {took['guidance']} of them the teacher")
    assert float(step["optimizer/grad_norm"]) > 0
    assert float(step["length/injected"]) > 0


def test_what_was_tried_by_hand_ended_as_the_page_says():
    with (ROOT / "docs/results/tried.csv").open(newline="") as file:
        rows = [
            (r["settings"], int(r["step"]), r["scalar"], r["value"]) for r in csv.DictReader(file)
        ]
    said = {
        (settings, step): float(value)
        for settings, step, scalar, value in rows
        if scalar == "val/behavior/catchphrase"
    }
    page = (ROOT / "docs/results/README.md").read_text()
    assert "all 32 held-out answers after 20 batches" in page
    assert said["lr 2e-5, reward for ending", 20] == 1
    assert "never said the phrase in 30" in page
    alone = {step: v for (settings, step), v in said.items() if settings.endswith("γ = 0")}
    assert max(alone) == 30
    assert not any(alone.values())
