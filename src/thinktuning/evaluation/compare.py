"""``thinktuning compare``: models by prompting strategies by benchmarks, in one report."""

import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from thinktuning import runs
from thinktuning.errors import InputError
from thinktuning.evaluation.benchmarks import check_benchmarks
from thinktuning.evaluation.module import BEHAVIORS
from thinktuning.evaluation.report import write_report
from thinktuning.evaluation.store import read_cell
from thinktuning.evaluation.strategies import check_strategies
from thinktuning.evaluation.summary import Cell
from thinktuning.provenance import provenance
from thinktuning.teaching import Behavior, load_behaviors
from thinktuning.trained import read_training


@dataclass(frozen=True)
class ComparedModel:
    """A row of the report, or several.

    Attributes:
        name: How the report calls it.
        pretrained: Hub id, folder, or embedded.
        checkpoint: Of a training run, instead.
        base: Where the checkpoint's base model lies now, if that isn't where it lay in training.
        strategies: Where they differ from the comparison's.
    """

    name: str
    pretrained: str | None = None
    checkpoint: str | None = None
    base: str | None = None
    strategies: list[str] | None = None


def compare(
    models: list[ComparedModel],
    evaluation: str = "configs/eval.yaml",
    strategies: Sequence[str] = ("zero_shot",),
    benchmarks: list[str] | None = None,
    behaviors: Sequence[str] = BEHAVIORS,
    baseline: str | None = None,
    paper: bool = True,
    output: str = "runs/comparison",
) -> None:
    """Evaluate what is missing, and write report.html, report.md and report.csv.

    Every model is evaluated in a process of its own. Where one fails, the report is of the others,
    and the same command goes on where it stopped.

    Args:
        models: To be compared.
        evaluation: Configuration of `thinktuning test` with everything that isn't said here.
        strategies: Prompting strategies of all models that name none themselves.
        benchmarks: NAME or NAME=FILE; null takes those of the evaluation's configuration.
        behaviors: Whose patterns are counted in the responses.
        baseline: MODEL/STRATEGY that others are compared with; null is the first.
        paper: Show the paper's own figures too, as the paper's.
        output: Folder of the reports. Results lie where the evaluation's model.cells says.

    Raises:
        InputError: Naming all that is wrong before anything is evaluated; or, in the end, the
            evaluations that failed.
    """
    _check(models, evaluation, strategies, benchmarks, baseline)
    runs.check_writable(Path(output), "output")
    counted = load_behaviors(behaviors)
    cells: list[Cell] = []
    failed: list[str] = []
    for model in models:
        print(f"{model.name}: {', '.join(model.strategies or strategies)}", flush=True)
        root = Path(output) / "runs" / _folder_name(model.name)
        if not _evaluate(model, evaluation, model.strategies or strategies, benchmarks, root):
            failed.append(model.name)
            continue
        index = json.loads((runs.versions(root)[-1] / runs.CELLS).read_text(encoding="utf-8"))
        cells += [read_cell(model.name, Path(c["folder"]), c["items"]) for c in index]
    if cells:
        _report(cells, Path(output), baseline, counted, paper)
    if failed:
        raise InputError(
            f"the evaluation of {', '.join(failed)} failed, see above; the report is of the "
            f"others. What is finished is kept, and the same command goes on behind it"
        )


def _report(
    cells: Sequence[Cell],
    output: Path,
    baseline: str | None,
    behaviors: Sequence[Behavior],
    paper: bool,
) -> None:
    made = provenance() | {
        "command": shlex.join(["thinktuning", *sys.argv[1:]]),
        "date": date.today().isoformat(),
    }
    there = {f"{cell.model}/{cell.strategy}" for cell in cells}
    write_report(cells, output, baseline if baseline in there else None, behaviors, paper, made)
    print(f"wrote {output}/report.html, report.md and report.csv")


def _check(
    models: Sequence[ComparedModel],
    evaluation: str,
    strategies: Sequence[str],
    benchmarks: Sequence[str] | None,
    baseline: str | None,
) -> None:
    faults = list(_faults(models, evaluation))
    runs_of = [f"{m.name}/{s}" for m in models for s in m.strategies or strategies]
    if baseline is not None and baseline not in runs_of:
        faults.append(f"baseline must be one of {', '.join(runs_of)}, got {baseline!r}")
    checks: list[tuple[Callable[[Sequence[str]], None], Sequence[str]]]
    checks = [(check_strategies, model.strategies or strategies) for model in models]
    if benchmarks is not None:
        checks.append((check_benchmarks, benchmarks))
    for check, names in checks:
        try:
            check(names)
        except InputError as error:
            faults.append(str(error))
    if faults:
        raise InputError("compare: " + "\n  ".join(dict.fromkeys(faults)))


def _faults(models: Sequence[ComparedModel], evaluation: str) -> Iterator[str]:
    if not models:
        yield "models must name at least one"
    folders = [_folder_name(model.name) for model in models]
    for name in sorted({n for n in folders if folders.count(n) > 1}):
        yield f"two models have the name {name!r}"
    for model in models:
        if (model.pretrained is None) == (model.checkpoint is None):
            yield f"model {model.name!r} needs either pretrained or checkpoint"
        if model.checkpoint is not None:
            try:
                read_training(Path(model.checkpoint))
            except InputError as error:
                yield f"model {model.name!r}: {error}"
    if not Path(evaluation).is_file():
        yield f"there is no configuration {evaluation!r}"


def _folder_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_.+" else "-" for c in name)


def _evaluate(
    model: ComparedModel,
    evaluation: str,
    strategies: Sequence[str],
    benchmarks: Sequence[str] | None,
    root: Path,
) -> bool:
    """Run `thinktuning test`, which asks only what hasn't been answered; whether it succeeded."""
    settings = {
        "--model.pretrained": model.pretrained,
        "--model.checkpoint": model.checkpoint,
        "--model.base": model.base,
        "--model.label": model.name,
        "--model.strategies": list(strategies),
        "--trainer.default_root_dir": str(root),
    }
    if benchmarks is not None:
        settings["--data.benchmarks"] = list(benchmarks)
    options = [
        part
        for name, value in settings.items()
        for part in (name, value if isinstance(value, str) else json.dumps(value))
    ]
    command = [sys.executable, "-m", "thinktuning.cli", "test", "--config", evaluation, *options]
    # In a process of its own: one engine of vLLM cannot follow another one in the same process.
    return subprocess.run(command).returncode == 0
