"""What a user can mend."""


class InputError(ValueError):
    """Bad input: a configuration, a file, a model. The command line shows it without a traceback.

    The message says what was wrong, what was expected and what to do; related faults come together.
    """


class StaleWeightsError(RuntimeError):
    """An engine doesn't hold the weights that it was given."""


class LostGradientsError(RuntimeError):
    """The loss has a gradient, but none of it arrives at the trained weights."""


def too_small(*bounds: tuple[str, float, float]) -> list[str]:
    """Faults of arguments, given as (name, value, least), that are below what they must be."""
    return [
        f"{name} must be at least {least}, got {value}"
        for name, value, least in bounds
        if value < least
    ]
