"""What both models ask of the images they are called with."""

import os
from collections.abc import Sequence

from convert import MixerConfig

CACHE = 10 * 2**20  # bytes of the widest activation beyond which a CPU waits for memory


def few_enough(config: MixerConfig, itemsize: int) -> int:
    """How many images at once leave the widest activation, of items of so many bytes, in a CPU's cache."""
    return max(1, CACHE // (itemsize * config.num_tokens * config.channels_mlp_dim))


def require_array(images: object) -> None:
    """Raise ValueError, naming the function to use, for the path of an image."""
    if isinstance(images, str | os.PathLike):
        raise ValueError(
            f"images must be an array, not the path {str(images)!r}: mixer_jax.prepare({str(images)!r}, model)[None]"
        )


def check_images(shape: Sequence[int], dtype: str, config: MixerConfig, *, axes: str) -> None:
    """Raise ValueError, saying what to do, unless images fit the model in size, axes ("b h w c", "b c h w") and dtype."""
    h, w, c = (*config.image_size, config.in_channels)
    sizes = {"b": "batch", "h": h, "w": w, "c": c}
    wanted, found = tuple(sizes[axis] for axis in axes.split()), tuple(shape)
    if len(found) == 4 and found[1:] == wanted[1:] and dtype.startswith(("float", "bfloat")):
        return  # a batch of symbolic length is not looked at further
    text = f"images must be ({', '.join(map(str, wanted))}), that is ({', '.join(axes.split())}), not {found}"
    if len(found) == 3 and found == wanted[1:]:
        raise ValueError(f"{text}: one image is a batch of one, images[None]")
    if len(found) != 4 or found[1:] != wanted[1:]:
        other = (c, h, w) if axes == "b h w c" else (h, w, c)
        if len(found) == 4 and found[1:] == other:
            order = "(0, 2, 3, 1)" if axes == "b h w c" else "(0, 3, 1, 2)"
            move = f"images.{'transpose' if axes == 'b h w c' else 'permute'}{order}"
            raise ValueError(f"{text}: the channels are on the wrong axis, use {move}")
        raise ValueError(f"{text}: resize or crop them; weights for another grid are another checkpoint")
    if not dtype.startswith(("float", "bfloat")):
        raise ValueError(
            f"images must be floating point, not {dtype}: the released weights take pixels of 0 to 255 as x / 127.5 - 1"
        )
