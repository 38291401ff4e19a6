"""Our verifier against lm-eval's GSM8K scorer, on the responses of a finished evaluation.

The outcomes stand in ``items.jsonl``, so this needs lm-eval only, in an environment of its own::

    python3 -m venv /tmp/lmeval
    /tmp/lmeval/bin/pip install 'lm-eval==0.4.13'
    /tmp/lmeval/bin/python scripts/compare_scorers.py runs/eval/cells/CELL/items.jsonl

Filter and metric are lm-eval's own, as its task ``gsm8k`` sets them: ``flexible-extract`` takes the
last number of a response, ``strict-match`` the one after ``####``. Prints how far the two scorers
agree, and every response on which they differ.
"""

import argparse
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval
import yaml
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_metric
from lm_eval.filters import build_filter_ensemble

TAIL = 160


@dataclass(frozen=True)
class Scored:
    """A response with both verdicts; ``found`` is what lm-eval's filter took from it."""

    id: str
    gold: str
    response: str
    outcome: str
    found: str
    theirs: bool

    @property
    def ours(self) -> bool:
        """Our verdict."""
        return self.outcome == "correct"


def score(path: Path, filter_name: str) -> list[Scored]:
    """Judge every sample of ``items.jsonl`` with lm-eval."""
    task = yaml.safe_load(
        (Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml").read_text("utf-8")
    )
    rows = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
    samples = [(row, sample) for row in rows for sample in row["samples"]]
    instances = [
        Instance("generate_until", {}, (), i, resps=[sample["response"]])
        for i, (_, sample) in enumerate(samples)
    ]
    (steps,) = (f["filter"] for f in task["filter_list"] if f["name"] == filter_name)
    build_filter_ensemble(filter_name, [_component(step) for step in steps]).apply(instances)

    (metric,) = task["metric_list"]
    exact_match = get_metric(metric.pop("metric"))
    settings = {k: v for k, v in metric.items() if k not in ("aggregation", "higher_is_better")}
    scored = []
    for (row, sample), instance in zip(samples, instances, strict=True):
        found = instance.filtered_resps[filter_name]
        verdict = exact_match(predictions=[found], references=[row["answer"]], **settings)
        theirs = bool(verdict["exact_match"])
        texts = (row["id"], row["answer"], sample["response"], sample["outcome"], found)
        scored.append(Scored(*texts, theirs))
    return scored


def _component(step: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    return step["function"], {k: v for k, v in step.items() if k != "function"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("items", type=Path, help="items.jsonl of a cell of GSM8K")
    parser.add_argument(
        "--filter", default="flexible-extract", choices=["flexible-extract", "strict-match"]
    )
    arguments = parser.parse_args()
    scored = score(arguments.items, arguments.filter)
    different = [s for s in scored if s.ours != s.theirs]
    for s in different:
        print(f"{s.id}: gold {s.gold!r}, ours {s.outcome}, theirs {s.theirs} (found {s.found!r})")
        print(f"    {s.response[-TAIL:]!r}")
    print(f"{len(scored)} responses, lm-eval {lm_eval.__version__}, {arguments.filter}")
    print(f"correct: ours {sum(s.ours for s in scored)}, theirs {sum(s.theirs for s in scored)}")
    print(f"agree on {len(scored) - len(different)}, differ on {len(different)}")
    for outcome, number in Counter(s.outcome for s in different).most_common():
        print(f"    ours {outcome}, theirs {outcome != 'correct'}: {number}")


if __name__ == "__main__":
    main()
