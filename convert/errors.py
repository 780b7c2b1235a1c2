__all__ = ["CheckpointError", "NumericsAssumed"]


class CheckpointError(ValueError):
    """A checkpoint that is wrong, or a request about one that cannot be met. The message says what to do."""


class NumericsAssumed(UserWarning):
    """A checkpoint does not state its numerics, so those of the code that owns its names are assumed."""
