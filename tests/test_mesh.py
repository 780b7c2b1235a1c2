"""A batch sharded over a mesh of eight simulated devices, with explicit and with automatic axes.

As a script, in a process of its own, it calls a model in every way and prints a JSON line for each.
"""

import contextlib
import json
import os
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
from conftest import TINY as THREE_BLOCKS
from conftest import random_images, random_weights
from flax import nnx
from implementations import checkpoint
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import mixer_jax

ENVIRONMENT = {
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
    "JAX_ENABLE_X64": "1",
    "JAX_PLATFORMS": "cpu",
}
TINY = THREE_BLOCKS.replace(num_blocks=2)
WEIGHTS, IMAGES = random_weights(TINY, dtype="float64"), random_images(TINY, 16, dtype="float64")


def load(sharding=None):
    rates = {"dropout_rate": 0.3, "stochastic_depth_rate": 0.6, "rngs": nnx.Rngs(0)}
    return mixer_jax.load(checkpoint(WEIGHTS, TINY), param_dtype="float64", sharding=sharding, **rates)


def step(model, images):
    """A training step with dropout; the first kernel after it."""
    model.train()
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)

    @nnx.jit
    def update(model, optimizer, images):
        gradients = nnx.grad(lambda model: (model(images, rngs=jax.random.key(3, impl="unsafe_rbg")) ** 2).mean())(model)
        optimizer.update(model, gradients)

    update(model, optimizer, images)
    return model.stem.kernel[...]


FORWARD = {
    "call": lambda model, images: model(images),
    "jax.jit": lambda model, images: jax.jit(model)(images),
    "nnx.jit": lambda model, images: nnx.jit(lambda model, images: model(images))(model, images),
    "compiled": lambda model, images: mixer_jax.compiled(model)(images),
}


def main():
    expected = dict.fromkeys(FORWARD, load()(IMAGES)) | {"step": step(load(), IMAGES)}  # on one device
    for axes in ("explicit", "auto"):
        mesh = jax.make_mesh((8,), ("data",), **({"axis_types": (AxisType.Auto,)} if axes == "auto" else {}))
        images = jax.device_put(IMAGES, NamedSharding(mesh, P("data")))
        replicated = NamedSharding(mesh, P())
        for context, unstack in ((False, False), (True, False), (False, True))[:: 1 if axes == "explicit" else 2]:
            for name, way in {**FORWARD, "step": step}.items():
                # With explicit axes a gradient needs the weights on the mesh; a forward pass does not.
                model = load(replicated if name == "step" else None)
                with jax.set_mesh(mesh) if context else contextlib.nullcontext():
                    result = way(model.unstacked() if unstack else model, images)
                error = np.abs(np.asarray(result) - expected[name]).max() / np.abs(expected[name]).max()
                shards = len({str(shard.index) for shard in result.addressable_shards})
                row = {"axes": axes, "context": context, "unstacked": unstack, "way": name}
                print(json.dumps(row | {"error": float(error), "shards": shards}))
        text = mixer_jax.compiled(load(replicated)).lower(images).compile().as_text()
        print(json.dumps({"axes": axes, "collectives": [name for name in ("all-gather", "all-to-all") if name in text]}))


@pytest.fixture(scope="module")
def rows():
    command = [sys.executable, __file__]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_way_to_call_a_model_on_a_mesh_gives_the_logits_and_the_step_of_one_device(rows):
    errors = [row["error"] for row in rows if "way" in row]
    assert len(errors) == (3 + 2) * 5
    assert max(errors) <= 1e-12  # measured: 1e-15


def test_the_batch_stays_sharded_and_a_compiled_forward_gathers_nothing(rows):
    assert {row["shards"] for row in rows if row.get("way", "step") != "step"} == {8}
    assert [row["collectives"] for row in rows if "collectives" in row] == [[], []]


if __name__ == "__main__":
    main()
