"""The three implementations behind one call, in float64, so that one test can make a claim about each."""

from dataclasses import asdict

import numpy as np

import mixer_jax
from convert import Checkpoint, MixerConfig
from convert.config import usual_depth
from mixer_jax.parity import numpy_model


def of_numpy(weights, images, config: MixerConfig, hook=lambda name, array: array) -> np.ndarray:
    return numpy_model.forward(config, weights, images, hook=hook)


def of_flax(weights, images, config: MixerConfig, hook=None) -> np.ndarray:
    import jax

    with jax.enable_x64(True):
        model = flax_model(weights, config)
        images = np.asarray(images, np.float64)
        return np.asarray(model(images) if hook is None else model(images, hook=hook))


def of_torch(weights, images, config: MixerConfig, hook=None) -> np.ndarray:
    import torch

    model = torch_model(weights, config)
    images = torch.from_numpy(np.asarray(images, np.float64)).permute(0, 3, 1, 2)
    with torch.inference_mode():
        return (model(images) if hook is None else model(images, hook=hook)).numpy()


def flax_model(weights, config: MixerConfig, **options) -> "mixer_jax.MlpMixer":
    return mixer_jax.load(checkpoint(weights, config), **({"param_dtype": "float64"} | options))


def torch_model(weights, config: MixerConfig, **options):
    import torch

    from mixer_jax import torch_pretrained

    return torch_pretrained.load(checkpoint(weights, config), **({"param_dtype": torch.float64} | options))


def checkpoint(weights, config: MixerConfig) -> Checkpoint:
    """Weights in any layout with a config's numerics and grid, and its depth if that is unusual for a published width."""
    unusual = usual_depth(asdict(config)) not in (None, config.num_blocks)
    metadata = {"gelu": config.gelu, "layer_norm_epsilon": config.layer_norm_epsilon}
    metadata |= {"num_blocks": config.num_blocks} if unusual else {}
    return Checkpoint.from_arrays(weights).with_metadata(**metadata).with_image_size(config.image_size)


def distance(values, right) -> float:
    """The largest difference relative to max abs."""
    assert values.shape == right.shape
    return float(np.abs(values - right).max() / np.abs(right).max())


IMPLEMENTATIONS = {"numpy": of_numpy, "flax": of_flax, "torch": of_torch}
