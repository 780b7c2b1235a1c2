"""What a Mixer checkpoint is: its sizes, numerics, names, axes and files. No model, and neither jax nor torch."""

from .checkpoint import Checkpoint, Metadata, read, usual_layout, write
from .config import VARIANTS, MixerConfig
from .errors import CheckpointError

__all__ = ["VARIANTS", "Checkpoint", "CheckpointError", "Metadata", "MixerConfig", "read", "usual_layout", "write"]
