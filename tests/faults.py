"""A generator of faults, at a random place of a side, of the families that ports get wrong."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from conftest import random_weights
from einops import rearrange
from sides import checkpoint

from convert import MixerConfig
from mixer_jax import referee
from mixer_jax.sides import Run, Side

# As many tokens as channels, hidden units and classes, so that no fault is caught by a shape.
CONFIG = MixerConfig(
    patch_size=(4, 4), image_size=(16, 16), num_blocks=3, hidden_dim=16, tokens_mlp_dim=16, channels_mlp_dim=16, num_classes=16
)
WEIGHTS = random_weights(CONFIG)
PRODUCTS = {
    "stem": "stem",
    "token_mixing/dense_0": "token_mixing/Dense_0",
    "token_mixing/dense_1": "token_mixing/Dense_1",
    "channel_mixing/dense_0": "channel_mixing/Dense_0",
    "channel_mixing/dense_1": "channel_mixing/Dense_1",
    "head": "head",
}
NORMS = {"token_norm": "LayerNorm_0", "channel_norm": "LayerNorm_1", "pre_head_norm": "pre_head_layer_norm"}


@dataclass(frozen=True)
class Fault:
    """What is wrong, the operation that is the first to be, and the side that has it."""

    family: str
    what: str
    operation: str
    side: Side
    run: Run


Random = np.random.Generator
Change = Callable[[str, np.ndarray], np.ndarray]


def drawn(random: Random) -> Fault:
    """A fault of a random family at a random place."""
    side = Side(str(random.choice(["flax", "torch"])))
    family = str(random.choice(list(FAMILIES)))
    what, operation, run = FAMILIES[family](random, side)
    return Fault(family, what, operation, side, run)


@functools.cache
def honest(side: Side) -> Run:
    return side.open(checkpoint(WEIGHTS, CONFIG))


def in_weights(side: Side, weights: dict[str, np.ndarray], **config) -> Run:
    assert config or any(not np.array_equal(weights[name], array) for name, array in WEIGHTS.items())
    return side.open(checkpoint(weights, CONFIG.replace(**config)))


def in_operation(side: Side, operation: str, change: Callable[[np.ndarray, dict[str, np.ndarray]], np.ndarray]) -> Run:
    """`change(result, results so far)` replaces what an operation gives, with the tap and without it."""

    def run(images, tap):
        before: dict[str, np.ndarray] = {}

        def faulty(name, array):
            before[name] = array
            if name == operation:
                array = change(array, before)
            return array if tap is None else tap(name, array)

        return honest(side)(images, faulty)

    return run


def place(random: Random, names) -> tuple[str, str]:
    """One of the modules, in a random block if it is of a block: our name and Google's."""
    ours = str(random.choice(list(names)))
    if ours in ("stem", "head", "pre_head_norm"):
        return ours, names[ours]
    block = random.integers(CONFIG.num_blocks)
    return f"blocks/{block}/{ours}", f"MixerBlock_{block}/{names[ours]}"


def order(random: Random, side: Side):
    kind, weights = str(random.choice(["blocks", "norms", "patches", "products"])), dict(WEIGHTS)
    first, second = sorted(random.choice(CONFIG.num_blocks, 2, replace=False))
    if kind == "patches":
        swap = in_operation(side, "stem", lambda x, _: rearrange(x, "b (gh gw) c -> b (gw gh) c", gh=4))
        return kind, "stem", swap
    pairs = {
        "blocks": (f"MixerBlock_{first}/", f"MixerBlock_{second}/"),
        "norms": (f"MixerBlock_{first}/LayerNorm_0/", f"MixerBlock_{first}/LayerNorm_1/"),
        "products": (f"MixerBlock_{first}/channel_mixing/Dense_0/", f"MixerBlock_{first}/channel_mixing/Dense_1/"),
    }
    one, other = pairs[kind]
    for name in WEIGHTS:
        for mine, theirs in ((one, other), (other, one)):
            if name.startswith(mine):
                weights[name] = WEIGHTS[theirs + name.removeprefix(mine)]
    operation = "channel_mixing/dense_0" if kind == "products" else "token_norm"
    return f"{kind} {one} {other}", f"blocks/{first}/{operation}", in_weights(side, weights)


def axes(random: Random, side: Side):
    ours, google = place(random, PRODUCTS)
    way = "h w i o -> w h i o" if ours == "stem" else "i o -> o i"
    turned = np.ascontiguousarray(rearrange(WEIGHTS[f"{google}/kernel"], way))
    return f"{google}, {way}", ours, in_weights(side, WEIGHTS | {f"{google}/kernel": turned})


def numerics(random: Random, side: Side):
    kind = str(random.choice(["gelu", "epsilon", "gelu everywhere", "epsilon everywhere"]))
    if kind == "gelu everywhere":
        return kind, "blocks/0/token_mixing/gelu", in_weights(side, WEIGHTS, gelu="exact")
    if kind == "epsilon everywhere":
        return kind, "blocks/0/token_norm", in_weights(side, WEIGHTS, layer_norm_epsilon=1e-5)
    if kind == "gelu":
        mlp, _ = place(random, {"token_mixing": "", "channel_mixing": ""})
        return (
            kind,
            f"{mlp}/gelu",
            in_operation(side, f"{mlp}/gelu", lambda _, seen: referee.gelu(seen[f"{mlp}/dense_0"], "exact")),
        )
    ours, google = place(random, NORMS)
    return kind, ours, in_operation(side, ours, lambda _, seen: norm(google, before(ours, seen), epsilon=1e-5))


def missing(random: Random, side: Side):
    kind = str(random.choice(["bias", "residual", "norm"]))
    if kind == "bias":
        ours, google = place(random, PRODUCTS | NORMS)
        return f"bias of {google}", ours, in_weights(side, WEIGHTS | {f"{google}/bias": np.zeros(16, np.float32)})
    if kind == "norm":
        ours, _ = place(random, NORMS)
        return kind, ours, in_operation(side, ours, lambda _, seen: before(ours, seen))
    mlp, _ = place(random, {"token_mixing": "", "channel_mixing": ""})

    def branch_alone(_, seen):
        y = seen[f"{mlp}/dense_1"]
        return rearrange(y, "b c n -> b n c") if "token" in mlp else y

    return kind, f"{mlp}/sum", in_operation(side, f"{mlp}/sum", branch_alone)


def reduction(random: Random, side: Side):
    if random.integers(2):
        return "mean", "mean", in_operation(side, "mean", lambda _, seen: seen["pre_head_norm"].mean(axis=2))
    ours, google = place(random, NORMS)

    def over_tokens(_, seen):
        return rearrange(norm(google, rearrange(before(ours, seen), "b n c -> b c n")), "b c n -> b n c")

    return "norm", ours, in_operation(side, ours, over_tokens)


def dtype(random: Random, side: Side):
    coarse = random.choice([np.float16, ml_dtypes.bfloat16])
    if random.integers(2):
        ours, google = place(random, PRODUCTS)
        kernel = WEIGHTS[f"{google}/kernel"].astype(coarse).astype(np.float32)
        return f"{google} in {coarse.__name__}", ours, in_weights(side, WEIGHTS | {f"{google}/kernel": kernel})
    ours, _ = place(random, PRODUCTS | NORMS | {"token_mixing/gelu": "", "channel_mixing/gelu": "", "token_mixing/sum": ""})
    return f"in {coarse.__name__}", ours, in_operation(side, ours, lambda x, _: x.astype(coarse).astype(np.float64))


FAMILIES = {
    "order": order,
    "axes": axes,
    "numerics": numerics,
    "missing": missing,
    "reduction axis": reduction,
    "dtype": dtype,
}


def before(operation: str, seen: dict[str, np.ndarray]) -> np.ndarray:
    """What goes into a norm."""
    names = list(seen)
    return seen[names[names.index(operation) - 1]]


def norm(google: str, x: np.ndarray, epsilon: float = 1e-6) -> np.ndarray:
    scale, bias = (WEIGHTS[f"{google}/{leaf}"].astype(np.float64) for leaf in ("scale", "bias"))
    return referee.Arithmetic().layer_norm(x, scale, bias, epsilon)
