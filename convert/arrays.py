"""LazyArray: an array whose shape and dtype are known and whose values stay in the file until they are read."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
from einops import rearrange

CHUNK = 1 << 18  # bytes compared at a time, so that the result stays in the cache


class Array(Protocol):
    """What the mapping needs of an array: NumPy arrays and LazyArrays have it."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...
    def __getitem__(self, index: int, /) -> Any: ...
    def __array__(self, dtype: Any = None, /, *, copy: bool | None = None) -> np.ndarray: ...


Arrays = Mapping[str, Array]


class LazyArray:
    """Read with `np.asarray(lazy)`; `lazy[i]` reads the i-th item of the first axis alone.

    `read(None)` returns all values and `read(i)` one item. Nothing is cached: a second read reads again. `by_item` marks an
    array that is assembled from its items: reading them one by one costs no more than reading all, and `read(None)` returns
    a fresh array.
    """

    def __init__(
        self, shape: Iterable[int], dtype: np.dtype, read: Callable[[int | None], np.ndarray], *, by_item: bool = False
    ):
        self.shape = tuple(shape)
        self.dtype = np.dtype(dtype)
        self.by_item = by_item
        self._read = read

    def __array__(self, dtype: Any = None, /, *, copy: bool | None = None) -> np.ndarray:
        array = np.asarray(self._read(None), dtype)
        return array.copy() if copy else array

    def __getitem__(self, index: int, /) -> np.ndarray:
        return self._read(index)

    def __repr__(self) -> str:
        return f"LazyArray(shape={self.shape}, dtype={self.dtype})"


def is_by_item(array: Array) -> bool:
    return isinstance(array, LazyArray) and array.by_item


def read_array(array: Array, index: int | None) -> np.ndarray:
    """The values of the whole array, or of one item of its first axis."""
    return np.asarray(array if index is None else array[index])


def mapped(array: Array, change: Callable[[np.ndarray], np.ndarray], *, dtype: np.dtype | None = None) -> Array:
    """The array with `change`, which keeps the shape, applied to all values that are read."""
    dtype = array.dtype if dtype is None else dtype
    return LazyArray(array.shape, dtype, lambda i: change(read_array(array, i)), by_item=is_by_item(array))


def derived(array: Array, shape: tuple[int, ...], change: Callable[[np.ndarray], np.ndarray]) -> Array:
    """`change(whole array)` as an array of this shape and the same dtype."""
    return LazyArray(shape, array.dtype, lambda i: read_array(change(np.asarray(array)), i))


def rearranged(array: Array, source: str, target: str) -> Array:
    """The array with its axes in another order, given as two einops patterns: "o i" to "i o"."""
    if source == target:
        return array
    shape = rearrange(np.broadcast_to(np.int8(0), array.shape), f"{source} -> {target}").shape
    return derived(array, shape, lambda values: rearrange(values, f"{source} -> {target}"))


def reshaped(array: Array, shape: tuple[int, ...]) -> Array:
    """The array in another shape of equal size."""
    return array if tuple(array.shape) == shape else derived(array, shape, lambda values: values.reshape(shape))


def item(array: Array, index: int) -> Array:
    """One item of the first axis, read without the others."""
    return LazyArray(array.shape[1:], array.dtype, lambda i: read_array(np.asarray(array[index]), i))


def stacked(items: list[Array]) -> Array:
    """Arrays of one shape along a new first axis."""
    first = items[0]

    def read(index: int | None) -> np.ndarray:
        if index is not None:
            return np.asarray(items[index])
        whole = _aligned_empty((len(items), *first.shape), first.dtype)

        def fill(row: int) -> None:  # in place: never two copies of all
            whole[row] = np.asarray(items[row])

        with ThreadPoolExecutor(2) as threads:
            deque(threads.map(fill, range(len(items))), maxlen=0)
        return whole

    return LazyArray((len(items), *first.shape), first.dtype, read, by_item=True)


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """np.empty on a boundary of 64 bytes: JAX can share such memory on a CPU, and copies any other."""
    count = int(np.prod(shape)) * dtype.itemsize
    block = np.empty(count + 64, np.uint8)
    start = -block.ctypes.data % 64
    return block[start : start + count].view(dtype).reshape(shape)


def contiguous_parts(array: Array) -> Iterator[np.ndarray]:
    """The values in C order: item by item where the array is assembled from items, else all at once."""
    for index in range(array.shape[0]) if is_by_item(array) else [None]:
        yield contiguous(read_array(array, index))


def contiguous(values: np.ndarray) -> np.ndarray:
    """The values in C order. A large transposed matrix is copied in stripes of a cache line, up to five times as fast."""
    if values.ndim != 2 or values.flags.c_contiguous or values.nbytes < 1 << 20:
        return np.ascontiguousarray(values)
    copy, width = np.empty(values.shape, values.dtype), 64 // values.dtype.itemsize
    for i in range(0, values.shape[1], width):
        copy[:, i : i + width] = values[:, i : i + width]
    return copy


def as_bytes(values: np.ndarray) -> np.ndarray:
    """The bytes of values in C order, as a view."""
    return values.reshape(-1).view(np.uint8)


def same_bytes(a: Array, b: Array) -> bool:
    """Whether two arrays have one shape, one dtype and equal bits, so that NaN equals itself and 0.0 differs from -0.0."""
    if tuple(a.shape) != tuple(b.shape) or a.dtype != b.dtype:
        return False
    for i in range(a.shape[0]) if is_by_item(a) else [None]:
        x, y = (as_bytes(contiguous(read_array(array, i))) for array in (a, b))
        if not all(np.array_equal(x[at : at + CHUNK], y[at : at + CHUNK]) for at in range(0, x.size, CHUNK)):
            return False
    return True


def unequal_names(left: Arrays, right: Arrays) -> list[str]:
    """The names that only one of the two has, or whose arrays differ in shape, dtype or any bit."""
    names = sorted(left.keys() | right.keys())
    return [name for name in names if name not in left or name not in right or not same_bytes(left[name], right[name])]
