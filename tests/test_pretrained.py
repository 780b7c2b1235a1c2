"""load and save, in both frameworks."""

from types import SimpleNamespace

import numpy as np
import pytest
from conftest import GOLDENS, TINY, both, random_images, random_weights
from implementations import checkpoint

import convert
import mixer_jax
from convert import Checkpoint, CheckpointError, ReadOptions

pytestmark = pytest.mark.usefixtures("unoptimised")
SQUARE = GOLDENS["square"].weights_file


def module(framework):
    """Where `load`, `save` and `to_checkpoint` of a framework are."""
    if framework == "flax":
        from mixer_jax import pretrained

        return pretrained
    from mixer_jax import torch_pretrained

    return torch_pretrained


def arrays_of(framework, model):
    return module(framework).to_checkpoint(model).to("google").as_numpy()


def is_training(model):
    return not model.deterministic if hasattr(model, "deterministic") else model.training


@both
@pytest.mark.parametrize("source", [SQUARE, Checkpoint.from_arrays(GOLDENS["square"].weights)], ids=["file", "memory"])
def test_sizes_and_classes_are_read_off_the_weights_and_the_mode_is_eval(framework, source, square):
    model = module(framework).load(source)
    assert model.config == square.config
    assert not is_training(model)
    model.train()
    assert is_training(model)
    loaded = arrays_of(framework, model)
    assert all(np.array_equal(loaded[name], array) for name, array in square.weights.items())


@both
@pytest.mark.parametrize("ending", [".npz", ".safetensors", pytest.param(".pt", marks=pytest.mark.torch), ""])
@pytest.mark.parametrize("layout", [None, "google", "flax", "timm"])
def test_what_is_saved_loads_as_the_same_model(tmp_path, framework, ending, layout):
    model = module(framework).load(checkpoint(random_weights(TINY), TINY.replace(gelu="exact", layer_norm_epsilon=1e-5)))
    model.labels, model.preprocessing = tuple("abcde"), "squash"
    path = tmp_path / f"w{ending}"
    module(framework).save(model, path, layout=layout)
    usual = {".npz": "google", ".safetensors": "timm", ".pt": "timm", "": "flax"}[ending]
    assert convert.read(path).layout.name == (layout or usual)
    loaded = module(framework).load(path)
    assert (loaded.config, loaded.labels, loaded.preprocessing) == (model.config, tuple("abcde"), "squash")
    arrays, others = arrays_of(framework, model), arrays_of(framework, loaded)
    assert all(np.array_equal(arrays[name], others[name]) for name in arrays)


@both
def test_googles_file_loaded_and_saved_is_the_same_file_which_nothing_replaces_without_force(tmp_path, framework):
    model, path = module(framework).load(SQUARE), tmp_path / "w.npz"
    module(framework).save(model, path)
    assert path.read_bytes() == SQUARE.read_bytes()
    with pytest.raises(CheckpointError, match="exists already"):
        module(framework).save(model, path)
    module(framework).save(model, path, dtype="bfloat16", force=True)
    assert convert.read(path).dtype.name == "bfloat16"


@both
def test_another_class_count_is_a_new_head_of_zeros_with_a_warning(framework):
    with pytest.warns(UserWarning, match="google.npz: the head for 7 classes is now zeros for 3"):
        model = module(framework).load(SQUARE, num_classes=3)
    assert model.config.num_classes == 3
    weights = arrays_of(framework, model)
    assert not weights["head/kernel"].any()
    assert weights["head/kernel"].shape == (10, 3)
    assert module(framework).load(SQUARE, num_classes=0).config.num_classes == 0


@both
def test_what_the_file_is_read_with_reaches_the_model(framework):
    options = ReadOptions(gelu="exact", layer_norm_epsilon=1e-5, image_size=(10, 40))
    config = module(framework).load(convert.read(SQUARE, options)).config
    assert (config.gelu, config.layer_norm_epsilon, config.grid) == ("exact", 1e-5, (2, 8))


@both
def test_weights_have_the_files_dtype_or_param_dtype(tmp_path, framework):
    convert.write(tmp_path / "half.npz", convert.read(SQUARE).astype("float16"))
    for source, options, dtype in (
        (tmp_path / "half.npz", {}, "float16"),
        (SQUARE, {"param_dtype": "bfloat16"}, "bfloat16"),
        (convert.read(SQUARE), {"param_dtype": "bfloat16"}, "bfloat16"),
    ):
        model = module(framework).load(source, **options)
        assert {array.dtype.name for array in arrays_of(framework, model).values()} == {dtype}


def test_float64_files_need_a_dtype(tmp_path):
    import jax

    np.savez(tmp_path / "w.npz", **random_weights(TINY, dtype="float64"))
    with pytest.raises(CheckpointError, match="float64 weights, which no published Mixer has"):
        mixer_jax.load(tmp_path / "w.npz")

    def read(dtype):
        return convert.read(tmp_path / "w.npz", ReadOptions(dtype=dtype, image_size=TINY.image_size))

    assert arrays_of("flax", mixer_jax.load(read("float32")))["head/bias"].dtype == np.float32
    with jax.enable_x64(True):
        assert arrays_of("flax", mixer_jax.load(read("float64")))["head/bias"].dtype == np.float64


def test_rates_need_rngs_and_then_draw():
    from flax import nnx

    with pytest.raises(ValueError, match=r"dropout and stochastic depth need rngs, as in load\(..., rngs=flax.nnx.Rngs"):
        mixer_jax.load(SQUARE, dropout_rate=0.1)
    images = random_images(GOLDENS["square"].config)
    one, same, other = (
        mixer_jax.load(SQUARE, dropout_rate=0.3, stochastic_depth_rate=0.3, rngs=nnx.Rngs(seed)) for seed in (1, 1, 2)
    )
    assert np.array_equal(one(images), mixer_jax.load(SQUARE)(images))
    for model in (one, same, other):
        model.train()
    logits = one(images)
    assert np.array_equal(logits, same(images))
    assert not np.array_equal(logits, other(images))
    assert not np.array_equal(logits, one(images))


@pytest.mark.torch
def test_the_pytorch_model_draws_after_train():
    import torch

    from mixer_jax import torch_pretrained

    model = torch_pretrained.load(SQUARE, dropout_rate=0.3, stochastic_depth_rate=0.3).train()
    images = torch.from_numpy(random_images(GOLDENS["square"].config)).permute(0, 3, 1, 2)
    assert not torch.equal(model(images), model(images))


def test_no_weight_is_initialised_to_be_thrown_away(caplog):
    """Loading compiles nothing, and random numbers would have to be compiled."""
    import jax
    from flax import nnx

    def compiled():
        return [message for record in caplog.records if "Compiling" in (message := record.getMessage())]

    jax.clear_caches()
    with jax.log_compiles():
        mixer_jax.load(SQUARE)
        assert compiled() == []
        mixer_jax.MlpMixer(TINY, rngs=nnx.Rngs(0))  # sabotage: initialisation shows
    assert any("normal" in message for message in compiled())


@both
def test_a_model_owns_its_weights(framework):
    """Writing to the arrays a model was loaded from leaves the model alone."""
    weights = random_weights(TINY)
    model = module(framework).load(checkpoint(weights, TINY))
    for array in weights.values():
        array[...] = 99
    assert max(np.abs(array).max() for array in arrays_of(framework, model).values()) < 10


@both
@pytest.mark.parametrize("fault", ["name", "shape", "dtype"])
def test_weights_that_do_not_fit_the_model_are_named(monkeypatch, framework, fault):
    """Names, shapes and dtypes are checked against the model itself, since nnx.update takes any of them."""
    converted = Checkpoint.to

    def faulty(self, layout):
        right = converted(self, layout)
        name = "head/bias" if layout == "flax" else "head.bias"
        arrays = dict(right.arrays)
        value = np.asarray(arrays.pop(name))
        arrays |= {
            "name": {name + "x": value},
            "shape": {name: value[:-1]},
            "dtype": {name: value.astype("float16")},
        }[fault]
        return SimpleNamespace(**vars(right) | {"arrays": arrays, "config": right.config, "dtype": right.dtype})

    monkeypatch.setattr(Checkpoint, "to", faulty)
    with pytest.raises(CheckpointError, match=r"the weights do not fit the model\n  head.bias: found"):
        module(framework).load(SQUARE)


def test_weights_go_where_sharding_says():
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(jax.devices()[:1]), ("x",))
    everywhere, shapes = NamedSharding(mesh, PartitionSpec()), {}

    def place(name, shape):
        shapes[name] = shape
        return NamedSharding(mesh, PartitionSpec("x")) if len(shape) > 1 else everywhere

    for sharding in (jax.devices()[0], everywhere, place):
        kernel = mixer_jax.load(SQUARE, sharding=sharding).blocks.token_mixing.dense_0.kernel[...]
        assert kernel.devices() == {jax.devices()[0]}
    assert kernel.sharding.spec == PartitionSpec("x")
    assert shapes["blocks/token_mixing/dense_0/kernel"] == (2, 16, 6)


@pytest.mark.torch
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_pytorch_model_goes_to_a_device(device):
    from mixer_jax import torch_pretrained

    assert torch_pretrained.load(SQUARE, device=device).head.weight.device.type == device
