__all__ = ["CheckpointError", "NumericsAssumed"]


class CheckpointError(ValueError):
    """A checkpoint, or a request about one, that cannot be honoured. The message says what to do."""


class NumericsAssumed(UserWarning):
    """A checkpoint says nothing of its numerics, and those of the code that owns its names are taken."""
