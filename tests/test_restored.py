"""What is written here, Flax and Orbax restore by themselves: into a Linen TrainState and into the state of an NNX model."""

import flax
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from conftest import GOLDENS
from flax import nnx, serialization
from flax.training.train_state import TrainState
from linen_mixer import MlpMixer as LinenMixer

import mixer_jax
from convert import Checkpoint
from convert.commands import convert_file

SQUARE = GOLDENS["square"]
PARAMS = Checkpoint.from_arrays(SQUARE.weights).as_linen()["params"]


def zeros(tree):
    return jax.tree.map(lambda array: jax.numpy.zeros(array.shape, array.dtype), tree)


def assert_equal(tree, other) -> None:
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    assert all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other)))


@pytest.fixture(scope="module")
def linen():
    """A TrainState whose parameters are zero, and the logits that Google's weights give."""
    network = LinenMixer(SQUARE.config)
    apply = jax.jit(network.apply)
    state = TrainState.create(apply_fn=apply, params=zeros(PARAMS), tx=optax.sgd(0.1, momentum=0.9))
    return state, apply({"params": PARAMS}, SQUARE.images)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The golden file in each format and layout that a JAX user restores."""
    folder = tmp_path_factory.mktemp("written")
    for name, layout in (("linen.msgpack", None), ("nnx.msgpack", "flax"), ("linen", "google"), ("nnx", None)):
        convert_file(SQUARE.weights_file, folder / name, layout=layout)
    return folder


@pytest.fixture(scope="module")
def abstract():
    """The graph and the abstract state of the model, as Flax's guide makes them."""
    return nnx.split(nnx.eval_shape(lambda: mixer_jax.MlpMixer(SQUARE.config, rngs=nnx.Rngs(0))))


@pytest.fixture(scope="module")
def logits():
    return mixer_jax.load(SQUARE.weights_file)(SQUARE.images)


def check_linen(linen, params) -> None:
    state, logits = linen
    assert_equal(jax.tree.map(np.asarray, params), PARAMS)
    state = state.replace(params=params)
    assert np.array_equal(state.apply_fn({"params": state.params}, SQUARE.images), logits)
    state = state.apply_gradients(grads=zeros(params))  # the tree is the optimiser's
    assert_equal(jax.tree.map(np.asarray, state.params), PARAMS)


def test_msgpack_is_restored_without_a_target(written, linen):
    check_linen(linen, serialization.msgpack_restore((written / "linen.msgpack").read_bytes())["params"])


@pytest.mark.parametrize("freeze", [flax.core.unfreeze, flax.core.freeze], ids=["dict", "FrozenDict"])
def test_msgpack_is_restored_into_linens_variables(written, linen, freeze):
    target = freeze({"params": zeros(PARAMS)})
    restored = serialization.from_bytes(target, (written / "linen.msgpack").read_bytes())
    assert type(restored) is type(target)
    check_linen(linen, flax.core.unfreeze(restored)["params"])


def test_msgpack_is_restored_into_a_train_states_parameters(written, linen):
    entries = serialization.msgpack_restore((written / "linen.msgpack").read_bytes())
    check_linen(linen, serialization.from_state_dict(linen[0].params, entries["params"]))


def test_msgpack_is_restored_into_the_pure_dict_of_an_nnx_state(written, abstract, logits):
    graph, state = abstract
    target = {"params": nnx.to_pure_dict(state)}
    restored = serialization.from_bytes(target, (written / "nnx.msgpack").read_bytes())["params"]
    nnx.replace_by_pure_dict(state, jax.tree.map(jax.numpy.asarray, restored))
    assert np.array_equal(nnx.merge(graph, state)(SQUARE.images), logits)


def test_orbax_is_restored_into_linens_parameters(written, linen):
    with ocp.StandardCheckpointer() as checkpointer:
        check_linen(linen, checkpointer.restore(written / "linen" / "params"))
        check_linen(linen, checkpointer.restore(written / "linen" / "params", jax.eval_shape(lambda: zeros(PARAMS))))


def test_orbax_is_restored_into_the_state_of_an_nnx_model(written, abstract, logits):
    graph, state = abstract
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(written / "nnx" / "params", state)
    assert np.array_equal(nnx.merge(graph, restored)(SQUARE.images), logits)
    model = mixer_jax.load(Checkpoint.from_arrays(zeros(PARAMS)))
    assert not np.array_equal(model(SQUARE.images), logits)
    nnx.update(model, restored)
    assert np.array_equal(model(SQUARE.images), logits)


def test_orbax_is_restored_as_an_item_of_its_folder(written, abstract, logits):
    graph, state = abstract
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        args = ocp.args.Composite(params=ocp.args.StandardRestore(state))
        restored = checkpointer.restore(written / "nnx", args=args)["params"]
    assert np.array_equal(nnx.merge(graph, restored)(SQUARE.images), logits)


def test_a_weight_in_a_wrong_place_would_be_noticed(linen):
    """Two LayerNorms have one shape, so no check of shapes tells them apart: the logits do."""
    state, logits = linen
    block = PARAMS["MixerBlock_0"]
    swapped = PARAMS | {"MixerBlock_0": block | {"LayerNorm_0": block["LayerNorm_1"], "LayerNorm_1": block["LayerNorm_0"]}}
    with pytest.raises(AssertionError):
        check_linen(linen, swapped)
    assert not np.array_equal(state.apply_fn({"params": swapped}, SQUARE.images), logits)
