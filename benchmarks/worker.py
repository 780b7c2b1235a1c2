"""One side of a measurement, in a process of its own: the same weights and images, one request a line on standard input.

`python worker.py PEER` answers {"do": "prepare", ...} with what there is to tell, its versions among it, once its results
are written, and {"do": "run", "repeat": n} with the seconds of one run, the mean of n in a row. It runs in whatever
environment has the peer; between requests it waits for input.
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

Call = Callable[[], Any]  # one run, finished when it returns
Prepared = tuple[Call, Callable[[], dict[str, np.ndarray]], dict[str, Any]]  # the run, its results, what else to tell
PACKAGES = ("jax", "flax", "torch", "timm", "onnxruntime", "openvino", "numpy")
MOMENTUM, RATE = 0.9, 1e-3


# JAX: ours and Google's formulation in Flax Linen.


def ours(job: dict[str, Any]) -> Prepared:
    """What the library offers for inference."""
    import jax

    import mixer_jax

    dtype = None if job["dtype"] == "float32" else job["dtype"]
    model = mixer_jax.load(job["weights"], dtype=dtype, param_dtype=dtype)
    forward = mixer_jax.compiled(model.unstacked() if job.get("unstack") else model)
    images = jax.device_put(images_of(job).astype(job["dtype"]))
    return (lambda: forward(images).block_until_ready()), (lambda: {"logits": np.asarray(forward(images), np.float32)}), {}


def nnx_jit(job: dict[str, Any]) -> Prepared:
    """The model under `nnx.jit`, as people write it."""
    import jax
    from flax import nnx

    import mixer_jax

    model, images = mixer_jax.load(job["weights"]), jax.device_put(images_of(job))
    forward = nnx.jit(lambda model, images: model(images))
    return (lambda: forward(model, images).block_until_ready()), (lambda: {"logits": np.asarray(forward(model, images))}), {}


def linen(job: dict[str, Any]) -> Prepared:
    """Google's formulation, jitted."""
    import jax
    from linen_mixer import MlpMixer

    from convert import read

    checkpoint = read(job["weights"], dtype=job["dtype"])
    model = MlpMixer(checkpoint.config, dtype=job["dtype"])
    variables, images = jax.device_put((checkpoint.as_linen(), images_of(job).astype(job["dtype"])))
    forward = jax.jit(model.apply)
    return (
        (lambda: forward(variables, images).block_until_ready()),
        (lambda: {"logits": np.asarray(forward(variables, images), np.float32)}),
        {},
    )


def products(job: dict[str, Any]) -> Prepared:
    """The network's products and nothing between them, in slices as ours: what no formulation in this JAX gets below."""
    import jax
    import jax.numpy as jnp

    import mixer_jax
    from mixer_jax.images import few_enough

    model = mixer_jax.load(job["weights"], dtype=job["dtype"], param_dtype=job["dtype"])
    config = model.config
    weights = [
        [layer.kernel[...] for mlp in (block.token_mixing, block.channel_mixing) for layer in (mlp.dense_0, mlp.dense_1)]
        for block in model.unstacked().blocks
    ]
    shape = (job["batch"], config.num_tokens, config.hidden_dim)
    few = min(few_enough(config, jnp.dtype(job["dtype"]).itemsize), job["batch"])

    def through(weights: Any, x: jax.Array) -> jax.Array:
        for tokens_0, tokens_1, channels_0, channels_1 in weights:
            x = (x.reshape(-1, shape[2], shape[1]) @ tokens_0 @ tokens_1).reshape(-1, *shape[1:]) @ channels_0 @ channels_1
        return x

    forward = jax.jit(
        lambda weights, x: (
            jax.lax.map(partial(through, weights), x.reshape(-1, few, *shape[1:])) if few < len(x) else through(weights, x)
        )
    )
    x = 1e-3 * jax.random.normal(jax.random.key(0), shape, job["dtype"])
    return (lambda: forward(weights, x).block_until_ready()), dict, {}


def ceiling(job: dict[str, Any]) -> Prepared:
    """The best of several large matrix products of this JAX, kept up: no model, what a model could at most reach."""
    import jax
    import jax.numpy as jnp

    sides = [(2048, 2048, 2048), (4096, 1024, 4096), (1568, 768, 3072), (1568, 3072, 768), (3136, 3072, 768)]
    sides += [(784, 768, 3072), (784, 3072, 768)]
    product, runs = jax.jit(jnp.matmul), {}
    for m, k, n in sides:
        a, b = (jax.random.normal(jax.random.key(i), shape, job["dtype"]) for i, shape in enumerate([(m, k), (k, n)]))
        call = partial(lambda a, b, times: [product(a, b) for _ in range(times)][-1].block_until_ready(), a, b)
        call(1)
        times = max(1, round(0.3 / timed(partial(call, 1))[0]))  # about as long as a batch
        call = partial(call, times)
        runs[m, k, n] = (min(timed(call)[0] for _ in range(3)) / (2 * m * k * n * times), call, times)
    best = min(runs, key=lambda side: runs[side][0])
    _, call, times = runs[best]
    return call, dict, {"flops": times * 2 * int(np.prod(best)), "product": best}


def bandwidth(job: dict[str, Any]) -> Prepared:
    """One pass over 256 MiB of memory, read and written."""
    import jax
    import jax.numpy as jnp

    add, x = jax.jit(lambda x: x + 1), jnp.zeros(2**26, jnp.float32)
    return (lambda: add(x).block_until_ready()), dict, {"bytes": 2 * x.nbytes}


def ours_training(job: dict[str, Any]) -> Prepared:
    """Blocks scanned, with or without `remat`; one jitted function of the split state, updated in place."""
    from flax import nnx

    import mixer_jax

    model = mixer_jax.load(job["weights"], remat=job["remat"])
    model.train()
    graphdef, parameters, rest = nnx.split(model, nnx.Param, ...)
    return jax_training(job, lambda parameters, images: nnx.merge(graphdef, parameters, rest)(images), parameters)


def linen_training(job: dict[str, Any]) -> Prepared:
    """Blocks one by one, every activation kept."""
    from linen_mixer import MlpMixer

    from convert import read

    checkpoint = read(job["weights"])
    return jax_training(job, MlpMixer(checkpoint.config).apply, checkpoint.as_linen())


def jax_training(job: dict[str, Any], function: Callable[..., Any], parameters: Any) -> Prepared:
    import jax

    images, labels = jax.device_put((images_of(job), labels_of(job)))
    optimizer, step = jax_step(function)
    state = [jax.device_put(parameters), jax.jit(optimizer.init)(parameters)]
    started = time.perf_counter()
    compiled = step.lower(*state, images, labels).compile()
    told = {
        "compile_s": time.perf_counter() - started,
        "temporaries_bytes": compiled.memory_analysis().temp_size_in_bytes,
    }

    def call() -> float:
        *new, loss = compiled(*state, images, labels)
        state[:] = new
        return float(loss)

    losses = [call() for _ in range(3)]
    return call, (lambda: {"losses": np.asarray(losses)}), told


def jax_step(function: Callable[..., Any]) -> tuple[Any, Any]:
    """optax's SGD with momentum, and a jitted step on the cross-entropy that updates in place."""
    import jax
    import optax

    optimizer = optax.sgd(RATE, momentum=MOMENTUM)

    def loss(parameters: Any, images: Any, labels: Any) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(function(parameters, images), labels).mean()

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(parameters: Any, state: Any, images: Any, labels: Any) -> Any:
        value, gradients = jax.value_and_grad(loss)(parameters, images, labels)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(parameters, updates), state, value

    return optimizer, step


def ours_compiling(job: dict[str, Any]) -> Prepared:
    """Our training step at some depth, lowered and compiled without weights."""
    import jax.numpy as jnp
    from flax import nnx

    import mixer_jax

    config = mixer_jax.MixerConfig.named(job["variant"]).replace(num_blocks=job["blocks"])
    model = nnx.eval_shape(lambda: mixer_jax.MlpMixer(config, rngs=nnx.Rngs(0), param_dtype=jnp.float32, remat=True))
    graphdef, parameters, rest = nnx.split(model, nnx.Param, ...)
    return compiling(job, config, lambda p, images: nnx.merge(graphdef, p, rest)(images), parameters)


def linen_compiling(job: dict[str, Any]) -> Prepared:
    """Google's formulation of the same."""
    import jax
    from linen_mixer import MlpMixer

    from convert import MixerConfig

    config = MixerConfig.named(job["variant"]).replace(num_blocks=job["blocks"])
    model, image = MlpMixer(config), np.zeros((1, *config.image_size, config.in_channels), np.float32)
    return compiling(job, config, model.apply, jax.eval_shape(model.init, jax.random.key(0), image))


def compiling(job: dict[str, Any], config: Any, function: Callable[..., Any], parameters: Any) -> Prepared:
    import jax

    images = jax.ShapeDtypeStruct((job["batch"], *config.image_size, config.in_channels), "float32")
    labels = jax.ShapeDtypeStruct((job["batch"],), "int32")

    def call() -> None:
        jax.clear_caches()
        optimizer, step = jax_step(function)
        step.lower(parameters, jax.eval_shape(optimizer.init, parameters), images, labels).compile()

    return call, dict, {}


# PyTorch: the twin, timm, the reference formulation.


def twin(job: dict[str, Any]) -> Prepared:
    """Our PyTorch model, eager, in the microbatches that the library offers."""
    import torch

    from mixer_jax import torch_model

    dtype = getattr(torch, job["dtype"])
    model = torch_model.load(job["weights"], dtype=dtype, param_dtype=dtype)
    return torch_forward(job, lambda images: torch_model.in_microbatches(model, images, model.config))


def timm(job: dict[str, Any]) -> Prepared:
    """timm's MlpMixer with the weights' own GELU."""
    return torch_forward(job, timm_model(job))


def timm_model(job: dict[str, Any]) -> Any:
    import torch
    from timm.layers import Mlp
    from timm.models.mlp_mixer import MixerBlock, MlpMixer

    from convert import read

    checkpoint = read(job["weights"]).to("timm")
    config = checkpoint.config
    model = MlpMixer(
        num_classes=config.num_classes,
        img_size=config.image_size,
        patch_size=config.patch_size,
        num_blocks=config.num_blocks,
        embed_dim=config.hidden_dim,
        mlp_ratio=(config.tokens_mlp_dim / config.hidden_dim, config.channels_mlp_dim / config.hidden_dim),
        block_layer=MixerBlock,
        mlp_layer=Mlp,
        norm_layer=partial(torch.nn.LayerNorm, eps=config.layer_norm_epsilon),
        act_layer=partial(torch.nn.GELU, approximate="tanh" if config.gelu == "tanh" else "none"),
    )
    model.load_state_dict(checkpoint.as_torch())
    return model.to(getattr(torch, job["dtype"])).eval()


def torch_eager(job: dict[str, Any]) -> Prepared:
    """The reference formulation, eager."""
    return torch_forward(job, reference_model(job))


def torch_compile(job: dict[str, Any]) -> Prepared:
    """The reference formulation under torch.compile."""
    import torch

    return torch_forward(job, torch.compile(reference_model(job)))


def reference_model(job: dict[str, Any]) -> Any:
    import torch
    from torch_reference import MlpMixer

    from convert import read

    checkpoint = read(job["weights"]).to("reference")
    model = MlpMixer(checkpoint.config)
    model.load_state_dict(checkpoint.as_torch())
    return model.to(getattr(torch, job["dtype"])).eval()


def torch_forward(job: dict[str, Any], model: Any) -> Prepared:
    import torch

    images = torch.from_numpy(channels_first(images_of(job))).to(getattr(torch, job["dtype"]))

    def call() -> Any:
        with torch.inference_mode():
            return model(images)

    return call, (lambda: {"logits": call().float().numpy()}), {}


def timm_training(job: dict[str, Any]) -> Prepared:
    import torch

    model = timm_model(job).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
    images, labels = torch.from_numpy(channels_first(images_of(job))), torch.from_numpy(labels_of(job)).long()

    def call() -> float:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return float(loss)

    losses = [call() for _ in range(3)]
    return call, (lambda: {"losses": np.asarray(losses)}), {}


# Runtimes, from the reference formulation.


def onnxruntime(job: dict[str, Any]) -> Prepared:
    """ONNX Runtime, exported by torch.onnx; its threads stop spinning when a run has ended."""
    import onnxruntime as ort
    import torch

    path, images = str(Path(job["folder"]) / f"b{job['batch']}.onnx"), channels_first(images_of(job))
    with contextlib.redirect_stdout(sys.stderr):
        torch.onnx.export(reference_model(job), (torch.from_numpy(images),), path, input_names=["images"], dynamo=True)
    options = ort.SessionOptions()
    options.intra_op_num_threads = job["threads"]
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    call = partial(session.run, None, {"images": images})
    return call, (lambda: {"logits": call()[0]}), {}


def openvino(job: dict[str, Any]) -> Prepared:
    """OpenVINO, converted from PyTorch, in the precision asked for and no other."""
    import openvino as ov
    import torch

    images = channels_first(images_of(job))
    reference = reference_model(job | {"dtype": "float32"})
    model = ov.convert_model(reference, example_input=torch.from_numpy(images), input=[images.shape])
    hints = {
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[job["dtype"]],
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": job["threads"],
    }
    request = ov.Core().compile_model(model, "CPU", hints).create_infer_request()
    call = partial(request.infer, {0: images}, share_inputs=True)
    return call, (lambda: {"logits": np.array(call()[0])}), {}


# What all have in common.


def images_of(job: dict[str, Any]) -> np.ndarray:
    return np.load(job["images"], mmap_mode="r")[: job["batch"]].copy()


def labels_of(job: dict[str, Any]) -> np.ndarray:
    return np.arange(job["batch"], dtype=np.int32)


def channels_first(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def timed(call: Call, repeat: int = 1) -> tuple[float, float]:
    """Seconds and processor seconds of one run, the mean of several in a row."""
    cpu, started = time.process_time(), time.perf_counter()
    for _ in range(repeat):
        call()
    return (time.perf_counter() - started) / repeat, (time.process_time() - cpu) / repeat


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        if name in sys.modules:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found[name] = importlib.metadata.version(name)
    return found


PEERS: dict[str, Callable[[dict[str, Any]], Prepared]] = {
    function.__name__: function
    for function in (
        *(ours, nnx_jit, linen, products, ceiling, bandwidth, ours_training, linen_training, ours_compiling, linen_compiling),
        *(twin, timm, torch_eager, torch_compile, timm_training, onnxruntime, openvino),
    )
}


def main() -> None:
    # Whatever a library prints goes to standard error: standard output carries answers alone.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    make = PEERS[sys.argv[1]]
    call: Call | None = None
    for line in sys.stdin:
        job = json.loads(line)
        if job["do"] == "prepare":
            call = None  # what the last job held is freed first
            call, results, told = make(job)
            np.savez(job["results"], **results())
            answer = {"told": told, "versions": versions()}
        else:
            assert call is not None
            seconds, cpu = timed(call, job["repeat"])
            answer = {"seconds": seconds, "cpu": cpu}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
