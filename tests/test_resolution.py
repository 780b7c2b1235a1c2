"""Weights for another grid: the paper's rule is exact, the resampled ones are what their docstring says and no more."""

import math

import jax
import numpy as np
import pytest
from conftest import TINY, random_images, random_weights
from einops import einsum, rearrange, repeat
from test_convert import DTYPES, equal

from convert import CheckpointError, MixerConfig
from convert.arrays import LazyArray
from convert.dtypes import as_dtype
from convert.layouts import GOOGLE
from convert.mapping import shapes, sizes_of
from convert.resolution import expanded, interpolation, resampled
from mixer_jax.parity import numpy_model

SQUARE = TINY.replace(patch_size=(2, 2), image_size=(6, 6))
B16 = MixerConfig.named("B/16")
KERNELS = ("token_mixing/Dense_0/kernel", "token_mixing/Dense_1/kernel")
configs = pytest.mark.parametrize("config", [SQUARE, TINY], ids=["square", "rectangular"])
larger = pytest.mark.parametrize("grid", [(5, 6), (9, 7), (4, 11)])  # than TINY's 4 x 5


def of_grid(config, grid, **changes):
    """The config for so many patches."""
    return config.replace(image_size=(grid[0] * config.patch_size[0], grid[1] * config.patch_size[1]), **changes)


def times(config, factor):
    """The config of what `expanded` gives."""
    grid = (factor * config.grid[0], factor * config.grid[1])
    return of_grid(config, grid, tokens_mlp_dim=factor**2 * config.tokens_mlp_dim)


def without_values(config):
    """Arrays that cannot be read, and a list of the attempts."""
    reads = []
    names_and_shapes = shapes(GOOGLE, config.sizes).items()
    return {name: LazyArray(shape, np.dtype("float32"), reads.append) for name, shape in names_and_shapes}, reads


def as_type(arrays, dtype):
    return {name: np.asarray(array).astype(as_dtype(dtype)) for name, array in arrays.items()}


def changed(arrays, changes):
    """With other values for the arrays whose names end so."""
    of_name = {name: change for name in arrays for end, change in changes.items() if name.endswith(end)}
    return {name: of_name.get(name, np.asarray)(np.asarray(array)) for name, array in arrays.items()}


def relative(actual, expected):
    """The error relative to max abs."""
    return np.abs(actual - expected).max() / np.abs(expected).max()


def error_of_crops(config, weights, large, factor):
    """How far logits of the large weights are from the mean of the others' over the crops, relative to max abs."""
    images = random_images(times(config, factor), dtype="float64")
    crops = rearrange(images, "b (p h) (q w) c -> (b p q) h w c", p=factor, q=factor)
    logits = rearrange(numpy_model.forward(config, weights, crops), "(b p) k -> b p k", p=factor**2)
    return relative(numpy_model.forward(times(config, factor), large, images), logits.mean(axis=1))


@configs
@pytest.mark.parametrize("factor", [1, 2, 3])
def test_expanded_logits_are_the_mean_over_the_crops(config, factor):
    weights = random_weights(config, dtype="float64")
    large = expanded(weights, old_grid=config.grid, factor=factor)
    assert error_of_crops(config, weights, large, factor) < 5e-15  # 6e-16


@configs
@pytest.mark.parametrize("factor", [2, 3])
def test_a_kronecker_product_without_the_permutation_is_not(config, factor):
    """What the paper's block-diagonal matrix gives if the tokens are taken as they come."""
    weights = random_weights(config, dtype="float64")
    kron = {end: lambda w: np.kron(np.eye(factor**2), w) for end in KERNELS}
    kron |= {end.replace("kernel", "bias"): lambda b: np.tile(b, factor**2) for end in KERNELS}
    assert error_of_crops(config, weights, changed(weights, kron), factor) > 0.02  # 0.18 to 1.2


def test_a_grid_read_the_wrong_way_round_is_not():
    weights = random_weights(TINY, dtype="float64")
    large = expanded(weights, old_grid=TINY.grid[::-1], factor=2)
    assert error_of_crops(TINY, weights, large, 2) > 0.02  # 0.23


def test_expanded_b16_at_448_has_the_papers_sizes_and_reads_nothing():
    weights, reads = without_values(B16)
    large = expanded(weights, old_grid=(14, 14), factor=2)
    sizes = sizes_of(large, GOOGLE)
    assert (sizes["num_tokens"], sizes["tokens_mlp_dim"]) == (4 * 196, 4 * 384)
    assert sum(math.prod(array.shape) for array in large.values()) == 86_996_392 == times(B16, 2).num_parameters
    assert of_grid(B16, (28, 28)).num_parameters != 86_996_392  # D_S as it was
    assert not reads


@pytest.mark.parametrize("dtype", DTYPES)
def test_expanded_by_one_is_bit_equal(dtype):
    weights = as_type(random_weights(TINY), dtype)
    assert equal(expanded(weights, old_grid=TINY.grid, factor=1), weights)
    assert not equal(expanded(weights, old_grid=(2, 10), factor=2), expanded(weights, old_grid=TINY.grid, factor=2))


@configs
def test_expanded_biases_are_copies_in_each_part(config):
    """Logits cannot tell: Dense_1 adds one number to all channels of a token, which every LayerNorm takes away."""
    weights = random_weights(config)
    large = expanded(weights, old_grid=config.grid, factor=2)
    hidden, out = (f"MixerBlock_2/token_mixing/Dense_{i}/bias" for i in (0, 1))
    (h, w), tokens = config.grid, np.asarray(large[out])
    assert np.array_equal(tokens, repeat(weights[out], "(r c) -> (p r q c)", p=2, r=h, q=2, c=w))
    assert not np.array_equal(tokens, np.tile(weights[out], 4))
    assert np.array_equal(np.asarray(large[hidden]), np.tile(weights[hidden], 4))


@pytest.mark.parametrize("end", KERNELS)
def test_expanded_copies_every_bit(end):
    """Zeros off the diagonal are +0, and a NaN spreads to nothing."""
    weights = random_weights(TINY)
    weights[f"MixerBlock_1/{end}"][3, 4] = np.nan
    kernel = np.asarray(expanded(weights, old_grid=TINY.grid, factor=3)[f"MixerBlock_1/{end}"])
    assert np.isnan(kernel).sum() == 9
    assert np.count_nonzero(kernel.view(np.uint32)) == 9 * 20 * 11


def both_ways(weights):
    """Every function here, on TINY's weights."""
    yield expanded(weights, old_grid=TINY.grid, factor=2)
    yield resampled(weights, old_grid=TINY.grid, new_grid=(3, 8))


def test_only_what_knows_the_grid_is_changed():
    weights = random_weights(TINY)
    for other, kept in zip(both_ways(weights), (0, 3)):  # the first bias of a token-mixing MLP knows D_S alone
        assert list(other) == list(weights)
        assert sum(other[name] is not array for name, array in weights.items()) == 4 * 3 - kept
        assert all(other[name] is array for name, array in weights.items() if "token_mixing" not in name)


def test_nothing_is_read_before_its_values_are_needed():
    weights, reads = without_values(TINY)
    assert [sizes_of(other, GOOGLE)["num_tokens"] for other in both_ways(weights)] == [80, 24]
    assert not reads
    name = "MixerBlock_2/token_mixing/Dense_1/bias"
    bias = random_weights(TINY)[name]
    weights[name] = LazyArray(bias.shape, bias.dtype, lambda index: (reads.append(name), bias)[1])
    for other in both_ways(weights):
        np.asarray(other[name])
    assert reads == [name, name]


def test_no_argument_is_changed():
    weights = random_weights(TINY)
    before = {name: array.copy() for name, array in weights.items()}
    for other in both_ways(weights):
        for name in other:
            if other[name] is not weights[name]:
                np.asarray(other[name])[...] *= 2
    assert equal(weights, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes_dtypes_order_and_items_are_as_announced(dtype):
    weights = as_type(random_weights(TINY), dtype)
    for other in both_ways(weights):
        for lazy in other.values():
            array = np.asarray(lazy)
            assert (array.shape, array.dtype) == (lazy.shape, lazy.dtype) == (array.shape, as_dtype(dtype))
            assert array.flags.c_contiguous
            assert np.array_equal(lazy[1], array[1])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_resampled_in_float64_and_rounded_once(dtype):
    half = as_type(random_weights(TINY), dtype)
    from_half, from_double = (
        resampled(weights, old_grid=TINY.grid, new_grid=(9, 7)) for weights in (half, as_type(half, "float64"))
    )
    assert equal(from_half, as_type(from_double, dtype))


@pytest.mark.parametrize("grid", [(24, 24), (8, 8), (7, 28)], ids=["larger", "smaller", "rectangular"])
def test_resampled_b16_has_the_sizes_of_its_grid(grid):
    weights, reads = without_values(B16)
    other = resampled(weights, old_grid=(14, 14), new_grid=grid)
    assert {n: a.shape for n, a in other.items()} == {n: a.shape for n, a in without_values(of_grid(B16, grid))[0].items()}
    assert not reads


def test_the_same_grid_gives_the_same_arrays():
    weights = random_weights(TINY)
    same = resampled(weights, old_grid=TINY.grid, new_grid=TINY.grid)
    assert all(same[name] is array for name, array in weights.items())
    assert same is not weights
    assert not equal(resampled(weights, old_grid=TINY.grid, new_grid=TINY.grid[::-1]), weights)


@pytest.mark.parametrize("lengths", [(14, 24), (14, 8), (14, 28), (14, 7), (14, 15), (5, 4), (2, 3), (3, 1), (1, 6)])
def test_rows_of_the_matrix_sum_to_one_and_shrinking_undoes_growing(lengths):
    old, new = lengths
    matrix, back = interpolation(old, new), interpolation(new, old)
    assert matrix.shape == (new, old)
    assert matrix.dtype == np.float64
    assert np.abs(matrix.sum(axis=1) - 1).max() < 2e-14  # 1e-15
    undone = back @ matrix if new > old else matrix @ back
    assert np.abs(undone - np.eye(min(lengths))).max() < 2e-14  # 1.5e-15
    assert np.array_equal(interpolation(old, old), np.eye(old))


@pytest.mark.parametrize("lengths", [(14, 24), (14, 28), (2, 3), (1, 6)])
def test_growing_is_the_cubic_of_jax(lengths):
    old, new = lengths
    with jax.enable_x64(True):
        cubic, linear = (np.asarray(jax.image.resize(np.eye(old), (new, old), how)) for how in ("cubic", "linear"))
    assert np.abs(interpolation(old, new) - cubic).max() < 2e-14  # 2.7e-15
    assert old == 1 or np.abs(interpolation(old, new) - linear).max() > 0.05  # 0.07


def hidden(weights, tokens):
    """Hidden units of the first token-mixing MLP, before GELU, for tokens (c, n)."""
    name = "MixerBlock_0/token_mixing/Dense_0"
    return tokens @ np.asarray(weights[f"{name}/kernel"]) + np.asarray(weights[f"{name}/bias"])


def token_mlp(weights, tokens):
    name = "MixerBlock_0/token_mixing/Dense_1"
    y = numpy_model.gelu(hidden(weights, tokens), "tanh")
    return y @ np.asarray(weights[f"{name}/kernel"]) + np.asarray(weights[f"{name}/bias"])


def up_scaled(tokens, old, new):
    image = rearrange(tokens, "c (h w) -> c h w", h=old[0], w=old[1])
    image = einsum(interpolation(old[0], new[0]), interpolation(old[1], new[1]), image, "y h, x w, c h w -> c y x")
    return rearrange(image, "c y x -> c (y x)")


@pytest.mark.parametrize("grid", [(9, 7), (2, 3), (10, 3), (1, 1)])
def test_tokens_all_the_same_give_the_same_hidden_units_on_any_grid(grid):
    weights = random_weights(TINY, dtype="float64")
    constant = np.random.default_rng(0).normal(size=(7, 1))
    tokens = repeat(constant, "c 1 -> c n", n=grid[0] * grid[1])
    wanted = hidden(weights, repeat(constant, "c 1 -> c n", n=20))
    other = resampled(weights, old_grid=TINY.grid, new_grid=grid)
    assert relative(hidden(other, tokens), wanted) < 1e-14  # 8e-16

    unscaled = changed(other, {KERNELS[0]: lambda w: w * len(w) / 20})  # values kept and not sums
    assert relative(hidden(unscaled, tokens), wanted) > 0.1  # 0.5 to 2.2


@larger
def test_up_scaled_tokens_give_the_old_token_mixing_up_scaled(grid):
    weights = random_weights(TINY, dtype="float64")
    tokens = np.random.default_rng(0).normal(size=(7, 20))
    other = resampled(weights, old_grid=TINY.grid, new_grid=grid)
    large, wanted = up_scaled(tokens, TINY.grid, grid), up_scaled(token_mlp(weights, tokens), TINY.grid, grid)
    assert relative(hidden(other, large), hidden(weights, tokens)) < 5e-14  # 4e-15
    assert relative(token_mlp(other, large), wanted) < 5e-14  # 5e-15

    turned = resampled(weights, old_grid=TINY.grid[::-1], new_grid=grid)
    assert relative(token_mlp(turned, large), wanted) > 0.1  # 1.0


@larger
def test_to_a_larger_grid_and_back_gives_the_weights_back(grid):
    weights = random_weights(TINY, dtype="float64")
    back = resampled(resampled(weights, old_grid=TINY.grid, new_grid=grid), old_grid=grid, new_grid=TINY.grid)
    assert max(relative(np.asarray(back[name]), weights[name]) for name in weights) < 5e-14  # 4e-15
    other_way = resampled(resampled(weights, old_grid=TINY.grid, new_grid=(3, 5)), old_grid=(3, 5), new_grid=TINY.grid)
    assert max(relative(np.asarray(other_way[name]), weights[name]) for name in weights) > 0.1  # 0.7


PATCHES = "old_grid 4x4 has 16 patches, and the weights are for 20"
PAIR = r"must be a positive whole number or a \(height, width\) pair"


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        *((expanded, {"factor": f}, f"factor must be a whole number of at least 1, not {f!r}") for f in (0, -2, 1.5, "2")),
        (expanded, {"old_grid": (4, 4), "factor": 2}, PATCHES),
        (resampled, {"old_grid": (4, 4), "new_grid": (4, 4)}, PATCHES),
        (expanded, {"old_grid": (4, 5, 1), "factor": 2}, f"old_grid {PAIR}"),
        (resampled, {"new_grid": (0, 5)}, f"new_grid {PAIR}"),
    ],
)
def test_wrong_grids_and_factors_are_refused(function, options, message):
    with pytest.raises(ValueError, match=message):
        function(random_weights(TINY), **{"old_grid": TINY.grid} | options)


def test_names_that_are_not_googles_are_refused():
    weights = {name.replace("token_mixing", "tokens"): array for name, array in random_weights(TINY).items()}
    with pytest.raises(CheckpointError, match="not a Mixer checkpoint in the google layout"):
        expanded(weights, old_grid=TINY.grid, factor=2)


def smooth_images(config, count=4):
    """The same few low frequencies at any size."""
    amplitudes = np.random.default_rng(3).normal(size=(count, 3, 3, config.in_channels))
    y, x = (np.cos(np.pi * np.outer(np.arange(3), (np.arange(n) + 0.5) / n)) for n in config.image_size)
    return einsum(amplitudes, y, x, "b i j c, i h, j w -> b h w c") / 3


@pytest.mark.parametrize("grid", [(12, 12), (16, 16), (10, 14), (6, 6)])
def test_a_smooth_image_keeps_its_features_roughly_and_in_the_right_token_order_alone(grid):
    """With filters that are smooth themselves, made on 4 x 4; relative to how the images differ from one another."""
    base = TINY.replace(patch_size=(1, 1), num_classes=0)
    old, new = of_grid(base, (8, 8)), of_grid(base, grid)
    weights = resampled(random_weights(of_grid(base, (4, 4)), dtype="float64"), old_grid=(4, 4), new_grid=(8, 8))
    other = resampled(weights, old_grid=(8, 8), new_grid=grid)
    wanted = numpy_model.forward(old, weights, smooth_images(old))

    def error(weights):
        features = numpy_model.forward(new, weights, smooth_images(new))
        return np.linalg.norm(features - wanted) / np.linalg.norm(wanted - wanted.mean(axis=0))

    def columns_first(n):
        return rearrange(n, "... (h w) -> ... (w h)", h=grid[0], w=grid[1])

    wrong_order = changed(other, {KERNELS[0]: lambda w: columns_first(w.T).T, KERNELS[1]: columns_first})
    unscaled = changed(other, {KERNELS[0]: lambda w: w * len(w) / 64})
    assert error(other) < 0.25  # 0.10, 0.12, 0.11; 0.21 on the smaller grid
    assert error(wrong_order) > 0.5  # 0.75 to 0.93
    assert error(unscaled) > 0.5  # 0.71 to 1.5
