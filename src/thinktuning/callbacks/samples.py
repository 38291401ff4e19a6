"""Real samples in TensorBoard."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from thinktuning.types import Rollout, RolloutBatch


class SampleLog(Callback):
    """Shows one guided and one unguided rollout of a step under TensorBoard's "Text".

    Args:
        every_n_steps: Rollout steps from one writing to the next.
    """

    def __init__(self, every_n_steps: int = 5) -> None:
        self.every_n_steps = every_n_steps

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Write the first rollout of each kind."""
        rollouts: RolloutBatch = outputs["rollouts"]
        if rollouts.step % self.every_n_steps or not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            if not isinstance(logger, TensorBoardLogger):
                continue
            for kind, guided in (("guided", True), ("unguided", False)):
                rollout = next((r for r in rollouts.rollouts if r.guided is guided), None)
                if rollout is not None:
                    text = indented(describe(rollout))
                    logger.experiment.add_text(f"rollouts/{kind}", text, rollouts.step)


def describe(rollout: Rollout) -> str:
    """A rollout for people: question, answer with the injected part marked, and what it earned."""
    student = (rollout.original or rollout).text
    parts = [f"Question: {rollout.prompt.question}", "", f"Student: {student}"]
    if rollout.guided:
        injected = rollout.text[len(student) :].strip()
        parts += ["", "[injected from the teacher]", injected, "[end of the injected part]"]
    outcome = f"{rollout.outcome}" if rollout.outcome else "not verified"
    if rollout.original is not None:
        outcome = f"{rollout.original.outcome} before guidance, {outcome} after"
    advantage = "unset" if rollout.advantage is None else f"{rollout.advantage:+.3f}"
    parts += [
        "",
        f"gold {rollout.prompt.answer} | {outcome} | reward {rollout.reward} | "
        f"advantage {advantage} | {len(rollout.completion_ids)} tokens",
    ]
    return "\n".join(parts)


def indented(text: str) -> str:
    """The text as a Markdown code block, in which nothing that a model writes is markup."""
    return "\n".join(f"    {line}" for line in text.splitlines())
