"""Several processes that compute as one: what each holds, and what they tell each other. `joining` brings them together."""

__all__ = [
    "AllFailed",
    "all_or_none",
    "count",
    "exchanged",
    "index",
    "is_first",
    "of_first",
    "require_equal_everywhere",
    "versions",
    "whole",
]

import contextlib
import json
import sys
from collections.abc import Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np

from convert import CheckpointError

if TYPE_CHECKING:
    import jax


class AllFailed(CheckpointError):
    """An error that every process raises at the same point, so that all can end in good order."""


def index() -> int:
    """Which of the processes this is; 0 for one alone. JAX is not imported for it."""
    return _jax().process_index() if count() > 1 else 0


def count() -> int:
    return _jax().process_count() if "jax" in sys.modules and _jax().distributed.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the process that writes files and speaks."""
    return index() == 0


def exchanged(value: Any) -> list[Any]:
    """What each process gives here, in their order: bytes, or else what JSON has. All must call it at the same point."""
    if count() == 1:
        return [value]
    from jax.experimental.multihost_utils import process_allgather

    content = value if isinstance(value, bytes) else json.dumps(value).encode()
    lengths = process_allgather(np.array([len(content)], np.int32)).reshape(-1)
    padded = np.zeros(max(int(lengths.max()), 1), np.uint8)
    padded[: len(content)] = np.frombuffer(content, np.uint8)
    rows = process_allgather(padded)
    contents = [row[:length].tobytes() for row, length in zip(rows, lengths)]
    return contents if isinstance(value, bytes) else list(map(json.loads, contents))


def of_first(value: Any) -> Any:
    """What the first process gives here."""
    return exchanged(value)[0]


def whole(array: "jax.Array") -> np.ndarray:
    """An array in this process's memory, wherever its parts are. Where other processes hold some, all must call it."""
    if not array.is_fully_addressable and not array.is_fully_replicated:
        sharding: Any = array.sharding
        everywhere = _jax().sharding.NamedSharding(sharding.mesh, _jax().sharding.PartitionSpec())
        array = _jax().jit(lambda array: array, out_shardings=everywhere)(array)
    return np.asarray(array)


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
    """A part that fails in all processes, with AllFailed, if it fails in one: none waits for another that has ended."""
    error: Exception | None = None
    try:
        yield
    except (CheckpointError, OSError, ImportError, ValueError) as fault:
        if count() == 1 or isinstance(fault, AllFailed):
            raise
        error = fault
    errors = exchanged(None if error is None else str(error))
    if error is not None:
        raise AllFailed(str(error)) from error
    if others := [f"process {i}: {text}" for i, text in enumerate(errors) if text is not None]:
        raise AllFailed(others[0])


def versions() -> dict[str, str]:
    """Of all that decides what is computed."""
    return {name: version(name) for name in ("mixer-jax", "jax", "flax", "optax", "numpy", "pillow", "grain")}


def require_equal_everywhere(what: str, values: dict[str, Any]) -> None:
    """Raise AllFailed in all processes unless they have the same; what differs from the first one's is named."""
    first, *others = exchanged(values)
    for i, other in enumerate(others, 1):
        if different := [name for name in first if first[name] != other.get(name)]:
            name = different[0]
            fault = f"process {i} has another {what} than process 0: {name} is {other.get(name)!r} and not {first[name]!r}"
            raise AllFailed(f"{fault}: give all processes the same")


def _jax() -> Any:
    return sys.modules["jax"]
