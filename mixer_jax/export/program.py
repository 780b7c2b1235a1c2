"""What an exported program takes and gives, whatever its format, and the facts that travel with it."""

__all__ = ["ExportOptions", "Facts", "Program", "wide"]

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any, Self

import numpy as np

from convert import Checkpoint, CheckpointError, MixerConfig
from convert.dtypes import weights_dtype
from convert.identity import fingerprint
from convert.layouts import GOOGLE
from convert.metadata import Metadata
from convert.preprocessing import unknown_preprocessing

KIND = "mixer_jax exported program, version 1"


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """`features`: the head's input instead of logits. `softmax`: scores instead of logits. `uint8`: pixels from 0 to 255 in,
    scaled inside the program, so that nobody can feed another range. `dtype` is that of the weights and of the computation.
    """

    features: bool = False
    softmax: bool = False
    uint8: bool = False
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.features and self.softmax:
            raise ValueError("features have no softmax: leave out one of the two")
        object.__setattr__(self, "dtype", weights_dtype(self.dtype).name)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a program cannot say of itself. `fingerprint` identifies the weights before a cast; `versions` are the writer's."""

    config: MixerConfig
    options: ExportOptions
    labels: tuple[str, ...] | None
    preprocessing: str | None
    fingerprint: str
    versions: dict[str, str]

    @classmethod
    def of(cls, checkpoint: Checkpoint, options: ExportOptions, *packages: str) -> Self:
        """Raises CheckpointError where options need what the checkpoint does not have."""
        config, metadata = checkpoint.config, checkpoint.metadata
        if not config.num_classes and not options.features:
            raise CheckpointError(f"{checkpoint.source}: has no head, so no logits: export its features with --features")
        if options.uint8 and metadata.preprocessing is None:
            raise unknown_preprocessing(checkpoint.source, "names no preprocessing, which --uint8 needs")
        versions = {name: version(name) for name in ("mixer-jax", *packages)}
        identity = fingerprint(checkpoint.arrays, checkpoint.layout)
        labels = None if options.features else metadata.labels
        return cls(
            config=config,
            options=options,
            labels=labels,
            preprocessing=metadata.preprocessing,
            fingerprint=identity,
            versions=versions,
        )

    def to_json(self) -> str:
        return json.dumps({"kind": KIND} | asdict(self))

    def scaling(self) -> tuple[np.ndarray, np.ndarray]:
        """Factor and offset, of all channels or of each, that make a model's input of pixels from 0 to 255."""
        from ..preprocess import preprocessing_of

        if self.preprocessing is None:
            raise CheckpointError("names no preprocessing, so the range of its input is unknown")
        ends = np.repeat(np.array([[0], [255]], np.uint8), self.config.in_channels, axis=1)
        low, high = preprocessing_of(self.preprocessing, self.config.in_channels).scaled(ends).astype(np.float64)
        return (high - low) / 255, low

    def scaled(self, pixels: np.ndarray) -> np.ndarray:
        """Pixels (b, h, w, c) from 0 to 255 as the model takes them, in float32 or better."""
        factor, offset = self.scaling()
        return (pixels * factor + offset).astype(wide(self.options.dtype))

    def pixels(self, images: np.ndarray) -> np.ndarray:
        """The uint8 pixels that are nearest to images (b, h, w, c) as the model takes them."""
        factor, offset = self.scaling()
        return np.rint((images - offset) / factor).clip(0, 255).astype(np.uint8)

    @property
    def output(self) -> str:
        return "features" if self.options.features else "scores" if self.options.softmax else "logits"

    @property
    def output_width(self) -> int:
        config = self.config
        return config.hidden_dim if self.options.features else config.num_classes

    @property
    def input_dtype(self) -> str:
        return "uint8" if self.options.uint8 else wide(self.options.dtype)

    @classmethod
    def from_json(cls, text: str | bytes, source: str) -> Self:
        """Raises CheckpointError for anything that `to_json` did not write."""
        try:
            values: dict[str, Any] = json.loads(text)
            kind = values.pop("kind")
            if kind != KIND:
                raise CheckpointError(f"is a {kind!r}, and this version reads a {KIND!r}: export it again")
            values["config"] = MixerConfig(**values["config"])
            values["options"] = ExportOptions(**values["options"])
            about_images = {name: values[name] for name in ("labels", "preprocessing")}
            metadata = Metadata.default(GOOGLE).updated(about_images)
            facts = cls(**values | {"labels": metadata.labels, "preprocessing": metadata.preprocessing})
            if facts.labels is not None and len(facts.labels) != facts.config.num_classes:
                raise CheckpointError(f"{len(facts.labels)} labels for {facts.config.num_classes} classes")
            return facts
        except CheckpointError as error:
            raise CheckpointError(f"{source}: {error}") from None
        except Exception as error:  # JSON can be anything
            raise CheckpointError(f"{source}: its facts are damaged ({type(error).__name__}: {error})") from None


def wide(dtype: str) -> str:
    """The dtype of a program's input, mean, head and output: float32 or better."""
    return dtype if dtype == "float64" else "float32"


@dataclass(frozen=True)
class Program:
    """An exported program, opened. `run` takes images (b, h, w, channels), uint8 pixels from 0 to 255 with `uint8` and else
    float32 as preprocessing makes them, and gives float32 logits, scores (b, classes) or features (b, hidden).

    `operations`, of a program that names them, takes the same and gives the result of every operation by parity's name, in
    order. With it and with `config`, `labels` and `preprocessing`, a program serves where a model does.
    """

    source: str
    facts: Facts
    run: Callable[[np.ndarray], np.ndarray]
    operations: Callable[[np.ndarray], dict[str, np.ndarray]] | None = None

    @property
    def config(self) -> MixerConfig:
        """Without classes where the output is features."""
        return self.facts.config.replace(num_classes=0) if self.facts.options.features else self.facts.config

    @property
    def labels(self) -> tuple[str, ...] | None:
        return self.facts.labels

    @property
    def preprocessing(self) -> str | None:
        return self.facts.preprocessing

    def with_facts(self, **changes: Any) -> Self:
        """With other labels or another preprocessing. Raises CheckpointError for one that a uint8 program does not have."""
        if "preprocessing" in changes:
            self.require_preprocessing([changes["preprocessing"]])
        return replace(self, facts=replace(self.facts, **changes))

    def require_preprocessing(self, names: Sequence[str]) -> None:
        """Raise CheckpointError for another preprocessing than that which is inside a uint8 program."""
        others = [name for name in names if name != self.preprocessing]
        if self.facts.options.uint8 and others:
            raise CheckpointError(
                f"{self.source}: the scaling of {self.preprocessing} is inside it, so it takes no {others[0]}"
            )

    def forward(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Features and logits of preprocessed images (b, h, w, c): of the two what the program gives, and the other is empty.

        Without classes the logits are the features, and of scores the logits are their logarithm.
        """
        options = self.facts.options
        outputs = self.run(self.facts.pixels(images) if options.uint8 else images)
        if options.softmax:
            outputs = np.log(np.maximum(outputs, np.finfo(outputs.dtype).tiny))
        return (outputs if options.features else np.zeros((len(outputs), 0), np.float32)), outputs
