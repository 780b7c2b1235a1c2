"""Whether one implementation computes a Mixer, without a second one: exact identities of the function.

    for identity in self_test(convert.read("Mixer-B_16.npz"), side=Side("torch")):
        identity.name, identity.passed, identity.share

Each changes weights, images or both so that the logits are known from those of the unchanged checkpoint, and both go
through the side's own loading and model. Budgets are from the referee alone, on the checkpoint's own weights. A side of 16
bits rounds both runs nearly alike and uses next to nothing of its budget: float64 shows the most.

What no identity can see, since each of these faults gives a function for which all of them hold just as well:

- another function between the products: the exact GELU in place of tanh
- whole blocks in another order, or missing
- what is left out everywhere: a bias (of a norm or a product), a residual connection
- an epsilon that is off by a factor (one that ignores the checkpoint's is seen, where it matters at all)
- weights rounded one by one, such as to bfloat16
- a file that is read wrongly to begin with, such as the transpose of a square kernel: the identities change what was read

For those there is a second implementation: `mixer_jax.parity`, whose referee comes along. token_mixing/Dense_1/bias has no
influence on logits in any Mixer: it adds one number to all channels of a token, which every LayerNorm takes away.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from einops import rearrange

from convert import Checkpoint, MixerConfig
from convert.arrays import derived

from . import precision
from .parity import agreement
from .precision import Difference, difference
from .sides import Side

FACTOR = 2  # of the larger image, which has FACTOR x FACTOR crops
LARGEST = 100_000_000  # parameters that the model for it may have: B/16 at 448 has 87 million, L/16 281
FLAX_IN_FLOAT64 = Side("flax", dtype="float64")

Change = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Identity:
    """One identity: what it shows, how far the two sides of its equation lie apart, and how far they may.

    `share` is what it uses of its budget, `passed` whether that is 1 at most. All four are None where it was not run;
    `note` then says why.
    """

    name: str
    shows: str
    difference: Difference | None = None
    budget: Difference | None = None
    share: float | None = None
    passed: bool | None = None
    note: str = ""


@dataclass(frozen=True)
class _Equation:
    """An identity before its difference is taken: `sides` gives what was found and what is right.

    `runs` is how many runs' errors are in the difference, where the budget is for two. With `because`, it is not run.
    """

    name: str
    shows: str
    sides: Callable[[], tuple[np.ndarray, np.ndarray]]
    runs: float = 2
    note: str = ""
    because: str = ""


def self_test(
    checkpoint: Checkpoint,
    *,
    side: Side = FLAX_IN_FLOAT64,
    count: int = 2,
    seed: int = 0,
    draws: int = precision.DRAWS,
) -> list[Identity]:
    """Every identity of a checkpoint on a side, on images of noise; without a head, of its features.

    There are `count` images, and at least four where those together make the large one. Raises ValueError where the logits
    prove nothing, and what `Side.open` raises.
    """
    config, random = checkpoint.config, np.random.default_rng(seed)
    large = checkpoint.resized((FACTOR * config.image_size[0], FACTOR * config.image_size[1]))
    shape = (max(count, FACTOR**2) if _fits(large) else count, *config.image_size, config.in_channels)
    images = random.uniform(-1, 1, shape).astype(np.float32).astype(np.float64)
    base = _run(side, checkpoint, images)
    agreement(base, base)  # raises where equality proves nothing
    allowed = _budget(checkpoint, images, side, draws, seed)
    return [_identity(equation, allowed) for equation in _equations(checkpoint, large, side, images, base, random)]


def passed(results: Sequence[Identity]) -> bool:
    """Whether some were run and all of those hold."""
    run = [each.passed for each in results if each.passed is not None]
    return bool(run) and all(run)


def lines(results: Sequence[Identity]) -> str:
    """For a terminal: a table, what was not run and why, and the verdict last."""
    width = max(len(each.name) for each in results)
    rows = [f"{'identity':<{width}}  {'difference':>10}  {'budget':>8}  {'share':>6}"]
    for each in results:
        if each.difference is None or each.budget is None or each.share is None:
            rows.append(f"{each.name:<{width}}  not run: {each.note}")
            continue
        figures = f"{each.difference.largest:>10.1e}  {each.budget.largest:>8.1e}  {each.share:>6.2g}"
        verdict = "holds" if each.passed else f"FAILS: {each.shows}"
        rows.append(f"{each.name:<{width}}  {figures}  {verdict}{f' ({each.note})' if each.note else ''}")
    run = [each for each in results if each.passed is not None]
    wrong = [each.name for each in run if not each.passed]
    rows.append(f"{len(run) - len(wrong)} of {len(run)} hold" + (f"; not run: {len(results) - len(run)}" * (run != [*results])))
    return "\n".join(rows)


def _identity(equation: _Equation, allowed: Difference) -> Identity:
    if equation.because:
        return Identity(equation.name, equation.shows, note=equation.because)
    found, right = equation.sides()
    factor = equation.runs / 2
    apart, budget = difference(found, right), Difference(factor * allowed.largest, factor * allowed.rms, allowed.scale)
    share = max(apart.largest / budget.largest, apart.rms / budget.rms)
    return Identity(equation.name, equation.shows, apart, budget, share, share <= 1, equation.note)


def _equations(
    checkpoint: Checkpoint, large: Checkpoint, side: Side, images: np.ndarray, base: np.ndarray, random: np.random.Generator
) -> Iterator[_Equation]:
    config, classes = checkpoint.config, checkpoint.config.num_classes
    patch = config.patch_size[0] * config.patch_size[1] * config.in_channels
    # Only powers of two come in, yet in float16 a small weight loses digits when it is halved.
    exact = checkpoint.astype("float32") if checkpoint.dtype == np.float16 else checkpoint

    def run(changed: Checkpoint, images: np.ndarray = images) -> np.ndarray:
        return _run(side, changed, images)

    def tokens() -> tuple[np.ndarray, np.ndarray]:
        order = _order(random, config.num_tokens)
        return run(_changed(checkpoint, _tokens(config, order)), rearranged(images, config, tokens=order)), base

    def pixels() -> tuple[np.ndarray, np.ndarray]:
        order = _order(random, patch)
        stem: dict[str, Change] = {"stem/kernel": lambda w: w.reshape(patch, -1)[order].reshape(w.shape)}
        return run(_changed(checkpoint, stem), rearranged(images, config, pixels=order)), base

    def hidden() -> tuple[np.ndarray, np.ndarray]:
        return run(_changed(checkpoint, _hidden(config, random))), base

    def channels() -> tuple[np.ndarray, np.ndarray]:
        order = _order(random, config.hidden_dim)
        return run(_changed(checkpoint, _channels(config, order))), base if classes else base[:, order]

    def scales() -> tuple[np.ndarray, np.ndarray]:
        scaled = _changed(exact, _scales(config)).with_metadata(layer_norm_epsilon=4 * config.layer_norm_epsilon)
        return run(scaled), base if classes else base / 2

    def crops() -> tuple[np.ndarray, np.ndarray]:
        image = rearrange(images[: FACTOR**2], "(p q) h w c -> 1 (p h) (q w) c", p=FACTOR)
        return run(large, image), base[: FACTOR**2].mean(axis=0, keepdims=True)

    def head() -> tuple[np.ndarray, np.ndarray]:
        arrays = exact.to("google").arrays
        first = {name: random.integers(0, 2, arrays[name].shape) == 1 for name in ("head/kernel", "head/bias")}
        one = _changed(exact, {name: _masked(own, 1) for name, own in first.items()})
        other = _changed(exact, {name: _masked(~own, -2) for name, own in first.items()})
        return run(one) - run(other) / 2, base

    def selected() -> tuple[np.ndarray, np.ndarray]:
        chosen = [int(k) for k in _order(random, classes)[: max(1, classes // 2)]]
        return run(checkpoint.with_selected_classes(chosen)), base[:, chosen]

    # Where things are only put in another order or scaled by powers of two, both runs err as those of one model do.
    yield _Equation(
        "tokens",
        "patches in another order, with the token MLPs' weights alike, give the same logits",
        tokens,
        because="there is one token" if config.num_tokens == 1 else "",
    )
    yield _Equation(
        "pixels",
        "the values inside all patches in another order, with the stem's kernel alike, give the same logits",
        pixels,
        because="a patch is one value" if patch == 1 else "",
    )
    yield _Equation(
        "hidden units",
        "hidden units of every MLP in an order of its own give the same logits",
        hidden,
        because="every MLP has one hidden unit" if config.tokens_mlp_dim == config.channels_mlp_dim == 1 else "",
    )
    yield _Equation("channels", "channels in another order throughout give the same logits", channels)
    yield _Equation(
        "scales",
        "norms times powers of two, what reads them divided by them, and the residual stream doubled give the same logits",
        scales,
    )
    # A mean of K x K runs errs no more than one of them, nor does the large model, whose mean is over as many crops: two runs.
    height, width = large.config.image_size
    size = f"the model for {height}x{width} pixels has {large.num_parameters:,} parameters"
    yield _Equation(
        "crops",
        f"the model for a larger image gives the mean of the logits over its {FACTOR}x{FACTOR} crops",
        crops,
        note=size,
        because="" if _fits(large) else f"{size}, more than {LARGEST:,}",
    )
    # Both parts of the head see the features' errors and add their own: three runs err where two do elsewhere.
    no_head = "" if classes else "there is no head"
    yield _Equation(
        "head", "the head in two parts, one of them times -2, gives the sum of their logits", head, runs=3, because=no_head
    )
    yield _Equation("classes", "some classes in another order give those logits in that order", selected, because=no_head)


def _fits(large: Checkpoint) -> bool:
    return large.num_parameters <= LARGEST


def _tokens(config: MixerConfig, order: np.ndarray) -> dict[str, Change]:
    changes = {"Dense_0/kernel": _taken(order, 0), "Dense_1/kernel": _taken(order, 1), "Dense_1/bias": _taken(order, 0)}
    return _in_blocks(config, lambda i: {f"token_mixing/{name}": change for name, change in changes.items()})


def _hidden(config: MixerConfig, random: np.random.Generator) -> dict[str, Change]:
    def changes(i: int) -> dict[str, Change]:
        found = {}
        for mlp, width in (("token_mixing", config.tokens_mlp_dim), ("channel_mixing", config.channels_mlp_dim)):
            order = _order(random, width)
            found[f"{mlp}/Dense_0/kernel"] = _taken(order, 1)
            found[f"{mlp}/Dense_0/bias"] = _taken(order, 0)
            found[f"{mlp}/Dense_1/kernel"] = _taken(order, 0)
        return found

    return _in_blocks(config, changes)


def _channels(config: MixerConfig, order: np.ndarray) -> dict[str, Change]:
    read, written = _taken(order, 0), _taken(order, -1)
    block = {f"LayerNorm_{i}/{leaf}": written for i in (0, 1) for leaf in ("scale", "bias")}
    block |= {f"channel_mixing/Dense_1/{leaf}": written for leaf in ("kernel", "bias")} | {
        "channel_mixing/Dense_0/kernel": read
    }
    ends = dict.fromkeys(("stem/kernel", "stem/bias", "pre_head_layer_norm/scale", "pre_head_layer_norm/bias"), written)
    return _in_blocks(config, lambda i: block) | ends | ({"head/kernel": read} if config.num_classes else {})


def _scales(config: MixerConfig) -> dict[str, Change]:
    """Powers of two, so that nothing is rounded; those of neighbouring norms differ. With four times the epsilon."""

    def changes(i: int) -> dict[str, Change]:
        found: dict[str, Change] = {}
        for norm, mlp, factor in (("LayerNorm_0", "token_mixing", 2.0), ("LayerNorm_1", "channel_mixing", 0.5)):
            power = factor ** (1 + i % 3)
            found |= {f"{norm}/{leaf}": _times(power) for leaf in ("scale", "bias")}
            found[f"{mlp}/Dense_0/kernel"] = _times(1 / power)
            found |= {f"{mlp}/Dense_1/{leaf}": _times(2) for leaf in ("kernel", "bias")}
        return found

    ends = {f"stem/{leaf}": _times(2) for leaf in ("kernel", "bias")}
    ends |= {f"pre_head_layer_norm/{leaf}": _times(0.5) for leaf in ("scale", "bias")}
    return _in_blocks(config, changes) | ends | ({"head/kernel": _times(2)} if config.num_classes else {})


def _taken(order: np.ndarray, axis: int) -> Change:
    return lambda array: array.take(order, axis)


def _times(factor: float) -> Change:
    return lambda array: (array * factor).astype(array.dtype)


def _masked(mask: np.ndarray, factor: float) -> Change:
    return lambda array: np.where(mask, array * factor, 0).astype(array.dtype)


def _in_blocks(config: MixerConfig, changes: Callable[[int], Mapping[str, Change]]) -> dict[str, Change]:
    return {f"MixerBlock_{i}/{name}": change for i in range(config.num_blocks) for name, change in changes(i).items()}


def rearranged(
    images: np.ndarray,
    config: MixerConfig,
    *,
    tokens: np.ndarray | slice = slice(None),
    pixels: np.ndarray | slice = slice(None),
) -> np.ndarray:
    """Images with their patches, and the values inside each, in another order."""
    (gh, gw), (h, w) = config.grid, config.patch_size
    patches = rearrange(images, "b (gh h) (gw w) c -> b (gh gw) (h w c)", h=h, w=w)[:, tokens][:, :, pixels]
    return rearrange(patches, "b (gh gw) (h w c) -> b (gh h) (gw w) c", gh=gh, gw=gw, h=h, w=w)


def _order(random: np.random.Generator, length: int) -> np.ndarray:
    """Some order that is not the one there is, unless there is one thing."""
    order = random.permutation(length)
    return order if length == 1 or (order != np.arange(length)).any() else np.roll(order, 1)


def _changed(checkpoint: Checkpoint, changes: Mapping[str, Change]) -> Checkpoint:
    """With arrays, by google's names, that are changed when they are read; in the layout that it has."""
    google = checkpoint.to("google")
    arrays = dict(google.arrays)
    for name, change in changes.items():
        arrays[name] = derived(arrays[name], arrays[name].shape, change)
    return replace(google, arrays=arrays, claimed=None).to(checkpoint.layout)


def _run(side: Side, checkpoint: Checkpoint, images: np.ndarray) -> np.ndarray:
    return side.open(checkpoint)(images, None)


def _budget(checkpoint: Checkpoint, images: np.ndarray, side: Side, draws: int, seed: int) -> Difference:
    """Of two runs of one side, both rounded in one way; where a device has several, the larger."""
    weights = {name: np.asarray(array) for name, array in checkpoint.to("google").arrays.items()}
    found = []
    for way in side.precisions:
        growth = precision.budget(checkpoint.config, weights, images, way, way, draws=draws, seed=seed).growth
        found.append(growth[next(reversed(growth))])
    return Difference(*(max(getattr(each, entry) for each in found) for entry in ("largest", "rms", "scale")))
