"""What the figures of a parity report depend on: weights, implementations, versions and the machine."""

__all__ = ["provenance"]

import os
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

from convert import Checkpoint, __version__
from convert.identity import fingerprint

from . import programs
from .comparison import Comparison
from .implementations import Implementation

PACKAGES = {"flax": ("jax", "jaxlib", "flax"), "torch": ("torch",), "timm": ("torch", "timm"), "numpy": ()} | programs.PACKAGES
ENVIRONMENT = ("XLA_FLAGS", "JAX_PLATFORMS", "NVIDIA_TF32_OVERRIDE", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


def provenance(comparison: Comparison, **given: Any) -> dict[str, dict[str, Any]]:
    """Titles of sections, and the entries of each; `given` are those of the input."""
    a, b, (first, second) = comparison.a, comparison.b, comparison.checkpoints
    packages = dict.fromkeys(("numpy", *PACKAGES[a.name], *PACKAGES[b.name]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "weights": _weights(first),
        **({} if second is first else {"weights of b": _weights(second)}),
        "input": given,
        "a": _implementation(a),
        "b": _implementation(b),
        "versions": {"Python": platform.python_version(), "mixer-jax": __version__} | {p: version(p) for p in packages},
        "machine": {"system": platform.platform(), "processor": _processor(), "cores": cores}
        | {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    }


def _weights(checkpoint: Checkpoint) -> dict[str, Any]:
    config = checkpoint.config
    model = f"Mixer-{config.variant}" if config.variant else "a Mixer of no published size"
    return {
        "file": Path(checkpoint.source).name,
        "fingerprint": fingerprint(checkpoint.arrays, checkpoint.layout),
        "model": f"{model}, {config.num_classes or 'no'} classes",
        "dtype": checkpoint.dtype.name,
        "numerics": f"{config.gelu} GELU, LayerNorm epsilon {config.layer_norm_epsilon:g}",
    }


def _implementation(implementation: Implementation) -> dict[str, Any]:
    """Where it ran, how it rounds, and the settings of its library."""
    rounding = " or ".join(map(str, implementation.roundings))
    entries = {"implementation": str(implementation), "device": implementation.device_name(), "rounding": rounding}
    if implementation.name == "flax":
        import jax

        entries["jax_default_matmul_precision"] = str(getattr(jax.config, "jax_default_matmul_precision", None))
        entries["jax_default_backend"] = jax.default_backend()
    elif implementation.name in ("torch", "timm", "pt2"):
        import torch

        from ..torch_model import tf32_switches

        with tf32_switches(implementation.precision):
            entries["torch.backends.cuda.matmul.fp32_precision"] = torch.backends.cuda.matmul.fp32_precision
            entries["torch.backends.cudnn.conv.fp32_precision"] = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
        entries["threads"] = str(torch.get_num_threads())
    return entries


def _processor() -> str:
    """The processor's name, where Linux gives it."""
    try:
        name = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        name = None
    return name[1] if name else platform.processor() or platform.machine()
