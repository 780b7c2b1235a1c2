"""A generator of faults, at a random place of an implementation, of the kinds that ports get wrong."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from conftest import random_weights
from einops import rearrange
from implementations import checkpoint

from convert import MixerConfig
from mixer_jax.parity import numpy_model
from mixer_jax.parity.implementations import Implementation, Run

# As many tokens as channels, hidden units and classes, so that no fault is caught by a shape.
CONFIG = MixerConfig(
    patch_size=(4, 4), image_size=(16, 16), num_blocks=3, hidden_dim=16, tokens_mlp_dim=16, channels_mlp_dim=16, num_classes=16
)
WEIGHTS = random_weights(CONFIG)
CHECKPOINT = checkpoint(WEIGHTS, CONFIG)
MIXINGS = ("token_mixing", "channel_mixing")
MATMULS = {"stem": "stem", "head": "head"} | {f"{mlp}/dense_{i}": f"{mlp}/Dense_{i}" for mlp in MIXINGS for i in (0, 1)}
NORMS = {"token_norm": "LayerNorm_0", "channel_norm": "LayerNorm_1", "pre_head_norm": "pre_head_layer_norm"}
RESULTS = MATMULS | NORMS | {"token_mixing/gelu": "", "channel_mixing/gelu": "", "token_mixing/sum": ""}

Results = dict[str, np.ndarray]  # of the operations so far
Weights = dict[str, np.ndarray]
Change = Weights | tuple[str, Callable[[np.ndarray, Results], np.ndarray]] | MixerConfig
Planted = tuple[str, Change]  # the first operation that is wrong, and weights, an operation's result or a config


@dataclass(frozen=True)
class Fault:
    kind: str
    operation: str
    implementation: Implementation
    run: Run


def fault(seed: int) -> Fault:
    """A fault at a random place; consecutive seeds give consecutive kinds."""
    random, kind = np.random.default_rng(seed), list(KINDS)[seed % len(KINDS)]
    implementation = Implementation(str(random.choice(["flax", "torch"])))
    operation, change = KINDS[kind](random)
    if isinstance(change, tuple):
        run = in_operation(honest(implementation), *change)
    else:
        weights, config = (change, CONFIG) if isinstance(change, dict) else (WEIGHTS, change)
        run = implementation.open(checkpoint(weights, config))
    return Fault(kind, operation, implementation, run)


@functools.cache
def honest(implementation: Implementation) -> Run:
    return implementation.open(CHECKPOINT)


def in_operation(run: Run, operation: str, change: Callable[[np.ndarray, Results], np.ndarray]) -> Run:
    """`change(result, results so far)` replaces the result of an operation, with the hook and without it."""

    def faulty_run(images, hook):
        results: Results = {}

        def faulty(name, array):
            results[name] = array
            array = change(array, results) if name == operation else array
            return array if hook is None else hook(name, array)

        return run(images, faulty)

    return faulty_run


def in_one_element(error: float) -> Callable[[np.ndarray, Results], np.ndarray]:
    def change(array, results):
        array = array.copy()
        array.flat[3] += error
        return array

    return change


def place(random: np.random.Generator, names) -> tuple[str, str]:
    """One of the modules, in a random block if it is in a block: our name and Google's."""
    ours = str(random.choice(list(names)))
    if ours in ("stem", "head", "pre_head_norm", "mean"):
        return ours, names[ours]
    block = random.integers(CONFIG.num_blocks)
    return f"blocks/{block}/{ours}", f"MixerBlock_{block}/{names[ours]}"


@dataclass(frozen=True)
class Place:
    """An operation by our name and Google's, and the results up to it."""

    ours: str
    google: str
    results: Results

    @property
    def input(self) -> np.ndarray:
        names = list(self.results)
        return self.results[names[names.index(self.ours) - 1]]

    def norm(self, x: np.ndarray, epsilon: float = 1e-6) -> np.ndarray:
        scale, bias = (WEIGHTS[f"{self.google}/{leaf}"].astype(np.float64) for leaf in ("scale", "bias"))
        return numpy_model.Arithmetic().layer_norm(x, scale, bias, epsilon)


def in_result(names, change):
    """A kind of fault: `change(result, Place)` at one of the places."""

    def planted(random) -> Planted:
        ours, google = place(random, names)
        return ours, (ours, lambda x, results: change(x, Place(ours, google, results)))

    return planted


def in_leaf(names, leaf, change):
    """A kind of fault: `change(array)` of a leaf at one of the places."""

    def planted(random) -> Planted:
        ours, google = place(random, names)
        return ours, WEIGHTS | {f"{google}/{leaf}": np.ascontiguousarray(change(WEIGHTS[f"{google}/{leaf}"]))}

    return planted


def swapped(operation, one, other):
    """A kind of fault: what is below two names, in two blocks {i} and {j}, is swapped."""

    def planted(random) -> Planted:
        i, j = sorted(random.choice(CONFIG.num_blocks, 2, replace=False))
        names = one.format(i=i, j=j), other.format(i=i, j=j)
        weights = dict(WEIGHTS)
        for name in WEIGHTS:
            for a, b in (names, names[::-1]):
                if name.startswith(a):
                    weights[name] = WEIGHTS[b + name.removeprefix(a)]
        return f"blocks/{i}/{operation}", weights

    return planted


def shared_norm(random) -> Planted:
    i = random.integers(CONFIG.num_blocks)
    one, other = f"MixerBlock_{i}/LayerNorm_0", f"MixerBlock_{i}/LayerNorm_1"
    return f"blocks/{i}/channel_norm", WEIGHTS | {f"{other}/{k}": WEIGHTS[f"{one}/{k}"] for k in ("scale", "bias")}


def missing_block(random) -> Planted:
    i = random.integers(CONFIG.num_blocks)
    last, before = f"blocks/{i}/channel_mixing/sum", f"blocks/{i - 1}/channel_mixing/sum" if i else "stem"
    return last, (last, lambda _, results: results[before])


def turned(x: np.ndarray) -> np.ndarray:
    return rearrange(x, "h w i o -> w h i o" if x.ndim == 4 else "i o -> o i")


def tokens_last(x: np.ndarray) -> np.ndarray:
    return rearrange(x, "b n c -> b c n")


def coarse(x: np.ndarray, dtype=ml_dtypes.bfloat16) -> np.ndarray:
    return x.astype(dtype).astype(x.dtype)


SUMS, GELUS = ({f"{mlp}/{name}": "" for mlp in MIXINGS} for name in ("sum", "gelu"))
KINDS: dict[str, Callable[[np.random.Generator], Planted]] = {
    "blocks swapped": swapped("token_norm", "MixerBlock_{i}/", "MixerBlock_{j}/"),
    "norms swapped": swapped("token_norm", "MixerBlock_{i}/LayerNorm_0/", "MixerBlock_{i}/LayerNorm_1/"),
    "matmuls of an MLP swapped": swapped(
        "channel_mixing/dense_0", "MixerBlock_{i}/channel_mixing/Dense_0/", "MixerBlock_{i}/channel_mixing/Dense_1/"
    ),
    "matmuls of two blocks swapped": swapped(
        "channel_mixing/dense_1", "MixerBlock_{i}/channel_mixing/Dense_1/", "MixerBlock_{j}/channel_mixing/Dense_1/"
    ),
    "patches column by column": in_result({"stem": ""}, lambda x, at: rearrange(x, "b (gh gw) c -> b (gw gh) c", gh=4)),
    "colours reversed": in_leaf({"stem": "stem"}, "kernel", lambda w: w[:, :, ::-1]),
    "classes reversed": in_result({"head": ""}, lambda x, at: x[:, ::-1]),
    "first image for all": in_result({"stem": ""}, lambda x, at: x[:1].repeat(len(x), axis=0)),
    "kernel transposed": in_leaf(MATMULS, "kernel", turned),
    "another GELU": in_result(GELUS, lambda x, at: numpy_model.gelu(at.input, "exact")),
    "another GELU everywhere": lambda random: ("blocks/0/token_mixing/gelu", CONFIG.replace(gelu="exact")),
    "another epsilon": in_result(NORMS, lambda x, at: at.norm(at.input, epsilon=1e-5)),
    "another epsilon everywhere": lambda random: ("blocks/0/token_norm", CONFIG.replace(layer_norm_epsilon=1e-5)),
    "no bias": in_leaf(MATMULS | NORMS, "bias", np.zeros_like),
    "no scale": in_leaf(NORMS, "scale", np.ones_like),
    "no residual": in_result(SUMS, lambda x, at: tokens_last(at.input) if "token" in at.ours else at.input),
    "no norm": in_result(NORMS, lambda x, at: at.input),
    "no block": missing_block,
    "no transpose": in_result({"token_mixing/dense_1": ""}, lambda x, at: tokens_last(x)),
    "one norm for both mixings": shared_norm,
    "mean over channels": in_result({"mean": ""}, lambda x, at: at.input.mean(axis=2)),
    "mean of half the tokens": in_result({"mean": ""}, lambda x, at: at.input[:, :8].mean(axis=1)),
    "norm over tokens": in_result(NORMS, lambda x, at: tokens_last(at.norm(tokens_last(at.input)))),
    "probabilities": in_result({"head": ""}, lambda x, at: np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)),
    "kernel in bfloat16": in_leaf(MATMULS, "kernel", coarse),
    "result in bfloat16": in_result(RESULTS, lambda x, at: coarse(x)),
    "result in float16": in_result(RESULTS, lambda x, at: coarse(x, np.float16)),
    "all weights in bfloat16": lambda random: ("stem", {name: coarse(array) for name, array in WEIGHTS.items()}),
}
