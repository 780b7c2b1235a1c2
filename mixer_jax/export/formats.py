"""The formats of exported programs, by the ending of the file."""

__all__ = ["FORMATS", "format_of", "is_exported", "opened"]

import importlib
import os
from pathlib import Path
from types import ModuleType

from convert import CheckpointError

from .program import Program

# Each module has `write(path, checkpoint, options)` and `opened(path)`, which raise ImportError without their packages.
FORMATS = {".onnx": "onnx_program", ".stablehlo": "stablehlo", ".pt2": "pt2"}


def is_exported(path: str | os.PathLike[str]) -> bool:
    return Path(path).suffix in FORMATS


def format_of(path: str | os.PathLike[str]) -> ModuleType:
    """The module of a path's format. Raises CheckpointError, naming the known endings, for any other."""
    if not is_exported(path):
        raise CheckpointError(f"{path}: a program is exported as {', '.join(FORMATS)}: give a name with one of these endings")
    return importlib.import_module(f".{FORMATS[Path(path).suffix]}", __package__)


def opened(path: str | os.PathLike[str]) -> Program:
    """An exported program. Raises CheckpointError for a file that is none."""
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: no such file")
    return format_of(path).opened(path)
