"""LazyArray: an array whose shape and dtype are known and whose values stay in the file until asked for."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
from einops import rearrange

from . import memory
from .files import CHUNK


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

    `read(None)` or `read(i)` returns the values. Nothing is kept: asking twice reads twice. `by_item` says that the
    array is put together from its items each time: reading them one by one costs no more, and the whole is nobody
    else's. `pieces()`, where there is one, gives the bytes in C order for someone who does not need them all at once.
    """

    def __init__(
        self,
        shape: Iterable[int],
        dtype: np.dtype,
        read: Callable[[int | None], np.ndarray],
        *,
        by_item: bool = False,
        pieces: Callable[[], Iterator[np.ndarray]] | None = None,
    ):
        self.shape = tuple(shape)
        self.dtype = np.dtype(dtype)
        self.by_item = by_item
        self.pieces = pieces
        self._read = read

    def __array__(self, dtype: Any = None, /, *, copy: bool | None = None) -> np.ndarray:
        array = self._read(None)
        return array if dtype is None else array.astype(dtype, copy=False)

    def __getitem__(self, index: int, /) -> np.ndarray:
        return self._read(index)

    def __repr__(self) -> str:
        return f"LazyArray(shape={self.shape}, dtype={self.dtype})"


def rearranged(array: Array, source: str, target: str) -> Array:
    """The array with its axes in another order, as two einops patterns say: "o i" to "i o"."""
    if source == target:
        return array
    shape = rearrange(np.broadcast_to(np.int8(0), array.shape), f"{source} -> {target}").shape
    return derived(array, shape, lambda values: rearrange(values, f"{source} -> {target}"))


def reshaped(array: Array, shape: tuple[int, ...]) -> Array:
    """The array in another shape of as many values."""
    return array if tuple(array.shape) == shape else derived(array, shape, lambda values: values.reshape(shape))


def stacked(items: list[Array]) -> Array:
    """The arrays, all of one shape, along a new first axis."""
    first = items[0]

    def read(index: int | None) -> np.ndarray:
        if index is not None:
            return np.asarray(items[index])
        whole = memory.aligned((len(items), *first.shape), first.dtype)

        def fill(row: int) -> None:  # in place: never two copies of all
            whole[row] = np.asarray(items[row])

        if whole.nbytes < memory.LARGE:
            for row in range(len(items)):
                fill(row)
        else:
            with ThreadPoolExecutor(2) as threads:
                deque(threads.map(fill, range(len(items))), maxlen=0)
        return whole

    return LazyArray((len(items), *first.shape), first.dtype, read, by_item=True)


def item(array: Array, row: int) -> Array:
    """One item along the first axis, read alone."""
    return LazyArray(array.shape[1:], array.dtype, lambda i: _item(np.asarray(array[row]), i))


def changed(array: Array, dtype: np.dtype, change: Callable[[np.ndarray], np.ndarray]) -> Array:
    """The array with every value it reads passed through `change`, which keeps the shape."""
    by_item = getattr(array, "by_item", False)
    return LazyArray(array.shape, dtype, lambda i: change(np.asarray(array if i is None else array[i])), by_item=by_item)


def parts(arrays: Arrays) -> Iterator[tuple[str, int | None, np.ndarray]]:
    """Name, item and values in C order, item by item where that costs nothing (None: the whole).

    Each large one, with the small ones before it, is made in another thread while the one before is at work, and never
    more than that one: so `del` it before asking for the next.
    """

    def made() -> Iterator[list[tuple[str, int | None, np.ndarray]]]:
        batch: list[tuple[str, int | None, np.ndarray]] = []
        for name, array in arrays.items():
            for i in range(array.shape[0]) if getattr(array, "by_item", False) else [None]:
                batch.append((name, i, contiguous(np.asarray(array if i is None else array[i]))))
                if sum(values.nbytes for _, _, values in batch) >= memory.LARGE:
                    yield batch
                    batch = []
        yield batch

    iterator = made()
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, iterator, None)
        while (batch := coming.result()) is not None:
            coming = thread.submit(next, iterator, None)
            while batch:
                yield batch.pop(0)


def unequal(left: Arrays, right: Arrays) -> list[str]:
    """The names that are on one side only, or whose arrays differ in shape, dtype or a bit."""
    both = {name: array for name, array in left.items() if name in right and _alike(array, right[name])}
    wrong = {name for name in left.keys() | right.keys() if name not in both}
    for name, i, values in parts(both):
        if name not in wrong and not same_bytes(right[name] if i is None else right[name][i], values):
            wrong.add(name)
        del values
    return sorted(wrong)


def _alike(a: Array, b: Array) -> bool:
    return tuple(a.shape) == tuple(b.shape) and a.dtype == b.dtype


def contiguous(values: np.ndarray) -> np.ndarray:
    """The values in C order. A large transposed matrix is copied in stripes of a cache line, up to five times as fast."""
    if values.ndim != 2 or values.flags.c_contiguous or values.nbytes < 1 << 20:
        return np.ascontiguousarray(values)
    copy, width = memory.empty(values.shape, values.dtype), 64 // values.dtype.itemsize
    for i in range(0, values.shape[1], width):
        copy[:, i : i + width] = values[:, i : i + width]
    return copy


def as_bytes(values: np.ndarray) -> np.ndarray:
    """The bytes of values in C order, shared."""
    return values.reshape(-1).view(np.uint8)


def in_pieces(array: Array) -> Iterator[np.ndarray]:
    """The bytes of an array in C order, a little at a time: that stays in the processor's cache."""
    if isinstance(array, LazyArray) and array.pieces is not None:
        yield from array.pieces()
    else:
        whole = as_bytes(contiguous(np.asarray(array)))
        yield from (whole[i : i + CHUNK] for i in range(0, whole.size, CHUNK))


def same_bytes(a: Array, b: Array) -> bool:
    """Whether two arrays have one shape, one dtype and the same bits (so NaN equals itself, 0.0 is not -0.0)."""
    if not _alike(a, b):
        return False
    whole, done = as_bytes(contiguous(np.asarray(b))), 0
    for piece in in_pieces(a):
        if not np.array_equal(piece, whole[done : done + piece.size]):
            return False
        done += piece.size
    return done == whole.size


def derived(array: Array, shape: tuple[int, ...], change: Callable[[np.ndarray], np.ndarray]) -> Array:
    """What `change` makes of the whole array, of this shape and the same dtype."""
    return LazyArray(shape, array.dtype, lambda i: _item(change(np.asarray(array)), i))


def _item(array: np.ndarray, index: int | None) -> np.ndarray:
    return array if index is None else array[index]
