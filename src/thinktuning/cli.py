"""The command line: ``thinktuning fit | validate | test | plan | doctor | export | compare``."""

import argparse
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonargparse
import yaml
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from thinktuning import wiring
from thinktuning.baselines import SFTModule, STaRDataModule, STaRModule
from thinktuning.callbacks import (
    AnswerLog,
    AuditLog,
    BehaviorRates,
    ResumeCheck,
    RolloutProgress,
    SampleLog,
)
from thinktuning.data import GSM8KDataModule
from thinktuning.errors import (
    AbsentTeacherError,
    DivergedError,
    FailingRewardError,
    InputError,
    LostGradientsError,
    RunStopped,
    StaleWeightsError,
    UnsavedError,
    first_of,
)
from thinktuning.evaluation import BenchmarkDataModule, EvaluationModule
from thinktuning.evaluation.compare import compare
from thinktuning.export import export
from thinktuning.host_memory import bound_shape_caches
from thinktuning.module import ThinkTuningModule

_DESCRIPTION = """ThinkTuning: teach a language model behaviors that it never samples.
`thinktuning fit --config FILE` trains; `thinktuning SUBCOMMAND --help` is the manual;
`thinktuning plan --config FILE` says what memory and work that would take;
`thinktuning doctor --config FILE` checks all that it needs, without training;
`thinktuning test --config configs/eval.yaml` answers benchmarks, and
`thinktuning compare --config FILE` makes several models do so;
`thinktuning export --ckpt_path FILE --output DIR` writes a Hugging Face folder."""

_PLAN_DESCRIPTION = """Memory and work of `thinktuning fit` on each device, from its configuration
and the model's config.json: no weights are read, nothing is trained. Takes what `fit` takes."""

_DOCTOR_DESCRIPTION = """Check what `thinktuning fit` needs, without training: versions, devices,
memory, disk, verifier, prompts, tokens, engine and teacher. Prints a table; the exit code is 1 if a
check has failed. Takes what `fit` takes."""

# What reads a configuration of fit, and makes no run of it.
_READERS: dict[str, tuple[type[wiring.MethodCLI], str]] = {
    "plan": (wiring.PlanCLI, _PLAN_DESCRIPTION),
    "doctor": (wiring.DoctorCLI, _DOCTOR_DESCRIPTION),
}

# Errors that are told in a few lines; all others are ours, and show where they come from.
_SHOWN = (
    InputError,
    MisconfigurationException,
    StaleWeightsError,
    LostGradientsError,
    DivergedError,
    FailingRewardError,
    AbsentTeacherError,
    UnsavedError,
)

# Of each method: its command line, its module, its data, its callbacks.
_METHODS: dict[wiring.Method, tuple[type[wiring.MethodCLI], type, type, list[type]]] = {
    "thinktuning": (
        wiring.ThinkTuningCLI,
        ThinkTuningModule,
        GSM8KDataModule,
        [RolloutProgress, SampleLog, BehaviorRates, AuditLog, AnswerLog, ResumeCheck],
    ),
    "sft": (wiring.SFTCLI, SFTModule, GSM8KDataModule, [RolloutProgress, AnswerLog, ResumeCheck]),
    "star": (wiring.STaRCLI, STaRModule, STaRDataModule, [RolloutProgress, AnswerLog, ResumeCheck]),
    "evaluation": (wiring.EvaluationCLI, EvaluationModule, BenchmarkDataModule, [RolloutProgress]),
}


def _silence_untrue_warnings() -> None:
    """Libraries' advice that doesn't apply here would hide what a user should read."""
    for message in (
        "Using ModelCheckpoint with manual optimization",  # the weights are meant as they are
        "Found .* module\\(s\\) in eval mode",  # dropout must stay off
        "Total length of .* across ranks is zero",  # no validation was asked for
        ".*LeafSpec.*deprecated",
        "LightningCLI's args parameter",
        "Checkpoint directory .* exists and is not empty",  # a resumed run goes on where it was
    ):
        warnings.filterwarnings("ignore", message)
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="lightning|jsonargparse")
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
    # That its 4-bit kernels could be faster, even where nothing is in 4 bits.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # That 8-bit layers compute in 16 bits, once per layer and token.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def main(args: list[str] | None = None) -> None:
    """Run the command line."""
    _silence_untrue_warnings()
    bound_shape_caches()
    # Rewards and stages of one's own lie there. Behind all else, so that no file hides a package.
    sys.path.append(os.getcwd())
    arguments = sys.argv[1:] if args is None else args
    command, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    functions: dict[str, Callable[..., None]] = {"export": export, "compare": compare}
    try:
        commands = ("fit", "validate", "test", *_READERS, *functions)
        if command not in (*commands, "-h", "--help"):
            raise InputError(
                f"the command must be one of {', '.join(commands)}, got {command!r}; "
                f"`thinktuning --help` says what they do"
            )
        if command in functions:
            jsonargparse.auto_cli(
                functions[command], args=rest, as_positional=False, prog=f"thinktuning {command}"
            )
            return
        method = _method(rest)
        if command in _READERS:
            if method != "thinktuning":
                raise InputError(f"{command} is for method thinktuning, got {method}")
            reader, description = _READERS[command]
            reader(
                ThinkTuningModule,
                GSM8KDataModule,
                args=rest,
                run=False,
                auto_configure_optimizers=False,
                seed_everything_default=1,
                parser_kwargs={"description": description, "prog": f"thinktuning {command}"},
            )
            return
        cli, module, data, callbacks = _METHODS[method]
        if command in ("fit", "validate", "test") and command not in cli.subcommands():
            raise InputError(f"method {method} has only {', '.join(cli.subcommands())}")
        cli(
            module,
            data,
            args=args,
            auto_configure_optimizers=False,
            seed_everything_default=1,
            save_config_callback=None,
            trainer_defaults={"callbacks": [callback() for callback in callbacks]},
            parser_kwargs={"description": _DESCRIPTION, "prog": "thinktuning"},
        )
    except RunStopped as stop:
        print(stop, file=sys.stderr)
        sys.exit(128 + stop.signal)  # not 0: whoever restarts failed jobs is to restart this one
    except (ValueError, ModuleNotFoundError, *_SHOWN) as error:
        sys.exit(f"error: {_users_fault(error)}")


def _method(args: list[str]) -> wiring.Method:
    """The method that a command line asks for, by a flag or in its last file that names one."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", action="append", default=[], nargs="?")
    parser.add_argument("--method", nargs="?")
    known, _ = parser.parse_known_args(args)
    files = [Path(file) for file in known.config if file and Path(file).is_file()]
    named = [_read_configuration(file).get("method") for file in files]
    method = known.method or next((m for m in reversed(named) if m is not None), "thinktuning")
    if not isinstance(method, str) or method not in _METHODS:
        raise InputError(f"method must be one of {', '.join(_METHODS)}, got {method!r}")
    return method


# As jsonargparse chooses it: the two accept slightly different texts.
_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_SafeLoader):
    """Refuses a key that stands twice, of which YAML would forget the first in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Read a mapping."""
        keys = [key.value for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            problem = f"{', '.join(twice)} stands there twice; write it once"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def _read_configuration(file: Path) -> dict[str, Any]:
    """The sections of a configuration file.

    Raises:
        InputError: If it isn't one, which the parser of the options would tell less clearly.
    """
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(
            f"the configuration {str(file)!r} can't be read: {error}\n"
            f"expected YAML in UTF-8, as in configs/quickstart.yaml"
        ) from error
    sections = {} if content is None else content
    if not isinstance(sections, dict):
        raise InputError(
            f"the configuration {str(file)!r} must have sections such as model and data, got a "
            f"{type(sections).__name__}"
        )
    for name in ("model", "data", "guidance", "injection", "trainer", "checkpoint"):
        if not isinstance(sections.get(name, {}), dict | str | None):  # a text names another file
            raise InputError(
                f"the configuration {str(file)!r}: section {name} must have options, got "
                f"{sections[name]!r:.60}"
            )
    return sections


def _users_fault(error: Exception) -> BaseException:
    """What a user can mend in an error."""
    if (cause := first_of(error, _SHOWN)) is not None:
        return cause
    if _is_lightnings(error):
        return error
    raise error


def _is_lightnings(error: Exception) -> bool:
    """Whether Lightning has raised it, which refuses many settings by a plain ValueError."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals["__name__"]).startswith("lightning.")


if __name__ == "__main__":
    main()
