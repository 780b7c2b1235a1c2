"""Exported programs as implementations: an .onnx of anybody's, and what `mixer_jax export` wrote."""

__all__ = ["PACKAGES", "PROGRAMS", "dtype_of", "facts_of", "open_program"]

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

    return stablehlo.facts_of(path)[0] if name == "stablehlo" else pt2.facts_of(path)


def dtype_of(name: str, path: str) -> str:
    """What a program computes in. Raises CheckpointError for a file that is none."""
    if (facts := facts_of(name, path)) is not None:
        return facts.options.dtype
    from ..export.onnx_program import Session

    return Session(path).dtype


def open_program(name: str, path: str, checkpoint: Checkpoint) -> Run:
    """A program that takes the images of a checkpoint and gives its logits, or features where it has no head.

    One of uint8 pixels is given the nearest ones. The hook sees every operation where an .onnx names them, or shows them by
    its structure, and else none. Raises CheckpointError for a program of another network or of another output.
    """
    config = checkpoint.config
    if name in ("onnx", "openvino"):
        from ..export.onnx_program import Session

        session = Session(path)
        session.require_fits(config, "logits" if config.num_classes else "features")
        facts, compute = session.facts, session.run if name == "onnx" else _openvino(session)
        operations: Any = session.operations if name == "onnx" else None
    else:
        from ..export.formats import opened

        program = opened(path)
        facts, compute, operations = program.facts, program.run, None
        if program.config.image_size != config.image_size or program.config.num_classes != config.num_classes:
            raise CheckpointError(f"{path}: is of another network: {_sizes(program.config)}, wanted {_sizes(config)}")
    if facts is not None:
        _require_comparable(facts, config, path)

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


def _require_comparable(facts: "Facts", config: MixerConfig, path: str) -> None:
    wanted = "logits" if config.num_classes else "features"
    if facts.output != wanted:
        raise CheckpointError(
            f"{path}: gives {facts.output}, and the checkpoint {wanted}: compare an export that gives {wanted}"
            + ("" if wanted == "features" else ", or a checkpoint without head" * (facts.output == "features"))
        )


def _openvino(session: Any) -> Callable[[np.ndarray], np.ndarray]:
    """The same file in OpenVINO on the CPU, in float32 where its own default may be bfloat16."""
    try:
        import openvino
    except ModuleNotFoundError:
        raise ImportError("running .onnx by OpenVINO needs it: pip install 'mixer-jax[openvino]'") from None
    model = openvino.Core().compile_model(str(session.path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda images: np.array(model(session.prepared(images))[0])


def _sizes(config: MixerConfig) -> str:
    return f"images of {config.image_size[0]}x{config.image_size[1]} and {config.num_classes} classes"
