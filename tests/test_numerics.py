"""Numerics, preprocessing and depth travel with the weights; numerics that a file does not state are assumed with a warning."""

import subprocess
import sys

import numpy as np
import pytest
from conftest import GOLDENS, TINY, random_images, random_weights
from implementations import checkpoint
from test_convert import endings, refuse_to_read

import convert
import mixer_jax
from convert import Checkpoint, CheckpointError, MixerConfig, NumericsAssumed, ReadOptions
from convert.__main__ import main

OTHERS = TINY.replace(gelu="exact", layer_norm_epsilon=3e-5)
SHALLOW = MixerConfig.named("S/32", image_size=32, num_classes=3).replace(num_blocks=2)
SQUARE = GOLDENS["square"].weights_file
TIMM = SQUARE.with_name("timm.safetensors")
frameworks = pytest.mark.parametrize("framework", ["flax", pytest.param("torch", marks=pytest.mark.torch)])
strict = pytest.mark.filterwarnings("error::convert.errors.NumericsAssumed")


def load(framework, source, **options):
    if framework == "torch":
        from mixer_jax import torch_pretrained

        return torch_pretrained.load(source, **options)
    return mixer_jax.load(source, **options)


@pytest.fixture
def pytorch():
    model = load("torch", checkpoint(random_weights(TINY), OTHERS))
    model.labels, model.preprocessing = tuple("abcde"), "squash"
    return model


def carries_all(checkpoint: Checkpoint) -> bool:
    metadata = checkpoint.metadata
    assert (metadata.gelu, metadata.layer_norm_epsilon, metadata.image_size) == ("exact", 3e-5, TINY.image_size)
    assert (metadata.preprocessing, metadata.labels) == ("squash", tuple("abcde"))
    return True


@pytest.mark.torch
@strict
def test_a_state_dict_carries_numerics_grid_preprocessing_and_labels(tmp_path, pytorch):
    import copy

    import torch

    state = pytorch.state_dict()
    assert carries_all(Checkpoint.from_arrays(state))
    assert carries_all(Checkpoint.from_arrays(copy.deepcopy(state)))
    assert carries_all(Checkpoint.from_arrays({"model": state, "step": 3}))
    assert carries_all(Checkpoint.from_arrays(torch.nn.DataParallel(pytorch).state_dict()))
    for name, saved in (("plain", state), ("nested", {"state_dict": state, "epoch": 3})):
        torch.save(saved, tmp_path / f"{name}.pt")
        assert carries_all(convert.read(tmp_path / f"{name}.pt"))
    assert mixer_jax.load(tmp_path / "plain.pt").config == OTHERS
    pytorch.load_state_dict(state, strict=True)


@pytest.mark.torch
def test_numerics_that_are_not_stated_are_assumed_with_one_warning(tmp_path, pytorch):
    import torch

    bare = dict(pytorch.state_dict())
    message = (
        r"does not state its numerics, so those of timm's own code are assumed: exact GELU, LayerNorm epsilon 1e-06; .*"
        r"--gelu and --layer-norm-epsilon, or ReadOptions\(gelu=..., layer_norm_epsilon=...\)"
    )
    with pytest.warns(NumericsAssumed, match=f"these arrays: {message}"):
        Checkpoint.from_arrays(bare)
    torch.save(bare, tmp_path / "bare.pt")
    with pytest.warns(NumericsAssumed, match=f"bare.pt: {message}") as warnings:
        mixer_jax.load(convert.read(tmp_path / "bare.pt", ReadOptions(image_size=TINY.image_size)))
    assert len(warnings) == 1


@strict
def test_stated_or_certain_numerics_give_no_warning(tmp_path):
    mixer_jax.load(SQUARE)  # google's names: all of Google's files have these numerics
    assert convert.read(TIMM, ReadOptions(gelu="exact", layer_norm_epsilon=1e-6)).config.gelu == "exact"
    for ending in (".npz", ".safetensors"):
        convert.write(tmp_path / f"w{ending}", convert.read(SQUARE), layout="timm")
        assert convert.read(tmp_path / f"w{ending}").metadata.gelu == "tanh"


def test_a_command_warns_once_of_assumed_numerics_and_takes_the_remedy(tmp_path):
    def warnings(*options):
        command = [sys.executable, "-m", "convert", TIMM, tmp_path / "w.npz", "--force", *options]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stderr.count("does not state its numerics")

    assert warnings() == 1
    assert convert.read(tmp_path / "w.npz").metadata.gelu == "exact"
    assert warnings("--gelu", "tanh", "--layer-norm-epsilon", "1e-6") == 0
    assert convert.read(tmp_path / "w.npz").metadata.gelu == "tanh"


def test_a_flax_models_bare_state_is_warned_of_and_its_checkpoint_is_not():
    from flax import nnx

    from mixer_jax.pretrained import to_checkpoint

    model = mixer_jax.load(checkpoint(random_weights(TINY), OTHERS))
    with pytest.warns(NumericsAssumed, match="those of flax's own code are assumed: tanh GELU"):
        Checkpoint.from_arrays(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    assert to_checkpoint(model).metadata.gelu == "exact"
    assert mixer_jax.load(to_checkpoint(model)).config == OTHERS


# Depth


@endings
def test_an_unusual_depth_is_confirmed_once(tmp_path, ending):
    np.savez(tmp_path / "unknown.npz", **random_weights(SHALLOW))
    with pytest.raises(CheckpointError, match="found 2 blocks, but Mixer-S, whose widths these are, has 8"):
        mixer_jax.load(tmp_path / "unknown.npz")
    model = mixer_jax.load(convert.read(tmp_path / "unknown.npz", ReadOptions(num_blocks=2)))
    path = tmp_path / f"ours{ending}"
    mixer_jax.save(model, path)
    assert mixer_jax.load(path).config.num_blocks == 2
    assert main(["inspect", str(path)]) == 0


def test_a_depth_in_memory_must_be_confirmed_and_agree_with_the_metadata():
    weights = Checkpoint.from_arrays(random_weights(SHALLOW))
    with pytest.raises(CheckpointError, match="found 2 blocks, but Mixer-S, whose widths these are, has 8"):
        mixer_jax.load(weights)
    assert mixer_jax.load(weights.with_metadata(num_blocks=2)).config.num_blocks == 2
    with pytest.raises(CheckpointError, match="found 2 blocks, but the metadata says 3"):
        Checkpoint.from_arrays(weights.arrays, metadata={"num_blocks": 3})


@pytest.mark.torch
def test_the_depth_of_a_new_model_is_confirmed(tmp_path):
    from flax import nnx

    from mixer_jax import torch_model, torch_pretrained

    mixer_jax.save(mixer_jax.MlpMixer(SHALLOW, rngs=nnx.Rngs(0)), tmp_path / "flax.npz")
    torch_pretrained.save(torch_model.MlpMixer(SHALLOW), tmp_path / "torch.safetensors")
    for name in ("flax.npz", "torch.safetensors"):
        assert torch_pretrained.load(tmp_path / name).config.num_blocks == 2


# What the loaders of both frameworks take


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["bfloat16", "bf16", np.float16, np.dtype("float32"), "torch.bfloat16", "jax.numpy.bfloat16"])
def test_a_dtype_of_any_framework_is_taken_by_both(square, dtype):
    import jax.numpy as jnp
    import torch

    value = {"torch.bfloat16": torch.bfloat16, "jax.numpy.bfloat16": jnp.bfloat16}.get(str(dtype), dtype)
    name = "bfloat16" if isinstance(dtype, str) else np.dtype(dtype).name
    images = random_images(square.config)
    flax = mixer_jax.load(SQUARE, dtype=value, param_dtype=value)
    assert flax.stem.kernel.dtype.name == name
    assert flax(images).shape == (2, 7)
    model = load("torch", SQUARE, dtype=value, param_dtype=value)
    assert model.head.weight.dtype == getattr(torch, name)
    assert model(torch.from_numpy(images).permute(0, 3, 1, 2)).shape == (2, 7)


@frameworks
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "complex64", "no such", np.int32])
def test_any_other_dtype_is_refused_at_once(framework, dtype):
    for option in ("dtype", "param_dtype"):
        with pytest.raises(ValueError, match=f"^{option} must be one of float16, bfloat16, float32, float64, not "):
            load(framework, SQUARE, **{option: dtype})


def test_a_file_with_several_sets_of_weights_or_float64_names_the_remedy(tmp_path):
    average = random_weights(TINY, seed=1)
    both = {f"model/{name}": a for name, a in random_weights(TINY).items()} | {f"ema/{name}": a for name, a in average.items()}
    np.savez(tmp_path / "two.npz", **both)
    refuse_to_read(tmp_path / "two.npz", "several sets of weights, ema, model: say which with --key or key=")
    options = ReadOptions(image_size=TINY.image_size, key="ema")
    model = mixer_jax.load(convert.read(tmp_path / "two.npz", options))
    assert np.array_equal(model.head.bias[...], average["head/bias"])
    np.savez(tmp_path / "wide.npz", **random_weights(TINY, dtype="float64"))
    refuse_to_read(tmp_path / "wide.npz", r"ReadOptions\(dtype='float64'\), or param_dtype='float64' of load")


@pytest.mark.parametrize("name", ["Mixer-B_16", "mixer_b16", "B/16"])
def test_a_name_that_is_no_file_lists_the_published_ones_nearest_first(name):
    with pytest.raises(CheckpointError, match="no such file or folder; published checkpoints, nearest first:") as error:
        mixer_jax.load(name)
    names = [line.strip() for line in str(error.value).splitlines()[1:]]
    assert sorted(names) == sorted(mixer_jax.list_models())
    assert "mixer-b_16" in names[0].lower() or "mixer_b16" in names[0]


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (SQUARE, {"num_classes": -1}, "num_classes must be a whole number of at least 0, not -1"),
        ("https://example.org/Mixer-B_16.npz", {}, "^https://example.org/Mixer-B_16.npz: an address, not a file"),
    ],
)
def test_a_class_count_below_zero_and_an_address_are_refused(source, options, message):
    with pytest.raises(CheckpointError, match=message):
        mixer_jax.load(source, **options)


@frameworks
def test_the_path_of_an_image_is_answered_with_the_function_to_use(framework):
    with pytest.raises(ValueError, match=r"not the path 'cat.jpg': mixer_jax.prepare\('cat.jpg', model\)\[None\]"):
        load(framework, SQUARE)("cat.jpg")


@pytest.mark.torch
def test_save_names_its_arguments_and_the_model_that_it_takes(tmp_path):
    from mixer_jax import torch_pretrained

    flax, pytorch = mixer_jax.load(SQUARE), load("torch", SQUARE)
    for save, model, other, whose in (
        (mixer_jax.save, flax, pytorch, "torch_pretrained.save"),
        (torch_pretrained.save, pytorch, flax, "mixer_jax.save"),
    ):
        with pytest.raises(TypeError, match=r"the model first and then the path, save\(model, 'w.npz'\)"):
            save("w.npz", model)
        with pytest.raises(TypeError, match=f"not mixer_jax.*MlpMixer; the other framework's is .*{whose}"):
            save(other, tmp_path / "w.npz")
    assert not list(tmp_path.iterdir())
