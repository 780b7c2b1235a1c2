"""What worker.py runs in JAX: mixer-jax beside Google's formulation in Flax Linen, and what the machine can do."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from linen_mixer import MlpMixer as Linen
from programs import jitted_step, train_step
from worker import Job, Prepared, images_of, labels_of, timed

import mixer_jax
from convert import ReadOptions, read
from mixer_jax.inputs import cpu_microbatch


def forward(function: Callable[..., Any], *arguments: Any) -> Prepared:
    def call() -> Any:
        return function(*arguments).block_until_ready()

    return call, {"logits": np.asarray(call(), np.float32)}, {}


def mixer_jax_forward(job: Job) -> Prepared:
    """What the library offers for inference."""
    dtype = None if job["dtype"] == "float32" else job["dtype"]
    model = mixer_jax.load(job["weights"], dtype=dtype, param_dtype=dtype)
    return forward(mixer_jax.compiled(model), jax.device_put(images_of(job).astype(job["dtype"])))


def nnx_jit_forward(job: Job) -> Prepared:
    """The model under `nnx.jit`, as people write it."""
    model, images = mixer_jax.load(job["weights"]), jax.device_put(images_of(job))
    return forward(nnx.jit(lambda model, images: model(images)), model, images)


def linen_forward(job: Job) -> Prepared:
    checkpoint = read(job["weights"], ReadOptions(dtype=job["dtype"]))
    model = Linen(checkpoint.config, dtype=job["dtype"])
    variables, images = jax.device_put((checkpoint.as_linen(), images_of(job).astype(job["dtype"])))
    return forward(jax.jit(model.apply), variables, images)


def matmuls(job: Job) -> Prepared:
    """The network's matmuls and nothing in between, in mixer-jax's microbatches: no formulation in this JAX takes less time."""
    model = mixer_jax.load(job["weights"], dtype=job["dtype"], param_dtype=job["dtype"])
    config = model.config
    weights = [
        [layer.kernel[...] for mlp in (block.token_mixing, block.channel_mixing) for layer in (mlp.dense_0, mlp.dense_1)]
        for block in model.unstacked().blocks
    ]
    shape = (job["batch"], config.num_tokens, config.hidden_dim)
    microbatch = min(cpu_microbatch(config, jnp.dtype(job["dtype"]).itemsize), job["batch"])

    def through(weights: Any, x: jax.Array) -> jax.Array:
        for tokens_0, tokens_1, channels_0, channels_1 in weights:
            x = (x.reshape(-1, shape[2], shape[1]) @ tokens_0 @ tokens_1).reshape(-1, *shape[1:]) @ channels_0 @ channels_1
        return x

    def all_blocks(weights: Any, x: jax.Array) -> jax.Array:
        if microbatch == len(x):
            return through(weights, x)
        return jax.lax.map(partial(through, weights), x.reshape(-1, microbatch, *shape[1:]))

    x, jitted = 1e-3 * jax.random.normal(jax.random.key(0), shape, job["dtype"]), jax.jit(all_blocks)
    return (lambda: jitted(weights, x).block_until_ready()), {}, {}


def fastest_matmul(job: Job) -> Prepared:
    """The best of several large matmuls, kept up for as long as a batch takes: what a model could at most reach."""
    sizes = [(2048, 2048, 2048), (4096, 1024, 4096), (1568, 768, 3072), (1568, 3072, 768), (3136, 3072, 768)]
    sizes += [(784, 768, 3072), (784, 3072, 768)]
    matmul, runs = jax.jit(jnp.matmul), {}
    for m, k, n in sizes:
        a, b = (jax.random.normal(jax.random.key(i), shape, job["dtype"]) for i, shape in enumerate([(m, k), (k, n)]))
        call = partial(lambda a, b, times: [matmul(a, b) for _ in range(times)][-1].block_until_ready(), a, b)
        call(1)
        times = max(1, round(0.3 / timed(partial(call, 1))[0]))
        call = partial(call, times)
        runs[m, k, n] = (min(timed(call)[0] for _ in range(3)) / (2 * m * k * n * times), call, times)
    best = min(runs, key=lambda size: runs[size][0])
    _, call, times = runs[best]
    return call, {}, {"flops": times * 2 * int(np.prod(best)), "matmul": best}


def mixer_jax_training(job: Job, *, remat: bool = False) -> Prepared:
    """Blocks scanned; one jitted function of the split state, updated in place."""
    model = mixer_jax.load(job["weights"], remat=remat)
    model.train()
    graphdef, parameters, rest = nnx.split(model, nnx.Param, ...)
    return training(job, lambda parameters, images: nnx.merge(graphdef, parameters, rest)(images), parameters)


def linen_training(job: Job) -> Prepared:
    """Blocks one by one, every activation kept."""
    checkpoint = read(job["weights"])
    return training(job, Linen(checkpoint.config).apply, checkpoint.as_linen())


def training(job: Job, function: Callable[..., Any], parameters: Any) -> Prepared:
    images, labels = jax.device_put((images_of(job), labels_of(job)))
    optimizer, step = jitted_step(function)
    state = [jax.device_put(parameters), jax.jit(optimizer.init)(parameters)]
    started = time.perf_counter()
    compiled = step.lower(*state, images, labels).compile()
    facts = {"compile_s": time.perf_counter() - started, "temporaries_bytes": compiled.memory_analysis().temp_size_in_bytes}

    def call() -> float:
        *new, loss = compiled(*state, images, labels)
        state[:] = new
        return float(loss)

    return call, {"losses": np.asarray([call() for _ in range(3)])}, facts


def compiling(job: Job, model: str) -> Prepared:
    """The training step at some depth, lowered and compiled without weights."""
    options = {"model": model, "batch": job["batch"], "variant": job["variant"], "blocks": job["blocks"]}
    step, arguments = train_step(jax.devices(), **options, dtype=None, remat=True)

    def call() -> None:
        jax.clear_caches()
        step.lower(*arguments).compile()

    return call, {}, {"blocks": job["blocks"]}


CALLING = {"mixer_jax": mixer_jax_forward, "nnx_jit": nnx_jit_forward, "linen": linen_forward}
TASKS: dict[str, dict[str, Callable[[Job], Prepared]]] = {
    "calling": CALLING,
    "forward": CALLING | {"matmuls": matmuls, "fastest_matmul": fastest_matmul},
    "training": {
        "mixer_jax": mixer_jax_training,
        "mixer_jax_remat": partial(mixer_jax_training, remat=True),
        "linen": linen_training,
    },
    "compiling": {name: partial(compiling, model=name) for name in ("mixer_jax", "linen")},
}
