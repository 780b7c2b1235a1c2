"""The Flax model under every transform of JAX: as a closure, as an argument, with Flax's own, in eval and train mode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY as THREE_BLOCKS
from conftest import random_images, random_weights
from flax import nnx
from implementations import checkpoint, of_numpy

import mixer_jax

pytestmark = pytest.mark.usefixtures("unoptimised")
TINY = THREE_BLOCKS.replace(num_blocks=2)
WEIGHTS = random_weights(TINY, dtype="float64")
IMAGES = random_images(TINY, 3, dtype="float64")
TOLERANCE = 1e-12  # relative to max abs; measured: 3e-15


RATES = {"dropout_rate": 0.3, "stochastic_depth_rate": 0.6}


def key():
    return jax.random.key(7, impl="unsafe_rbg")  # compiles in a fraction of the time of the default generator


def load(kind: str = "stacked", mode: str = "eval", dtype: str = "float32", **options) -> mixer_jax.MlpMixer:
    rates = RATES | {"rngs": nnx.Rngs(0)} if mode == "train" else {}
    model = mixer_jax.load(checkpoint(WEIGHTS, TINY), param_dtype=dtype, **rates, **options)
    if mode == "train":
        model.train()
    return model.unstacked() if kind == "unstacked" else model


@pytest.fixture(params=["stacked", pytest.param("unstacked", marks=pytest.mark.heavy)])
def kind(request):
    return request.param


@pytest.fixture(params=["eval", "train"])
def model_and_call(request, kind):
    """A model in a mode, and how it is called there: with a key where it draws."""
    with jax.enable_x64(True):
        options = {} if request.param == "eval" else {"rngs": key()}
        yield load(kind, request.param, "float64"), lambda model, images: model(images, **options)


def same(actual, expected):
    expected = np.asarray(expected)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= TOLERANCE * np.abs(expected).max()
    return True


def test_every_transform_with_the_model_as_a_closure_gives_what_a_call_gives(model_and_call):
    model, call = model_and_call
    images, direction = jnp.asarray(IMAGES), jnp.asarray(random_images(TINY, 3, seed=5, dtype="float64"))

    def plain(images):
        return call(model, images)

    logits = plain(images)
    if model.deterministic:
        assert same(logits, of_numpy(WEIGHTS, IMAGES, TINY))
    assert same(jax.jit(plain)(images), logits)
    assert jax.eval_shape(plain, images).shape == logits.shape
    assert "dot_general" in str(jax.make_jaxpr(plain)(images))
    exported = jax.export.deserialize(jax.export.export(jax.jit(plain))(images).serialize())
    assert same(exported.call(images), logits)

    # Derivatives, against central differences along one direction.
    step = 1e-5
    slope = (plain(images + step * direction) - plain(images - step * direction)) / (2 * step)
    value, forward = jax.jvp(plain, (images,), (direction,))
    assert same(value, logits)
    assert np.abs(forward - slope).max() <= 1e-7 * np.abs(slope).max()  # measured: 1e-9
    gradient = jax.jit(jax.grad(lambda images: plain(images).sum()))(images)
    assert same(jnp.vdot(gradient, direction), forward.sum())
    for jacobian in (jax.jacrev, jax.jacfwd):
        assert same(jnp.einsum("bknhwc,nhwc->bk", jax.jit(jacobian(plain))(images), direction), forward)


def test_vmap_over_images_gives_what_the_batch_gives(kind):
    with jax.enable_x64(True):
        model = load(kind, dtype="float64")
        assert same(jax.vmap(lambda image: model(image[None])[0])(IMAGES), model(IMAGES))
        gradients = jax.vmap(jax.grad(lambda image: model(image[None]).sum()))(IMAGES)
        assert same(gradients, jax.grad(lambda images: model(images).sum())(jnp.asarray(IMAGES)))


def test_every_transform_of_the_model_itself(kind):
    with jax.enable_x64(True):
        model = load(kind, dtype="float64")
        logits, features = model(IMAGES), model.features(IMAGES)
        assert same(jax.jit(model)(IMAGES), logits)
        assert same(jax.jit(model.features)(IMAGES), features)
        assert jax.eval_shape(model, IMAGES).shape == logits.shape
        assert same(jax.export.export(jax.jit(model))(IMAGES).call(IMAGES), logits)


def test_every_transform_with_the_model_as_an_argument(model_and_call):
    model, call = model_and_call
    logits = call(model, IMAGES)
    assert same(jax.jit(call)(model, IMAGES), logits)
    assert same(nnx.jit(call)(model, IMAGES), logits)
    graphdef, parameters, rest = nnx.split(model, nnx.Param, ...)
    ensemble = jax.tree.map(lambda leaf: np.stack([leaf, 2 * leaf]), parameters)
    members = jax.jit(jax.vmap(lambda parameters: call(nnx.merge(graphdef, parameters, rest), IMAGES)))(ensemble)
    assert same(members[0], logits)
    assert not np.allclose(members[1], logits)

    def loss(model):
        return (call(model, IMAGES) ** 2).sum()

    gradients = jax.jit(jax.grad(lambda parameters: loss(nnx.merge(graphdef, parameters, rest))))(parameters)
    pairs = list(zip(*map(jax.tree.leaves, (gradients, nnx.jit(nnx.grad(loss))(model))), strict=True))
    assert len(pairs) > 10
    max_abs = max(float(np.abs(leaf).max()) for leaf, _ in pairs)  # of all: some are zero but for rounding
    assert max(float(np.abs(a - b).max()) for a, b in pairs) <= TOLERANCE * max_abs


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_stacked_and_unstacked_with_and_without_remat_have_one_gradient(mode):
    options = {"rngs": key()} if mode == "train" else {}

    def gradient(kind, remat):
        model = load(kind, mode, "float64", remat=remat)
        return np.asarray(jax.jit(jax.grad(lambda images: (model(images, **options) ** 2).sum()))(IMAGES))

    with jax.enable_x64(True):
        gradients = [gradient(kind, remat) for kind in ("stacked", "unstacked") for remat in (False, True)]
    assert all(same(other, gradients[0]) for other in gradients)


def test_an_unstacked_model_with_remat_recomputes_each_block():
    def checkpoints(remat):
        model = load("unstacked", remat=remat)
        gradient = jax.make_jaxpr(jax.grad(lambda images: model(images).sum()))(jnp.asarray(random_images(TINY)))
        return sum(equation.primitive.name in ("checkpoint", "remat2") for equation in gradient.eqns)

    assert (checkpoints(False), checkpoints(True)) == (0, TINY.num_blocks)


def test_a_key_decides_what_is_drawn_and_the_stream_stays():
    model, images = load(mode="train"), random_images(TINY)
    count = int(model.stream.count[...])
    one, same_key, other = (model(images, rngs=jax.random.key(seed)) for seed in (1, 1, 2))
    assert int(model.stream.count[...]) == count
    assert np.array_equal(one, same_key)
    assert not np.array_equal(one, other)
    assert not np.array_equal(model(images, rngs=nnx.Rngs(3)), model(images, rngs=nnx.Rngs(4)))
    model.eval()
    assert np.array_equal(model(images, rngs=jax.random.key(1)), model(images))


def test_drawing_from_the_models_own_stream_inside_a_plain_transform_is_refused_with_advice(kind):
    model, images = load(kind, "train"), random_images(TINY)
    with pytest.raises(ValueError, match=r"give the call a key, model\(images, rngs=key\), or use Flax's transforms"):
        jax.jit(model)(images)
    assert jax.jit(lambda images, key: model(images, rngs=key))(images, key()).shape == (2, 5)


def test_a_second_call_outside_jit_compiles_nothing(caplog):
    model, images = load(), jnp.asarray(random_images(TINY))

    def compiled():
        return [record for record in caplog.records if "Compiling" in record.getMessage()]

    model(images)
    with jax.log_compiles():
        model(images)
        assert not compiled()
        jax.jit(lambda images: model(images))(images)  # sabotage: compiling shows
    assert compiled()


def test_a_block_is_counted_as_a_list_counts(kind):
    model, x = load(kind), jnp.ones((1, TINY.num_tokens, TINY.hidden_dim))
    last = model.block(1)(x)
    assert np.array_equal(last, model.block(-1)(x))
    assert not np.array_equal(last, model.block(0)(x))
    for index in (2, 7, -3):
        with pytest.raises(IndexError, match=f"no block {index}: this model has 2, counted from 0"):
            model.block(index)


def test_an_unstacked_model_shares_no_weight_with_the_one_it_was_made_of():
    model, images = load(), random_images(TINY)
    other, before = model.unstacked(), np.asarray(model(images))

    def add_one(model):
        for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
            variable[...] = variable[...] + 1

    add_one(other)
    assert np.array_equal(model(images), before)
    assert not np.allclose(other(images), before)
    add_one(model)
    assert np.array_equal(model.unstacked()(images), other(images))


@pytest.mark.parametrize("ending", [".npz", ".safetensors", ""])
def test_an_unstacked_model_saves_as_the_stacked_one_does(tmp_path, ending):
    for kind in ("stacked", "unstacked"):
        mixer_jax.save(load(kind), tmp_path / f"{kind}{ending}")
    one, other = (mixer_jax.load(tmp_path / f"{kind}{ending}") for kind in ("stacked", "unstacked"))
    assert one.config == other.config
    for (_, a), (_, b) in zip(*(nnx.to_flat_state(nnx.state(model, nnx.Param)) for model in (one, other)), strict=True):
        assert np.array_equal(a[...], b[...])
