"""Checkpoints as JAX's and NumPy's users write them: flax, Orbax 0 and 1, big_vision's zarr, numpy, safetensors, pickle.

Every writer puts one into a folder and returns the path to read; libraries are called as their guides call them.
"""

import contextlib
import pickle
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import orbax.checkpoint.experimental.v1 as ocp_v1
from conftest import TINY, random_weights
from flax import nnx, serialization
from flax.training import checkpoints
from flax.training.train_state import TrainState
from flax.traverse_util import flatten_dict
from jax.experimental.array_serialization import serialization as array_serialization
from jax.sharding import NamedSharding, PartitionSpec

import mixer_jax
from convert import Checkpoint
from convert.dtypes import as_dtype

WEIGHTS = random_weights(TINY)
AVERAGE = random_weights(TINY, seed=1)  # stands for an exponential moving average of WEIGHTS
PARAMS = Checkpoint.from_arrays(WEIGHTS).as_linen()["params"]
AVERAGE_PARAMS = Checkpoint.from_arrays(AVERAGE).as_linen()["params"]
WIDE = random_weights(TINY.replace(hidden_dim=8, tokens_mlp_dim=12, channels_mlp_dim=16))  # of lengths that four divides
FRESH = WEIGHTS | {name: np.zeros_like(WEIGHTS[name]) for name in ("head/kernel", "head/bias")}  # before fine-tuning
FRESH_PARAMS = Checkpoint.from_arrays(FRESH).as_linen()["params"]


def under(prefix: str, entries: Mapping[str, Any]) -> dict[str, Any]:
    return {prefix + name: entry for name, entry in entries.items()}


def model(**options) -> "mixer_jax.MlpMixer":
    return mixer_jax.load(Checkpoint.from_arrays(WEIGHTS).with_image_size(TINY.image_size), **options)


# Trees that JAX's trainers keep


class AverageTrainState(TrainState):
    ema_params: Any


def train_state(optimiser, steps: int = 1) -> TrainState:
    """After steps whose gradients are zero, which leave the parameters as they are."""
    state = TrainState.create(apply_fn=None, params=PARAMS, tx=optimiser)
    for _ in range(steps):
        state = state.apply_gradients(grads=jax.tree.map(jnp.zeros_like, PARAMS))
    return state


def with_average() -> AverageTrainState:
    return AverageTrainState.create(apply_fn=None, params=PARAMS, tx=optax.sgd(0.1), ema_params=AVERAGE_PARAMS)


def fine_tuning() -> tuple:
    optimiser = optax.chain(optax.clip_by_global_norm(1), optax.sgd(0.1, momentum=0.9, accumulator_dtype="bfloat16"))
    return PARAMS, optimiser.init(PARAMS), 2


def pure_model() -> dict:
    return nnx.to_pure_dict(nnx.state(model()))


def cast(dtype: str) -> dict:
    return {"params": jax.tree.map(lambda array: array.astype(as_dtype(dtype)), PARAMS)}


def optimizer_of(trained) -> nnx.Optimizer:
    return nnx.Optimizer(trained, optax.adamw(1e-3), wrt=nnx.Param)


def nnx_training() -> dict:
    trained = model()
    return {"model": nnx.state(trained), "optimizer": nnx.state(optimizer_of(trained)), "step": 3}


OPTIMISED = frozenset({"opt_state", "step"})
TREES: dict[str, tuple[Callable[[], Any], frozenset[str] | None]] = {
    "bare params": (lambda: PARAMS, frozenset()),
    "params": (lambda: {"params": PARAMS}, frozenset()),
    "FrozenDict": (lambda: flax.core.freeze({"params": PARAMS}), frozenset()),
    "dotted flat dict": (lambda: flatten_dict({"params": PARAMS}, sep="."), frozenset()),
    "slashed flat dict": (lambda: flatten_dict({"params": PARAMS}, sep="/"), frozenset()),
    "params, opt_state, step": (fine_tuning, frozenset({"1", "2"})),
    "TrainState, sgd": (partial(train_state, optax.sgd(0.1)), None),  # whose state is empty
    "TrainState, momentum": (partial(train_state, optax.sgd(0.1, momentum=0.9)), OPTIMISED),
    "TrainState, adam": (partial(train_state, optax.adam(1e-3)), OPTIMISED),
    "TrainState, MultiSteps": (
        partial(train_state, optax.MultiSteps(optax.adam(1e-3), 2).gradient_transformation(), steps=0),
        OPTIMISED,
    ),
    "pure dict of the NNX model": (pure_model, frozenset()),
}
ORBAX_TREES = {
    "tuple-keyed flat dict": (lambda: flatten_dict({"params": PARAMS}), frozenset()),
    "nnx.state": (lambda: nnx.state(model()), frozenset()),
    "nnx.state, unstacked": (lambda: nnx.state(model().unstacked()), frozenset()),
    "nnx.to_flat_state as a dict": (lambda: dict(nnx.to_flat_state(nnx.state(model()))), frozenset()),
    "nnx.split": (lambda: nnx.split(model())[1], frozenset()),
    "nnx.split with dropout": (lambda: nnx.split(model(dropout_rate=0.1, rngs=nnx.Rngs(0)))[1], frozenset({"stream"})),
    "nnx model, optimizer, step": (nnx_training, frozenset({"optimizer", "step"})),
    "nnx.state of a tuple": (lambda: nnx.state((trained := model(), optimizer_of(trained))), frozenset({"1"})),
    "keys of random numbers": (
        lambda: {"params": PARAMS, "key": jax.random.key(0), "rng": jax.random.PRNGKey(0)},
        frozenset({"key", "rng"}),
    ),
}


# Flax


def to_bytes(folder: Path, tree: Any) -> Path:
    (folder / "flax_model.msgpack").write_bytes(serialization.to_bytes(tree))
    return folder / "flax_model.msgpack"


def to_bytes_in_chunks(folder: Path, tree: Any) -> Path:
    """As Flax writes arrays of more than a gigabyte."""
    usual, serialization.MAX_CHUNK_SIZE = serialization.MAX_CHUNK_SIZE, 64
    try:
        return to_bytes(folder, tree)
    finally:
        serialization.MAX_CHUNK_SIZE = usual


def msgpack_serialize(folder: Path, tree: Any) -> Path:
    (folder / "state").write_bytes(serialization.msgpack_serialize(serialization.to_state_dict(tree)))
    return folder / "state"


@contextlib.contextmanager
def flax_writes_msgpack():
    """As Flax's `save_checkpoint` was before it wrote Orbax."""
    before = flax.config.flax_use_orbax_checkpointing
    flax.config.update("flax_use_orbax_checkpointing", False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Flax Checkpointing will soon be deprecated")
            yield
    finally:
        flax.config.update("flax_use_orbax_checkpointing", before)


def save_checkpoint(folder: Path, tree: Any, step: int = 3, **options) -> Path:
    return Path(checkpoints.save_checkpoint(folder, tree, step, **options))


def save_old_checkpoint(folder: Path, tree: Any, step: int = 3, **options) -> Path:
    with flax_writes_msgpack():
        return save_checkpoint(folder, tree, step, **options)


def run_of(save: Callable[..., Path], prefix: str = "checkpoint_") -> Callable[[Path], Path]:
    """Steps 2 and 10, of which the second has WEIGHTS."""

    def write(folder: Path) -> Path:
        save(folder, {"params": AVERAGE_PARAMS}, 2, keep=2, prefix=prefix)
        save(folder, {"params": PARAMS}, 10, keep=2, prefix=prefix)
        return folder

    return write


# Orbax


def standard(folder: Path, tree: Any) -> Path:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", tree)
    return folder / "state"


def pytree(folder: Path, tree: Any, **options) -> Path:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as checkpointer:
        checkpointer.save(folder / "state", tree)
    return folder / "state"


def pytree_checkpointer(folder: Path, tree: Any) -> Path:
    ocp.PyTreeCheckpointer().save(folder / "state", tree)
    return folder / "state"


def manager(folder: Path, args: Any, steps: Mapping[int, Any] | None = None, **options) -> Path:
    """A run whose last step, 12, has `args`; the root of the run."""
    with ocp.CheckpointManager(folder / "run", options=ocp.CheckpointManagerOptions(**options)) as checkpoint_manager:
        for step, earlier in (steps or {}).items():
            checkpoint_manager.save(step, args=earlier)
        checkpoint_manager.save(12, args=args)
    return folder / "run"


def managed(folder: Path, tree: Any) -> Path:
    return manager(folder, ocp.args.StandardSave(tree))


def managed_by_loss(folder: Path) -> Path:
    options = ocp.CheckpointManagerOptions(best_fn=lambda metrics: metrics["loss"])
    with ocp.CheckpointManager(folder / "run", options=options) as checkpoint_manager:
        checkpoint_manager.save(12, args=ocp.args.StandardSave({"params": PARAMS}), metrics={"loss": 0.5})
    return folder / "run"


def composite(folder: Path, **items) -> Path:
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(folder / "state", args=ocp.args.Composite(**items))
    return folder / "state"


def unfinished_beside(folder: Path) -> Path:
    """A run that was killed while it wrote step 20."""
    root = manager(folder, ocp.args.StandardSave({"params": PARAMS}))
    (root / "20.orbax-checkpoint-tmp-5" / "default").mkdir(parents=True)
    (root / "20.orbax-checkpoint-tmp-5" / "default" / "manifest.ocdbt").touch()
    return root


def v1_save(folder: Path, tree: Any, **options) -> Path:
    saving = ocp_v1.options.ArrayOptions.Saving(**options)
    with ocp_v1.Context(array_options=ocp_v1.options.ArrayOptions(saving=saving)):
        ocp_v1.save(folder / "state", tree)
    return folder / "state"


def v1_save_pytree(folder: Path, tree: Any) -> Path:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Use `save` instead")
        ocp_v1.save_pytree(folder / "state", tree)
    return folder / "state"


def v1_checkpointables(folder: Path, **checkpointables) -> Path:
    ocp_v1.save_checkpointables(folder / "state", checkpointables)
    return folder / "state"


def v1_training(folder: Path, tree: Any) -> Path:
    with warnings.catch_warnings(), ocp_v1.training.Checkpointer(folder / "run") as checkpointer:
        warnings.filterwarnings("ignore", "Use `save` instead")
        checkpointer.save_pytree(3, {"params": AVERAGE_PARAMS})
        checkpointer.save_pytree(12, tree)
    return folder / "run"


# big_vision


def big_vision(folder: Path, tree: Any, step: int = 100) -> Path:
    """One zarr array per leaf, as big_vision writes them through JAX; the folder of the step."""
    target = folder / f"checkpoint.bv-{step:09}"
    leaves = {name.replace("/", "~"): jnp.asarray(leaf) for name, leaf in flatten_dict(tree, sep="/").items()}
    specs = [array_serialization.get_tensorstore_spec(str(target / name)) for name in leaves]
    writer = array_serialization.GlobalAsyncCheckpointManager()
    writer.serialize([*leaves.values()], specs, on_commit_callback=lambda: None)
    writer.wait_until_finished()
    (folder / "checkpoint.bv-LAST").write_text(f"{step:09}")
    return target


def big_vision_tree() -> dict:
    state = serialization.to_state_dict(optax.sgd(0.1, momentum=0.9, accumulator_dtype="bfloat16").init(PARAMS))
    return {"params": PARAMS, "opt": {"0": state["0"]}}


def big_vision_run(folder: Path) -> Path:
    big_vision(folder, {"params": AVERAGE_PARAMS}, 20)
    big_vision(folder, big_vision_tree())
    return folder


def sharded(folder: Path) -> None:
    """Arrays whose columns are on the devices of this process, by three writers into a folder each."""
    mesh = jax.make_mesh((jax.device_count(),), ("x",))

    def shard(array: np.ndarray) -> jax.Array:
        axes = ["x" if size % jax.device_count() == 0 else None for size in array.shape]
        first = axes.index("x") if "x" in axes else len(axes)
        spec = PartitionSpec(*("x" if i == first else None for i in range(len(axes))))
        return jax.device_put(array, NamedSharding(mesh, spec))

    tree = {"params": jax.tree.map(shard, Checkpoint.from_arrays(WIDE).as_linen()["params"])}
    for name, write in {"ocdbt": standard, "zarr": partial(pytree, use_ocdbt=False), "big_vision": big_vision}.items():
        (folder / name).mkdir()
        write(folder / name, tree)


# NumPy and pickles


def savez(folder: Path, arrays: Mapping[str, Any]) -> Path:
    np.savez(folder / "w.npz", **arrays)
    return folder / "w.npz"


def optimiser_arrays(prefix: str, *names: str) -> dict[str, np.ndarray]:
    return {f"{prefix}/{name}/{path}": 0 * array for name in names for path, array in WEIGHTS.items()}


def pickled(folder: Path, tree: Any) -> Path:
    (folder / "params.pkl").write_bytes(pickle.dumps(tree))
    return folder / "params.pkl"


def saved_as_object(folder: Path) -> Path:
    np.save(folder / "params.npy", PARAMS, allow_pickle=True)
    return folder / "params.npy"


def safetensors(folder: Path, arrays: Mapping[str, np.ndarray]) -> Path:
    from safetensors.numpy import save_file

    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, folder / "model.safetensors")
    return folder / "model.safetensors"


def safetensors_of_flax(folder: Path) -> Path:
    from safetensors.flax import save_file

    save_file(flatten_dict(jax.tree.map(jnp.asarray, PARAMS), sep="."), folder / "model.safetensors")
    return folder / "model.safetensors"
