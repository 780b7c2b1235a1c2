"""A Mixer whose answer is known: it says which colour an image has most of."""

import numpy as np
from PIL import Image

from convert import Checkpoint, MixerConfig, write

COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "cyan": (0, 255, 255),
    "magenta": (255, 0, 255),
    "yellow": (255, 255, 0),
}
CONFIG = MixerConfig(
    patch_size=(4, 4),
    image_size=(8, 8),
    num_blocks=1,
    hidden_dim=3,
    tokens_mlp_dim=2,
    channels_mlp_dim=5,
    num_classes=6,
)


def weights(classes=6, at=range(6)):
    """Three channels are the means of red, green and blue; both MLPs add nothing; the head scores each colour by its angle.

    `at` says which classes the colours are; every other one has a logit of -100.
    """
    shapes = {
        "stem/kernel": (4, 4, 3, 3),
        "stem/bias": (3,),
        "MixerBlock_0/token_mixing/Dense_0/kernel": (4, 2),
        "MixerBlock_0/token_mixing/Dense_0/bias": (2,),
        "MixerBlock_0/token_mixing/Dense_1/kernel": (2, 4),
        "MixerBlock_0/token_mixing/Dense_1/bias": (4,),
        "MixerBlock_0/channel_mixing/Dense_0/kernel": (3, 5),
        "MixerBlock_0/channel_mixing/Dense_0/bias": (5,),
        "MixerBlock_0/channel_mixing/Dense_1/kernel": (5, 3),
        "MixerBlock_0/channel_mixing/Dense_1/bias": (3,),
        "head/kernel": (3, classes),
        "head/bias": (classes,),
    }
    arrays = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    for norm in ("MixerBlock_0/LayerNorm_0", "MixerBlock_0/LayerNorm_1", "pre_head_layer_norm"):
        arrays |= {f"{norm}/scale": np.ones(3, np.float32), f"{norm}/bias": np.zeros(3, np.float32)}
    arrays["stem/kernel"][:] = np.eye(3) / 16
    directions = np.array(list(COLOURS.values())) / 255
    directions -= directions.mean(axis=1, keepdims=True)
    arrays["head/bias"][:] = -100
    arrays["head/bias"][list(at)] = 0
    arrays["head/kernel"][:, list(at)] = (directions / np.linalg.norm(directions, axis=1, keepdims=True)).T
    return arrays


def checkpoint(path, *, labels=tuple(COLOURS), **options):
    said = {"preprocessing": "resmall_crop"} | ({} if labels is None else {"labels": list(labels)})
    write(path, Checkpoint.from_arrays(weights(**options), said=said))
    return path


def plain(colour, size=(20, 16)):
    return Image.new("RGB", size, COLOURS[colour])


def split(middle, sides):
    """The middle third of a wide image has one colour, both sides another."""
    image = plain(sides, (96, 32))
    image.paste(COLOURS[middle], (32, 0, 64, 32))
    return image
