"""Files of class names: text in UTF-8, one a line."""

__all__ = ["read_labels", "read_lines"]

import os
from pathlib import Path

from .errors import CheckpointError


def read_labels(path: str | os.PathLike[str], num_classes: int) -> tuple[str, ...]:
    """The names of all classes in their order. Raises CheckpointError unless there are as many as classes."""
    lines = read_lines(path)
    labels = tuple(filter(None, lines))
    if len(lines) != num_classes or labels != lines:
        raise CheckpointError(f"{path}: {len(labels)} labels in {len(lines)} lines for {num_classes} classes")
    return labels


def read_lines(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """The lines of a file of labels, each without the blanks around it."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{path}: labels must be text in UTF-8, one a line, and byte {error.start} is not: save the file as UTF-8"
        ) from None
    return tuple(line.strip() for line in text.splitlines())
