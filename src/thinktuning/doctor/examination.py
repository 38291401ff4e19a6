"""All checks, one after the other."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from jinja2 import TemplateError
from jsonargparse import Namespace
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console
from torch import OutOfMemoryError

from thinktuning.doctor import machine, sampling, text
from thinktuning.doctor.finding import Finding, Status, failed, skipped
from thinktuning.doctor.setup import Setup
from thinktuning.errors import InputError, StaleWeightsError, first_of

# What a set-up can be blamed for; all other errors are ours, and show where they come from.
_KNOWN = (InputError, StaleWeightsError, MisconfigurationException, TemplateError)
_OF_THE_MACHINE = (OutOfMemoryError, OSError)


@dataclass(frozen=True)
class Check:
    """One row of the table.

    Attributes:
        name: How the table calls it.
        find: Looks.
        needs: Names of checks before it that must not have failed.
    """

    name: str
    find: Callable[[Setup], Finding]
    needs: tuple[str, ...] = ()


def checks_of(config: Namespace) -> list[Check]:
    """What is to be checked, in this order."""
    return [
        Check("versions", machine.versions),
        Check("devices", machine.devices),
        Check("checkpoint folder", machine.checkpoint_folder),
        Check("verifier", machine.verifier),
        Check("model", machine.model, ("devices",)),
        Check("batches", machine.batches, ("model",)),
        Check("memory", machine.memory, ("model",)),
        Check("disk space", machine.disk_space, ("model", "checkpoint folder")),
        Check("tokenizer", text.tokenizer),
        Check("end of turn", text.end_of_turn, ("tokenizer",)),
        Check("questions", text.questions, ("tokenizer",)),
        Check("prompt", text.prompt, ("questions",)),
        Check("tokens of prompts", text.tokens_of_prompts, ("questions",)),
        Check("student", machine.student, ("model", "tokenizer", "end of turn")),
        Check("engine", sampling.engine, ("student", "questions")),
        Check("tokens of completions", text.tokens_of_completions, ("engine",)),
        Check("teacher", sampling.teacher, ("devices", "questions", *_weights_of_teacher(config))),
    ]


def examine(config: Namespace, console: Console) -> dict[str, Finding]:
    """Check a set-up without training.

    Args:
        config: As the parser of ``thinktuning doctor`` gives it.
        console: Gets a line as each check begins.

    Returns:
        The findings by the names of the checks.
    """
    todo = checks_of(config)
    setup = Setup(config)
    findings: dict[str, Finding] = {}
    try:
        for number, check in enumerate(todo, start=1):
            console.print(f"{number:2}/{len(todo)} {check.name} …")
            findings[check.name] = run(check, setup, findings)
    finally:
        setup.close()
    return findings


def is_healthy(findings: Mapping[str, Finding]) -> bool:
    """Whether no check has failed."""
    return all(finding.status is not Status.FAILED for finding in findings.values())


def run(check: Check, setup: Setup, findings: Mapping[str, Finding]) -> Finding:
    """Run a check; an error that a user can mend is what it finds.

    Args:
        check: To be run.
        setup: What it looks at.
        findings: Of the checks that it needs, at least.
    """
    for name in check.needs:
        if findings[name].status in (Status.FAILED, Status.SKIPPED):
            return skipped(f"needs the check of: {name}, which {_ended(findings[name])}")
    try:
        return check.find(setup)
    except (ValueError, *_KNOWN) as error:
        cause = first_of(error, _KNOWN)
        if cause is None:
            raise
        return _blamed(str(cause))
    except _OF_THE_MACHINE as error:
        return _blamed(str(error) or repr(error))


def _ended(finding: Finding) -> str:
    return "has failed" if finding.status is Status.FAILED else "was skipped"


def _blamed(message: str) -> Finding:
    """Messages say in their first line what is wrong, and mostly what to do in the others."""
    found, _, advice = message.strip().partition("\n")
    return failed(found, advice)


def _weights_of_teacher(config: Namespace) -> tuple[str, ...]:
    """The check that a teacher needs which replies with the reference's weights."""
    teacher = config.guidance.teacher
    own = teacher is not None and teacher.get("init_args.pretrained", "a server's") is not None
    return () if own else ("engine",)
