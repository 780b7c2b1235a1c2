"""A model of either framework behind the same methods."""

import functools

import numpy as np
from conftest import TINY

import mixer_jax
import mixer_jax.pretrained
from convert import MixerConfig

STOCHASTIC = {"dropout_rate": 0.3, "stochastic_depth_rate": 0.6}


class FlaxModel:
    """Images (b, h, w, c) in, NumPy out."""

    def __init__(self, config: MixerConfig, **options):
        from flax import nnx

        self.model = mixer_jax.MlpMixer(config, rngs=nnx.Rngs(0), **options)
        self.to_checkpoint = mixer_jax.pretrained.to_checkpoint

    def __call__(self, images, **options):
        return np.asarray(self.model(images, **options))

    def features(self, images, **options):
        return np.asarray(self.model.features(images, **options))

    def weights(self):
        return self.to_checkpoint(self.model).to("google").as_numpy()


class TorchModel(FlaxModel):
    def __init__(self, config: MixerConfig, **options):
        import torch

        from mixer_jax import torch_model, torch_pretrained

        torch.manual_seed(0)
        self.model = torch_model.MlpMixer(config, **options)
        self.to_checkpoint = torch_pretrained.to_checkpoint

    def __call__(self, images, **options):
        return self.model(channels_first(images), **options).detach().numpy()

    def features(self, images, **options):
        return self.model.features(channels_first(images), **options).detach().numpy()


def as_array(result):
    return np.asarray(result.detach() if hasattr(result, "detach") else result)


def channels_first(images):
    import torch

    return torch.from_numpy(np.moveaxis(images, -1, -3))


MODELS = {"flax": FlaxModel, "torch": TorchModel}


_built = functools.cache(lambda framework, config, **options: MODELS[framework](config, **options))


def model(framework, mode="eval", config=TINY, **options):
    """A model that tests share, in train or eval mode."""
    shared = _built(framework, config, **options)
    getattr(shared.model, mode)()
    return shared


def intermediates(model, images):
    """What a hook sees, by name."""
    arrays = {}
    model(images, hook=lambda name, array: arrays.setdefault(name, array))
    return {name: as_array(array) for name, array in arrays.items()}
