"""The command line: ``thinktuning fit | validate | test | plan | export | compare``."""

import argparse
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import jsonargparse
import yaml
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from thinktuning import wiring
from thinktuning.baselines import SFTModule, STaRDataModule, STaRModule
from thinktuning.callbacks import AuditLog, RolloutProgress, SampleLog
from thinktuning.data import GSM8KDataModule
from thinktuning.errors import InputError, LostGradientsError, StaleWeightsError
from thinktuning.evaluation import BenchmarkDataModule, EvaluationModule
from thinktuning.evaluation.compare import compare
from thinktuning.export import export
from thinktuning.module import ThinkTuningModule

_DESCRIPTION = """ThinkTuning: teach a language model behaviors that it never samples.
`thinktuning fit --config FILE` trains; `thinktuning SUBCOMMAND --help` is the manual;
`thinktuning plan --config FILE` says what memory and work that would take;
`thinktuning test --config configs/eval.yaml` answers benchmarks, and
`thinktuning compare --config FILE` makes several models do so;
`thinktuning export --ckpt_path FILE --output DIR` writes a Hugging Face folder."""

_PLAN_DESCRIPTION = """Memory and work of `thinktuning fit` on each device, from its configuration
and the model's config.json: no weights are read, nothing is trained. Takes what `fit` takes."""

# Errors that are told in a few lines; all others are ours, and show where they come from.
_SHOWN = (InputError, MisconfigurationException, StaleWeightsError, LostGradientsError)

# Of each method: its command line, its module, its data, its callbacks.
_METHODS: dict[wiring.Method, tuple[type[wiring.MethodCLI], type, type, list[type]]] = {
    "thinktuning": (
        wiring.ThinkTuningCLI,
        ThinkTuningModule,
        GSM8KDataModule,
        [RolloutProgress, SampleLog, AuditLog],
    ),
    "sft": (wiring.SFTCLI, SFTModule, GSM8KDataModule, [RolloutProgress]),
    "star": (wiring.STaRCLI, STaRModule, STaRDataModule, [RolloutProgress]),
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
    arguments = sys.argv[1:] if args is None else args
    command, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    functions: dict[str, Callable[..., None]] = {"export": export, "compare": compare}
    try:
        if command in functions:
            jsonargparse.auto_cli(
                functions[command], args=rest, as_positional=False, prog=f"thinktuning {command}"
            )
            return
        method = _method(rest)
        if command == "plan":
            if method != "thinktuning":
                raise InputError(f"plan is for method thinktuning, got {method}")
            wiring.PlanCLI(
                ThinkTuningModule,
                GSM8KDataModule,
                args=rest,
                run=False,
                auto_configure_optimizers=False,
                seed_everything_default=1,
                parser_kwargs={"description": _PLAN_DESCRIPTION, "prog": "thinktuning plan"},
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
    except (ValueError, *_SHOWN) as error:
        sys.exit(f"error: {_users_fault(error)}")


def _method(args: list[str]) -> wiring.Method:
    """The method that a command line asks for, by a flag or in its last file that names one."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", action="append", default=[], nargs="?")
    parser.add_argument("--method", nargs="?")
    known, _ = parser.parse_known_args(args)
    named = [_named_in(Path(file)) for file in known.config if file]
    method = known.method or next((m for m in reversed(named) if m is not None), "thinktuning")
    if not isinstance(method, str) or method not in _METHODS:
        raise InputError(f"method must be one of {', '.join(_METHODS)}, got {method!r}")
    return method


def _named_in(file: Path) -> str | None:
    """The method in a configuration file; None also where the file can't be read, which the parser
    of the configuration tells better.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    return content.get("method") if isinstance(content, dict) else None


def _users_fault(error: Exception) -> Exception:
    """What a user can mend in an error; jsonargparse wraps those of optional arguments."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, _SHOWN):
            return cause
        cause = cause.__cause__ or cause.__context__
    raise error


if __name__ == "__main__":
    main()
