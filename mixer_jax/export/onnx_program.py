"""A Mixer as an .onnx file: written with the package onnx, run by ONNX Runtime without it."""

__all__ = ["Session", "opened", "write"]

import hashlib
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange

from convert import Checkpoint, CheckpointError, MixerConfig
from convert.atomic import data_name
from convert.errors import first_line

from .onnx_names import operations_of, shapes_of, values_of
from .program import ExportOptions, Facts, Program

KEY = "mixer_jax"
INPUT_DTYPES = {"tensor(float)": "float32", "tensor(double)": "float64", "tensor(float16)": "float16", "tensor(uint8)": "uint8"}
DTYPES = ("float32", "float16")
INLINE_BYTES = 10**9  # more weights go to a file beside the graph; a protobuf message cannot have 2 GiB


def write(path: Path, checkpoint: Checkpoint, options: ExportOptions) -> None:
    """Write the graph, and above 1 GB the weights beside it as `NAME.onnx.DIGEST.data`. Raises ImportError without onnx."""
    try:
        import onnx
    except ModuleNotFoundError:
        raise ImportError("writing .onnx needs onnx: pip install 'mixer-jax[onnx]'") from None
    from .onnx_graph import OPSET, graph_of

    if options.dtype not in DTYPES:
        raise CheckpointError(
            f"{path.name}: opset 20 has no convolution that ONNX Runtime computes in {options.dtype}: use --dtype float32 or "
            "float16, or the ending .stablehlo or .pt2"
        )
    facts = Facts.of(checkpoint, options, "onnx")
    graph = graph_of(checkpoint, facts)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=9)
    model.producer_name, model.producer_version = "mixer_jax", facts.versions["mixer-jax"]
    onnx.helper.set_model_props(model, {KEY: facts.to_json()} | _readable(facts))
    _save(model, path)


def _save(model: Any, path: Path) -> None:
    import onnx

    weights = [tensor.raw_data for tensor in model.graph.initializer]
    beside: dict[str, Any] = {}
    if sum(map(len, weights)) > INLINE_BYTES:
        digest = hashlib.sha256()
        for data in weights:
            digest.update(data)
        location = data_name(path.name, digest.hexdigest()[:8])
        beside = {"save_as_external_data": True, "location": location, "size_threshold": 256}
        (path.parent / location).touch()  # with the permissions of other files: onnx would keep them from all but the owner
    del weights
    onnx.save(model, path, **beside)
    onnx.checker.check_model(str(path), full_check=True)


def _readable(facts: Facts) -> dict[str, str]:
    """For a viewer: what most people look for in the JSON."""
    config, options = facts.config, facts.options
    values = {
        "model": f"Mixer-{config.variant}" if config.variant else "a Mixer of no published size",
        "numerics": f"{config.gelu} GELU, LayerNorm epsilon {config.layer_norm_epsilon:g}, {options.dtype}",
        "input": "uint8 pixels from 0 to 255, RGB" if options.uint8 else f"scaled as by {facts.preprocessing or 'unknown'}",
        "preprocessing": facts.preprocessing or "unknown",
        "fingerprint": facts.fingerprint,
    }
    return values | ({"labels": "\n".join(facts.labels)} if facts.labels else {})


def opened(path: str | os.PathLike[str]) -> Program:
    """A program that `write` wrote. Raises CheckpointError for any other file, ImportError without ONNX Runtime."""
    session = Session(path)
    facts = session.facts
    if facts is None:
        raise CheckpointError(f"{path}: was not exported by mixer_jax: it has no facts about its labels and preprocessing")
    session.require_fits(facts.config, facts.output)
    config = facts.config.replace(num_classes=0) if facts.options.features else facts.config

    def operations(images: np.ndarray) -> dict[str, np.ndarray]:
        return session.operations(images, config)

    return Program(session.source, facts, session.run, operations)


class Session:
    """An .onnx file of anybody's in ONNX Runtime on the CPU, with one input of images and one output (b, n)."""

    def __init__(self, path: str | os.PathLike[str]):
        self.source = str(path)
        self.path = Path(path)
        if not self.path.is_file():
            raise CheckpointError(f"{path}: no such file")
        self._session = self._opened(str(path))
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        if (len(inputs), len(outputs)) != (1, 1):
            raise CheckpointError(f"{path}: has {len(inputs)} inputs and {len(outputs)} outputs, and a Mixer one of each")
        self._input = inputs[0]
        kind = self._input.type
        if kind not in INPUT_DTYPES:
            raise CheckpointError(f"{path}: takes a {kind}, and images are one of {', '.join(INPUT_DTYPES)}")
        if INPUT_DTYPES[kind] == "uint8" and self.facts is None:
            raise CheckpointError(f"{path}: takes uint8 pixels, and does not say how it scales them")
        self._named: Any = None

    def _opened(self, model: str | bytes) -> Any:
        try:
            import onnxruntime
        except ModuleNotFoundError:
            raise ImportError("running .onnx needs ONNX Runtime: pip install 'mixer-jax[onnx]'") from None
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors are raised as well
        folder = str(self.path.parent.resolve())
        if isinstance(model, bytes):
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        try:
            return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's own classes, which have no base but Exception
            raise CheckpointError(f"{self.source}: ONNX Runtime does not open it: {first_line(error)}") from None

    @cached_property
    def facts(self) -> Facts | None:
        """None in somebody else's file."""
        text = self._session.get_modelmeta().custom_metadata_map.get(KEY)
        return None if text is None else Facts.from_json(text, self.source)

    @property
    def dtype(self) -> str:
        """That of the weights by our facts, else that of the input."""
        if self.facts is not None:
            return self.facts.options.dtype
        return INPUT_DTYPES[self._input.type]

    def require_fits(self, config: MixerConfig, output: str = "logits") -> None:
        """Raise CheckpointError unless images of this config go in and its logits, scores or features come out."""
        channels, size = config.in_channels, config.image_size
        width = config.hidden_dim if output == "features" or not config.num_classes else config.num_classes
        images, result = self._input.shape, self._session.get_outputs()[0].shape
        fits = any(_may_be(images[1:], axes) for axes in ((channels, *size), (*size, channels)))
        if not fits or not _may_be(result[1:], (width,)):
            raise CheckpointError(
                f"{self.source}: is of another network: it takes {_shape(images)} and gives {_shape(result)}, "
                f"wanted (b, {channels}, {size[0]}, {size[1]}) and (b, {width})"
            )

    def run(self, images: np.ndarray) -> np.ndarray:
        """Images (b, h, w, c) -> the output (b, n), in float32 or better."""
        return _wide(self._outputs(self._session, images)[0])

    def _outputs(self, session: Any, images: np.ndarray) -> list[np.ndarray]:
        fixed = self._input.shape[0]
        if isinstance(fixed, int) and fixed != len(images):
            raise CheckpointError(f"{self.source}: its batch is fixed at {fixed}, and {len(images)} images were given")
        try:
            outputs = session.run(None, {self._input.name: self.prepared(images)})
        except Exception as error:
            raise CheckpointError(
                f"{self.source}: does not compute {len(images)} images, as with a batch frozen inside: {first_line(error)}"
            ) from None
        if len(outputs[0]) != len(images):
            raise CheckpointError(f"{self.source}: gives {len(outputs[0])} rows for {len(images)} images: its batch is frozen")
        return outputs

    def prepared(self, images: np.ndarray) -> np.ndarray:
        """Images (b, h, w, c) in the axes and dtype of the input."""
        dtype = INPUT_DTYPES[self._input.type]
        shape = self._input.shape[1:]
        channels_last = _may_be(shape, images.shape[1:]) and not _may_be(shape, np.roll(images.shape[1:], 1).tolist())
        return np.ascontiguousarray(images if channels_last else rearrange(images, "b h w c -> b c h w"), dtype)

    def operations(self, images: np.ndarray, config: MixerConfig) -> dict[str, np.ndarray]:
        """All results by parity's names; none where the graph does not show which they are, or without the package onnx."""
        session = self._with_operations(config)
        if session is None:
            return {}
        results = self._outputs(session, images)
        if [result.shape[1:] for result in results] != shapes_of(config):
            return {}
        return dict(zip(operations_of(config), map(_wide, results)))

    def _with_operations(self, config: MixerConfig) -> Any:
        """A session whose outputs are the results of all operations."""
        if self._named is None:
            try:
                import onnx
            except ModuleNotFoundError:
                return None
            model = onnx.load(self.path, load_external_data=False)
            names = values_of(model.graph, config)
            if names is None:
                return None
            del model.graph.output[:]
            model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(names))
            self._named = self._opened(model.SerializeToString())
        return self._named


def _may_be(shape: Sequence[int | str | None], wanted: Sequence[int]) -> bool:
    """Whether a shape, in which names and None stand for any length, can be the wanted one."""
    return len(shape) == len(wanted) and all(not isinstance(n, int) or n == m for n, m in zip(shape, wanted))


def _wide(values: np.ndarray) -> np.ndarray:
    return values if values.dtype == np.float64 else values.astype(np.float32)


def _shape(shape: Any) -> str:
    return f"({', '.join(map(str, shape))})"
