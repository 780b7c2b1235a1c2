"""Numerics, preprocessing and depth travel with the weights; what nothing states is said to be assumed."""

import subprocess
import sys

import numpy as np
import pytest
from conftest import GOLDENS, TINY, random_images, random_weights
from sides import checkpoint

import convert
import mixer_jax
from convert import Checkpoint, CheckpointError, MixerConfig, NumericsAssumed
from convert.__main__ import main

OTHERS = TINY.replace(gelu="exact", layer_norm_epsilon=3e-5)
SHALLOW = MixerConfig.named("S/32", image_size=32, num_classes=3).replace(num_blocks=2)


@pytest.fixture
def pytorch():
    pytest.importorskip("torch")
    from mixer_jax import torch_model

    model = torch_model.load(checkpoint(random_weights(TINY), OTHERS))
    model.labels, model.preprocessing = tuple("abcde"), "squash"
    return model


def carries_all(found: Checkpoint) -> bool:
    metadata = found.metadata
    assert (metadata.gelu, metadata.layer_norm_epsilon, metadata.image_size) == ("exact", 3e-5, TINY.image_size)
    assert (metadata.preprocessing, metadata.labels) == ("squash", tuple("abcde"))
    return True


@pytest.mark.torch
@pytest.mark.filterwarnings("error::convert.errors.NumericsAssumed")
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
    back = mixer_jax.load(tmp_path / "plain.pt")
    assert (back.config, back.preprocessing) == (OTHERS, "squash")
    pytorch.load_state_dict(state, strict=True)


@pytest.mark.torch
def test_without_it_the_guess_is_said_with_the_remedy(tmp_path, pytorch):
    import torch

    bare = dict(pytorch.state_dict())
    message = (
        r"nothing states its numerics, so those of timm's own code are assumed: exact GELU, LayerNorm epsilon 1e-06; .*gelu="
    )
    with pytest.warns(NumericsAssumed, match=f"these arrays: {message}"):
        Checkpoint.from_arrays(bare)
    torch.save(bare, tmp_path / "bare.pt")
    with pytest.warns(NumericsAssumed, match=f"bare.pt: {message}") as said:
        mixer_jax.load(tmp_path / "bare.pt", image_size=TINY.image_size)
    assert len(said) == 1


@pytest.mark.filterwarnings("error::convert.errors.NumericsAssumed")
def test_what_is_stated_or_certain_is_not_warned_of(tmp_path):
    mixer_jax.load(GOLDENS["square"].weights_file)  # google's names: all of Google's files have these numerics
    timm = GOLDENS["square"].weights_file.with_name("timm.safetensors")
    assert mixer_jax.load(timm, gelu="exact", layer_norm_epsilon=1e-6).config.gelu == "exact"
    for ending in (".npz", ".safetensors"):
        convert.write(tmp_path / f"w{ending}", convert.read(GOLDENS["square"].weights_file), layout="timm")
        assert convert.read(tmp_path / f"w{ending}").metadata.gelu == "tanh"


def test_a_command_says_once_what_it_assumes_and_takes_the_remedy(tmp_path):
    timm = GOLDENS["square"].weights_file.with_name("timm.safetensors")

    def notes(*options):
        command = [sys.executable, "-m", "convert", timm, tmp_path / "w.npz", "--force", *options]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stderr.count("nothing states its numerics")

    assert notes() == 1
    assert convert.read(tmp_path / "w.npz").metadata.gelu == "exact"
    assert notes("--gelu", "tanh", "--layer-norm-epsilon", "1e-6") == 0
    assert convert.read(tmp_path / "w.npz").metadata.gelu == "tanh"


def test_a_flax_models_bare_state_is_said_to_be_assumed_and_its_checkpoint_is_not():
    from flax import nnx

    from mixer_jax.pretrained import to_checkpoint

    model = mixer_jax.load(checkpoint(random_weights(TINY), OTHERS))
    with pytest.warns(NumericsAssumed, match="those of flax's own code are assumed: tanh GELU"):
        Checkpoint.from_arrays(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    assert to_checkpoint(model).metadata.gelu == "exact"
    assert mixer_jax.load(to_checkpoint(model)).config == OTHERS


@pytest.mark.parametrize("ending", [".npz", ".safetensors", pytest.param(".pt", marks=pytest.mark.torch), ""])
def test_an_unusual_depth_is_asked_for_once(tmp_path, ending):
    np.savez(tmp_path / "unknown.npz", **random_weights(SHALLOW))
    with pytest.raises(CheckpointError, match="found 2 blocks, but Mixer-S, whose widths these are, has 8"):
        mixer_jax.load(tmp_path / "unknown.npz")
    found = convert.read(tmp_path / "unknown.npz", num_blocks=2)
    model = mixer_jax.load(found)
    path = tmp_path / f"ours{ending}"
    mixer_jax.save(model, path)
    assert mixer_jax.load(path).config.num_blocks == 2
    assert main(["inspect", str(path)]) == 0


@pytest.mark.torch
def test_the_depth_of_a_new_model_is_meant(tmp_path):
    from flax import nnx

    from mixer_jax import torch_model

    mixer_jax.save(mixer_jax.MlpMixer(SHALLOW, rngs=nnx.Rngs(0)), tmp_path / "flax.npz")
    torch_model.save(torch_model.MlpMixer(SHALLOW), tmp_path / "torch.safetensors")
    for name in ("flax.npz", "torch.safetensors"):
        assert torch_model.load(tmp_path / name).config.num_blocks == 2


def test_a_file_that_lost_a_block_of_the_depth_it_states_is_refused():
    whole = checkpoint(random_weights(SHALLOW.replace(num_blocks=3)), SHALLOW.replace(num_blocks=3))
    arrays = {name: array for name, array in whole.arrays.items() if "MixerBlock_2" not in name}
    with pytest.raises(CheckpointError, match="found 2 blocks, and 3 are stated"):
        Checkpoint.from_arrays(arrays, said={"num_blocks": 3})


@pytest.mark.parametrize(
    "dtype", ["bfloat16", "float32", np.float16, np.dtype("float32"), "torch.bfloat16", "jax.numpy.bfloat16"]
)
@pytest.mark.torch
def test_a_dtype_of_either_framework_or_numpys_is_taken_by_both(dtype):
    import jax.numpy as jnp
    import torch

    from mixer_jax import torch_model

    value = (
        {"torch.bfloat16": torch.bfloat16, "jax.numpy.bfloat16": jnp.bfloat16}.get(dtype, dtype)
        if isinstance(dtype, str)
        else dtype
    )
    name = dtype.rpartition(".")[2] if isinstance(dtype, str) else np.dtype(dtype).name
    square = GOLDENS["square"]
    flax = mixer_jax.load(square.weights_file, dtype=value, param_dtype=value)
    assert flax.stem.kernel.dtype.name == name
    assert flax(random_images(square.config)).shape == (2, 7)
    model = torch_model.load(square.weights_file, dtype=value, param_dtype=value)
    assert model.head.weight.dtype == getattr(torch, name)
    assert model(torch.from_numpy(random_images(square.config)).permute(0, 3, 1, 2)).shape == (2, 7)


@pytest.mark.parametrize("side", ["flax", pytest.param("pytorch", marks=pytest.mark.torch)])
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "complex64", "no such", np.int32])
def test_any_other_dtype_is_refused_at_once(side, dtype):
    if side == "flax":
        home = mixer_jax
    else:
        from mixer_jax import torch_model as home
    for option in ("dtype", "param_dtype"):
        with pytest.raises(ValueError, match=f"^{option} must be one of float16, bfloat16, float32, float64, not "):
            home.load(GOLDENS["square"].weights_file, **{option: dtype})


def test_loaders_name_what_they_take(tmp_path):
    both = {"model": random_weights(TINY), "ema": random_weights(TINY, seed=1)}
    np.savez(tmp_path / "two.npz", **{f"{k}/{name}": a for k, arrays in both.items() for name, a in arrays.items()})
    with pytest.raises(CheckpointError, match="several sets of weights, ema, model: say which with --key or key="):
        mixer_jax.load(tmp_path / "two.npz", image_size=TINY.image_size)
    model = mixer_jax.load(tmp_path / "two.npz", image_size=TINY.image_size, key="ema")
    assert np.array_equal(model.head.bias[...], both["ema"]["head/bias"])
    np.savez(tmp_path / "wide.npz", **random_weights(TINY, dtype="float64"))
    with pytest.raises(CheckpointError, match="dtype='float64' of convert.read, and param_dtype='float64' of load"):
        mixer_jax.load(tmp_path / "wide.npz")


@pytest.mark.parametrize("name", ["Mixer-B_16", "mixer_b16", "B/16"])
def test_a_name_that_is_no_file_lists_the_published_ones_nearest_first(name):
    with pytest.raises(CheckpointError, match="no such file or folder; published checkpoints, nearest first:") as error:
        mixer_jax.load(name)
    names = [line.strip() for line in str(error.value).splitlines()[1:]]
    assert sorted(names) == sorted(mixer_jax.list_models())
    assert "b" in names[0].lower()
    assert names[0].lower().replace("_", "").rstrip("0123456789").endswith(("mixer-b", "mixerb")) or "mixer_b16" in names[0]


def test_a_class_count_below_zero_is_refused():
    with pytest.raises(CheckpointError, match=r"num_classes must be a whole number of at least 0, not -1"):
        mixer_jax.load(GOLDENS["square"].weights_file, num_classes=-1)


def test_an_address_is_shown_as_it_was_given():
    with pytest.raises(CheckpointError, match=r"^https://example.org/Mixer-B_16.npz: an address, not a file"):
        mixer_jax.load("https://example.org/Mixer-B_16.npz")


@pytest.mark.parametrize("side", ["flax", pytest.param("pytorch", marks=pytest.mark.torch)])
def test_the_path_of_an_image_is_told_the_function_to_use(side, square):
    if side == "flax":
        home = mixer_jax
    else:
        from mixer_jax import torch_model as home
    with pytest.raises(ValueError, match=r"not the path 'cat.jpg': mixer_jax.prepare\('cat.jpg', model\)\[None\]"):
        home.load(square.weights_file)("cat.jpg")


@pytest.mark.torch
def test_save_says_which_argument_is_which_and_whose_model_it_takes(tmp_path, square):
    from mixer_jax import torch_model

    flax, pytorch = mixer_jax.load(square.weights_file), torch_model.load(square.weights_file)
    for home, model, other, whose in (
        (mixer_jax, flax, pytorch, "torch_model.save"),
        (torch_model, pytorch, flax, "mixer_jax.save"),
    ):
        with pytest.raises(TypeError, match=r"the model first and then the path, save\(model, 'w.npz'\)"):
            home.save("w.npz", model)
        with pytest.raises(TypeError, match=f"not mixer_jax.*MlpMixer; the other framework's is .*{whose}"):
            home.save(other, tmp_path / "w.npz")
    assert not list(tmp_path.iterdir())


@pytest.mark.torch
def test_a_refusal_of_torch_load_has_no_escape_codes(tmp_path):
    import torch

    torch.save({"weights": MixerConfig.named("S/32")}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="nothing else is tried: Weights only load failed") as error:
        convert.read(tmp_path / "w.pt")
    assert "\x1b" not in str(error.value)
