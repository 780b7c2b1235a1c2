"""How a device rounds, and how far two sides may therefore lie apart: budgets, from the referee alone.

A budget is Monte Carlo arithmetic (Parker 1997): the referee computes on, but every result is rounded up or down at random
to the digits that the side has, a product's operands are rounded as its unit rounds them, and a sum of many terms errs as
one that is rounded after every term. What two such passes differ by, two honest sides may differ by. No output of a side
under test enters.
"""

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from convert import MixerConfig

from . import referee

BITS = {"float64": 53, "float32": 24, "tf32": 11, "float16": 11, "bfloat16": 8}  # of the significand, the leading one included
UNITS = ("float32", "tf32", "tf32_truncated", "bfloat16", "bfloat16_3x", "bfloat16_6x")
DRAWS = 8
THREADS = os.cpu_count()
MARGIN = 2.0  # of a budget over the largest draw: what the order of additions inside a unit may add
LOCAL_MARGIN = 3.0  # of one operation's: there are hundreds of them
LANES = 8  # in which a sum over the channels is done at least; other sums add one term after the other
# Root mean square of a relative rounding error to nearest, for values of any size, in units of half the last place.
_NEAREST = 0.425


@dataclass(frozen=True)
class Precision:
    """What a side computes in: `dtype` of results, and how its matrix `unit` takes float32 operands.

    "tf32" rounds operands to nearest, "tf32_truncated" cuts them off; "bfloat16" is one pass, "_3x" and "_6x" add the products
    of what was rounded away. Sums are in float32, whatever the operands are; float64 has no unit. The mean over tokens and
    the head are in float32 at least, as in the models.
    """

    dtype: str = "float32"
    unit: str = "float32"

    def __post_init__(self) -> None:
        if self.dtype not in BITS or self.dtype == "tf32" or self.unit not in UNITS:
            raise ValueError(f"no such precision: results in {self.dtype!r}, operands in {self.unit!r}")

    def __str__(self) -> str:
        return self.dtype if self.unit == "float32" or self.dtype != "float32" else f"{self.dtype} by {self.unit}"

    @property
    def shrink(self) -> float:
        """What errors drawn in this precision are multiplied by: float64 is drawn as float32, whose errors the referee can see.

        Rounding errors are small enough for the function to be linear in them.
        """
        return 2.0 ** (BITS["float32"] - BITS["float64"]) if self.dtype == "float64" else 1.0


_FLOAT64 = Precision("float64")


def rounded(x: np.ndarray, bits: int, how: str = "nearest", random: np.random.Generator | None = None) -> np.ndarray:
    """float64 values with `bits` significant bits: "nearest" (ties to even), "truncate" or "random", up or down by distance."""
    drop = BITS["float64"] - bits
    if drop <= 0:
        return x
    whole = np.ascontiguousarray(x).view(np.int64)
    if how == "random":
        if random is None:
            raise ValueError("random rounding needs a generator")
        whole = whole + random.integers(0, 1 << drop, x.shape, np.uint32 if drop < 32 else np.int64)
    elif how == "nearest":
        whole = whole + ((1 << (drop - 1)) - 1 + ((whole >> drop) & 1))
    return (whole & -(1 << drop)).view(np.float64)


class Rounded(referee.Arithmetic):
    """The referee's arithmetic as a device of some precision has it. `error` is what rounding did in the last operation."""

    def __init__(self, precision: Precision, random: np.random.Generator, kernels: "_Kernels | None" = None):
        self._dtype, self._unit = _drawn(precision).dtype, _drawn(precision).unit
        self._random, self._kernels = random, kernels or _Kernels()
        self.error = np.zeros(0)

    def product(self, x: np.ndarray, kernel: np.ndarray, bias: np.ndarray) -> np.ndarray:
        exact = x @ kernel
        product = self._product(x, kernel, exact, self._dtype)
        return self._done(self._stored(product) + self._cast(bias), exact + bias)

    def head(self, x: np.ndarray, kernel: np.ndarray, bias: np.ndarray) -> np.ndarray:
        exact = x @ kernel
        return self._done(self._float32(self._product(x, kernel, exact, "float32")) + bias, exact + bias, keep=True)

    def layer_norm(self, x: np.ndarray, scale: np.ndarray, bias: np.ndarray, epsilon: float) -> np.ndarray:
        r, channels = self._float32, x.shape[-1]
        mean = r(self._sum(x.sum(axis=-1, keepdims=True), (x**2).sum(axis=-1, keepdims=True), channels / LANES) / channels)
        centred = r(x - mean)
        squares = (centred**2).sum(axis=-1, keepdims=True)
        variance = r(self._sum(squares, squares**2 / channels, channels / LANES) / channels)
        y = r(centred * r(1 / np.sqrt(variance + epsilon))) * self._cast(scale)
        return self._done(r(y) + self._cast(bias), super().layer_norm(x, scale, bias, epsilon))

    def gelu(self, x: np.ndarray, form: str) -> np.ndarray:
        r, exact = self._float32, referee.gelu(x, form)
        # 0.5 x (1 + t): t is what an elementary function gives, good to a few units in its last place.
        t = np.divide(exact, 0.5 * x, out=np.ones_like(x), where=x != 0) - 1
        return self._done(0.5 * x * r(1 + rounded(t, BITS["float32"] - 2, "random", self._random)), exact)

    def add(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return self._done(x + y, x + y)

    def mean(self, x: np.ndarray) -> np.ndarray:
        tokens = x.shape[1]
        return self._done(self._sum(x.sum(axis=1), (x**2).sum(axis=1), tokens) / tokens, x.mean(axis=1), keep=True)

    def _product(self, x: np.ndarray, kernel: np.ndarray, exact: np.ndarray, dtype: str) -> np.ndarray:
        """Of operands rounded as the unit does, with the error of adding one term after the other in float32."""
        parts, squares = self._kernels(kernel, dtype, self._unit)
        product = exact if parts[0] is kernel else _times(_operand(x, self._unit), parts)
        return self._sum(product, (x**2).sum(axis=-1, keepdims=True) * squares / len(kernel), len(kernel))

    def _sum(self, total: np.ndarray, squares: np.ndarray, terms: float) -> np.ndarray:
        """A sum of terms, one after the other, each partial sum rounded to float32; `squares` is the sum of the terms' squares.

        Partial sums go from 0 to the total as a Brownian bridge: their squares add up to terms (total² / 3 + squares / 6).
        """
        deviation = _NEAREST * 2.0 ** -BITS["float32"] * np.sqrt(terms * (total**2 / 3 + squares / 6))
        return total + deviation * self._random.standard_normal(np.shape(total), np.float32)

    def _float32(self, x: np.ndarray) -> np.ndarray:
        return rounded(x, BITS["float32"], "random", self._random)

    def _stored(self, x: np.ndarray) -> np.ndarray:
        return rounded(x, BITS[self._dtype], "random", self._random)

    def _cast(self, weights: np.ndarray) -> np.ndarray:
        return rounded(weights, BITS[self._dtype])

    def _done(self, y: np.ndarray, exact: np.ndarray, *, keep: bool = False) -> np.ndarray:
        y = self._float32(y) if keep else self._stored(y)
        self.error = y - exact
        return y


Operand = tuple[np.ndarray, ...]


class _Kernels:
    """What every draw needs of the kernel at hand, made once: it as an operand, and the sums of its columns' squares."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._of: tuple[np.ndarray, str, str] | None = None
        self._made: tuple[Operand, np.ndarray] = (), np.zeros(0)

    def __call__(self, kernel: np.ndarray, dtype: str, unit: str) -> tuple[Operand, np.ndarray]:
        with self._lock:
            if self._of is None or self._of[0] is not kernel or self._of[1:] != (dtype, unit):
                cast = rounded(kernel, BITS[dtype])
                cast = kernel if np.array_equal(cast, kernel) else cast
                self._of, self._made = (kernel, dtype, unit), (_operand(cast, unit), (cast**2).sum(axis=0))
            return self._made


def _operand(x: np.ndarray, unit: str) -> Operand:
    """What a unit takes of float32 values: them, rounded, or bfloat16 parts that add up to them as far as they can."""
    if unit == "float32":
        return (x,)
    if unit.startswith("tf32"):
        return (rounded(x, BITS["tf32"], "truncate" if unit == "tf32_truncated" else "nearest"),)
    parts, rest = [], x
    for _ in range({"bfloat16": 1, "bfloat16_3x": 2, "bfloat16_6x": 3}[unit]):
        parts.append(rounded(rest, BITS["bfloat16"]))
        rest = rest - parts[-1]
    return tuple(parts)


def _times(x: Operand, kernel: Operand) -> np.ndarray:
    """The products of parts that a unit adds up: all but those of two small parts."""
    product = sum(x[1:], x[0]) @ sum(kernel[1:], kernel[0])
    if len(x) == 2:
        product -= x[1] @ kernel[1]
    if len(x) == 3:
        product -= (x[1] + x[2]) @ kernel[2] + x[2] @ kernel[1]
    return product


@dataclass(frozen=True)
class Difference:
    """The largest and the root-mean-square difference of two arrays, and the largest magnitude of the one that is right."""

    largest: float
    rms: float
    scale: float

    @property
    def relative(self) -> float:
        """The largest difference as a share of the largest magnitude."""
        return self.largest / self.scale if self.scale else self.largest

    def over(self, budget: "Difference") -> float:
        """The share of a budget that this uses: more than 1 is too much. Both are taken relative to their scale."""
        shares = [
            _share(mine / (self.scale or 1), allowed / (budget.scale or 1))
            for mine, allowed in ((self.largest, budget.largest), (self.rms, budget.rms))
        ]
        return max(shares)


def difference(found: np.ndarray, right: np.ndarray) -> Difference:
    """Infinite where shapes differ or a value is not finite."""
    scale = float(np.abs(right).max(initial=0))
    if found.shape != right.shape or not np.isfinite(found).all():
        return Difference(np.inf, np.inf, scale)
    apart = np.subtract(found, right, dtype=np.float64)
    return Difference(float(np.abs(apart).max(initial=0)), float(np.sqrt(np.square(apart).mean())), scale)


def _share(found: float, allowed: float) -> float:
    if found == 0:
        return 0.0
    return found / allowed if allowed else np.inf


@dataclass
class Budget:
    """What two sides may differ by, operation by operation: what has grown up to it, and what either adds by itself, as
    the referee's float64 sees it."""

    growth: dict[str, Difference] = field(default_factory=dict)
    local: tuple[dict[str, Difference], dict[str, Difference]] = field(default_factory=lambda: ({}, {}))


class _Beside(referee.Arithmetic):
    """Several arithmetics at once, each on rows of its own of the batch."""

    def __init__(self, parts: Sequence[tuple[slice, referee.Arithmetic]]):
        self.parts = parts

    def product(self, x: np.ndarray, kernel: np.ndarray, bias: np.ndarray) -> np.ndarray:
        return self._each(lambda a, rows: a.product(x[rows], kernel, bias))

    def head(self, x: np.ndarray, kernel: np.ndarray, bias: np.ndarray) -> np.ndarray:
        return self._each(lambda a, rows: a.head(x[rows], kernel, bias))

    def layer_norm(self, x: np.ndarray, scale: np.ndarray, bias: np.ndarray, epsilon: float) -> np.ndarray:
        return self._each(lambda a, rows: a.layer_norm(x[rows], scale, bias, epsilon))

    def gelu(self, x: np.ndarray, form: str) -> np.ndarray:
        return self._each(lambda a, rows: a.gelu(x[rows], form))

    def add(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return self._each(lambda a, rows: a.add(x[rows], y[rows]))

    def mean(self, x: np.ndarray) -> np.ndarray:
        return self._each(lambda a, rows: a.mean(x[rows]))

    def _each(self, operation: Callable[[referee.Arithmetic, slice], np.ndarray]) -> np.ndarray:
        with ThreadPoolExecutor(THREADS) as threads:
            return np.concatenate(list(threads.map(lambda part: operation(part[1], part[0]), self.parts)))


def budget(
    config: MixerConfig,
    weights: Mapping[str, np.ndarray],
    images: np.ndarray,
    a: Precision,
    b: Precision,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Budget:
    """How far sides of two precisions may lie apart on these weights (google's names) and images (n, h, w, channels)."""
    same = _drawn(a) == _drawn(b)
    sides = _draws(a, range(draws), seed) + ([] if same else _draws(b, range(draws, 2 * draws), seed))
    found = Budget()

    def tap(name: str, array: np.ndarray) -> np.ndarray:
        exact, *rest = np.split(array, 1 + len(sides))
        scale = float(np.abs(exact).max())
        off, errors = np.stack(rest) - exact, np.stack([side.error for side in sides])
        # Draws of one precision serve both sides, each beside the next.
        off_a, off_b = (off, np.roll(off, 1, axis=0)) if same else (off[:draws], off[draws:])
        found.growth[name] = _allowed(off_a * a.shrink - off_b * b.shrink, scale)
        for local, side, mine in zip(found.local, (a, b), (errors[:draws], errors[-draws:])):
            local[name] = _allowed(mine * side.shrink - np.roll(mine, 1, axis=0) * _FLOAT64.shrink, scale, LOCAL_MARGIN)
        return array

    _side_by_side(config, weights, images, sides, tap)
    return found


def drawn(
    config: MixerConfig,
    weights: Mapping[str, np.ndarray],
    images: np.ndarray,
    how: Precision,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """The referee's logits (n, classes), and those of draws of a precision (draws, n, classes)."""
    logits = _side_by_side(config, weights, images, _draws(how, range(draws), seed), lambda name, array: array)
    exact, *rest = np.split(logits, 1 + draws)
    return exact, np.stack(rest)


def _side_by_side(
    config: MixerConfig, weights: Mapping[str, np.ndarray], images: np.ndarray, sides: Sequence[Rounded], tap: referee.Tap
) -> np.ndarray:
    """The referee on the images, then each of the sides on the same, in one batch."""
    n, arithmetics = len(images), [referee.Arithmetic(), *sides]
    return referee.forward(
        config,
        weights,
        np.tile(np.asarray(images, np.float64), (len(arithmetics), 1, 1, 1)),
        tap=tap,
        arithmetic=_Beside([(slice(i * n, (i + 1) * n), arithmetic) for i, arithmetic in enumerate(arithmetics)]),
    )


def _draws(precision: Precision, numbers: range, seed: int) -> list[Rounded]:
    kernels = _Kernels()
    return [Rounded(precision, np.random.default_rng((seed, number)), kernels) for number in numbers]


def _drawn(precision: Precision) -> Precision:
    """What a precision is drawn as."""
    return Precision() if precision.dtype == "float64" else precision


def _allowed(drawn: np.ndarray, scale: float, margin: float = MARGIN) -> Difference:
    """The largest of the draws (draws, ...), with a margin."""
    axes = tuple(range(1, drawn.ndim))
    rms = np.sqrt(np.square(drawn).mean(axis=axes)).max()
    return Difference(margin * float(np.abs(drawn).max()), margin * float(rms), scale)
