"""Programs by their abstract arguments. `python programs.py TARGET REQUEST RESULT` compiles what ahead_of_time.py requests.

A builder takes devices and options and returns a jitted function and its arguments, as shapes with shardings.
"""

import importlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from linen_mixer import MlpMixer as Linen
from worker import MOMENTUM, RATE

from convert import MixerConfig
from mixer_jax import MlpMixer

Built = tuple[Any, tuple[Any, ...]]


def forward(devices: Sequence[Any], **options: Any) -> Built:
    """The jitted function (parameters, images) -> logits, and its abstract arguments."""
    function, parameters, images, _ = _network(devices, **options)
    return jax.jit(function), (parameters, images)


def train_step(devices: Sequence[Any], **options: Any) -> Built:
    """One step of SGD with momentum on the cross-entropy, parameters and optimiser state updated in place."""
    function, parameters, images, labels = _network(devices, **options)
    optimizer, step = jitted_step(function)
    state = _placed(jax.eval_shape(optimizer.init, parameters), jax.tree.leaves(parameters)[0].sharding)
    return step, (parameters, state, images, labels)


def jitted_step(function: Callable[..., Any]) -> tuple[Any, Any]:
    """optax's SGD with momentum, and a jitted step on the cross-entropy that updates in place."""
    optimizer = optax.sgd(RATE, momentum=MOMENTUM)

    def loss(parameters: Any, images: Any, labels: Any) -> Any:
        logits = function(parameters, images).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(parameters: Any, state: Any, images: Any, labels: Any) -> Any:
        value, gradients = jax.value_and_grad(loss)(parameters, images, labels)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(parameters, updates), state, value

    return optimizer, step


def _network(
    devices: Sequence[Any],
    *,
    model: str,
    batch: int,
    variant: str = "B/16",
    blocks: int | None = None,
    dtype: str | None = "bfloat16",
    precision: str | None = None,
    param_dtype: str = "float32",
    unstacked: bool = False,
    remat: bool = False,
    data_parallel: bool = False,
) -> tuple[Any, Any, Any, Any]:
    """The function, and its parameters, images and labels as shapes; `batch` is that of one device."""
    config = MixerConfig.named(variant)
    config = config.replace(num_blocks=blocks or config.num_blocks)
    mesh = Mesh(np.array(devices if data_parallel else devices[:1]), ("data",))
    replicated, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    batch *= mesh.size
    images = jax.ShapeDtypeStruct((batch, *config.image_size, config.in_channels), jnp.float32, sharding=split)
    labels = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=split)
    if model == "linen":
        linen = Linen(config, dtype=dtype, precision=precision)
        parameters = jax.eval_shape(linen.init, jax.random.key(0), images)
        parameters = jax.tree.map(lambda leaf: leaf.update(dtype=param_dtype), parameters)
        return linen.apply, _placed(parameters, replicated), images, labels

    def create() -> MlpMixer:
        numerics: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "precision": precision}
        mixer = MlpMixer(config, rngs=nnx.Rngs(0), remat=remat, **numerics)
        return mixer.unstacked() if unstacked else mixer

    graphdef, parameters = nnx.split(nnx.eval_shape(create))

    def function(parameters: Any, images: Any) -> Any:
        return nnx.merge(graphdef, parameters)(images)

    return function, _placed(parameters, replicated), images, labels


def _placed(tree: Any, sharding: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def devices_of(target: str) -> list[Any]:
    if target.startswith("cpu:"):
        return jax.devices()
    description = Path(__file__).with_name("h100.txtpb").read_text()
    h100 = {"platform": "cuda", "topology": "1x1x1", "target_config": description}
    options = h100 if target == "h100" else {"platform": "tpu", "topology_name": target}
    return list(topologies.get_topology_desc(**options).devices)


def main(target: str, request: str, result: str) -> None:
    devices, programs = devices_of(target), []
    for builder, options, compiler_options in json.loads(Path(request).read_text()):
        module, _, function = builder.partition(":")
        jitted, arguments = getattr(importlib.import_module(module), function)(devices, **options)
        lowered = jitted.lower(*arguments)
        started = time.process_time()
        compiled = lowered.compile(compiler_options)
        seconds = time.process_time() - started
        programs.append((compiled.as_text(), compiled.memory_analysis().temp_size_in_bytes, seconds))
    Path(result).write_text(json.dumps(programs))


if __name__ == "__main__":
    main(*sys.argv[1:])
