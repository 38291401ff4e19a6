"""What a user can mend."""


class InputError(ValueError):
    """Bad input: a configuration, a file, a model. The command line shows it without a traceback.

    The message says what was wrong, what was expected and what to do; related faults come together.
    """


class StaleWeightsError(RuntimeError):
    """An engine doesn't hold the weights that it was given."""


class LostGradientsError(RuntimeError):
    """The loss has a gradient, but none of it arrives at the trained weights."""


class DivergedError(RuntimeError):
    """The model's logits aren't finite, or too many losses or gradients in a row weren't."""


class FailingRewardError(RuntimeError):
    """A reward has failed on too many responses in a row."""


class AbsentTeacherError(RuntimeError):
    """The teacher hasn't answered for too many steps in a row."""


class UnsavedError(OSError):
    """A checkpoint couldn't be written."""


class RunStopped(Exception):
    """A signal has ended a run, behind a step that is saved.

    Args:
        signal: Its number.
        checkpoint: Where the run can go on.
    """

    def __init__(self, signal: int, checkpoint: str) -> None:
        super().__init__(f"stopped; go on with --ckpt_path {checkpoint}")
        self.signal = signal


def too_small(*bounds: tuple[str, float, float]) -> list[str]:
    """Faults of arguments, given as (name, value, least), that are below what they must be."""
    return [
        f"{name} must be at least {least}, got {value}"
        for name, value, least in bounds
        if value < least
    ]


def first_of(error: BaseException, kinds: tuple[type[BaseException], ...]) -> BaseException | None:
    """The first error of some kinds among an error and what caused it; None if there is none.

    jsonargparse wraps the errors of optional arguments.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, kinds):
        cause = cause.__cause__ or cause.__context__
    return cause
