"""What a Mixer checkpoint is: sizes, numerics, names, axes and files. No model, and neither jax nor torch at import."""

from .checkpoint import Checkpoint
from .commands import Changes, compare_files, convert_file, inspect_file
from .config import VARIANTS, MixerConfig
from .errors import CheckpointError, NumericsAssumed
from .io import ReadOptions, read, usual_layout, write
from .metadata import Metadata
from .published import list_models

__version__ = "0.1.0"

__all__ = [
    "VARIANTS",
    "Changes",
    "Checkpoint",
    "CheckpointError",
    "Metadata",
    "MixerConfig",
    "NumericsAssumed",
    "ReadOptions",
    "__version__",
    "compare_files",
    "convert_file",
    "inspect_file",
    "list_models",
    "read",
    "usual_layout",
    "write",
]
