"""Checks that both models make of their images, and how many of them a CPU should compute at once."""

import os
from collections.abc import Sequence

from convert import MixerConfig

CPU_CACHE = 10 * 2**20  # bytes: with a larger activation a CPU waits for memory


def cpu_microbatch(config: MixerConfig, itemsize: int) -> int:
    """The number of images whose widest activation, of `itemsize` bytes a value, stays in the cache of a CPU."""
    return max(1, CPU_CACHE // (itemsize * config.num_tokens * config.channels_mlp_dim))


def require_array(images: object) -> None:
    """Raise ValueError, naming the function to use, if `images` is a path."""
    if isinstance(images, str | os.PathLike):
        raise ValueError(
            f"images must be an array, not the path {str(images)!r}: mixer_jax.prepare({str(images)!r}, model)[None]"
        )


def check_images(shape: Sequence[int], dtype: str, config: MixerConfig, *, axes: str) -> None:
    """Raise ValueError, with a remedy, unless images fit the model in size, axes ("b h w c" or "b c h w") and dtype."""
    h, w, c = (*config.image_size, config.in_channels)
    sizes = {"b": "batch", "h": h, "w": w, "c": c}
    expected, actual = tuple(sizes[axis] for axis in axes.split()), tuple(shape)
    if len(actual) == 4 and actual[1:] == expected[1:] and dtype.startswith(("float", "bfloat")):
        return  # a batch of symbolic length is not looked at further
    text = f"images must be ({', '.join(map(str, expected))}), that is ({', '.join(axes.split())}), not {actual}"
    if len(actual) == 3 and actual == expected[1:]:
        raise ValueError(f"{text}: one image is a batch of one, images[None]")
    if len(actual) != 4 or actual[1:] != expected[1:]:
        other = (c, h, w) if axes == "b h w c" else (h, w, c)
        if len(actual) == 4 and actual[1:] == other:
            order = "(0, 2, 3, 1)" if axes == "b h w c" else "(0, 3, 1, 2)"
            move = f"images.{'transpose' if axes == 'b h w c' else 'permute'}{order}"
            raise ValueError(f"{text}: the channels are on the wrong axis, use {move}")
        raise ValueError(f"{text}: resize or crop them; weights for another grid are another checkpoint")
    if not dtype.startswith(("float", "bfloat")):
        raise ValueError(
            f"images must be floating point, not {dtype}: the released weights take pixels of 0 to 255 as x / 127.5 - 1"
        )
