"""load and save, in both frameworks."""

import numpy as np
import pytest
from conftest import GOLDENS, TINY, random_images, random_weights
from sides import checkpoint

import convert
import mixer_jax
from convert import Checkpoint, CheckpointError

SQUARE = GOLDENS["square"].weights_file
sides = pytest.mark.parametrize("side", ["flax", pytest.param("twin", marks=pytest.mark.torch)])


def home(side):
    if side == "flax":
        return mixer_jax
    from mixer_jax import torch_model

    return torch_model


def arrays_of(side, model):
    from mixer_jax import pretrained

    to_checkpoint = pretrained.to_checkpoint if side == "flax" else home(side).to_checkpoint
    return {name: np.asarray(array) for name, array in to_checkpoint(model).to("google").arrays.items()}


def dtype(side, name):
    if side == "flax":
        return name
    import torch

    return getattr(torch, name)


def is_training(side, model):
    return not model.deterministic if side == "flax" else model.training


@sides
def test_sizes_and_classes_are_read_off_the_file_and_the_mode_is_eval(side, square):
    model = home(side).load(SQUARE)
    assert model.config == square.config
    assert not is_training(side, model)
    model.train()
    assert is_training(side, model)
    loaded = arrays_of(side, model)
    assert all(np.array_equal(loaded[name], array) for name, array in square.weights.items())


@sides
@pytest.mark.parametrize("ending", [".npz", ".safetensors", pytest.param(".pt", marks=pytest.mark.torch), ""])
@pytest.mark.parametrize("layout", [None, "google", "flax", "timm"])
def test_what_is_saved_loads_as_the_same_model(tmp_path, side, ending, layout):
    model = home(side).load(checkpoint(random_weights(TINY), TINY.replace(gelu="exact", layer_norm_epsilon=1e-5)))
    model.labels, model.preprocessing = tuple("abcde"), "squash"
    path = tmp_path / f"w{ending}"
    home(side).save(model, path, layout=layout)
    usual = {".npz": "google", ".safetensors": "timm", ".pt": "timm", "": "flax"}[ending]
    assert convert.read(path).layout.name == (layout or usual)
    back = home(side).load(path)
    assert (back.config, back.labels, back.preprocessing) == (model.config, tuple("abcde"), "squash")
    one, other = arrays_of(side, model), arrays_of(side, back)
    assert all(np.array_equal(one[name], other[name]) for name in one)


@sides
def test_googles_file_loaded_and_saved_is_the_same_file(tmp_path, side, square):
    home(side).save(home(side).load(SQUARE), tmp_path / "w.npz")
    assert (tmp_path / "w.npz").read_bytes() == SQUARE.read_bytes()


@sides
def test_save_replaces_nothing_without_force(tmp_path, side):
    model = home(side).load(SQUARE)
    home(side).save(model, tmp_path / "w.npz")
    with pytest.raises(CheckpointError, match="exists already"):
        home(side).save(model, tmp_path / "w.npz")
    home(side).save(model, tmp_path / "w.npz", dtype="bfloat16", force=True)
    assert convert.read(tmp_path / "w.npz").dtype.name == "bfloat16"


@sides
def test_another_class_count_is_a_fresh_zero_head_and_said(side):
    with pytest.warns(UserWarning, match="google.npz: the head for 7 classes is now zeros for 3"):
        model = home(side).load(SQUARE, num_classes=3)
    assert model.config.num_classes == 3
    weights = arrays_of(side, model)
    assert not weights["head/kernel"].any()
    assert weights["head/kernel"].shape == (10, 3)
    assert home(side).load(SQUARE, num_classes=0).config.num_classes == 0


@sides
def test_options_reach_the_model(side):
    model = home(side).load(SQUARE, gelu="exact", layer_norm_epsilon=1e-5, image_size=(10, 40))
    assert model.config.gelu == "exact"
    assert model.config.layer_norm_epsilon == 1e-5
    assert model.config.grid == (2, 8)
    stored = home(side).load(SQUARE, param_dtype=dtype(side, "bfloat16"))
    assert {array.dtype.name for array in arrays_of(side, stored).values()} == {"bfloat16"}


@sides
def test_the_file_decides_what_weights_are_stored_in(tmp_path, side):
    convert.write(tmp_path / "half.npz", convert.read(SQUARE).astype("float16"))
    model = home(side).load(tmp_path / "half.npz")
    assert {array.dtype.name for array in arrays_of(side, model).values()} == {"float16"}


@sides
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "B/16"}, "not a Mixer-B/16"),
        ({"num_blocks": 3}, "found 2 blocks, wanted 3"),
        ({"image_size": 25}, "image size 25x25 does not fit"),
    ],
)
def test_what_the_file_is_not_is_refused(side, options, message):
    with pytest.raises(CheckpointError, match=f"^{SQUARE}: {message}"):
        home(side).load(SQUARE, **options)


@sides
def test_nonfinite_weights_need_the_flag(tmp_path, side):
    weights = random_weights(TINY)
    weights["head/bias"][2] = np.nan
    np.savez(tmp_path / "nan.npz", **weights)
    with pytest.raises(CheckpointError, match="nan.npz: head/bias: 1 NaN"):
        home(side).load(tmp_path / "nan.npz", image_size=(8, 15))
    model = home(side).load(tmp_path / "nan.npz", image_size=(8, 15), allow_nonfinite=True)
    assert np.isnan(arrays_of(side, model)["head/bias"][2])


def test_float64_files_need_a_word(tmp_path):
    import jax

    np.savez(tmp_path / "w.npz", **random_weights(TINY, dtype="float64"))
    with pytest.raises(CheckpointError, match="float64 weights, which no published Mixer has"):
        mixer_jax.load(tmp_path / "w.npz")
    assert mixer_jax.load(tmp_path / "w.npz", param_dtype="float32", image_size=(8, 15))
    with jax.enable_x64(True):
        model = mixer_jax.load(tmp_path / "w.npz", param_dtype="float64", image_size=(8, 15))
        assert arrays_of("flax", model)["head/bias"].dtype == np.float64


def test_rates_need_rngs_and_then_draw():
    from flax import nnx

    with pytest.raises(ValueError, match=r"dropout and stochastic depth need rngs, as in load\(..., rngs=flax.nnx.Rngs"):
        mixer_jax.load(SQUARE, dropout_rate=0.1)
    images = random_images(GOLDENS["square"].config)
    one, same, other = (
        mixer_jax.load(SQUARE, dropout_rate=0.3, stochastic_depth_rate=0.3, rngs=nnx.Rngs(seed)) for seed in (1, 1, 2)
    )
    plain = mixer_jax.load(SQUARE)
    assert np.array_equal(one(images), plain(images))
    for model in (one, same, other):
        model.train()
    drawn = one(images)
    assert np.array_equal(drawn, same(images))
    assert not np.array_equal(drawn, other(images))
    assert not np.array_equal(drawn, one(images))


@pytest.mark.torch
def test_the_twin_draws_after_train():
    from mixer_jax import torch_model

    model = torch_model.load(SQUARE, dropout_rate=0.3, stochastic_depth_rate=0.3).train()
    import torch

    images = torch.from_numpy(random_images(GOLDENS["square"].config)).permute(0, 3, 1, 2)
    assert not torch.equal(model(images), model(images))


def test_no_weight_is_initialised_to_be_thrown_away(monkeypatch):
    """An initialiser that ran on real numbers would hand out an array; under abstract creation it sees tracers only."""
    import jax
    from flax import nnx
    from jax._src import random  # where jax.nn.initializers draw; the second half shows that the watch works

    real = []
    draw = random.truncated_normal

    def watched(key, *arguments, **options):
        real.append(not isinstance(key, jax.core.Tracer))
        return draw(key, *arguments, **options)

    monkeypatch.setattr(random, "truncated_normal", watched)
    mixer_jax.load(SQUARE)
    assert not any(real)
    real.clear()
    mixer_jax.MlpMixer(TINY, rngs=nnx.Rngs(0))
    assert any(real)


@sides
def test_a_model_owns_its_weights(side):
    """Writing to the arrays a model was loaded from leaves the model alone."""
    weights = random_weights(TINY)
    model = home(side).load(checkpoint(weights, TINY))
    for array in weights.values():
        array[...] = 99
    assert max(np.abs(array).max() for array in arrays_of(side, model).values()) < 10


@sides
@pytest.mark.parametrize("fault", ["name", "shape", "dtype"])
def test_weights_that_do_not_fit_the_model_are_named(monkeypatch, side, fault):
    """Names, shapes and dtypes are checked against the model itself, since nnx.update takes any of them."""
    right = Checkpoint.to

    def wrong(self, layout):
        arrays = dict(right(self, layout).arrays)
        name = "head/bias" if layout == "flax" else "head.bias"
        value = np.asarray(arrays.pop(name))
        arrays |= {
            "name": {name + "x": value},
            "shape": {name: value[:-1]},
            "dtype": {name: value.astype("float16")},
        }[fault]
        other = object.__new__(Checkpoint)
        other.__dict__.update(right(self, layout).__dict__ | {"arrays": arrays})
        return other

    monkeypatch.setattr(Checkpoint, "to", wrong)
    with pytest.raises(CheckpointError, match=r"the weights do not fit the model\n  head.bias: found"):
        home(side).load(SQUARE)


def test_weights_go_where_sharding_says():
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(jax.devices()[:1]), ("x",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    asked = {}

    def place(name, shape):
        asked[name] = shape
        return NamedSharding(mesh, PartitionSpec("x")) if len(shape) > 1 else everywhere

    for sharding in (jax.devices()[0], everywhere, place):
        model = mixer_jax.load(SQUARE, sharding=sharding)
        kernel = model.blocks.token_mixing.dense_0.kernel[...]
        assert kernel.devices() == {jax.devices()[0]}
    assert kernel.sharding.spec == PartitionSpec("x")
    assert asked["blocks/token_mixing/dense_0/kernel"] == (2, 16, 6)


@pytest.mark.torch
def test_the_twin_goes_to_a_device():
    from mixer_jax import torch_model

    assert torch_model.load(SQUARE, device="cpu").head.weight.device.type == "cpu"
    assert torch_model.load(SQUARE, device="meta").head.weight.device.type == "meta"


def test_a_checkpoint_in_memory_loads_like_a_file(square):
    from_memory = mixer_jax.load(Checkpoint.from_arrays(square.weights))
    images = random_images(square.config)
    assert np.array_equal(from_memory(images), mixer_jax.load(SQUARE)(images))
