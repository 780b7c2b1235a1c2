"""A Mixer as a .stablehlo file: one program for cpu, cuda and tpu, run by JAX alone, with the weights beside it.

It is a zip file of `facts.json`, `program.bin` (what `jax.export` serialises: StableHLO with a batch of any size, precision
"highest" at every matmul) and `weights.safetensors`, whose arrays by name are the program's first argument; images are the
second.
"""

__all__ = ["opened", "write"]

import contextlib
import json
import os
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from convert import Checkpoint, CheckpointError
from convert.formats import safetensors

from .program import ExportOptions, Facts, Program

PLATFORMS = ("cpu", "cuda", "tpu")


def write(path: Path, checkpoint: Checkpoint, options: ExportOptions) -> None:
    """Write program, weights and facts. Raises CheckpointError for what the options need and the checkpoint lacks."""
    facts = Facts.of(checkpoint, options, "jax", "jaxlib")
    with _precise(options.dtype):
        exported, weights = _exported(checkpoint, facts)
    convention = {"calling_convention_version": exported.calling_convention_version}
    about = json.loads(facts.to_json()) | {"platforms": PLATFORMS, "precision": "highest"} | convention
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, zipfile.ZipFile(path, "w") as file:
        safetensors.write(Path(folder) / "weights", weights, {})
        file.writestr("facts.json", json.dumps(about))
        file.writestr("program.bin", exported.serialize())
        file.write(Path(folder) / "weights", "weights.safetensors")


def _exported(checkpoint: Checkpoint, facts: Facts) -> tuple[Any, dict[str, Any]]:
    """The program of weights by name and images (b, h, w, c), and the weights, those of each block by themselves."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from ..pretrained import load

    options, config = facts.options, facts.config
    checkpoint = checkpoint.without_head() if options.features else checkpoint
    model = load(checkpoint, param_dtype=options.dtype, dtype=options.dtype, precision="highest").unstacked()
    model.eval()
    graphdef, state = nnx.split(model)
    flat = {"/".join(map(str, path)): (path, variable) for path, variable in nnx.to_flat_state(state)}
    scaling = facts.scaling() if options.uint8 else None

    def forward(weights: dict[str, jax.Array], images: jax.Array) -> jax.Array:
        params = [(path, variable.replace(weights[name])) for name, (path, variable) in flat.items()]
        if scaling is not None:
            factor, offset = (jnp.asarray(values, jnp.promote_types(options.dtype, jnp.float32)) for values in scaling)
            images = images.astype(factor.dtype) * factor + offset
        outputs = nnx.merge(graphdef, nnx.from_flat_state(params))(images)
        return jax.nn.softmax(outputs) if options.softmax else outputs

    weights = {name: np.asarray(variable[...]) for name, (_, variable) in flat.items()}
    (batch,) = jax.export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((batch, *config.image_size, config.in_channels), facts.input_dtype)
    shapes = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in weights.items()}
    return jax.export.export(jax.jit(forward), platforms=PLATFORMS)(shapes, images), weights


def facts_of(path: str | os.PathLike[str]) -> tuple[Facts, int]:
    """The facts of a file, and the version of JAX's calling convention. Raises CheckpointError for any other file."""
    try:
        with zipfile.ZipFile(path) as file:
            about = json.loads(file.read("facts.json"))
        convention = int(about.pop("calling_convention_version"))
        about = {name: value for name, value in about.items() if name not in ("platforms", "precision")}
    except (OSError, zipfile.BadZipFile, KeyError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: is not a program that mixer_jax exported ({type(error).__name__}: {error})") from None
    return Facts.from_json(json.dumps(about), str(path)), convention


def opened(path: str | os.PathLike[str]) -> Program:
    """A program that `write` wrote, on JAX's first device. Raises CheckpointError for any other, or one of another JAX."""
    import jax
    from jax import export

    facts, convention = facts_of(path)
    oldest, newest = export.minimum_supported_calling_convention_version, export.maximum_supported_calling_convention_version
    if not oldest <= convention <= newest:
        raise CheckpointError(
            f"{path}: jax {facts.versions['jax']} wrote it with calling convention {convention}, and this jax "
            f"{jax.__version__} runs {oldest} to {newest}: export it again with this jax, or run it with one nearer to that"
        )
    with zipfile.ZipFile(path) as file, tempfile.TemporaryDirectory() as folder:
        try:
            exported = export.deserialize(bytearray(file.read("program.bin")))
            arrays = safetensors.read(Path(file.extract("weights.safetensors", folder))).arrays
            weights: Any = {name: np.asarray(array) for name, array in arrays.items()}
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        except Exception as error:  # FlatBuffers and MLIR raise nearly anything
            raise CheckpointError(f"{path}: jax {jax.__version__} does not read its program: {error}") from None
    with _precise(facts.options.dtype):
        weights = jax.device_put(weights)
    call = jax.jit(exported.call)

    def run(images: np.ndarray) -> np.ndarray:
        with _precise(facts.options.dtype):
            return np.asarray(call(weights, np.asarray(images, facts.input_dtype)))

    return Program(str(path), facts, run)


def _precise(dtype: str) -> Any:
    """JAX's 64-bit mode where a program needs it."""
    import jax

    return jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext()
