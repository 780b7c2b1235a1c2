"""How a device rounds: the dtype of its results, the operands of its matmul unit, and the NumPy model's arithmetic done so."""

__all__ = ["BITS", "LANES", "UNITS", "Rounded", "Rounding", "rounded", "slices"]

import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from . import numpy_model

BITS = {"float64": 53, "float32": 24, "tf32": 11, "float16": 11, "bfloat16": 8}  # of the significand, the leading one included
UNITS = ("float32", "tf32", "tf32_truncated", "bfloat16", "bfloat16_3x", "bfloat16_6x")
LANES = 8  # partial sums, at least, in a sum over the channels; other sums add one term after the other
# Root mean square of a relative rounding error to nearest, for values of any size, in units of half the last place.
_NEAREST = 0.425
_SLICE = 1 << 15  # elements worked on at once: temporaries stay in the cache, and no fresh memory is asked for


@dataclass(frozen=True)
class Rounding:
    """The dtype of results, and how the matmul `unit` takes float32 operands.

    "tf32" rounds operands to nearest, "tf32_truncated" cuts them off; "bfloat16" is one pass, "_3x" and "_6x" add passes over
    what was rounded away. Sums are in float32, whatever the operands are; float64 has no unit. The mean over tokens and
    the head are in float32 at least, as in the models.
    """

    dtype: str = "float32"
    unit: str = "float32"

    def __post_init__(self) -> None:
        if self.dtype not in BITS or self.dtype == "tf32" or self.unit not in UNITS:
            raise ValueError(f"no such rounding: results in {self.dtype!r}, operands in {self.unit!r}")

    def __str__(self) -> str:
        return self.dtype if self.unit == "float32" or self.dtype != "float32" else f"{self.dtype} by {self.unit}"

    @property
    def simulated(self) -> "Rounding":
        """What is simulated in its place: float32 for float64, whose errors the NumPy model, in float64 itself, cannot see."""
        return Rounding() if self.dtype == "float64" else self

    @property
    def error_scale(self) -> float:
        """What simulated errors are multiplied by. They are small enough for the model to be linear in them."""
        return 2.0 ** (BITS["float32"] - BITS["float64"]) if self.dtype == "float64" else 1.0


def rounded(
    x: np.ndarray, bits: int, how: str = "nearest", random: np.random.Generator | None = None, *, out: np.ndarray | None = None
) -> np.ndarray:
    """float64 values with `bits` significant bits: "nearest" (ties to even), "truncate" or "random", up or down by distance.

    `out`, a contiguous array, receives the result, and may be `x`.
    """
    drop = BITS["float64"] - bits
    if how == "random" and random is None:
        raise ValueError("random rounding needs a generator")
    if drop <= 0:
        return x
    if out is None:
        out = np.empty(x.shape)
    elif not out.flags.c_contiguous:
        raise ValueError("rounding in place needs a contiguous array")
    if out is not x:
        out[...] = x
    for (words,) in slices(out.view(np.int64)):
        if random is not None and how == "random":
            words += random.integers(0, 1 << drop, words.size, np.uint32 if drop < 32 else np.int64)
        elif how == "nearest":
            words += ((1 << (drop - 1)) - 1) + ((words >> drop) & 1)
        words &= -(1 << drop)
    return out


def slices(*arrays: np.ndarray) -> Iterator[list[np.ndarray]]:
    """The same small part of each of several contiguous arrays of one size, after the other parts."""
    flat = [array.reshape(-1) for array in arrays]
    for start in range(0, flat[0].size, _SLICE):
        yield [array[start : start + _SLICE] for array in flat]


class Rounded(numpy_model.Arithmetic):
    """The NumPy model's arithmetic as a device rounds. `error` is what rounding did in the last operation."""

    def __init__(self, rounding: Rounding, random: np.random.Generator, kernels: "Kernels | None" = None):
        self._dtype, self._unit = rounding.simulated.dtype, rounding.simulated.unit
        self._random, self._kernels = random, kernels or Kernels()
        self.error = np.zeros(0)

    def matmul(self, x: np.ndarray, kernel: np.ndarray, bias: np.ndarray, exact: np.ndarray | None = None) -> np.ndarray:
        exact = x @ kernel if exact is None else exact
        y = self._round(self._matmul(x, kernel, exact, self._dtype), self._dtype)
        y += rounded(bias, BITS[self._dtype])
        exact += bias
        return self._result(y, exact, self._dtype)

    def head(self, x: np.ndarray, kernel: np.ndarray, bias: np.ndarray) -> np.ndarray:
        exact = x @ kernel
        y = self._round(self._matmul(x, kernel, exact, "float32"))
        return self._result(y + bias, exact + bias, "float32")

    def layer_norm(self, x: np.ndarray, scale: np.ndarray, bias: np.ndarray, epsilon: float) -> np.ndarray:
        channels = x.shape[-1]
        total = x.sum(axis=-1, keepdims=True)
        mean = self._round(self._add_errors(total, channels / LANES, _squares(x)) / channels)
        y = self._round(x - mean)
        squares = _squares(y)
        variance = self._add_errors(squares, channels / LANES, squares**2 / channels) / channels
        y *= self._round(1 / np.sqrt(self._round(variance) + epsilon))
        self._round(y)
        y *= rounded(scale, BITS[self._dtype])
        self._round(y)
        y += rounded(bias, BITS[self._dtype])
        return self._result(y, super().layer_norm(x, scale, bias, epsilon), self._dtype)

    def gelu(self, x: np.ndarray, form: str) -> np.ndarray:
        # 0.5 x (1 + t): t is what an elementary function gives, good to a few units in its last place.
        x = np.ascontiguousarray(x)
        exact, t = np.empty(x.shape), np.ones(x.shape)
        for x_part, exact_part, t_part in slices(x, exact, t):
            exact_part[...] = numpy_model.gelu(x_part, form)
            np.divide(exact_part, 0.5 * x_part, out=t_part, where=x_part != 0)
            t_part -= 1
        y = rounded(t, BITS["float32"] - 2, "random", self._random, out=t)
        y += 1
        self._round(y)
        y *= x
        y *= 0.5
        return self._result(y, exact, self._dtype)

    def add(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        exact = np.add(x, y, order="C")
        return self._result(exact.copy(), exact, self._dtype)

    def mean(self, x: np.ndarray) -> np.ndarray:
        total = self._add_errors(x.sum(axis=1), x.shape[1], np.einsum("btc,btc->bc", x, x))
        return self._result(total / x.shape[1], x.mean(axis=1), "float32")

    def _matmul(self, x: np.ndarray, kernel: np.ndarray, exact: np.ndarray, dtype: str) -> np.ndarray:
        """Of operands rounded as the unit does, with the error of adding one term after the other in float32."""
        parts, column_squares = self._kernels(kernel, dtype, self._unit)
        y = exact.copy() if parts[0] is kernel else _matmul_of_parts(_operand(x, self._unit), parts)
        return self._add_errors(y, len(kernel), _squares(x), column_squares / len(kernel))

    def _add_errors(
        self, total: np.ndarray, terms: float, squares: np.ndarray, column_squares: np.ndarray | None = None
    ) -> np.ndarray:
        """Add to sums of `terms` terms, in place, what adding one after the other, each partial sum rounded to float32, errs.

        `squares` is the sum of the terms' squares, or with `column_squares` a factor of it that is the same along a row.
        Partial sums go from 0 to the total as a Brownian bridge: their squares add up to terms (total² / 3 + squares / 6).
        """
        unit_variance = (_NEAREST * 2.0 ** -BITS["float32"]) ** 2 * terms
        width = total.shape[-1]
        rows, row_squares = total.reshape(-1, width), np.broadcast_to(squares, total.shape[:-1] + squares.shape[-1:])
        row_squares = row_squares.reshape(len(rows), -1) * (unit_variance / 6)
        step = max(1, _SLICE // width)
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            deviation = part * part
            deviation *= unit_variance / 3
            deviation += row_squares[start : start + step] * (1 if column_squares is None else column_squares)
            np.sqrt(deviation, out=deviation)
            deviation *= self._random.standard_normal(part.shape, np.float32)
            part += deviation
        return total

    def _round(self, x: np.ndarray, dtype: str = "float32") -> np.ndarray:
        return rounded(x, BITS[dtype], "random", self._random, out=x)

    def _result(self, y: np.ndarray, exact: np.ndarray, dtype: str) -> np.ndarray:
        y = self._round(y, dtype)
        self.error = np.subtract(y, exact, out=exact)
        return y


def _squares(x: np.ndarray) -> np.ndarray:
    """The sum of the squares of each row, as a column."""
    return np.einsum("...i,...i->...", x, x)[..., None]


class Kernels:
    """What every simulated run needs of a kernel, computed once: its operands, and the sums of its columns' squares."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._key: tuple[np.ndarray, str, str] | None = None
        self._value: tuple[tuple[np.ndarray, ...], np.ndarray] = (), np.zeros(0)

    def __call__(self, kernel: np.ndarray, dtype: str, unit: str) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
        with self._lock:
            if self._key is None or self._key[0] is not kernel or self._key[1:] != (dtype, unit):
                cast = rounded(kernel, BITS[dtype])
                cast = kernel if np.array_equal(cast, kernel) else cast
                self._key, self._value = (kernel, dtype, unit), (_operand(cast, unit), np.einsum("io,io->o", cast, cast))
            return self._value


def _operand(x: np.ndarray, unit: str) -> tuple[np.ndarray, ...]:
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


def _matmul_of_parts(x: tuple[np.ndarray, ...], kernel: tuple[np.ndarray, ...]) -> np.ndarray:
    """The sum of the matmuls of all pairs of parts but those of two small parts, as a unit computes it."""
    y = sum(x[1:], x[0]) @ sum(kernel[1:], kernel[0])
    if len(x) == 2:
        y -= x[1] @ kernel[1]
    if len(x) == 3:
        y -= (x[1] + x[2]) @ kernel[2] + x[2] @ kernel[1]
    return y
