"""What a fine-tuning run does, as one frozen value: what is shown, saved with the run, and compared when the run goes on."""

__all__ = ["PRESETS", "FinetuneConfig"]

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from convert.config import Size, as_size
from convert.dtypes import WEIGHTS

from .augment import Augmentation
from .recipe import Recipe

PRESETS: dict[str, dict[str, Any]] = {  # flat fields, as `FinetuneConfig.of` takes them
    "official": {},
    "small": {"batch_size": 64, "base_rate": 0.01, "warmup_steps": 50, "total_steps": 500, "evaluate_every": 50},
}

HELP = {  # of each field of the config, in groups and in the order in which they are shown
    "run": {
        "total_steps": "steps of the run",
        "evaluate_every": "steps from one evaluation to the next",
        "seed": "seed of the order, the variation of images and the validation part",
    },
    "data and images": {
        "validation": "fraction of the training images set apart, where the source sets none apart",
        "image_size": "train on images of this size in pixels, by the paper's rule for higher resolution",
        "resample": "allow a size that the rule does not cover, by an approximation",
        "min_area": "smallest area of a random crop, a fraction of the image's; none: no crop",
        "flip": "mirror half of the images",
        "randaugment": "magnitude of random operations, 0 to 30",
        "operations": "random operations an image, with --randaugment",
        "mixup": "alpha of mixup",
    },
    "recipe": {
        "batch_size": "images a step",
        "accumulation": "microbatches a step; only one is in memory at a time",
        "base_rate": "peak of the learning rate",
        "warmup_steps": "steps in which the rate rises",
        "train": "patterns of the weights to train, such as head,blocks/11/*",
        "optimizer": "sgd or adamw",
        "momentum": "momentum of SGD, b1 of AdamW",
        "momentum_dtype": "dtype in which momentum is stored",
        "b2": "b2 of AdamW",
        "weight_decay": "decay of kernels, of AdamW alone",
        "layer_decay": "factor of the rate from each block to the one before it",
        "clip_norm": "largest norm of the gradient; a larger one is scaled down",
        "loss": "softmax or sigmoid",
        "label_smoothing": "part of the uniform distribution in the labels",
        "ema_decay": "decay of a moving average of the weights, which is then what is evaluated and kept",
    },
    "model": {
        "keep_head": "train the checkpoint's own head, for the classes it has labels for",
        "dropout_rate": "rate of dropout in every MLP",
        "stochastic_depth_rate": "rate of stochastic depth in the last block",
        "dtype": "dtype of the computation, such as bfloat16",
        "remat": "save memory by computing each block once more in the backward pass",
    },
}


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Everything that decides the weights and metrics of a run on given weights and images. By default the official recipe.

    `batch_size` images a step; `recipe.accumulation` splits them. `validation` is the fraction of the training images set
    apart where the source has no validation part. `image_size` is reached through `Checkpoint.resized`, by the paper's exact
    rule or with `resample`. `keep_head` trains the checkpoint's own head on its own classes; otherwise it is replaced by zeros.
    `dtype` is that of the computation. Every `evaluate_every` steps the validation images are evaluated, and the state saved.
    """

    batch_size: int = 512
    evaluate_every: int = 500
    seed: int = 0
    validation: float = 0.1
    image_size: Size | None = None
    resample: bool = False
    keep_head: bool = False
    dropout_rate: float = 0.0
    stochastic_depth_rate: float = 0.0
    dtype: str | None = None
    remat: bool = False
    recipe: Recipe = field(default_factory=Recipe)
    augmentation: Augmentation = field(default_factory=Augmentation)

    def __post_init__(self) -> None:
        if self.image_size is not None:
            object.__setattr__(self, "image_size", as_size(self.image_size, "image_size"))
        parts = self.recipe.accumulation
        rules = {
            "batch_size must be a whole number of at least 1": _is_whole(self.batch_size, 1),
            "evaluate_every must be a whole number of at least 1": _is_whole(self.evaluate_every, 1),
            "seed must be from 0 to 2**32 - 1": _is_whole(self.seed, 0) and self.seed < 2**32,
            "validation must be above 0 and below 1": 0 < self.validation < 1,
            "dropout_rate must be at least 0 and below 1": 0 <= self.dropout_rate < 1,
            "stochastic_depth_rate must be at least 0 and below 1": 0 <= self.stochastic_depth_rate < 1,
            f"dtype must be None or one of {', '.join(WEIGHTS)}": self.dtype in (None, *WEIGHTS),
            f"batch_size must be a multiple of the {parts} microbatches": self.batch_size % parts == 0,
        }
        faults = [f"{rule}, not {getattr(self, rule.split()[0])!r}" for rule, holds in rules.items() if not holds]
        if self.recipe.total_steps is None:
            faults.append("total_steps must be a number: a run ends")
        if faults:
            raise ValueError("FinetuneConfig: " + "; ".join(faults))

    @classmethod
    def of(cls, preset: str = "official", **changes: Any) -> Self:
        """A preset with other values of some fields, those of `recipe` and `augmentation` by their own names.

        Raises ValueError for an unknown preset or field, and for values that cannot be.
        """
        if preset not in PRESETS:
            raise ValueError(f"no preset {preset!r}: one of {', '.join(PRESETS)}")
        values = PRESETS[preset] | changes
        own, recipe, augmentation = (
            {item.name: values.pop(item.name) for item in fields(kind) if item.name in values}
            for kind in (cls, Recipe, Augmentation)
        )
        if values:
            raise ValueError(f"no setting called {', '.join(values)}")
        return cls(**own, recipe=Recipe(**recipe), augmentation=Augmentation(**augmentation))

    def as_dict(self) -> dict[str, Any]:
        """All fields by name, those of `recipe` and `augmentation` beside the others, as `of` takes them and JSON has them."""
        values = asdict(self)
        values |= values.pop("recipe") | values.pop("augmentation")
        return values | {"image_size": None if self.image_size is None else list(self.image_size)}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two settings, one text a field."""
    names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    return [f"{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in names]


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and value >= least
