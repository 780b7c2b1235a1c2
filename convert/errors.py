__all__ = ["CheckpointError"]


class CheckpointError(ValueError):
    """A checkpoint, or a request about one, that cannot be honoured. The message says what to do."""
