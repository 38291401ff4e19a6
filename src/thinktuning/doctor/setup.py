"""The parts of a set-up, made of its configuration when a check first asks for them."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CUDAAccelerator
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from thinktuning.callbacks import TeacherGuidance
from thinktuning.data import GSM8KDataModule
from thinktuning.engines import Completion, Engine, SamplingParams, derive_seed
from thinktuning.errors import InputError
from thinktuning.module import ThinkTuningModule
from thinktuning.plan import Plan, PlanOptions, make_plan, read_job
from thinktuning.policy import load_tokenizer
from thinktuning.rewards.verifier import Verifier
from thinktuning.teaching import Chat, Reply
from thinktuning.types import Prompt, Rollout, RolloutBatch

_QUESTIONS = 2
_SAMPLES = 2  # of each question
_NEW_TOKENS = 32
_PATIENCE = 30.0  # seconds that a teacher's server may be silent for; a run waits longer


class Setup:
    """What ``thinktuning fit`` would make, one part at a time, in one process on one device.

    A part that can't be made says why by an error.

    Args:
        config: As the parser of ``thinktuning doctor`` gives it.

    Attributes:
        verifier: Compares answers, with the deadline that a run has.
    """

    def __init__(self, config: Namespace) -> None:
        self.config = config
        self.verifier = Verifier()

    @cached_property
    def plan(self) -> Plan:
        """Memory of the run on each device."""
        return make_plan(read_job(self.config, PlanOptions()))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The student's."""
        return load_tokenizer(self.config.model.pretrained)

    @cached_property
    def prompts(self) -> list[Prompt]:
        """All training prompts; there are enough for a rollout batch."""
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(GSM8KDataModule, "data")
        data: GSM8KDataModule = _made(parser, data=self.config.data.as_dict()).data
        data.setup("fit")
        data.train_dataloader()  # refuses too few
        assert data.train_prompts is not None
        return data.train_prompts

    @cached_property
    def module(self) -> ThinkTuningModule:
        """The module and its engine, without weights."""
        parser = ArgumentParser(exit_on_error=False)
        parser.add_subclass_arguments(Engine, "engine")
        parser.add_class_arguments(ThinkTuningModule, "model")
        parser.link_arguments("engine", "model.engine", apply_on="instantiate")
        sections = {name: self.config[name].as_dict() for name in ("engine", "model")}
        module: ThinkTuningModule = _made(parser, **sections).model
        return module

    @cached_property
    def trainer(self) -> Trainer:
        """One that writes nothing, on the first of the run's devices."""
        gpus = chosen_gpus(self.config.trainer)
        return Trainer(
            accelerator="cuda" if gpus else "cpu",
            devices=gpus[:1] or 1,
            precision=self.config.trainer.precision,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    @cached_property
    def student(self) -> ThinkTuningModule:
        """The module with its weights, on the device."""
        module = self.module
        module.trainer = self.trainer
        with self.trainer.init_module():
            module.configure_model()
        module.to(self.trainer.strategy.root_device)
        return module

    def computing(self) -> AbstractContextManager[Any]:
        """The precision that the trainer computes in."""
        return self.trainer.precision_plugin.forward_context()

    @cached_property
    def rollouts(self) -> RolloutBatch:
        """Short completions of the first questions, by the student's engine."""
        module, prompts = self.student, self.prompts[:_QUESTIONS]
        limit = min(_NEW_TOKENS, module.max_new_tokens)
        params = SamplingParams(limit, module.stop_ids, module.temperature)
        seeds = [
            [derive_seed(module.seed, p.index, i, "doctor") for i in range(_SAMPLES)]
            for p in prompts
        ]
        with self.computing():
            module.engine.load_weights(module.policy, module.tokenizer)
            groups = module.engine.sample([p.token_ids for p in prompts], seeds, params)
        rollouts = tuple(
            _rollout(prompt, i, completion, module.decode(completion.token_ids))
            for prompt, group in zip(prompts, groups, strict=True)
            for i, completion in enumerate(group)
        )
        return RolloutBatch(step=0, group_size=_SAMPLES, rollouts=rollouts)

    @cached_property
    def guidance(self) -> TeacherGuidance:
        """Stage 2, with a teacher of its own if it has one."""
        settings = self.config.guidance.as_dict()
        if settings["teacher"] is not None:
            settings["teacher"] = _impatient(settings["teacher"])
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(TeacherGuidance, "guidance")
        guidance: TeacherGuidance = _made(parser, guidance=settings).guidance
        return guidance

    def ask(self, chats: Sequence[Chat]) -> list[Reply]:
        """The teacher's replies, as ``TeacherGuidance`` asks for them, but not from its cache.

        The student's weights stand for those of the frozen reference, which begins as the same.
        """
        guidance = self.guidance
        teacher = guidance.teacher or self.student.engine
        teacher.start()
        with self.computing():
            if isinstance(teacher, Engine) and teacher.needs_weights:
                teacher.load_weights(self.student.policy, self.student.tokenizer)
            return guidance.replies(teacher, chats)

    def close(self) -> None:
        """Release what was made."""
        self.verifier.close()
        made = vars(self)
        if "module" in made:
            self.module.engine.close()
        if "guidance" in made and self.guidance.teacher is not None:
            self.guidance.teacher.close()


def chosen_gpus(trainer: Namespace) -> list[int]:
    """This machine's GPUs that would train; none where its CPUs do.

    Raises:
        InputError: If there is no GPU, or another accelerator is wanted.
        MisconfigurationException: If there are too few.
    """
    wanted, there = trainer.accelerator, torch.cuda.is_available()
    if wanted not in ("cpu", "gpu", "cuda", "auto"):
        raise InputError(f"trainer.accelerator {wanted!r}: the doctor knows cpu, gpu and auto")
    if wanted == "cpu" or (wanted == "auto" and not there):
        return []
    if not there:
        raise InputError(
            f"trainer.accelerator is {wanted}, but torch {torch.__version__} sees no GPU\n"
            f"look at nvidia-smi and CUDA_VISIBLE_DEVICES, and whether this torch was built for "
            f"CUDA; or say --trainer.accelerator cpu"
        )
    return CUDAAccelerator.parse_devices(-1 if trainer.devices == "auto" else trainer.devices) or []


def _made(parser: ArgumentParser, **sections: dict[str, Any]) -> Namespace:
    return parser.instantiate(parser.parse_object(sections))


def _impatient(teacher: dict[str, Any]) -> dict[str, Any]:
    """A server as teacher that is asked once, and not waited for longer than the doctor may."""
    arguments = dict(teacher.get("init_args") or {})
    if "max_retries" in arguments:
        arguments["max_retries"] = 0
    if "timeout" in arguments:
        arguments["timeout"] = min(arguments["timeout"], _PATIENCE)
    return {**teacher, "init_args": arguments}


def _rollout(prompt: Prompt, sample: int, completion: Completion, text: str) -> Rollout:
    return Rollout(
        prompt=prompt,
        sample=sample,
        completion_ids=completion.token_ids,
        logprobs=completion.logprobs,
        injected_mask=(False,) * len(completion.token_ids),
        finished=completion.finish_reason == "stop",
        text=text,
        advantage=0.0,
    )
