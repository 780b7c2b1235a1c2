"""Memory that is used again. The kernel clears fresh pages, which takes longer than filling them."""

import contextlib
import math
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np

LARGE = 1 << 20  # bytes; below it malloc does this well
PAGES = 1 << 16

_spare: deque[np.ndarray] = deque(maxlen=3)  # blocks that no array uses
_users, _lock = 0, threading.Lock()


@contextlib.contextmanager
def reused() -> Iterator[None]:
    """Within it, the memory of a large array from `empty` goes to the next one of its size; it is all given back at the end."""
    global _users
    with _lock:
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                _spare.clear()


def empty(shape: int | tuple[int, ...], dtype: Any = np.uint8) -> np.ndarray:
    """np.empty, in memory of an array that is gone where there is some."""
    count = math.prod(np.atleast_1d(shape).tolist()) * np.dtype(dtype).itemsize
    if count < LARGE or not _users:
        return np.empty(shape, dtype)
    size = (count // PAGES + 1) * PAGES  # the same with a file's header before the values and without
    try:
        block = _spare.pop()  # a single step, so that no two threads get the same one
    except IndexError:
        block = np.empty(0, np.uint8)
    if block.size != size:
        block = np.empty(size, np.uint8)
    array = np.frombuffer(memoryview(block), np.uint8)  # what every view of it keeps alive, as it would not a view of `block`
    weakref.finalize(array, _give_back, block).atexit = False
    return array[:count].view(dtype).reshape(shape)


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """np.empty on a boundary of 64 bytes, where JAX can keep an array instead of copying it."""
    count = math.prod(shape) * dtype.itemsize
    block = np.empty(count + 64, np.uint8)
    start = -block.ctypes.data % 64
    return block[start : start + count].view(dtype).reshape(shape)


def _give_back(block: np.ndarray) -> None:
    if _users:
        _spare.append(block)
