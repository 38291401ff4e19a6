"""Behaviors as text files: what the teacher is to do, and worked examples of it."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
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
    """

    name: str
    instruction: str
    examples: tuple[WorkedExample, ...]


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
    expected = {f.name for f in fields(Behavior)}
    if not isinstance(content, dict) or set(content) != expected:
        got = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        faults.append(f"behavior {name!r} must have the keys {sorted(expected)}, got {got}")
        return None
    found = len(faults)
    for key in ("name", "instruction"):
        if not isinstance(content[key], str) or not content[key].strip():
            faults.append(f"behavior {name!r}: {key} must be a text")
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
    )
