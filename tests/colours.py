"""A Mixer whose best class is known: the colour that an image has most of."""

import numpy as np
from conftest import WITHOUT_TORCH, random_weights
from PIL import Image

import mixer_jax
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

    `at` are the classes of the colours; every other class has a logit of -100.
    """
    arrays = random_weights(CONFIG.replace(num_classes=classes))
    arrays = {name: np.full_like(array, name.endswith("scale")) for name, array in arrays.items()}  # zeros, scales of 1
    arrays["stem/kernel"][:] = np.eye(3) / 16
    directions = np.array(list(COLOURS.values())) / 255
    directions -= directions.mean(axis=1, keepdims=True)
    arrays["head/bias"][:] = -100
    arrays["head/bias"][list(at)] = 0
    arrays["head/kernel"][:, list(at)] = (directions / np.linalg.norm(directions, axis=1, keepdims=True)).T
    return arrays


def checkpoint(path, *, labels=tuple(COLOURS), **options):
    metadata = {"preprocessing": "resmall_crop"} | ({} if labels is None else {"labels": list(labels)})
    write(path, Checkpoint.from_arrays(weights(**options), metadata=metadata))
    return path


def models(source):
    """The Flax model of a checkpoint, and the PyTorch model where there is PyTorch."""
    loaded = [mixer_jax.load(source)]
    if not WITHOUT_TORCH:
        from mixer_jax import torch_pretrained

        loaded.append(torch_pretrained.load(source))
    return loaded


def plain(colour, size=(20, 16)):
    return Image.new("RGB", size, COLOURS[colour])


def split(middle, sides):
    """The middle third of a wide image has one colour, both sides another."""
    image = plain(sides, (96, 32))
    image.paste(COLOURS[middle], (32, 0, 64, 32))
    return image
