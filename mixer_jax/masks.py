"""What both models ask a source of masks for: `masks(name, shape, keep)` returns booleans, True for what stays.

Names are those of the tap, in the order of the forward pass: `blocks/3/token_mixing/dropout_0` (after the GELU),
`dropout_1` (after the second product), `stochastic_depth` (before the sum), then the same of `channel_mixing`. Shapes are
those of the arrays inside, which both models have alike, and (b, 1, 1) for stochastic depth. `keep` is the share that
stays; where that is all, and after `eval()`, nothing is asked for. A source replaces the random bits and nothing else:
where a mask acts and what is divided by what stays the model's own.
"""

from collections.abc import Sequence


def check_mask(name: str, shape: Sequence[int], dtype: str, wanted: Sequence[int]) -> None:
    """Raise ValueError unless a mask has booleans of the shape that was asked for."""
    if dtype != "bool" or tuple(shape) != tuple(wanted):
        raise ValueError(f"masks: {name} must be bool of shape {tuple(wanted)}, not {dtype} of shape {tuple(shape)}")
