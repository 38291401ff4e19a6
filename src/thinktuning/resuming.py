"""What Lightning leaves undone where a run resumes from a checkpoint at the end of an epoch."""

from typing import Any

from lightning.pytorch import Trainer


def begin_new_epoch(trainer: Trainer) -> None:
    """Begin a new epoch if a checkpoint was made behind the last batch of one; call it once, when
    training starts.

    Lightning (2.6.6) would take the new epoch for a part of the old one: it wouldn't count it, so
    that a resume from its checkpoints would repeat data, and would end it early where it is longer.
    The counts of batches and epochs themselves were saved before they were complete.
    """
    loop: Any = trainer.fit_loop
    epochs = loop.epoch_progress.current
    if epochs.started != epochs.processed:
        return
    batches = loop.epoch_loop
    if batches.restarted_on_train_batch_end:
        batches.batch_progress.increment_completed()
    epochs.completed = epochs.processed
    batches._batches_that_stepped = trainer.global_step
    for each in (loop, batches, batches.val_loop):
        each.on_iteration_done()
