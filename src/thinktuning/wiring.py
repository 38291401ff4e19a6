"""How the sections of a configuration become objects: a LightningCLI for each method."""

import re
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, NoReturn

import jsonargparse
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from rich.console import Console

from thinktuning import runs
from thinktuning.callbacks import (
    BehaviorInjection,
    RecordLog,
    ResumeCheck,
    RolloutCheckpoint,
    TeacherGuidance,
)
from thinktuning.checkpointing import AtomicCheckpointIO
from thinktuning.doctor import examine, is_healthy, print_findings
from thinktuning.engines import Engine, TransformersEngine
from thinktuning.errors import InputError
from thinktuning.evaluation import EvaluationModule
from thinktuning.evaluation.display import print_results
from thinktuning.logger import RunLogger
from thinktuning.plan import PlanOptions, make_plan, print_plan, read_job
from thinktuning.report import print_guidance, print_next_steps
from thinktuning.strategy import check_strategy
from thinktuning.trained import check_sound, read_training

Method = Literal["thinktuning", "sft", "star", "evaluation"]


class _Parser(LightningArgumentParser):
    """Says what is wrong in a few lines, without the usage of some two hundred options."""

    manual = "thinktuning fit --help"
    ratios = False
    """Whether what is sampled is trained on by its probability."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if self.ratios and re.search(r"\btop_[pk]\b", message):
            message += (
                "\ntop-p and top-k would cut off the support of the policy, and its ratio to the "
                "sampler would be wrong: use model.temperature"
            )
        sys.exit(f"error: {message}\nEvery option: {self.manual}")


class MethodCLI(LightningCLI):
    """What the command lines of all methods share: parser, engine and seeds."""

    method: Method = "thinktuning"

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser with short errors and a short usage line."""
        verbs = self.subcommands()
        usage = f"thinktuning {{{','.join(verbs)}}} [-c FILE]... [--SECTION.OPTION VALUE]..."
        parser = _Parser(usage=usage, **kwargs)
        parser.ratios = self.method == "thinktuning"
        if self.method != "thinktuning":
            parser.manual = f"thinktuning {next(iter(verbs))} --method {self.method} --help"
        parser.add_argument(
            "-c", "--config", action=jsonargparse.ActionConfigFile, help="A YAML file; repeatable."
        )
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The method, the engine, and where the seed goes."""
        parser.add_argument(
            "--method",
            type=Method,
            default=self.method,
            help="What is done; decides which sections and options there are.",
        )
        parser.add_subclass_arguments(
            Engine, "engine", default=jsonargparse.lazy_instance(TransformersEngine)
        )
        parser.link_arguments("engine", "model.engine", apply_on="instantiate")
        parser.link_arguments("seed_everything", "model.seed", compute_fn=_seed)

    def before_instantiate_classes(self) -> None:
        """The options are those of one method, whatever another file or flag has said."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        if config.method != self.method:
            raise InputError(
                f"method is {self.method} by one flag or file and {config.method} by another; "
                f"name one"
            )

    @rank_zero_only
    def _keep_config(self, run: Path) -> None:
        """Save the configuration of a start beside what it makes."""
        run.mkdir(parents=True, exist_ok=True)
        verb = self.subcommand
        config = runs.config_path(run)
        self._parser(verb).save(self.config[verb], config, skip_unset=False, multifile=False)

    def _parse_ckpt_path(self) -> None:
        """Lightning would let the checkpoint's hyperparameters override the configuration."""

    def _logging_into(self, run: Path, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The trainer's arguments, with a logger that writes into a run's folder."""
        if self._get(self.config_init, "trainer")["logger"] in (None, True):
            return kwargs | {"logger": RunLogger(run)}
        return kwargs


class TrainingCLI(MethodCLI):
    """Wires model, data, engine and trainer together, for training."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's subcommands that have a meaning here."""
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "weights_only"},
            "validate": {"model", "dataloaders", "datamodule", "weights_only"},
            "test": {"model", "dataloaders", "datamodule", "weights_only"},
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Checkpoints, defaults, and what follows from what."""
        super().add_arguments_to_parser(parser)
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
        parser.link_arguments("model.pretrained", "data.tokenizer")
        parser.link_arguments("seed_everything", "data.seed", compute_fn=_seed)

    def before_instantiate_classes(self) -> None:
        """There must be questions to validate on where that is what is asked for."""
        super().before_instantiate_classes()
        verb = self.subcommand
        if verb in ("validate", "test") and self.config[verb].data.val_size == 0:
            raise InputError(
                f"{verb} has no questions: data.val_size is 0; say e.g. --data.val_size 64"
            )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Give the run its folder: a new one, or that of the checkpoint it resumes from."""
        settings = self._get(self.config_init, "trainer")
        check_strategy(settings["strategy"])  # before Lightning, which would fail less clearly
        if settings["check_val_every_n_epoch"] == 0:
            raise InputError(
                "trainer.check_val_every_n_epoch must be at least 1 or null, got 0; to validate "
                "never set data.val_size 0"
            )
        if self._get(self.config_init, "checkpoint").dirpath is not None:
            raise InputError(
                "checkpoint.dirpath can't be set: checkpoints lie in their run's folder; set "
                "trainer.default_root_dir"
            )
        root = Path(settings["default_root_dir"])
        runs.check_writable(root, "trainer.default_root_dir")
        checkpoint = self._checkpoint(root)
        run = (checkpoint and runs.run_of(checkpoint)) or runs.new_run(root)
        self.config_init[self.subcommand]["ckpt_path"] = str(checkpoint) if checkpoint else None
        self._get(self.config_init, "checkpoint").dirpath = str(run / runs.CHECKPOINTS)
        plugins = settings["plugins"] or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        self.run = run
        for callback in self.trainer_defaults["callbacks"]:
            if isinstance(callback, RecordLog):
                callback.folder = run
            if isinstance(callback, ResumeCheck):
                callback.configuration = self._settings()
        kwargs = self._logging_into(run, kwargs)
        return super().instantiate_trainer(**kwargs, plugins=[*plugins, AtomicCheckpointIO()])

    def _settings(self) -> dict[str, str]:
        """Every setting of this start by its dotted name."""
        verb = self.subcommand
        dumped = yaml.safe_load(self._parser(verb).dump(self.config[verb], skip_unset=False))
        return {
            name: str(value) for name, value in _flat(dumped) if name not in ("config", "ckpt_path")
        }

    def _checkpoint(self, root: Path) -> Path | None:
        """What ``--ckpt_path`` means."""
        wanted = self._get(self.config_init, "ckpt_path")
        if wanted is None:
            return None
        found = runs.last_checkpoint(root) if wanted == "last" else Path(wanted)
        if found is None and self.subcommand != "fit":
            raise InputError(
                f"there is no checkpoint under {root} to {self.subcommand}; say where the run "
                f"lies by trainer.default_root_dir, or give --ckpt_path a file"
            )
        if found is None:
            rank_zero_warn(f"there is no checkpoint under {root}: the run starts afresh")
        elif not found.exists():
            raise InputError(
                f"there is no checkpoint {wanted!r}; expected a file, a folder or 'last'"
            )
        else:
            rank_zero_only(check_sound)(found)
            read_training(found)  # before Lightning, which would fail less clearly
        return found

    def before_fit(self) -> None:
        """Keep the configuration of every start, and what is skipped beside it."""
        self.model.skipped.folder = self.run
        self._keep_config(self.run)

    @rank_zero_only
    def after_fit(self) -> None:
        """Say what happened and what to do next."""
        if self.trainer.state.finished:
            console = Console(highlight=False)
            console.print(f"\nTrained for {self.trainer.global_step} steps.")
            self.print_report(console)

    def print_report(self, console: Console) -> None:
        """What a run says when it ends."""
        print_next_steps(self.trainer, self.run, console)


class SFTCLI(TrainingCLI):
    """``method: sft``."""

    method = "sft"


class STaRCLI(TrainingCLI):
    """``method: star``."""

    method = "star"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """An epoch is a round, which begins with new data."""
        super().add_arguments_to_parser(parser)
        parser.set_defaults({"trainer.reload_dataloaders_every_n_epochs": 1})


class ThinkTuningCLI(TrainingCLI):
    """Adds the stages of guidance and injection."""

    method = "thinktuning"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The sections of the stages."""
        super().add_arguments_to_parser(parser)
        parser.add_lightning_class_args(TeacherGuidance, "guidance")
        parser.add_lightning_class_args(BehaviorInjection, "injection")

    def print_report(self, console: Console) -> None:
        """Say what the stages did, too."""
        print_guidance(self.run, console)
        super().print_report(console)


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


class DoctorCLI(ThinkTuningCLI):
    """``thinktuning doctor``: reads what ``fit`` reads, and makes no run of it."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """No subcommands, and no options but those of ``fit``."""
        parser = super().init_parser(**kwargs)
        parser.usage = "thinktuning doctor [-c FILE]... [--SECTION.OPTION VALUE]..."
        parser.add_argument("--ckpt_path", help="In the config.yaml of a run; not read.")
        return parser

    def instantiate_classes(self) -> None:
        """Check instead."""
        console = Console(highlight=False)
        findings = examine(self.config, console)
        print_findings(findings, console)
        if not is_healthy(findings):
            sys.exit(1)


class EvaluationCLI(MethodCLI):
    """``method: evaluation``: wires model, benchmarks and engine together, for ``test``."""

    method = "evaluation"
    model: EvaluationModule

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """There is nothing to fit or to validate."""
        return {"test": {"model", "dataloaders", "datamodule", "weights_only"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Runs in a folder of their own."""
        super().add_arguments_to_parser(parser)
        parser.set_defaults({"trainer.default_root_dir": "runs/evaluation"})

    def before_instantiate_classes(self) -> None:
        """``--ckpt_path`` is the module's to load: its base model and adapters are noted in it."""
        super().before_instantiate_classes()
        config = self.config[self.subcommand]
        config.verbose = False  # our own tables say more
        if config.ckpt_path is not None:
            config.model.checkpoint, config.ckpt_path = config.ckpt_path, None

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Give the run a folder, and keep no checkpoints in it."""
        root = Path(self._get(self.config_init, "trainer")["default_root_dir"])
        runs.check_writable(root, "trainer.default_root_dir")
        self.run = runs.new_run(root)
        kwargs = self._logging_into(self.run, kwargs)
        return super().instantiate_trainer(**kwargs, enable_checkpointing=False)

    def before_test(self) -> None:
        """Keep the configuration beside the numbers."""
        self._keep_config(self.run)

    @rank_zero_only
    def after_test(self) -> None:
        """Show the numbers, and note whose they are."""
        if self.trainer.state.finished:
            self.model.write_index(self.run / runs.CELLS)
            print_results(self.model.cells, self.model.summaries, Console())


def _flat(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested dictionaries by their dotted names."""
    if not isinstance(tree, dict) or not tree:
        yield path, tree
        return
    for key, value in tree.items():
        yield from _flat(value, f"{path}.{key}" if path else str(key))


def _seed(seed: bool | int) -> int:
    if isinstance(seed, bool):
        raise InputError("seed_everything must be an integer, so that the run can be repeated")
    if not 0 <= seed < 2**32:
        raise InputError(f"seed_everything must be from 0 to {2**32 - 1}, got {seed}")
    return seed
