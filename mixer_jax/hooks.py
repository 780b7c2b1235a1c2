"""Hooks and masks, which both models take in a call.

A hook, `hook(name, array) -> array`, sees the result of every operation and returns what the forward pass continues with.
Names are those of `mixer_jax.parity.numpy_model`: "blocks/3/token_mixing/gelu". What it sees has the Flax model's axes.

Masks, `masks(name, shape, keep_rate) -> booleans`, replace the random bits of a call in train mode, True for what is kept, so
that two frameworks can train with the same ones. In the order of the forward pass their names are
`blocks/3/token_mixing/dropout_0` (after the GELU), `dropout_1` (after the second matmul), `stochastic_depth` (before the
residual sum), then the same of `channel_mixing`. Shapes are those of the activations, and (b, 1, 1) for stochastic depth.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

Named = TypeVar("Named", bound=Callable[..., Any] | None)


def no_hook(name: str, array: Any) -> Any:
    return array


def under(prefix: str, function: Named) -> Named:
    """A hook, or masks, whose names start with a prefix."""
    if function is None or function is no_hook:
        return function
    return lambda name, *rest: function(f"{prefix}/{name}", *rest)  # type: ignore[return-value]


def check_mask(name: str, shape: Sequence[int], dtype: str, wanted: Sequence[int]) -> None:
    """Raise ValueError unless a mask is boolean and of the requested shape."""
    if dtype != "bool" or tuple(shape) != tuple(wanted):
        raise ValueError(f"masks: {name} must be bool of shape {tuple(wanted)}, not {dtype} of shape {tuple(shape)}")
