"""The command line: ``thinktuning fit | validate | test | plan | export``."""

import logging
import re
import sys
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console

from thinktuning import runs
from thinktuning.callbacks import (
    AuditLog,
    BehaviorInjection,
    RolloutCheckpoint,
    RolloutProgress,
    SampleLog,
    TeacherGuidance,
)
from thinktuning.checkpointing import AtomicCheckpointIO
from thinktuning.data import GSM8KDataModule
from thinktuning.engines import Engine, TransformersEngine
from thinktuning.errors import InputError, LostGradientsError, StaleWeightsError
from thinktuning.export import export
from thinktuning.module import ThinkTuningModule
from thinktuning.plan import PlanOptions, make_plan, print_plan, read_job
from thinktuning.report import print_report
from thinktuning.strategy import check_strategy

_DESCRIPTION = """ThinkTuning: teach a language model behaviors that it never samples.
`thinktuning fit --config FILE` trains; `thinktuning SUBCOMMAND --help` is the manual;
`thinktuning plan --config FILE` says what memory and work that would take;
`thinktuning export --ckpt_path FILE --output DIR` writes a Hugging Face folder."""

_PLAN_DESCRIPTION = """Memory and work of `thinktuning fit` on each device, from its configuration
and the model's config.json: no weights are read, nothing is trained. Takes what `fit` takes."""

# Errors that are told in a few lines; all others are ours, and show where they come from.
_SHOWN = (InputError, MisconfigurationException, StaleWeightsError, LostGradientsError)

_USAGE = "thinktuning {fit,validate,test} [-c FILE]... [--SECTION.OPTION VALUE]..."


class _Parser(LightningArgumentParser):
    """Says what is wrong in a few lines, without the usage of some two hundred options."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if re.search(r"\btop_[pk]\b", message):
            message += (
                "\ntop-p and top-k would cut off the support of the policy, and its ratio to the "
                "sampler would be wrong: use model.temperature"
            )
        sys.exit(f"error: {message}\nEvery option: thinktuning fit --help")


class ThinkTuningCLI(LightningCLI):
    """Wires model, data, engine, guidance, injection and trainer together."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser with short errors and a short usage line."""
        parser = _Parser(usage=_USAGE, **kwargs)
        parser.add_argument(
            "-c", "--config", action=jsonargparse.ActionConfigFile, help="A YAML file; repeatable."
        )
        return parser

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's subcommands that have a meaning here."""
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "weights_only"},
            "validate": {"model", "dataloaders", "datamodule", "weights_only"},
            "test": {"model", "dataloaders", "datamodule", "weights_only"},
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The sections beside model, data and trainer, and what follows from what."""
        parser.add_subclass_arguments(
            Engine, "engine", default=jsonargparse.lazy_instance(TransformersEngine)
        )
        parser.add_lightning_class_args(TeacherGuidance, "guidance")
        parser.add_lightning_class_args(BehaviorInjection, "injection")
        parser.add_lightning_class_args(RolloutCheckpoint, "checkpoint")
        parser.set_defaults(
            {
                "checkpoint.every_n_train_steps": 10,
                "checkpoint.filename": "step={step:06d}",
                "checkpoint.auto_insert_metric_name": False,
                "checkpoint.save_last": "link",
                "checkpoint.enable_version_counter": False,  # else a resumed run makes last-v1
                "trainer.default_root_dir": "runs",
                "trainer.log_every_n_steps": 1,
                "trainer.num_sanity_val_steps": 0,
            }
        )
        parser.link_arguments("engine", "model.engine", apply_on="instantiate")
        parser.link_arguments("model.pretrained", "data.tokenizer")
        parser.link_arguments("seed_everything", "model.seed", compute_fn=_seed)
        parser.link_arguments("seed_everything", "data.seed", compute_fn=_seed)

    def _parse_ckpt_path(self) -> None:
        """Lightning would let the checkpoint's hyperparameters override the configuration."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Give the run its folder: a new one, or that of the checkpoint it resumes from."""
        settings = self._get(self.config_init, "trainer")
        check_strategy(settings["strategy"])  # before Lightning, which would fail less clearly
        root = Path(settings["default_root_dir"])
        checkpoint = self._checkpoint(root)
        run = (checkpoint and runs.run_of(checkpoint)) or runs.new_run(root)
        self.config_init[self.subcommand]["ckpt_path"] = str(checkpoint) if checkpoint else None
        self._get(self.config_init, "checkpoint").dirpath = str(run / runs.CHECKPOINTS)
        if settings["logger"] in (None, True):
            kwargs["logger"] = TensorBoardLogger(run.parent, name="", version=run.name)
        plugins = settings["plugins"] or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        self.run = run
        for callback in self.trainer_defaults["callbacks"]:
            if isinstance(callback, AuditLog):
                callback.folder = run
        return super().instantiate_trainer(**kwargs, plugins=[*plugins, AtomicCheckpointIO()])

    def _checkpoint(self, root: Path) -> Path | None:
        """What ``--ckpt_path`` means."""
        wanted = self._get(self.config_init, "ckpt_path")
        if wanted is None:
            return None
        if wanted == "last":
            found = runs.last_checkpoint(root)
            if found is None:
                rank_zero_warn(f"there is no checkpoint under {root}: the run starts afresh")
            return found
        if not Path(wanted).exists():
            raise InputError(
                f"there is no checkpoint {wanted!r}; expected a file, a folder or 'last'"
            )
        return Path(wanted)

    @rank_zero_only
    def before_fit(self) -> None:
        """Keep the configuration of every start beside what it made."""
        self.run.mkdir(parents=True, exist_ok=True)
        parser, config = self._parser("fit"), self.config["fit"]
        parser.save(config, runs.config_path(self.run), skip_unset=False, multifile=False)

    @rank_zero_only
    def after_fit(self) -> None:
        """Say what happened and what to do next."""
        if self.trainer.state.finished:
            print_report(self.trainer, self.run)


class PlanCLI(ThinkTuningCLI):
    """``thinktuning plan``: reads what ``fit`` reads, and makes none of it."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """The planner's own options come first."""
        parser = super().init_parser(**kwargs)
        parser.usage = "thinktuning plan [-c FILE]... [--OPTION VALUE]..."
        parser.add_class_arguments(PlanOptions)
        parser.add_argument("--ckpt_path", help="In the config.yaml of a run; not read.")
        return parser

    def instantiate_classes(self) -> None:
        """Plan instead."""
        options = PlanOptions(**{f.name: self.config[f.name] for f in fields(PlanOptions)})
        print_plan(make_plan(read_job(self.config, options)), options, Console())


def _seed(seed: bool | int) -> int:
    if isinstance(seed, bool):
        raise InputError("seed_everything must be an integer, so that the run can be repeated")
    return seed


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
    try:
        if arguments[:1] == ["export"]:
            jsonargparse.auto_cli(
                export, args=arguments[1:], as_positional=False, prog="thinktuning export"
            )
            return
        if arguments[:1] == ["plan"]:
            PlanCLI(
                ThinkTuningModule,
                GSM8KDataModule,
                args=arguments[1:],
                run=False,
                auto_configure_optimizers=False,
                seed_everything_default=1,
                parser_kwargs={"description": _PLAN_DESCRIPTION, "prog": "thinktuning plan"},
            )
            return
        ThinkTuningCLI(
            ThinkTuningModule,
            GSM8KDataModule,
            args=args,
            auto_configure_optimizers=False,
            seed_everything_default=1,
            save_config_callback=None,
            trainer_defaults={"callbacks": [RolloutProgress(), SampleLog(), AuditLog()]},
            parser_kwargs={"description": _DESCRIPTION, "prog": "thinktuning"},
        )
    except (ValueError, *_SHOWN) as error:
        sys.exit(f"error: {_users_fault(error)}")


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
