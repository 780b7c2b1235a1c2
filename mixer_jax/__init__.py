"""MLP-Mixer (Tolstikhin et al. 2021) in JAX with the released weights, mirrored in PyTorch.

Importing this imports neither jax nor torch: every public name is looked up when it is first used. The PyTorch twin is
the module `mixer_jax.torch_model`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from convert import VARIANTS, CheckpointError, MixerConfig

if TYPE_CHECKING:
    from .inference import compiled as compiled
    from .model import MlpMixer as MlpMixer
    from .preprocess import prepare as prepare
    from .pretrained import load as load
    from .pretrained import save as save

_HOMES = {
    "MlpMixer": ".model",
    "compiled": ".inference",
    "load": ".pretrained",
    "prepare": ".preprocess",
    "save": ".pretrained",
}

__all__ = ["VARIANTS", "CheckpointError", "MixerConfig", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
