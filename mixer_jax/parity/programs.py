"""Exported programs as implementations: an .onnx of anybody's, and what `mixer_jax export` wrote."""

__all__ = ["PACKAGES", "PROGRAMS", "device_of", "dtype_of", "facts_of", "open_program"]

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from convert import Checkpoint, CheckpointError, MixerConfig

from .numpy_model import Hook

if TYPE_CHECKING:
    from ..export.program import Facts

# What runs each of them.
PACKAGES = {"onnx": ("onnxruntime",), "openvino": ("openvino",), "stablehlo": ("jax", "jaxlib"), "pt2": ("torch",)}
PROGRAMS = tuple(PACKAGES)
Run = Callable[[np.ndarray, Hook | None], np.ndarray]


def facts_of(name: str, path: str) -> "Facts | None":
    """What a program says of itself; None for somebody else's .onnx. Raises CheckpointError for a file that is none."""
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: no such file")
    if name in ("onnx", "openvino"):
        from ..export.onnx_program import Session

        return Session(path).facts
    from ..export import pt2, stablehlo

    return stablehlo.facts_of(path) if name == "stablehlo" else pt2.facts_of(path)


def device_of(name: str) -> str:
    """Where a program runs: on JAX's first device, others on the CPU."""
    if name != "stablehlo":
        return "cpu"
    import jax

    return jax.default_backend()


def dtype_of(name: str, path: str) -> str:
    """What a program computes in. Raises CheckpointError for a file that is none."""
    if name in ("onnx", "openvino"):
        from ..export.onnx_program import Session

        return Session(path).dtype
    facts = facts_of(name, path)
    assert facts is not None
    return facts.options.dtype


def open_program(name: str, path: str, checkpoint: Checkpoint) -> Run:
    """A program that takes the images of a checkpoint and gives its logits, or features where it has no head.

    One of uint8 pixels is given the nearest ones. The hook sees every operation where an .onnx names them, or shows them by
    its structure, and else none. Raises CheckpointError for a program of another network or of another output.
    """
    config = checkpoint.config
    if name in ("onnx", "openvino"):
        from ..export.onnx_program import Session

        session = Session(path)
        facts, compute = session.facts, session.run if name == "onnx" else _openvino(session)
        _require_comparable(facts, config, path)
        session.require_fits(config, "logits" if config.num_classes else "features")
        operations: Any = session.operations if name == "onnx" else None
    else:
        from ..export.formats import opened

        program = opened(path)
        facts, compute, operations = program.facts, program.run, None
        _require_comparable(facts, config, path)
        if _sizes(program.config) != _sizes(config):
            raise CheckpointError(f"{path}: is of another network: {_sizes(program.config)}, wanted {_sizes(config)}")

    def run(images: np.ndarray, hook: Hook | None) -> np.ndarray:
        if facts is not None and facts.options.uint8:
            images = facts.pixels(images)
        else:
            images = images.astype("float64" if facts and facts.input_dtype == "float64" else np.float32)
        outputs = compute(images).astype(np.float64)
        compute(np.concatenate([images, images[:1]]))  # a batch that is frozen shows at another size
        if hook is not None and operations is not None:
            for operation, values in operations(images, config).items():
                hook(operation, values.astype(np.float64))
        return outputs

    return run


def _require_comparable(facts: "Facts | None", config: MixerConfig, path: str) -> None:
    """Raise CheckpointError for a program that says it gives something else than the checkpoint."""
    wanted = "logits" if config.num_classes else "features"
    if facts is not None and facts.output != wanted:
        remedy = f"compare an export that gives {wanted}"
        if facts.output == "features":
            remedy += ", or a checkpoint without head"
        raise CheckpointError(f"{path}: gives {facts.output}, and the checkpoint {wanted}: {remedy}")


def _openvino(session: Any) -> Callable[[np.ndarray], np.ndarray]:
    """The same file in OpenVINO on the CPU, in float32 where its own default may be bfloat16."""
    try:
        import openvino
    except ModuleNotFoundError:
        raise ImportError("running .onnx by OpenVINO needs it: pip install 'mixer-jax[openvino]'") from None
    try:
        model = openvino.Core().compile_model(str(session.path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    except RuntimeError as error:
        raise CheckpointError(f"{session.path}: OpenVINO does not open it: {_cause(error)}") from None

    def run(images: np.ndarray) -> np.ndarray:
        try:
            outputs = np.array(model(session.prepared(images))[0])
        except RuntimeError as error:
            raise CheckpointError(
                f"{session.path}: OpenVINO does not compute {len(images)} images, as with a fixed batch: {_cause(error)}"
            ) from None
        if len(outputs) != len(images):
            raise CheckpointError(f"{session.path}: gives {len(outputs)} rows for {len(images)} images: its batch is fixed")
        return outputs

    return run


def _cause(error: RuntimeError) -> str:
    """The last line of OpenVINO's message; those before it say where in its sources."""
    return str(error).strip().rpartition("\n")[2]


def _sizes(config: MixerConfig) -> str:
    height, width = config.image_size
    return f"images of {height}x{width} pixels and {config.in_channels} channels, and {config.num_classes} classes"
