"""What the paper states: RRV et al., ThinkTuning, EMNLP 2025 (arXiv 2508.07616v2).

Its differences in words, so that a report can show ours beside them. There is no table of its
single accuracies at hand, so none are here.
"""

from dataclasses import dataclass

from thinktuning.evaluation.report.numbers import Numbers, Run
from thinktuning.evaluation.statistics import Estimate

SOURCE = "RRV et al., ThinkTuning, EMNLP 2025, arXiv 2508.07616v2"


@dataclass(frozen=True)
class Claim:
    """A figure of the paper.

    Attributes:
        what: Which quantity of which methods.
        stated: The figure, as the paper states it.
        first: Method whose models are to have a label with this in it; None where the claim is of
            too many runs to put one number beside it.
        second: Method that ``first`` is compared with; ``zero_shot`` is the baseline.
        benchmark: Letters that its name begins with here; None for the average.
    """

    what: str
    stated: str
    first: str | None = None
    second: str | None = None
    benchmark: str | None = None


CLAIMS = (
    Claim("ThinkTuning − zero-shot, average of 8", "+3.85 points", "thinktuning", "zero_shot"),
    Claim("ThinkTuning − GRPO, MATH-500", "+2.08 points", "thinktuning", "grpo", "math500"),
    Claim("ThinkTuning − GRPO, AIME", "+2.23 points", "thinktuning", "grpo", "aime"),
    Claim("ThinkTuning − GRPO, GPQA-Diamond", "+3.99 points", "thinktuning", "grpo", "gpqadiamond"),
    Claim("ThinkTuning − prompting baselines", "up to +9.4 points"),
    Claim("ThinkTuning − STaR or zero-shot", "up to +6.8 points"),
    Claim("SFT, even in-domain", "loses up to 8 points"),
    Claim("ThinkTuning is the best", "on 6 of 8 sets (not GSM8K, StrategyQA)"),
    Claim("ThinkTuning, tokens per answer", "3.4 to 20.8 % more, by benchmark"),
    Claim("ThinkTuning and GRPO, tokens on MATH-500", "3.6 % fewer than GRPO"),
)


@dataclass(frozen=True)
class Beside:
    """A claim of the paper beside our corresponding difference, if there is one.

    Attributes:
        claim: The paper's.
        runs: Ours that correspond.
        where: Our benchmark, or ``average``.
        difference: Of their accuracies, from 0 to 1.
    """

    claim: Claim
    runs: tuple[Run, Run] | None = None
    where: str = ""
    difference: Estimate | None = None


def beside_ours(numbers: Numbers) -> list[Beside]:
    """Every claim; ours beside it where the labels leave no doubt which runs correspond."""
    return [_beside(claim, numbers) for claim in CLAIMS]


def _beside(claim: Claim, numbers: Numbers) -> Beside:
    first, second = _run(claim.first, numbers), _run(claim.second, numbers)
    if first is None or second is None:
        return Beside(claim)
    if claim.benchmark is None:
        difference = numbers.difference_of_averages(first, second)
        if difference is None:
            return Beside(claim)
        return Beside(claim, (first, second), "average", difference)
    same = [b for b in numbers.benchmarks if _letters(b).startswith(claim.benchmark)]
    pair = numbers.pair(first, second, same) if len(same) == 1 else None
    return Beside(claim, (first, second), same[0], pair.difference) if pair else Beside(claim)


def _run(method: str | None, numbers: Numbers) -> Run | None:
    """The one zero-shot run of a method, known by its model's label."""
    if method == "zero_shot":
        return numbers.baseline if numbers.baseline.strategy == "zero_shot" else None
    runs = [run for run in numbers.runs if run.strategy == "zero_shot"]
    same = [run for run in runs if _letters(run.model) == method]
    alike = [run for run in runs if method is not None and method in _letters(run.model)]
    found = same or alike
    return found[0] if len(found) == 1 else None


def _letters(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter.isalnum())
