"""Pictures as files: written completely or not at all."""

__all__ = ["check_path", "require_matplotlib", "save"]

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

from convert import CheckpointError
from convert.atomic import check_writable, write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ENDINGS = (".png", ".pdf", ".svg")


def check_path(path: Path, *, source: str = "", force: bool = False) -> None:
    """Raise CheckpointError unless a picture of this name can be written."""
    if path.suffix.lower() not in ENDINGS:
        raise CheckpointError(f"{path}: a picture ends in {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}")
    if path.exists() and os.path.exists(source) and path.samefile(source):
        raise CheckpointError(f"{path}: is the checkpoint itself; give another name")
    check_writable(path, force=force)


def save(figure: "Figure", path: Path, *, force: bool = False) -> None:
    """Write a figure, completely or not at all, in the format of the ending."""
    check_path(path, force=force)
    kind, content = path.suffix.lower()[1:], io.BytesIO()
    undated = {"png": None, "pdf": {"CreationDate": None}, "svg": {"Date": None}}[kind]
    figure.savefig(content, format=kind, metadata=undated)
    write_bytes(path, content.getbuffer(), force=force)


def require_matplotlib() -> None:
    """Raise ImportError, with what to install, if Matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise ImportError("drawing needs Matplotlib: pip install 'mixer-jax[images]'") from None
