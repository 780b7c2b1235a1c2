"""MLP-Mixer (Tolstikhin et al. 2021) in JAX with the released weights, mirrored in PyTorch.

Importing this imports neither jax nor torch: every public name is looked up when it is first used. For PyTorch the same is
in `mixer_jax.torch_model` (the model) and `mixer_jax.torch_pretrained` (load and save).
"""

import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any


def _require_own_convert() -> None:
    """Raise ImportError where a file of somebody else's, such as one beside the script, has the name of our package."""
    spec, own = importlib.util.find_spec("convert"), Path(__file__).resolve().parent.parent / "convert"
    if spec is None or spec.origin is None or Path(spec.origin).resolve().parent != own:
        raise ImportError(
            f"mixer_jax needs its own package `convert`, in {own}, and Python finds {spec and spec.origin} by that name: the "
            "name is taken, so give that file another"
        )


_require_own_convert()

from convert import VARIANTS, CheckpointError, MixerConfig, __version__, list_models  # noqa: E402

if TYPE_CHECKING:
    from .commands.evaluate import evaluate as evaluate
    from .commands.predict import predict as predict
    from .inference import compiled as compiled
    from .model import MlpMixer as MlpMixer
    from .preprocess import prepare as prepare
    from .pretrained import load as load
    from .pretrained import save as save

_HOMES = {
    "MlpMixer": ".model",
    "compiled": ".inference",
    "evaluate": ".commands.evaluate",
    "load": ".pretrained",
    "predict": ".commands.predict",
    "prepare": ".preprocess",
    "save": ".pretrained",
}

__all__ = [
    "VARIANTS",
    "CheckpointError",
    "MixerConfig",
    "MlpMixer",
    "__version__",
    "compiled",
    "evaluate",
    "list_models",
    "load",
    "predict",
    "prepare",
    "save",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
