"""The sizes of a Mixer: parameters, cost, variants, and what is refused."""

import dataclasses
import itertools

import numpy as np
import pytest
from conftest import TINY

from convert import VARIANTS, Checkpoint, CheckpointError, MixerConfig

# Parameters with 1000 classes, at 224 pixels; the last two with ImageNet-21k's 21,843.
PARAMETERS = {
    ("S/32", 1000): 19_104_624,
    ("S/16", 1000): 18_528_264,
    ("S/8", 1000): 20_646_504,
    ("B/32", 1000): 60_293_428,
    ("B/16", 1000): 59_880_472,
    ("L/32", 1000): 206_939_264,
    ("L/16", 1000): 208_196_168,
    ("H/14", 1000): 432_350_952,
    ("B/16", 21_843): 75_908_739,
    ("L/16", 21_843): 229_560_243,
}
every_variant = pytest.mark.parametrize(("name", "classes", "count"), [(*key, count) for key, count in PARAMETERS.items()])


@every_variant
def test_parameters_of_the_config_and_of_the_flax_model(name, classes, count):
    from flax import nnx

    from mixer_jax import MlpMixer

    config = MixerConfig.named(name, num_classes=classes)
    assert config.num_parameters == count
    model = nnx.eval_shape(lambda: MlpMixer(config, rngs=nnx.Rngs(0)))
    assert sum(param.size for _, param in nnx.to_flat_state(nnx.state(model, nnx.Param))) == count


@every_variant
@pytest.mark.torch
def test_parameters_of_the_pytorch_model(name, classes, count):
    import torch

    from mixer_jax.torch_model import MlpMixer

    with torch.device("meta"):
        model = MlpMixer(MixerConfig.named(name, num_classes=classes))
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_forward_flops_are_those_of_the_matmuls():
    assert MixerConfig.named("B/16").forward_flops == pytest.approx(2 * 12.6e9, rel=1e-3)  # 12.6 G multiply-adds
    stem, head = 2 * 20 * (2 * 3 * 3) * 7, 2 * 7 * 5
    block = 2 * 7 * (2 * 20 * 11) + 2 * 20 * (2 * 7 * 13)
    assert TINY.forward_flops == stem + 3 * block + head


def test_every_letter_takes_any_patch():
    for letter, patch in itertools.product(VARIANTS, [4, 7, 8, 16, 32]):
        config = MixerConfig.named(f"{letter}/{patch}", num_classes=3, image_size=(224, 448))
        assert config.variant == f"{letter}/{patch}"
        assert config.grid == (224 // patch, 448 // patch)
        assert config.num_classes == 3


def test_other_sizes_have_no_variant():
    b16 = MixerConfig.named("B/16")
    assert b16.replace(num_blocks=11).variant is None
    assert b16.replace(patch_size=(16, 8)).variant is None
    assert b16.replace(tokens_mlp_dim=3072, channels_mlp_dim=384).variant is None  # the widths the wrong way round


def test_a_config_is_frozen_and_hashable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TINY.num_blocks = 4
    assert {TINY: 1}[TINY.replace()] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": (8, 16)}, "image_size 8x16 is not a whole number of 2x3 patches"),
        ({"num_blocks": 0}, "num_blocks must be a whole number of at least 1, not 0"),
        ({"hidden_dim": 7.0}, "hidden_dim must be a whole number of at least 1, not 7.0"),
        ({"hidden_dim": np.float32(7)}, "hidden_dim must be a whole number of at least 1, not np.float32(7.0)"),
        ({"image_size": 8.0}, "image_size must be a positive whole number or a (height, width) pair"),
        ({"image_size": "88"}, "image_size must be a positive whole number or a (height, width) pair"),
        ({"num_classes": -1}, "num_classes must be a whole number of at least 0, not -1"),
        ({"gelu": "erf"}, "gelu must be 'tanh' or 'exact', not 'erf'"),
        ({"layer_norm_epsilon": 0}, "layer_norm_epsilon must be a positive number, not 0"),
        ({"patch_size": (2, 3, 4)}, "patch_size must be a positive whole number or a (height, width) pair"),
    ],
)
def test_impossible_sizes_are_refused(change, message):
    with pytest.raises(ValueError, match="^") as error:
        TINY.replace(**change)
    assert message in str(error.value)


@pytest.mark.parametrize("number", [np.int64, np.int32, np.uint8, np.array])
def test_counts_of_numpy_are_whole_numbers_and_become_pythons(number):
    sizes = dataclasses.asdict(TINY)
    counts = {name: size for name, size in sizes.items() if isinstance(size, int)}
    assert len(counts) == 6
    config = TINY.replace(**{name: number(size) for name, size in counts.items()})
    assert config == TINY
    assert {type(getattr(config, name)) for name in counts} == {int}
    assert TINY.replace(image_size=(number(8), number(15)), patch_size=np.array([2, 3])) == TINY
    named = MixerConfig.named("S/32", image_size=number(224), num_classes=number(10))
    assert named == MixerConfig.named("S/32", num_classes=10)
    assert {type(side) for side in named.image_size} == {int}


def test_a_checkpoint_takes_counts_of_numpy(golden):
    weights = Checkpoint.from_arrays(golden.weights)
    assert weights.with_classes(np.int64(3)).sizes["num_classes"] == 3
    assert weights.with_image_size(np.array(golden.config.image_size)).config == golden.config


def test_all_faults_are_listed_at_once():
    with pytest.raises(ValueError, match=r"num_blocks.*; .*gelu"):
        TINY.replace(num_blocks=0, gelu="none")


@pytest.mark.parametrize("name", ["B16", "X/16", "B/", "B/0", "b/16", "B/16.5"])
def test_an_unknown_variant_is_refused(name):
    with pytest.raises(ValueError, match="no variant .*: one of S, B, L, H, a slash and the patch size, as in 'B/16'"):
        MixerConfig.named(name)


def test_sizes_are_read_off_the_arrays(golden):
    checkpoint = Checkpoint.from_arrays(golden.weights)
    assert checkpoint.with_image_size(golden.config.image_size).config == golden.config
    if golden.config.grid[0] != golden.config.grid[1]:
        with pytest.raises(CheckpointError, match=r"tokens of \dx\d pixels are not a square grid: give the image size"):
            _ = checkpoint.config
