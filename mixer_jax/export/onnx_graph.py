"""A Mixer as an ONNX graph, operation by operation, with the names that parity's hooks use.

`blocks/3/token_mixing/gelu` is the result of that operation and `blocks/3/token_mixing/dense_0/kernel` a weight in Google's
axes, so that a viewer shows the paper and parity names the first wrong operation.
One Gelu node an MLP, one LayerNormalization node a norm.
"""

__all__ = ["OPSET", "graph_of", "tensor_type"]

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import GraphProto, NodeProto, TensorProto, helper

from convert import Checkpoint, MixerConfig
from convert.layouts import GOOGLE
from convert.mapping import slots

from .program import ExportOptions, Facts, wide

OPSET = 20  # the first in which Gelu is one operation; LayerNormalization is one since 17
APPROXIMATE = {"tanh": "tanh", "exact": "none"}


def tensor_type(dtype: str) -> int:
    """ONNX's number of a dtype by name."""
    return getattr(TensorProto, {"float32": "FLOAT", "float64": "DOUBLE"}.get(dtype, dtype.upper()))


@dataclass
class _Nodes:
    """Nodes in order, and the constants beside the weights."""

    options: ExportOptions
    config: MixerConfig
    nodes: list[NodeProto] = field(default_factory=list)
    constants: list[TensorProto] = field(default_factory=list)

    def add(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operator, inputs, [output], name=output, **attributes))
        return output

    def constant(self, name: str, values: np.ndarray) -> str:
        self.constants.append(_tensor(name, values))
        return name

    def cast(self, name: str, output: str, dtype: str) -> str:
        return self.add("Cast", [name], output, to=tensor_type(dtype))

    def dense(self, x: str, name: str) -> str:
        product = self.add("MatMul", [x, f"{name}/kernel"], f"{name}/matmul")
        return self.add("Add", [product, f"{name}/bias"], name)

    def norm(self, x: str, name: str) -> str:
        inputs = [x, f"{name}/scale", f"{name}/bias"]
        return self.add("LayerNormalization", inputs, name, axis=-1, epsilon=self.config.layer_norm_epsilon)

    def transposed(self, x: str, output: str) -> str:
        return self.add("Transpose", [x], output, perm=[0, 2, 1])

    def mlp(self, x: str, name: str) -> str:
        x = self.dense(x, f"{name}/dense_0")
        x = self.add("Gelu", [x], f"{name}/gelu", approximate=APPROXIMATE[self.config.gelu])
        return self.dense(x, f"{name}/dense_1")

    def stem(self, images: str) -> str:
        config = self.config
        kernel = self.add("Transpose", ["stem/kernel"], "stem/kernel/o_i_h_w", perm=[3, 2, 0, 1])
        grid = self.add("Conv", [images, kernel, "stem/bias"], "stem/grid", strides=list(config.patch_size))
        shape = self.constant("stem/shape", np.array([0, config.hidden_dim, config.num_tokens]))  # 0: the batch
        return self.transposed(self.add("Reshape", [grid, shape], "stem/transposed"), "stem")

    def block(self, x: str, name: str) -> str:
        y = self.norm(x, f"{name}/token_norm")
        y = self.mlp(self.transposed(y, f"{y}/transposed"), f"{name}/token_mixing")
        x = self.add("Add", [x, self.transposed(y, f"{y}/transposed")], f"{name}/token_mixing/sum")
        y = self.mlp(self.norm(x, f"{name}/channel_norm"), f"{name}/channel_mixing")
        return self.add("Add", [x, y], f"{name}/channel_mixing/sum")

    def input(self, facts: Facts) -> str:
        """The images in the dtype of the weights; pixels are scaled in float32 or better."""
        images, dtype = "images", self.options.dtype
        if self.options.uint8:
            float_dtype = wide(dtype)
            factor, offset = (
                self.constant(f"images/{name}", values.reshape(-1, 1, 1).astype(float_dtype))
                for name, values in zip(("factor", "offset"), facts.scaling())
            )
            images = self.add("Mul", [self.cast(images, "images/pixels", float_dtype), factor], "images/times_factor")
            images = self.add("Add", [images, offset], "images/scaled")
        return self.cast(images, "images/cast", dtype) if dtype not in ("float32", "float64") else images

    def output(self, x: str) -> str:
        """The mean and the head in float32 or better."""
        float_dtype = wide(self.options.dtype)
        axes = self.constant("mean/axes", np.array([1]))
        mean = "features" if self.options.features else "mean"
        x = self.cast(x, "pre_head_norm/wide", float_dtype) if float_dtype != self.options.dtype else x
        x = self.add("ReduceMean", [x, axes], mean, keepdims=0)
        if self.options.features:
            return x
        x = self.add("Add", [self.add("MatMul", [x, "head/kernel"], "head/matmul"), "head/bias"], "logits")
        return self.add("Softmax", [x], "scores", axis=-1) if self.options.softmax else x


def graph_of(checkpoint: Checkpoint, facts: Facts) -> GraphProto:
    """Images (b, c, h, w) -> logits, scores or features (b, n), with a batch of any size."""
    config, options = checkpoint.config, facts.options
    nodes = _Nodes(options, config)
    x = nodes.stem(nodes.input(facts))
    for i in range(config.num_blocks):
        x = nodes.block(x, f"blocks/{i}")
    result = nodes.output(nodes.norm(x, "pre_head_norm"))
    tensors = list(_weights(checkpoint.without_head() if options.features else checkpoint, options.dtype))
    images = helper.make_tensor_value_info(
        "images", tensor_type(facts.input_dtype), ["b", config.in_channels, *config.image_size]
    )
    output = helper.make_tensor_value_info(result, tensor_type(wide(options.dtype)), ["b", facts.output_width])
    return helper.make_graph(nodes.nodes, "mixer", [images], [output], [*tensors, *nodes.constants])


def _weights(checkpoint: Checkpoint, dtype: str) -> Iterator[TensorProto]:
    """By operation, "blocks/3/token_mixing/dense_0/kernel", in Google's axes; those of the head in float32 or better."""
    body, head = (checkpoint.astype(each).to(GOOGLE).arrays for each in (dtype, wide(dtype)))
    for name, slot in slots(GOOGLE, checkpoint.sizes).items():
        module = slot.module if slot.block is None else f"blocks/{slot.block}/{slot.module}"
        arrays = head if slot.module == "head" else body
        yield _tensor(f"{module}/{name.rpartition('/')[2]}", np.asarray(arrays[name]))


def _tensor(name: str, values: np.ndarray) -> TensorProto:
    data = np.ascontiguousarray(values).tobytes()
    return TensorProto(name=name, data_type=tensor_type(values.dtype.name), dims=values.shape, raw_data=data)
