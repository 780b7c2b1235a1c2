"""Errors, and how those of other libraries are named."""

__all__ = ["CheckpointError", "NumericsAssumed", "first_line"]


class CheckpointError(ValueError):
    """A checkpoint that is wrong, or a request about one that cannot be met. The message says what to do."""


class NumericsAssumed(UserWarning):
    """A checkpoint does not state its numerics, so those of the code that owns its names are assumed."""


def first_line(error: Exception) -> str:
    """The first line of another library's message, or where it has none the name of its class."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
