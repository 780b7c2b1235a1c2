"""The three implementations behind one call, in float64, so that a test can be said of each."""

import numpy as np

import mixer_jax
from convert import Checkpoint, MixerConfig
from mixer_jax import referee


def of_referee(weights, images, config: MixerConfig, tap=lambda name, array: array) -> np.ndarray:
    return referee.forward(config, weights, images, tap=tap)


def of_flax(weights, images, config: MixerConfig, tap=None) -> np.ndarray:
    import jax

    with jax.enable_x64(True):
        model = flax_model(weights, config)
        images = np.asarray(images, np.float64)
        return np.asarray(model(images) if tap is None else model(images, tap=tap))


def of_twin(weights, images, config: MixerConfig, tap=None) -> np.ndarray:
    import torch

    model = twin_model(weights, config)
    images = torch.from_numpy(np.asarray(images, np.float64)).permute(0, 3, 1, 2)
    with torch.inference_mode():
        return (model(images) if tap is None else model(images, tap=tap)).numpy()


def flax_model(weights, config: MixerConfig, **options) -> "mixer_jax.MlpMixer":
    return mixer_jax.load(checkpoint(weights, config), **({"param_dtype": "float64"} | options))


def twin_model(weights, config: MixerConfig, **options):
    import torch

    from mixer_jax import torch_model

    return torch_model.load(checkpoint(weights, config), **({"param_dtype": torch.float64} | options))


def checkpoint(weights, config: MixerConfig) -> Checkpoint:
    """Weights in any layout with a config's numerics and grid."""
    found = Checkpoint.from_arrays(weights)
    numerics = {"gelu": config.gelu, "layer_norm_epsilon": config.layer_norm_epsilon}
    return found.with_metadata(**numerics).with_image_size(config.image_size)


SIDES = {"referee": of_referee, "flax": of_flax, "twin": of_twin}
