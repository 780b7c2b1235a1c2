"""A Mixer as a .stablehlo file: one program for cpu, cuda and tpu, run by JAX alone, with the weights beside it.

It is a zip file of `facts.json`, `program.bin` (what `jax.export` serialises: StableHLO with a batch of any size, precision
"highest" at every matmul) and `weights.safetensors`, whose arrays by name are the program's first argument; images are the
second.
"""

__all__ = ["opened", "write"]

import contextlib
import json
import os
import re
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert import Checkpoint, CheckpointError
from convert.errors import first_line
from convert.formats import safetensors

from .archive import FOREIGN, Archive
from .program import ExportOptions, Facts, Program, wide

PLATFORMS = ("cpu", "cuda", "tpu")
# What leaves a program; JAX's own assertion about the batch does not.
OUTSIDE = re.compile(r"custom_call(?! @shape_assertion\()|stablehlo\.(infeed|outfeed|send|recv)\b")


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


def facts_of(path: str | os.PathLike[str]) -> Facts:
    """The facts of a file. Raises CheckpointError for any that `write` did not write."""
    return _facts_and_convention(path, _archive(path))[0]


def _archive(path: str | os.PathLike[str]) -> Archive:
    try:
        return Archive(path)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {FOREIGN}: {error}") from None


def _facts_and_convention(path: str | os.PathLike[str], archive: Archive) -> tuple[Facts, int]:
    """And the version of JAX's calling convention."""
    try:
        about = json.loads(archive.read("facts.json"))
        convention = int(about.pop("calling_convention_version"))
        about = {name: value for name, value in about.items() if name not in ("platforms", "precision")}
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {FOREIGN}: {error}") from None
    except Exception as error:  # JSON can be anything
        raise CheckpointError(f"{path}: {FOREIGN}: {type(error).__name__}: {error}") from None
    return Facts.from_json(json.dumps(about), str(path)), convention


def opened(path: str | os.PathLike[str]) -> Program:
    """A program that `write` wrote, on JAX's first device. Raises CheckpointError for any other, or one of another JAX."""
    import jax

    archive = _archive(path)
    facts, convention = _facts_and_convention(path, archive)
    try:
        program = archive.read("program.bin")
        _require_window(facts, convention, program)
        content = safetensors.read_open(archive.window("weights.safetensors"))
        if not content.verified:
            raise CheckpointError("its weights have no checksums, so export did not write them")
        weights: Any = {name: np.asarray(array) for name, array in content.arrays.items()}
        exported = _deserialised(program, facts)
        _require_one_model(exported, weights, facts)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    with _precise(facts.options.dtype):
        weights = jax.device_put(weights)
    call = jax.jit(exported.call)

    def run(images: np.ndarray) -> np.ndarray:
        with _precise(facts.options.dtype):
            return np.asarray(call(weights, np.asarray(images, facts.input_dtype)))

    return Program(str(path), facts, run)


def _require_window(facts: Facts, convention: int, program: bytes) -> None:
    """Raise CheckpointError for a program of another JAX whose calling convention or StableHLO this one does not read."""
    from jax import __version__, export
    from jax.extend.mlir.dialects import stablehlo

    window = export.minimum_supported_calling_convention_version, export.maximum_supported_calling_convention_version
    written = re.search(rb"StableHLO_v(\d+)\.(\d+)\.(\d+)", program)
    versions = [stablehlo.get_minimum_version(), stablehlo.get_current_version()]
    oldest, newest = (tuple(map(int, version.split("."))) for version in versions)
    fault = ""
    if not window[0] <= convention <= window[1]:
        fault = f"calling convention {convention}, and this jax {__version__} runs {window[0]} to {window[1]}"
    elif written and not oldest <= tuple(map(int, written.groups())) <= newest:
        found = b".".join(written.groups()).decode()
        fault = f"StableHLO {found}, and this jax {__version__} reads {versions[0]} to {versions[1]}"
    if fault:
        remedy = "export it again with this jax, or run it with one nearer to that"
        raise CheckpointError(f"jax {facts.versions.get('jax')} wrote it with {fault}: {remedy}")


def _deserialised(program: bytes, facts: Facts) -> Any:
    """A `jax.export.Exported` that this JAX reads whole and that calls nothing outside of itself."""
    from jax import __version__, export

    try:
        exported = export.deserialize(bytearray(program))
        text = exported.mlir_module()
    except Exception as error:  # FlatBuffers and MLIR raise nearly anything
        writer = f"jax {facts.versions.get('jax')} wrote its program"
        raise CheckpointError(f"{writer}, and this jax {__version__} does not read it: {first_line(error)}") from None
    if call := OUTSIDE.search(text):
        raise CheckpointError(f"is not run, since its program has a {text[call.start() : call.start() + 60].splitlines()[0]}")
    return exported


def _require_one_model(exported: Any, weights: Mapping[str, np.ndarray], facts: Facts) -> None:
    """Raise CheckpointError unless a program takes these weights and the images of the facts, and gives their output."""
    import jax

    config = facts.config
    wanted = {name: f"{array.dtype.name} {array.shape}" for name, array in weights.items()}
    wanted["images"] = f"{facts.input_dtype} {(*config.image_size, config.in_channels)}"
    wanted["output"] = f"{wide(facts.options.dtype)} {(facts.output_width,)}"
    try:
        (shapes, images), _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
        (output,) = exported.out_avals
        found = {name: f"{aval.dtype.name} {aval.shape}" for name, aval in shapes.items()}
    except (ValueError, TypeError, AttributeError):
        raise CheckpointError("its program is not one of weights and images") from None
    found |= {name: f"{aval.dtype.name} {aval.shape[1:]}" for name, aval in (("images", images), ("output", output))}
    if wrong := [name for name in wanted | found if wanted.get(name) != found.get(name)]:
        name, inside, beside = wrong[0], found.get(wrong[0], "absent"), wanted.get(wrong[0], "absent")
        raise CheckpointError(f"its parts are not of one model: {name} is {inside} in the program and {beside} beside it")


def _precise(dtype: str) -> Any:
    """JAX's 64-bit mode where a program needs it."""
    import jax

    return jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext()
