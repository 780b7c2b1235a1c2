"""Golden data, small random weights, and the rule for skips: only PyTorch's tests under WITHOUT_TORCH, and those of an absent
device.
"""

import json
import os
import platform
import sys
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import pytest

from convert import MixerConfig

HERE = Path(__file__).parent
WITHOUT_TORCH = bool(os.environ.get("WITHOUT_TORCH"))
SKIPPED: list[str] = []

# For a test that holds of both models.
both = pytest.mark.parametrize("framework", ["flax", pytest.param("torch", marks=pytest.mark.torch)])


# One cache of compiled programs for all processes of the suite, which the next run finds again; `make clean` removes it.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(HERE.parent / "build" / "jax-cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


@pytest.fixture(scope="module")
def unoptimised():
    """XLA without its optimisations, which compiles in a third of the time: for claims that do not depend on rounding."""
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()  # so that no other module runs these programs


def pytest_collection_modifyitems(items):
    for item in items:
        if WITHOUT_TORCH and item.get_closest_marker("torch"):
            item.add_marker(pytest.mark.skip(reason="WITHOUT_TORCH: the PyTorch model stays untested in this row"))


def pytest_runtest_setup(item):
    for marker in item.iter_markers("device"):
        if reason := absent(*marker.args):
            item.user_properties.append(("absent", reason))
            pytest.skip(f"unproved on {':'.join(marker.args)}: {reason}")


@cache
def absent(library: str, device: str) -> str | None:
    """Why this machine has no such device for "flax" or "torch", according to JAX or PyTorch; None where it has one."""
    if (library, device) == ("libtpu", "v5e"):
        supported = sys.platform == "linux" and platform.machine() == "x86_64"
        return None if supported else "libtpu, which compiles for a TPU, is built for Linux on x86-64 alone"
    if (library, device) not in {("flax", "cpu"), ("flax", "gpu"), ("flax", "tpu"), ("torch", "cpu"), ("torch", "gpu")}:
        raise ValueError(f"no such device: {library}:{device}")
    if library == "torch":
        import torch

        return "PyTorch finds no GPU" if device == "gpu" and not torch.cuda.is_available() else None
    import jax

    try:
        return None if jax.devices(device) else "JAX lists none"
    except RuntimeError as error:
        return f"JAX: {error}"


def pytest_runtest_logreport(report):
    allowed = (WITHOUT_TORCH and "torch" in report.keywords) or "absent" in dict(report.user_properties)
    if report.skipped and not allowed:
        SKIPPED.append(report.nodeid)


def pytest_sessionfinish(session):
    if SKIPPED:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    for name in SKIPPED:
        terminalreporter.write_line(f"skipped without leave: {name}", red=True)


@dataclass(frozen=True)
class Golden:
    """One folder of golden data."""

    name: str

    @property
    def weights_file(self) -> Path:
        return HERE / "golden" / self.name / "google.npz"

    @cached_property
    def config(self) -> MixerConfig:
        sizes = json.loads((HERE / "golden" / self.name / "meta.json").read_text())["config"]
        return MixerConfig(
            patch_size=tuple(sizes["patch"]),
            image_size=tuple(sizes["hw"]),
            num_blocks=sizes["blocks"],
            hidden_dim=sizes["hidden"],
            tokens_mlp_dim=sizes["tok"],
            channels_mlp_dim=sizes["ch"],
            num_classes=sizes["classes"],
            in_channels=sizes.get("inch", 3),
        )

    @cached_property
    def weights(self) -> dict[str, np.ndarray]:
        return self.load("google.npz")

    @cached_property
    def outputs(self) -> dict[str, np.ndarray]:
        return self.load("google_outputs.npz")

    @property
    def images(self) -> np.ndarray:
        return self.outputs["images"]

    @property
    def result(self) -> np.ndarray:
        """Logits, or features where there is no head."""
        return self.outputs["f64/logits" if self.config.num_classes else "f64/features"]

    def load(self, file: str) -> dict[str, np.ndarray]:
        with np.load(HERE / "golden" / self.name / file, allow_pickle=False) as data:
            return dict(data)


GOLDENS = {name: Golden(name) for name in ("square", "rectangular", "features")}


@pytest.fixture(params=GOLDENS)
def golden(request) -> Golden:
    return GOLDENS[request.param]


@pytest.fixture
def square() -> Golden:
    return GOLDENS["square"]


TINY = MixerConfig(  # all lengths differ
    patch_size=(2, 3),
    image_size=(8, 15),
    num_blocks=3,
    hidden_dim=7,
    tokens_mlp_dim=11,
    channels_mlp_dim=13,
    num_classes=5,
)


def random_weights(config: MixerConfig, seed: int = 0, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Weights in Google's names, spelled out here since the table of names is under test.

    Kernels are LeCun normal, scales 1 + 0.1 n, biases 0.1 n, sorted by name as Google's files are.
    """
    random = np.random.default_rng(seed)
    arrays = {}

    def dense(name, *shape):
        arrays[f"{name}/kernel"] = random.normal(size=shape) / np.sqrt(np.prod(shape[:-1]))
        arrays[f"{name}/bias"] = 0.1 * random.normal(size=shape[-1])

    def norm(name):
        arrays[f"{name}/scale"] = 1 + 0.1 * random.normal(size=config.hidden_dim)
        arrays[f"{name}/bias"] = 0.1 * random.normal(size=config.hidden_dim)

    dense("stem", *config.patch_size, config.in_channels, config.hidden_dim)
    for i in range(config.num_blocks):
        norm(f"MixerBlock_{i}/LayerNorm_0")
        dense(f"MixerBlock_{i}/token_mixing/Dense_0", config.num_tokens, config.tokens_mlp_dim)
        dense(f"MixerBlock_{i}/token_mixing/Dense_1", config.tokens_mlp_dim, config.num_tokens)
        norm(f"MixerBlock_{i}/LayerNorm_1")
        dense(f"MixerBlock_{i}/channel_mixing/Dense_0", config.hidden_dim, config.channels_mlp_dim)
        dense(f"MixerBlock_{i}/channel_mixing/Dense_1", config.channels_mlp_dim, config.hidden_dim)
    norm("pre_head_layer_norm")
    if config.num_classes:
        dense("head", config.hidden_dim, config.num_classes)
    return {name: arrays[name].astype(dtype) for name in sorted(arrays)}


def random_images(config: MixerConfig, count: int = 2, seed: int = 1, dtype: str = "float32") -> np.ndarray:
    shape = (count, *config.image_size, config.in_channels)
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(dtype)
