"""Checkpoint: the weights of a Mixer with their metadata, and verbs that return another Checkpoint."""

__all__ = ["Checkpoint"]

import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from . import mapping, resolution
from .arrays import Array, Arrays, derived, mapped
from .config import MixerConfig, Size, as_size, usual_depth, variant_letter, variant_sizes
from .dtypes import WEIGHTS, weights_dtype
from .errors import CheckpointError, NumericsAssumed
from .layouts import GOOGLE, Layout, layout_named
from .metadata import Metadata, verify_checksum
from .prefixes import carried, flattened, metadata_for, nested, unwrapped
from .published import of_sizes
from .tensors import to_torch

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a Mixer in some layout. Arrays may be lazy; every verb returns another Checkpoint and reads nothing.

    Construction checks names and shapes: CheckpointError lists every array that is missing, unknown or of another
    shape, and a dtype that weights cannot have.

    `explicit` are the metadata fields that come from the file and not from the layout's defaults; `notes` tell the user how
    the file was read; `verified`: all arrays are checked against the file's checksums when they are read; `beside` lists
    what else is in the file, such as "opt_state (48 arrays)" and "step"; `origins` says of metadata fields that come from
    elsewhere than the file itself from where.
    """

    arrays: Arrays
    layout: Layout
    metadata: Metadata
    source: str = "these arrays"
    explicit: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()
    verified: bool = False
    beside: tuple[str, ...] = ()
    origins: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _ = self.sizes, self.dtype
        labels, depth = self.metadata.labels, self.metadata.num_blocks
        if labels is not None and len(labels) != self.sizes["num_classes"]:
            raise CheckpointError(f"{len(labels)} labels for {self.sizes['num_classes']} classes")
        if depth not in (None, self.sizes["num_blocks"]):
            raise CheckpointError(f"found {self.sizes['num_blocks']} blocks, but the metadata says {depth}")

    @classmethod
    def from_arrays(
        cls,
        arrays: Any,
        *,
        key: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        source: str = "these arrays",
    ) -> Self:
        """From NumPy, JAX or torch arrays by name, in any layout; nested dictionaries, lists and prefixes are resolved.

        `key` selects one of several sets of weights. `metadata` has fields of Metadata; without it, those are used that a
        state_dict of `mixer_jax.torch_model` carries. All others are the layout's defaults, with a warning
        (NumericsAssumed) if these are a guess.
        """
        fields = verify_checksum(metadata_for(key, carried(arrays)) or {}) if metadata is None else metadata
        checkpoint = cls.recognised(arrays, key=key, fields=fields, source=source)
        checkpoint.warn_of_assumed_numerics(stacklevel=3)
        return checkpoint

    @classmethod
    def recognised(
        cls, tree: Any, *, key: str | None, fields: Mapping[str, Any], source: str, others: Sequence[str] = ()
    ) -> Self:
        """From a tree of arrays whose names tell the layout. `fields` are explicit metadata, `others` entries besides."""
        arrays, more = flattened(tree)
        weights, prefix, beside = unwrapped(arrays, [*others, *more], key)
        layout = mapping.detect(weights)
        notes = (f"weights taken from under {prefix!r}",) if prefix else ()
        metadata = Metadata.default(layout).updated(fields)
        weights = mapping.respelled(weights, layout)
        checkpoint = cls(weights, layout, metadata, source, frozenset(fields), notes, beside=tuple(beside))
        return checkpoint if "preprocessing" in fields else checkpoint._without_doubtful_preprocessing()

    @classmethod
    def of_model(
        cls, arrays: Arrays, layout: str, config: MixerConfig, *, labels: Sequence[str] | None, preprocessing: str | None
    ) -> Self:
        """From a model's parameters, in the layout of its framework."""
        metadata = Metadata.of_config(config, labels=labels, preprocessing=preprocessing)
        return cls(arrays, layout_named(layout), metadata, "the model", frozenset(metadata.as_json()))

    def warn_of_assumed_numerics(self, *, stacklevel: int = 2) -> None:
        """Warn (NumericsAssumed) if the file does not state its numerics and files of this layout exist with others."""
        if not self.layout.numerics_known and not {"gelu", "layer_norm_epsilon"} <= self.explicit:
            warnings.warn(
                f"{self.source}: does not state its numerics, so those of {self.layout.name}'s own code are assumed: "
                f"{self.metadata.gelu} GELU, LayerNorm epsilon {self.metadata.layer_norm_epsilon:g}; if it was trained with "
                "others, as Google's weights were with tanh and 1e-6, pass --gelu and --layer-norm-epsilon, or "
                "ReadOptions(gelu=..., layer_norm_epsilon=...)",
                NumericsAssumed,
                stacklevel=stacklevel,
            )

    @cached_property
    def sizes(self) -> mapping.Sizes:
        return mapping.sizes_of(self.arrays, self.layout)

    @cached_property
    def dtype(self) -> np.dtype:
        """The one dtype of all arrays."""
        counts = Counter(np.dtype(array.dtype) for array in self.arrays.values())
        if len(counts) > 1 or any(dtype.name not in WEIGHTS for dtype in counts):
            rarest = min(counts, key=counts.__getitem__)
            example = next(name for name, array in self.arrays.items() if array.dtype == rarest)
            raise CheckpointError(
                f"all weights must have one dtype of {', '.join(WEIGHTS)}; found "
                + ", ".join(f"{count} of {dtype}" for dtype, count in counts.most_common())
                + f" ({example}: {rarest})"
            )
        return next(iter(counts))

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(array.shape) for array in self.arrays.values())

    @cached_property
    def config(self) -> MixerConfig:
        """Raises CheckpointError if the tokens do not form a square and the metadata has no image size."""
        sizes, metadata = self.sizes, self.metadata
        patch, tokens = (sizes["patch_height"], sizes["patch_width"]), sizes["num_tokens"]
        side = math.isqrt(tokens)
        size = metadata.image_size or (side * patch[0], side * patch[1])
        if (size[0] // patch[0]) * (size[1] // patch[1]) != tokens or size[0] % patch[0] or size[1] % patch[1]:
            if metadata.image_size is None:
                raise CheckpointError(
                    f"{tokens} tokens of {patch[0]}x{patch[1]} pixels are not a square grid: give the image size, "
                    "--image-size HxW or ReadOptions(image_size=...)"
                )
            raise CheckpointError(
                f"image size {size[0]}x{size[1]} does not fit: the weights are for {tokens} patches "
                f"of {patch[0]}x{patch[1]} pixels"
            )
        names = ("num_blocks", "hidden_dim", "tokens_mlp_dim", "channels_mlp_dim", "num_classes", "in_channels")
        numbers: dict[str, Any] = {name: sizes[name] for name in names} | {"patch_size": patch, "image_size": size}
        return MixerConfig(**numbers, gelu=metadata.gelu, layer_norm_epsilon=metadata.layer_norm_epsilon)

    def to(self, layout: str | Layout) -> Self:
        """In the names and axes of another layout, with the same metadata."""
        target = layout_named(layout) if isinstance(layout, str) else layout
        canonical = mapping.to_canonical(self.arrays, self.layout)
        return replace(self, arrays=mapping.from_canonical(canonical, target), layout=target)

    def astype(self, dtype: str | np.dtype) -> Self:
        """Cast to another dtype, rounding to nearest even. A value that overflows is a CheckpointError when it is read."""
        target = weights_dtype(dtype)

        def cast(name: str, values: np.ndarray) -> np.ndarray:
            with np.errstate(over="ignore"):
                rounded = values.astype(target)
            if not _all_finite(rounded) and _all_finite(values):
                raise CheckpointError(f"{self.source}: {name}: too large for {target}, some values would become infinite")
            return rounded

        return self if target == self.dtype else self._changed(cast, dtype=target)

    def with_metadata(self, **fields: Any) -> Self:
        """With other fields of Metadata: gelu, layer_norm_epsilon, image_size, preprocessing, labels, num_blocks."""
        origins = {name: origin for name, origin in self.origins.items() if name not in fields}
        return replace(self, metadata=self.metadata.updated(fields), explicit=self.explicit | fields.keys(), origins=origins)

    def with_image_size(self, image_size: int | Size) -> Self:
        """For images of this size in pixels. Raises CheckpointError unless the tokens are its patches."""
        size = as_size(image_size, "image_size")
        checkpoint = self.with_metadata(image_size=size)
        square = checkpoint.config.grid[0] == checkpoint.config.grid[1]
        return self.with_metadata(image_size=None) if square else checkpoint  # a square grid is the default

    def canonical_array(self, module: str, leaf: int, block: int | None = None) -> Array:
        """The WEIGHT or BIAS of a module, such as "token_mixing/dense_0", in google's axes."""
        places = mapping.slots(GOOGLE, self.sizes)
        name = next(name for name, slot in places.items() if slot == (module, leaf, block))
        return mapping.to_canonical(self.arrays, self.layout)[name]

    def without_head(self) -> Self:
        """With the same body and no head: the model returns features."""
        canonical, places = mapping.to_canonical(self.arrays, self.layout), mapping.slots(GOOGLE, self.sizes)
        return self._with_canonical({name: array for name, array in canonical.items() if places[name].module != "head"})

    def with_classes(self, num_classes: int) -> Self:
        """With a new head of zeros, as Google's fine-tuning starts; unchanged if the head has that many classes. 0: no head."""
        if num_classes == self.sizes["num_classes"]:
            return self
        if num_classes < 0:
            raise CheckpointError(f"{self.source}: num_classes must be a whole number of at least 0, not {num_classes}")
        if not num_classes:
            return self.without_head()
        body = mapping.to_canonical(self.without_head().arrays, self.layout)
        shapes = mapping.shapes(GOOGLE, self.sizes | {"num_classes": num_classes})
        head: dict[str, Array] = {name: np.zeros(shape, self.dtype) for name, shape in shapes.items() if name not in body}
        return self._with_canonical(body | head)

    def with_selected_classes(self, classes: Sequence[int]) -> Self:
        """With a head for some of the classes, in this order; their logits stay bit-equal, and their labels are kept."""
        count = self.sizes["num_classes"]
        wrong = [index for index in classes if not 0 <= index < count]
        if wrong or not classes or len(set(classes)) != len(classes):
            raise CheckpointError(f"{self.source}: classes must be different numbers from 0 to {count - 1}: {wrong or classes}")
        chosen = list(classes)
        canonical = mapping.to_canonical(self.arrays, self.layout)
        for name, slot in mapping.slots(GOOGLE, self.sizes).items():
            if slot.module == "head":
                array = canonical[name]
                canonical[name] = derived(array, (*array.shape[:-1], len(chosen)), lambda values: values[..., chosen])
        labels = self.metadata.labels
        selected = self._with_canonical(canonical)
        return selected if labels is None else selected.with_metadata(labels=tuple(labels[i] for i in chosen))

    def resized(self, image_size: int | Size, *, resample: bool = False) -> Self:
        """For images of another size in pixels.

        Whole multiples of the old size follow the paper's rule (Appendix C): the new logits are the mean of the old ones over
        the parts of the image. Any other grid is an approximation, made only with `resample`: token filters are resampled as
        images.
        """
        config, size = self.config, as_size(image_size, "image_size")
        new = (size[0] // config.patch_size[0], size[1] // config.patch_size[1])
        if size[0] % config.patch_size[0] or size[1] % config.patch_size[1]:
            raise CheckpointError(f"{self.source}: {size[0]}x{size[1]} pixels are not a whole number of patches")
        factor = new[0] // config.grid[0]
        canonical = mapping.to_canonical(self.arrays, self.layout)
        if resample:
            canonical = resolution.resampled(canonical, old_grid=config.grid, new_grid=new)
        elif new == (factor * config.grid[0], factor * config.grid[1]) and factor:
            canonical = resolution.expanded(canonical, old_grid=config.grid, factor=factor)
        else:
            raise CheckpointError(
                f"{self.source}: {size[0]}x{size[1]} is not a whole multiple of {config.image_size[0]}x{config.image_size[1]}, "
                "so there is no exact rule; --resample or resample=True resamples the token filters, an approximation"
            )
        arrays = mapping.from_canonical(canonical, self.layout)
        metadata = replace(self.metadata, image_size=size)
        return replace(self, arrays=arrays, metadata=metadata).with_image_size(size)

    def as_numpy(self) -> dict[str, np.ndarray]:
        """The arrays by name, with their values."""
        return {name: np.asarray(array) for name, array in self.arrays.items()}

    def as_torch(self) -> "dict[str, torch.Tensor]":
        """The arrays by name as torch tensors of their own, bfloat16 included: a state_dict of the layout."""
        return {name: to_torch(array).clone() for name, array in self.arrays.items()}

    def as_linen(self) -> dict[str, Any]:
        """`{"params": ...}`, google's names as a nested dictionary: what Google's Flax Linen code takes."""
        return {"params": nested(self.to("google").arrays)}

    def require_finite(self) -> Self:
        """With a check: reading an array that contains NaN or infinity raises CheckpointError."""

        def check(name: str, values: np.ndarray) -> np.ndarray:
            if not _all_finite(values):
                nan, inf = np.isnan(values).sum(), np.isinf(values).sum()
                raise CheckpointError(
                    f"{self.source}: {name}: {nan} NaN and {inf} infinite values; --allow-nonfinite or "
                    "ReadOptions(allow_nonfinite=True) accepts them"
                )
            return values

        return self._changed(check, dtype=self.dtype)

    def require_variant(self, variant: str) -> None:
        """Raise CheckpointError unless widths, depth and patch size are those of a variant such as "B/16"."""
        patch, sizes = variant_sizes(variant)
        wanted = sizes | {"patch_height": patch, "patch_width": patch}
        wrong = [f"{name} {self.sizes[name]}, wanted {size}" for name, size in wanted.items() if self.sizes[name] != size]
        if wrong:
            raise CheckpointError(f"not a Mixer-{variant}: found {'; '.join(wrong)}")

    def require_depth(self) -> None:
        """Raise CheckpointError if the depth differs from that of published Mixers of these widths and is not confirmed.

        `with_metadata(num_blocks=...)` confirms it.
        """
        depth, usual = self.sizes["num_blocks"], usual_depth(self.sizes)
        if usual not in (None, depth) and self.metadata.num_blocks is None:
            raise CheckpointError(
                f"found {depth} blocks, but Mixer-{variant_letter(self.sizes)}, whose widths these are, has {usual}: is the "
                f"file complete? If it is, confirm with --depth {depth} or ReadOptions(num_blocks={depth})"
            )

    def _without_doubtful_preprocessing(self) -> Self:
        """With an unknown preprocessing if a published file of its names and sizes has another than the layout's default."""
        names = sorted({file.preprocessing for file in of_sizes(self.sizes) if file.layout == self.layout.name})
        if set(names) <= {self.metadata.preprocessing}:
            return self
        doubt = f"published files of these names and sizes need {' or '.join(names)}, and this one does not say what it needs"
        return replace(self, metadata=replace(self.metadata, preprocessing=None), origins={"preprocessing": doubt})

    def _changed(self, change: Callable[[str, np.ndarray], np.ndarray], dtype: np.dtype) -> Self:
        """With `change(name, values)` applied to all values that are read."""
        arrays = {name: mapped(array, partial(change, name), dtype=dtype) for name, array in self.arrays.items()}
        return replace(self, arrays=arrays)

    def _with_canonical(self, canonical: Arrays) -> Self:
        """With other weights in the same layout, and without labels, which belong to the head."""
        metadata = replace(self.metadata, labels=None)
        arrays = mapping.from_canonical(canonical, self.layout)
        return replace(self, arrays=arrays, metadata=metadata)


def _all_finite(values: np.ndarray) -> bool:
    with np.errstate(all="ignore"):
        total = values.sum(dtype=np.float32 if values.dtype.itemsize == 2 else None)
    return bool(np.isfinite(total)) or bool(np.isfinite(values).all())
