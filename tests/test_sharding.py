"""Weights and images on a mesh of eight simulated devices: the results of one device, and no collective beyond the sharding's.

The axes of a mesh are automatic (JAX's compiler shards what is computed) or explicit (shardings are part of an array's type).

As a script, in a process of its own, it prints a JSON line for each mesh.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import random_images, random_weights
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from PIL import Image
from test_mesh import ENVIRONMENT

import mixer_jax
from convert import Checkpoint, MixerConfig, write
from mixer_jax.sharding.digest import digests
from mixer_jax.sharding.placement import SIZES, Placement, mesh_of
from mixer_jax.sharding.replicas import Replicas, run_on_rows
from mixer_jax.training.freezing import named_weights
from mixer_jax.training.recipe import Recipe
from mixer_jax.training.states import States
from mixer_jax.training.step import initial_state, make_train_step, with_weights

CONFIG = MixerConfig.named("B/16", num_classes=8).replace(
    num_blocks=3, hidden_dim=32, tokens_mlp_dim=16, channels_mlp_dim=64, image_size=(8, 8), patch_size=(4, 4)
)
MESHES = [("data=8", False), ("data=8", True), ("data=2,model=4", False), ("data=2,model=4", True)]
COLLECTIVE = re.compile(r"= .*?\b(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
RECIPE = Recipe(total_steps=100, warmup_steps=1, ema_decay=0.9, accumulation=2)


def trained(dtype, placement=None, *, steps=10):
    """Logits by two ways, and the state after some steps with dropout and stochastic depth, by name."""
    checkpoint = Checkpoint.from_arrays(random_weights(CONFIG, dtype=dtype)).with_metadata(num_blocks=3)
    model = mixer_jax.load(
        checkpoint, sharding=placement, stochastic_depth_rate=0.3, dropout_rate=0.1, rngs=nnx.Rngs(0), precision="highest"
    )
    images, labels = random_images(CONFIG, 16, dtype=dtype), np.arange(16) % 8
    if placement is not None:
        images, labels = jax.device_put((images, labels), placement.images)
    results = {"compiled": mixer_jax.compiled(model)(images), "logits": jax.jit(lambda x: model(x))(images)}
    step, state = jax.jit(make_train_step(model, RECIPE), donate_argnums=0), initial_state(model, RECIPE)
    for _ in range(steps):
        state, _ = step(state, images, labels, jax.random.key(0, impl="threefry2x32"))
    results |= {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
    return {name: np.asarray(array) for name, array in results.items()}, state


def collectives(placement):
    """In the text of a forward pass and of a step; what is in a loop counts once."""
    model = mixer_jax.load(
        Checkpoint.from_arrays(random_weights(CONFIG)).with_metadata(num_blocks=3), sharding=placement, precision="highest"
    )
    recipe = Recipe(total_steps=10, warmup_steps=1)
    state = initial_state(model, recipe)
    images, labels = jax.device_put((random_images(CONFIG, 16), np.arange(16) % 8), placement.images)
    forward = jax.jit(lambda weights, images: with_weights(model, weights)(images)).lower(state.params, images)
    step = jax.jit(make_train_step(model, recipe)).lower(state, images, labels, jax.random.key(0))
    return [dict(Counter(COLLECTIVE.findall(each.compile().as_text()))) for each in (forward, step)]


def main():
    for dtype, axes in (("float64", AxisType.Auto), ("float64", AxisType.Explicit), ("float32", AxisType.Auto)):
        steps = 10 if dtype == "float64" else 0
        if axes == AxisType.Auto:
            one, _ = trained(dtype, steps=steps)
        for text, split in MESHES if axes == AxisType.Auto else MESHES[3:]:
            mesh = mesh_of(text).update(axis_types=(axes, axes))
            placement = Placement.checked(mesh, CONFIG, split_weights=split, batch_size=16)
            many, state = trained(dtype, placement, steps=steps)
            errors = {name: float(np.abs(many[name] - one[name]).max() / max(np.abs(one[name]).max(), 1e-30)) for name in one}
            own_bytes = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
            whole_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
            row = {"dtype": dtype, "axes": axes.name, "mesh": text, "split": split, "error": max(errors.values())}
            row |= {"logits": errors["logits"], "part": own_bytes / whole_bytes}
            kept = zip(jax.tree.leaves(state), jax.tree.leaves(placement.tree(state)))
            row["kept"] = all(leaf.sharding.is_equivalent_to(sharding, leaf.ndim) for leaf, sharding in kept)
            if dtype == "float32":
                row["forward"], row["step"] = collectives(placement)
            print(json.dumps(row))
    print(json.dumps({"restored": restored_elsewhere(state)}))
    print(json.dumps({"rows": in_rows()}))


def restored_elsewhere(state):
    """Whether a state that is split over eight devices has the same bits on other meshes, and on one device."""
    equal, devices = {}, jax.devices()
    targets = {text: Placement(mesh_of(text), split) for text, split in MESHES[1:3]}
    targets |= {"model=2": Placement(mesh_of("model=2", devices[:2])), "one": Placement(mesh_of(None, devices[:1]))}
    with tempfile.TemporaryDirectory() as folder:
        states = States(Path(folder))
        states.save(state)
        states.finish()
        for name, placement in targets.items():
            like = jax.device_put(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), state), placement.tree(state))
            restored = states.restore(like)
            assert jax.tree.map(lambda leaf: leaf.sharding, restored) == placement.tree(state)
            pairs = zip(jax.tree.leaves(restored), jax.tree.leaves(state))
            equal[name] = all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)
        states.close()
    return equal


def in_rows():
    """By mesh, the largest difference of an image's logits from those of one device."""
    checkpoint = Checkpoint.from_arrays(random_weights(CONFIG)).with_metadata(num_blocks=3, preprocessing="squash")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(folder, f"{i}.png")) for i in range(21)]
        for i, path in enumerate(paths):
            Image.fromarray(np.random.default_rng(i).integers(256, size=(9, 9, 3), dtype=np.uint8)).save(path)
        Path(paths[4]).write_bytes(b"no image")
        runs = {"one": mixer_jax.load(checkpoint)}
        runs |= {mesh: Replicas.load(checkpoint, mesh) for mesh in ("data=8", "data=2,model=4", "model=8")}
        results = {name: list(run_on_rows(model, paths, ["squash"], batch_size=2)) for name, model in runs.items()}
    for mesh, each in results.items():
        assert [result.path for result in each] == paths
        assert [i for i, result in enumerate(each) if result.error] == [4]
        pairs = [(a.logits[0], b.logits[0]) for a, b in zip(each, results["one"]) if not a.error]
        found[mesh] = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)
    return found


@pytest.fixture(scope="module")
def rows():
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=os.environ | ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_logits_and_ten_steps_are_those_of_one_device(rows):
    rows = [row for row in rows if "mesh" in row]
    assert len(rows) == 9
    assert max(row["error"] for row in rows if row["dtype"] == "float64") <= 1e-12  # measured: 2e-15
    assert max(row["logits"] for row in rows if row["dtype"] == "float32") <= 2e-6


@pytest.mark.parametrize("mesh", ["data=2,model=4", *(pytest.param(m, marks=pytest.mark.heavy) for m in ("data=8", "model=8"))])
def test_in_float32_every_operation_is_inside_the_tolerance_that_parity_derives(mesh, tmp_path):
    write(tmp_path / "w.npz", Checkpoint.from_arrays(random_weights(CONFIG)).with_metadata(num_blocks=3), layout="google")
    line = ["parity", tmp_path / "w.npz", "--b", "numpy", "--mesh", mesh, "--count", "8", "--depth", "3", "--json"]
    environment = os.environ | ENVIRONMENT | {"JAX_ENABLE_X64": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "mixer_jax", *line], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert json.loads(done.stdout)["passed"]


def test_with_explicit_axes_the_state_stays_where_the_placement_puts_it(rows):
    assert [row["kept"] for row in rows if row.get("axes") == "Explicit"] == [True]


def test_programs_have_the_collectives_that_the_sharding_calls_for(rows):
    """A kernel is gathered once in the forward pass and once more in the backward pass; an MLP sums once over model."""
    counts = {(row["mesh"], row["split"]): (row["forward"], row["step"]) for row in rows if "forward" in row}
    assert counts["data=8", False][0] == {}
    assert counts["data=8", False][1].keys() == {"all-reduce"}
    assert counts["data=8", True][0] == {"all-gather": 6}  # the stem, four kernels of the blocks in their loop, the head
    assert counts["data=8", True][1]["all-gather"] == 10
    assert counts["data=2,model=4", False][0] == {"all-reduce": 2}
    assert counts["data=2,model=4", True][0] == {"all-gather": 6, "all-reduce": 2}


def test_a_state_has_the_same_bits_on_any_mesh(rows):
    (equal,) = (row["restored"] for row in rows if "restored" in row)
    assert len(equal) == 4
    assert all(equal.values()), equal


def test_rows_of_a_mesh_give_the_logits_of_one_device(rows):
    (found,) = (row["rows"] for row in rows if "rows" in row)
    assert found.keys() == {"one", "data=8", "data=2,model=4", "model=8"}
    assert max(found.values()) <= 2e-6


def test_a_device_holds_its_part_of_the_state(rows):
    part = {(row["mesh"], row["split"]): row["part"] for row in rows if "mesh" in row}
    assert part["data=8", False] == 1
    assert part["data=8", True] < 0.25
    assert part["data=2,model=4", True] < part["data=2,model=4", False] < 0.6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data=3", "mesh data=3,model=1 is not of 8 devices, which there are"),
        ("data=2,rows=4", "mesh 'data=2,rows=4': 'rows' is not data=N or model=N"),
        ("data=0", "'data' is not data=N or model=N"),
    ],
)
def test_meshes_that_cannot_be_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        mesh_of(text, list(range(8)))


def test_a_width_or_a_batch_that_the_mesh_does_not_divide_is_named_with_what_does():
    class Mesh:
        def __init__(self, data, model):
            self.shape = {"data": data, "model": model}

    with pytest.raises(ValueError, match="tokens_mlp_dim 16 cannot be split into 3 parts; it can into 1, 2, 4, 8, 16"):
        Placement.checked(Mesh(1, 3), CONFIG)
    with pytest.raises(ValueError, match="hidden_dim 32 cannot be split into 5 parts"):
        Placement.checked(Mesh(5, 1), CONFIG.replace(tokens_mlp_dim=20, channels_mlp_dim=20), split_weights=True)
    with pytest.raises(ValueError, match="a batch of 6 images cannot be split over data=4"):
        Placement.checked(Mesh(4, 1), CONFIG, batch_size=6)


def test_a_digest_sees_every_bit_and_every_place():
    arrays = {"float32": np.arange(24, dtype=np.float32).reshape(2, 3, 4)}
    arrays |= {"bfloat16": jax.numpy.asarray(arrays["float32"], jax.numpy.bfloat16), "int32": np.arange(24, dtype=np.int32)}
    seen = []
    for name, array in arrays.items():
        values = np.array(array)
        seen.append(digests({name: array})[name])
        assert digests({name: jax.numpy.asarray(values)})[name] == seen[-1]
        for i in range(values.size):
            other = values.copy()
            other.reshape(-1).view(np.uint8)[i * other.itemsize] ^= 1
            seen.append(digests({name: other})[name])
        swapped = values.copy().reshape(-1)
        swapped[[3, 7]] = swapped[[7, 3]]
        seen.append(digests({name: swapped.reshape(values.shape)})[name])
    assert len(set(seen)) == len(seen) == 3 * 26


def test_the_table_names_weights_that_there_are():
    model = nnx.eval_shape(lambda: mixer_jax.MlpMixer(CONFIG, rngs=nnx.Rngs(0)))
    names = {name.removeprefix("blocks/") for name in named_weights(model)}
    assert SIZES.keys() <= names
    placement = Placement(mesh_of(devices=jax.devices()[:1]), split_weights=True)
    stacked, one = (placement(name, (1,) * n) for name, n in [("blocks/token_mixing/dense_1/kernel", 3), ("head/bias", 1)])
    assert stacked == NamedSharding(placement.mesh, P(None, ("model", "data"), None))
    assert one.spec == P(None) or one.spec == P()


if __name__ == "__main__":
    main()
