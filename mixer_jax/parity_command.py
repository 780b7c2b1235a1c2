"""The command `parity`: what it is asked to compare, what its figures depend on, and the report in its three forms."""

import argparse
import json
import os
import platform
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from convert import Checkpoint, CheckpointError, MixerConfig
from convert.cli import read_asked
from convert.files import check_writable, whole_or_nothing
from convert.identity import fingerprint

from . import precision
from .parity import agreement, compare
from .report import Findings, as_dict, as_html, as_text
from .sides import Run, Side

FLAX, TORCH = Side("flax"), Side("torch")
EXTRAS = ("explain", "exact", "predict")
PATIENCE = 2.0  # seconds until a terminal is told what goes on


def run(arguments: argparse.Namespace) -> bool:
    """Whether the verdict is yes."""
    page: Path | None = arguments.html
    if page:
        check_writable(page, force=arguments.force)
    checkpoint = read_asked(arguments)
    if arguments.self_test:
        return _self_test(checkpoint, arguments)
    a, b = arguments.a or FLAX, arguments.b or TORCH
    if arguments.exact:
        a, b = replace(a, dtype="float64"), replace(b, dtype="float64")
    other, names = None, Path(arguments.source).name
    if arguments.other:
        other = read_asked(argparse.Namespace(**vars(arguments) | {"source": arguments.other}))
        names = f"{names} and {Path(arguments.other).name}"
    images, said = _images(arguments, checkpoint)
    other_images = None
    if other and arguments.images and not arguments.preprocess:  # each side as its own file says
        other_images, other_said = _images(arguments, other)
        said = said if said == other_said else f"{said}; for the second side {other_said}"
    found = findings(
        checkpoint,
        images,
        a,
        b,
        other=other,
        other_images=other_images,
        source=names,
        said=said,
        draws=arguments.draws,
        seed=arguments.seed,
        extras=[name for name in EXTRAS if getattr(arguments, name)],
    )
    print(json.dumps(as_dict(found)) if arguments.json else as_text(found))
    if page:
        write_page(page, as_html(found), force=arguments.force)
    return found.passed


def findings(
    checkpoint: Checkpoint,
    images: np.ndarray,
    a: Side,
    b: Side,
    *,
    other: Checkpoint | None = None,
    other_images: np.ndarray | None = None,
    source: str = "these weights",
    said: str = "given",
    draws: int = precision.DRAWS,
    seed: int = 0,
    extras: Sequence[str] = (),
) -> Findings:
    """`compare`, with all that its figures depend on and what EXTRAS are asked for. `said` tells which images these are.

    Raises CheckpointError where a device is not there, where two files take different images, and where logits prove nothing.
    """
    second = other or checkpoint
    shapes = [(*each.config.image_size, each.config.in_channels) for each in (checkpoint, second)]
    if shapes[0] != shapes[1]:
        raise CheckpointError(f"{source}: one takes images of {shapes[0]} and the other of {shapes[1]}: no input is common")
    _require_room(checkpoint.config, len(images), draws)
    explanation = exactness = predicted = None
    with _Stages() as stage:
        runs, outputs = [], []
        seen = images if other_images is None else other_images
        for side, weights, inputs in ((a, checkpoint, images), (b, second, seen)):
            stage(f"loading {side}")
            runs.append(side.open(weights))
            stage(f"running {side}")
            outputs.append(runs[-1](inputs, None))
        try:
            agreement(*outputs)  # before the long part
        except ValueError as error:
            raise CheckpointError(f"{source}: {error}") from None
        first, last = (stage.watched(*each) for each in zip(runs, outputs, (a, b)))
        report = compare(
            checkpoint, images, a, b, other=other, other_images=other_images, draws=draws, seed=seed, runs=(first, last)
        )
        if "explain" in extras:
            from .explain import explain

            stage("switching one choice after the other")
            explanation = explain(report, checkpoint, images, other=other, other_images=other_images)
        if "exact" in extras:
            from .explain import exact

            exactness = exact(report)
        if "predict" in extras:
            from .explain import predictions

            stage("predicting other devices")
            predicted = predictions(checkpoint, images, draws=draws, seed=seed)
        stage("taking fingerprints")
        about: dict[str, dict[str, Any]] = {"weights": _weights(checkpoint)}
        if other is not None:
            about["second weights"] = _weights(other)
        budget = f"{draws} draws, seed {seed}; at least {precision.LANES} partial sums in a sum over channels"
        about["input"] = {"images": f"{len(images)}, {said}", "budget": budget}
        about |= {"first side": _side(a), "second side": _side(b), "versions": _versions(a, b), "machine": _machine()}
    stated = checkpoint.metadata.differences(second.metadata, ("gelu", "layer_norm_epsilon"))
    return Findings(report, source, about, explanation, exactness, predicted, stated)


def _require_room(config: MixerConfig, count: int, draws: int) -> None:
    """Every operation's result is kept for both sides, in float64, and the largest a few times for every draw."""
    tokens, hidden = config.num_tokens, config.hidden_dim
    widest = max(hidden * config.tokens_mlp_dim, tokens * config.channels_mlp_dim, tokens * hidden)
    block = 6 * tokens * hidden + 2 * hidden * config.tokens_mlp_dim + 2 * tokens * config.channels_mlp_dim
    image = 8 * (2 * config.num_blocks * block + 5 * (1 + 2 * draws) * widest)
    if count > (fits := _memory() // image):
        raise CheckpointError(
            f"{count} images need {count * image / 2**30:.1f} GiB for what every operation gives, and the machine has "
            f"{_memory() / 2**30:.1f}: {fits} at most"
        )


def _memory() -> int:
    """Bytes of the machine, where it tells."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return sys.maxsize


def noise(config: MixerConfig, count: int, seed: int) -> np.ndarray:
    """Images of uniform noise in [-1, 1]."""
    shape = (count, *config.image_size, config.in_channels)
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def write_page(path: Path, text: str, *, force: bool) -> None:
    data = text.encode()
    with whole_or_nothing(path, size=len(data), force=force) as written:
        written.write_bytes(data)


def _self_test(checkpoint: Checkpoint, arguments: argparse.Namespace) -> bool:
    from .self_test import FLAX_IN_FLOAT64, lines, passed, self_test

    side = arguments.a or FLAX_IN_FLOAT64
    with _Stages() as stage:
        stage(f"every identity on {side}")
        try:
            results = self_test(checkpoint, side=side, count=arguments.count, seed=arguments.seed, draws=arguments.draws)
        except ValueError as error:
            raise CheckpointError(f"{arguments.source}: {error}") from None
    if arguments.json:
        print(json.dumps({"passed": passed(results), "side": str(side), "identities": [asdict(each) for each in results]}))
    else:
        print(f"identities of {Path(arguments.source).name} on {side}\n{lines(results)}")
    return passed(results)


def _images(arguments: argparse.Namespace, checkpoint: Checkpoint) -> tuple[np.ndarray, str]:
    """The input asked for, and what it is."""
    if not arguments.images:
        return noise(checkpoint.config, arguments.count, arguments.seed), f"of seeded noise, seed {arguments.seed}"
    from .predict import images_asked
    from .preprocess import RECIPES, ImageError, prepare

    recipe = arguments.preprocess or checkpoint.metadata.preprocessing
    if recipe is None:
        raise CheckpointError(
            f"{arguments.source}: does not say how an image becomes its input: say --preprocess, one of {', '.join(RECIPES)}"
        )
    paths, empty = images_asked(arguments.images)
    if empty:
        raise CheckpointError("\n".join(f"{outcome.path}: {outcome.error}" for outcome in empty))
    images = []
    for path in paths:
        try:
            images.append(prepare(path, checkpoint.config, recipe))
        except ImageError as error:
            raise CheckpointError(f"{path}: {error}") from None
    if not images:
        raise CheckpointError("no images: standard input lists none")
    return np.stack(images), f"prepared by {recipe}"


class _Stages:
    """Tells a terminal what goes on, where it goes on for long. Call it with the name of each stage."""

    def __init__(self) -> None:
        self._timer: threading.Timer | None = None

    def __enter__(self) -> "_Stages":
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer:
            self._timer.cancel()

    def __call__(self, stage: str) -> None:
        self.__exit__()
        if sys.stderr.isatty():
            self._timer = threading.Timer(PATIENCE, lambda: print(f"{stage} ...", file=sys.stderr))
            self._timer.daemon = True
            self._timer.start()

    def watched(self, run: Run, output: np.ndarray, side: Side) -> Run:
        """A run that has been made once without a tap, and names the stages of the rest of `compare`."""

        def watched(images: np.ndarray, tap: Any) -> np.ndarray:
            if tap is None:
                return output
            self(f"recording every operation of {side}")
            found = run(images, tap)
            self("computing the budget and every operation's own error in float64")
            return found

        return watched


def _weights(checkpoint: Checkpoint) -> dict[str, Any]:
    config = checkpoint.config
    return {
        "file": Path(checkpoint.source).name,
        "fingerprint": fingerprint(checkpoint.arrays, checkpoint.layout),
        "model": f"Mixer-{config.variant or 'of other sizes'}, {config.num_classes or 'no'} classes",
        "dtype": checkpoint.dtype.name,
        "numerics": f"{config.gelu} GELU, LayerNorm epsilon {config.layer_norm_epsilon:g}",
    }


def _side(side: Side) -> dict[str, Any]:
    """Where a side ran and what it was set to."""
    entries = {"side": str(side), "device": side.device_name(), "precision": " or ".join(map(str, side.precisions))}
    if side.name == "flax":
        import jax

        entries["jax_default_matmul_precision"] = str(getattr(jax.config, "jax_default_matmul_precision", None))
        entries["jax_default_backend"] = jax.default_backend()
    elif side.name != "referee":
        import torch

        from .torch_model import switches

        with switches(side.precision):
            entries["torch.backends.cuda.matmul.fp32_precision"] = torch.backends.cuda.matmul.fp32_precision
            entries["torch.backends.cudnn.conv.fp32_precision"] = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
        entries["threads"] = str(torch.get_num_threads())
    return entries


def _versions(*sides: Side) -> dict[str, str]:
    packages = {"flax": ("jax", "jaxlib", "flax"), "torch": ("torch",), "timm": ("torch", "timm"), "referee": ()}
    names = ["mixer-jax", "numpy", *dict.fromkeys(name for side in sides for name in packages[side.name])]
    return {"Python": platform.python_version()} | {name: _version(name) for name in names}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _machine() -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    told = ("XLA_FLAGS", "JAX_PLATFORMS", "NVIDIA_TF32_OVERRIDE", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
    switches = {name: os.environ[name] for name in told if name in os.environ}
    return {"system": platform.platform(), "processor": _processor(), "cores": cores} | switches


def _processor() -> str:
    """Its name, where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
