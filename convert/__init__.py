"""What a Mixer checkpoint is: its sizes, numerics, names, axes and files. No model, and neither jax nor torch."""

from .checkpoint import Checkpoint, Metadata, read, usual_layout, write
from .config import VARIANTS, MixerConfig
from .errors import CheckpointError, NumericsAssumed
from .published import list_models

__version__ = "0.1.0"

__all__ = [
    "VARIANTS",
    "Checkpoint",
    "CheckpointError",
    "Metadata",
    "MixerConfig",
    "NumericsAssumed",
    "__version__",
    "list_models",
    "read",
    "usual_layout",
    "write",
]
