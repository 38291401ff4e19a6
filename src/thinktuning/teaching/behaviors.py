"""Behaviors as text files: what the teacher is to do, and worked examples of it."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import yaml

from thinktuning.errors import InputError
from thinktuning.teaching.feedback import OPINIONS
from thinktuning.types import Feedback


@dataclass(frozen=True)
class WorkedExample:
    """A question, a student's response and the feedback that it should get."""

    question: str
    response: str
    feedback: Feedback


@dataclass(frozen=True)
class Behavior:
    """A way of thinking to be taught.

    Attributes:
        name: How logs call it.
        instruction: Completes the teacher's system message: "I … ".
        examples: Shown to the teacher as earlier turns of its chat.
        patterns: Regular expressions, each a sign of the behavior in a response. Case doesn't
            matter; the text is read with single spaces and straight apostrophes.
    """

    name: str
    instruction: str
    examples: tuple[WorkedExample, ...]
    patterns: tuple[str, ...] = ()


def count_occurrences(behavior: Behavior, text: str) -> int:
    """How often a response shows the signs of a behavior; signs that overlap count once."""
    text = " ".join(text.replace("’", "'").split())
    spans = [
        match.span()
        for pattern in behavior.patterns
        for match in re.finditer(pattern, text, re.IGNORECASE)
    ]
    count = end = 0
    for start, stop in sorted(spans):
        if start >= end:
            count, end = count + 1, stop
    return count


def shipped_behaviors() -> list[str]:
    """Names of the behaviors that come with the package."""
    folder = resources.files("thinktuning.teaching") / "behaviors"
    names = [f.name for f in folder.iterdir()]
    return sorted(n.removesuffix(".yaml") for n in names if n.endswith(".yaml"))


def load_behaviors(names: Sequence[str]) -> tuple[Behavior, ...]:
    """Read behaviors by shipped name (``self_critique``) or by path (``mine.yaml``).

    Raises:
        InputError: If there is none, or naming every fault of the files.
    """
    if not names:
        raise InputError("guidance: at least one behavior is needed")
    faults: list[str] = []
    behaviors = [_load(name, faults) for name in names]
    if faults:
        raise InputError("\n".join(faults))
    return tuple(b for b in behaviors if b is not None)


def _load(name: str, faults: list[str]) -> Behavior | None:
    path = Path(name).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        shipped = shipped_behaviors()
        if name not in shipped:
            faults.append(
                f"behavior {name!r} is unknown; expected one of {', '.join(shipped)}, or the path "
                f"of a .yaml file"
            )
            return None
        path = Path(str(resources.files("thinktuning.teaching") / "behaviors" / f"{name}.yaml"))
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        faults.append(f"behavior {name!r} can't be read: {error}")
        return None
    return _from_content(name, content, faults)


def _from_content(name: str, content: object, faults: list[str]) -> Behavior | None:
    """Check a behavior file's content; each fault becomes a line."""
    expected = {"name", "instruction", "examples"}
    if not isinstance(content, dict) or set(content) - {"patterns"} != expected:
        got = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        faults.append(
            f"behavior {name!r} must have the keys {sorted(expected)} and may have patterns, "
            f"got {got}"
        )
        return None
    found = len(faults)
    for key in ("name", "instruction"):
        if not isinstance(content[key], str) or not content[key].strip():
            faults.append(f"behavior {name!r}: {key} must be a text")
    patterns = content.get("patterns", [])
    faults.extend(f"behavior {name!r}, {fault}" for fault in _pattern_faults(patterns))
    examples = content["examples"]
    if not isinstance(examples, list) or not examples:
        faults.append(f"behavior {name!r}: examples must be a list of at least one")
        return None
    keys = {"question", "response", "opinion", "reason", "phrase"}
    for i, example in enumerate(examples):
        if not isinstance(example, dict) or set(example) != keys:
            faults.append(f"behavior {name!r}, example {i + 1}: must have the keys {sorted(keys)}")
        elif not all(isinstance(v, str) and v.strip() for v in example.values()):
            faults.append(f"behavior {name!r}, example {i + 1}: every value must be a text")
        elif example["opinion"] not in OPINIONS:
            faults.append(
                f"behavior {name!r}, example {i + 1}: opinion must be one of {', '.join(OPINIONS)}"
            )
    if len(faults) > found:
        return None
    return Behavior(
        content["name"],
        content["instruction"].strip(),
        tuple(
            WorkedExample(
                e["question"].strip(),
                e["response"].strip(),
                Feedback(e["opinion"], e["reason"].strip(), e["phrase"].strip()),
            )
            for e in examples
        ),
        tuple(patterns),
    )


def _pattern_faults(patterns: object) -> Iterator[str]:
    if not isinstance(patterns, list):
        yield "patterns: must be a list of regular expressions"
        return
    for i, pattern in enumerate(patterns, start=1):
        if not isinstance(pattern, str):
            yield f"pattern {i}: must be a text"
            continue
        try:
            matches_nothing = re.search(pattern, "") is not None
        except re.error as error:
            yield f"pattern {i}: {pattern!r} is not a regular expression: {error}"
            continue
        if matches_nothing:
            yield f"pattern {i}: {pattern!r} matches an empty text, so it is a sign of nothing"
