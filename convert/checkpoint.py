"""Checkpoint: the weights of a Mixer with all that makes them a function; read, write, and pure verbs between."""

__all__ = ["PREPROCESSING", "Checkpoint", "Metadata", "read", "usual_layout", "write"]

import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, get_args

import numpy as np

from . import containers, mapping, memory, resolution
from .arrays import Array, Arrays, LazyArray, changed, derived, unequal
from .config import VARIANTS, Gelu, MixerConfig, Size, as_size, variant_letter, variant_sizes
from .dtypes import WEIGHTS, weights_dtype
from .errors import CheckpointError, NumericsAssumed
from .files import sync, whole_or_nothing
from .identity import digest, fingerprint_of
from .layouts import GOOGLE, USUAL_LAYOUT, Layout, layout_named
from .published import is_published, nearest
from .wrappers import carried, flattened, unwrapped

if TYPE_CHECKING:
    import torch

PREPROCESSING = ("resmall_crop", "resize_crop", "squash", "timm_bicubic", "timm_bilinear")


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """What the arrays cannot say: numerics, grid, preprocessing, class names.

    `image_size` (height, width in pixels) is None where nobody said it: then the tokens form a square. `labels` has a
    name for each class. `preprocessing` names how an image becomes an array, None where that is not known. `num_blocks` says
    that a depth is meant which no published Mixer of these widths has.
    """

    gelu: Gelu
    layer_norm_epsilon: float
    image_size: Size | None = None
    preprocessing: str | None = None
    labels: tuple[str, ...] | None = None
    num_blocks: int | None = None

    @classmethod
    def of_config(cls, config: MixerConfig, *, labels: Sequence[str] | None, preprocessing: str | None) -> Self:
        """Of a model; what goes without saying is left out."""
        usual_depth = _usual_depth(asdict(config))
        return cls(
            gelu=config.gelu,
            layer_norm_epsilon=float(config.layer_norm_epsilon),
            image_size=None if config.grid[0] == config.grid[1] else config.image_size,
            preprocessing=preprocessing,
            labels=None if labels is None else tuple(labels),
            num_blocks=None if usual_depth in (None, config.num_blocks) else config.num_blocks,
        )

    @classmethod
    def default(cls, layout: Layout) -> Self:
        """What holds for a file that says nothing: what the code that owns its names computes."""
        return cls(gelu=layout.gelu, layer_norm_epsilon=layout.layer_norm_epsilon, preprocessing=layout.preprocessing)

    def updated(self, said: Mapping[str, Any]) -> Self:
        """This with the entries that a file has. Raises CheckpointError for what is not understood."""
        if not isinstance(said, Mapping) or (unknown := said.keys() - self.said().keys()):
            what = ", ".join(sorted(map(str, unknown))) if isinstance(said, Mapping) else repr(said)
            raise CheckpointError(f"metadata that is not understood (written by a newer version?): {what}")
        entries: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in said.items()}
        new = replace(self, **entries)
        labels, size = new.labels, new.image_size
        faults = {
            "gelu": new.gelu not in get_args(Gelu),
            "layer_norm_epsilon": not (isinstance(new.layer_norm_epsilon, float) and 0 < new.layer_norm_epsilon < math.inf),
            "image_size": size is not None and not (_all(size, int) and len(size) == 2 and min(size) > 0),
            "preprocessing": new.preprocessing not in (None, *PREPROCESSING),
            "labels": labels is not None and not _all(labels, str),
            "num_blocks": new.num_blocks is not None and not (type(new.num_blocks) is int and new.num_blocks > 0),
        }
        if any(faults.values()):
            wrong = ", ".join(f"{k} {getattr(new, k)!r}" for k, fault in faults.items() if fault)
            raise CheckpointError(f"metadata that makes no sense: {wrong}")
        return new

    def differences(self, other: "Metadata", entries: Sequence[str]) -> list[str]:
        """These entries where the two differ, as "gelu: tanh against exact"."""
        return [f"{k}: {a} against {b}" for k in entries if (a := getattr(self, k)) != (b := getattr(other, k))]

    def said(self, *, beyond: "Metadata | None" = None) -> dict[str, Any]:
        """The entries as JSON has them; with `beyond`, those alone that differ from it."""
        entries = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return {k: v for k, v in entries.items() if beyond is None or getattr(self, k) != getattr(beyond, k)}


@dataclass(frozen=True)
class Checkpoint:
    """A Mixer's weights in some layout. Arrays may be lazy; every verb returns another Checkpoint and reads nothing.

    Names and shapes are checked when it is made: CheckpointError tells every array that is missing, unknown or of
    another shape, and a dtype that is no dtype of weights.
    """

    arrays: Arrays
    layout: Layout
    metadata: Metadata
    source: str = "these arrays"
    stated: frozenset[str] = frozenset()  # the entries of metadata that a file stated itself
    notes: tuple[str, ...] = ()  # what a person should know of how it was read
    claimed: str | None = None  # the fingerprint that a file states
    verified: bool = False  # its file has checksums of all arrays, which are checked when it is read

    def __post_init__(self) -> None:
        _ = self.sizes, self.dtype
        labels = self.metadata.labels
        if labels is not None and len(labels) != self.sizes["num_classes"]:
            raise CheckpointError(f"{len(labels)} labels for {self.sizes['num_classes']} classes")
        if self.metadata.num_blocks not in (None, self.sizes["num_blocks"]):
            raise CheckpointError(f"found {self.sizes['num_blocks']} blocks, and {self.metadata.num_blocks} are stated")

    @classmethod
    def from_arrays(
        cls,
        arrays: Mapping[str, Any],
        *,
        key: str | None = None,
        said: Mapping[str, Any] | None = None,
        source: str = "these arrays",
    ) -> Self:
        """Of NumPy, JAX or torch arrays by name, in whatever layout they are, nested dictionaries and wrappers included.

        `key` says which of several sets of weights is meant. `said` has entries of Metadata, in place of those that a
        state_dict of `mixer_jax.torch_model` carries; the layout gives the others, with a warning (NumericsAssumed) where
        that is a guess.
        """
        if said is None:
            said = containers.unsealed(carried(arrays, key) or {})
        checkpoint = cls._of(arrays, key, said, source)
        checkpoint.warn_of_assumed_numerics(stacklevel=3)
        return checkpoint

    @classmethod
    def _of(cls, arrays: Mapping[str, Any], key: str | None, said: Mapping[str, Any], source: str) -> Self:
        flat, others = flattened(arrays)
        weights, notes = unwrapped(flat, key)
        notes += _left_out(others)
        layout = mapping.detect(weights.keys())
        return cls(weights, layout, Metadata.default(layout).updated(said), source, frozenset(said), tuple(notes))

    def warn_of_assumed_numerics(self, *, stacklevel: int = 2) -> None:
        """Warn (NumericsAssumed) where nothing states the numerics, and files in this layout are known with others."""
        if not self.layout.certain and not {"gelu", "layer_norm_epsilon"} <= self.stated:
            warnings.warn(
                f"{self.source}: nothing states its numerics, so those of {self.layout.name}'s own code are assumed: "
                f"{self.metadata.gelu} GELU, LayerNorm epsilon {self.metadata.layer_norm_epsilon:g}; if it was trained with "
                "others, as Google's weights were with tanh and 1e-6, pass --gelu and --layer-norm-epsilon, or gelu= and "
                "layer_norm_epsilon=",
                NumericsAssumed,
                stacklevel=stacklevel,
            )

    @classmethod
    def of_momentum(cls, arrays: Arrays, layout: str) -> Self:
        """Of an optimiser's momentum under the names of a model's parameters; it has no numerics of its own."""
        return cls(arrays, layout_named(layout), Metadata.default(layout_named(layout)), "the momentum")

    @classmethod
    def of_model(
        cls,
        arrays: Arrays,
        layout: str,
        config: MixerConfig,
        *,
        labels: Sequence[str] | None,
        preprocessing: str | None,
    ) -> Self:
        """Of a model's parameters, in the layout of its framework."""
        metadata = Metadata.of_config(config, labels=labels, preprocessing=preprocessing)
        return cls(arrays, layout_named(layout), metadata, "the model", frozenset(metadata.said()))

    @cached_property
    def sizes(self) -> mapping.Sizes:
        return mapping.sizes_of(self.arrays, self.layout)

    @cached_property
    def dtype(self) -> np.dtype:
        """The one dtype of all arrays."""
        found = Counter(np.dtype(array.dtype) for array in self.arrays.values())
        illegal = [dtype for dtype in found if dtype.name not in WEIGHTS]
        if illegal or len(found) > 1:
            rarest = min(found, key=found.__getitem__)
            example = next(name for name, array in self.arrays.items() if array.dtype == rarest)
            raise CheckpointError(
                f"weights are one of {', '.join(WEIGHTS)} throughout; here are "
                + ", ".join(f"{count} of {dtype}" for dtype, count in found.most_common())
                + f" ({example}: {rarest})"
            )
        return next(iter(found))

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(array.shape) for array in self.arrays.values())

    @cached_property
    def config(self) -> MixerConfig:
        """Raises CheckpointError where the tokens do not form a square and nobody said the image size."""
        sizes, metadata = self.sizes, self.metadata
        patch, tokens = (sizes["patch_height"], sizes["patch_width"]), sizes["num_tokens"]
        side = math.isqrt(tokens)
        size = metadata.image_size or (side * patch[0], side * patch[1])
        if (size[0] // patch[0]) * (size[1] // patch[1]) != tokens or size[0] % patch[0] or size[1] % patch[1]:
            if metadata.image_size is None:
                raise CheckpointError(
                    f"{tokens} tokens of {patch[0]}x{patch[1]} pixels are no square grid: say image_size (--image-size HxW)"
                )
            raise CheckpointError(
                f"image size {size[0]}x{size[1]} does not fit: the weights are for {tokens} patches "
                f"of {patch[0]}x{patch[1]} pixels"
            )
        return MixerConfig(
            patch_size=patch,
            image_size=size,
            num_blocks=sizes["num_blocks"],
            hidden_dim=sizes["hidden_dim"],
            tokens_mlp_dim=sizes["tokens_mlp_dim"],
            channels_mlp_dim=sizes["channels_mlp_dim"],
            num_classes=sizes["num_classes"],
            in_channels=sizes["in_channels"],
            gelu=metadata.gelu,
            layer_norm_epsilon=metadata.layer_norm_epsilon,
        )

    def to(self, layout: str | Layout) -> Self:
        """In another layout's names and axes; numerics and all else travel along."""
        target = layout_named(layout) if isinstance(layout, str) else layout
        return replace(self, arrays=mapping.convert(self.arrays, self.layout, target), layout=target)

    def astype(self, dtype: str | np.dtype) -> Self:
        """Rounded to another dtype, to nearest even. A value that becomes infinite is a CheckpointError when read."""
        target = weights_dtype(dtype)

        def cast(name: str) -> Callable[[np.ndarray], np.ndarray]:
            def change(values: np.ndarray) -> np.ndarray:
                with np.errstate(over="ignore"):
                    rounded = values.astype(target)
                if not _all_finite(rounded) and _all_finite(values):
                    raise CheckpointError(f"{self.source}: {name}: too large for {target}, some values would become infinite")
                return rounded

            return change

        if target == self.dtype:
            return self
        arrays = {name: changed(array, target, cast(name)) for name, array in self.arrays.items()}
        return replace(self, arrays=arrays, claimed=None)

    def with_metadata(self, **entries: Any) -> Self:
        """With other entries of Metadata: gelu, layer_norm_epsilon, image_size, preprocessing, labels."""
        return replace(self, metadata=self.metadata.updated(entries), stated=self.stated | entries.keys())

    def with_image_size(self, image_size: int | Size) -> Self:
        """For images of this size in pixels. Raises CheckpointError unless the tokens are its patches."""
        size = as_size(image_size, "image_size")
        checkpoint = self.with_metadata(image_size=size)
        square = checkpoint.config.grid[0] == checkpoint.config.grid[1]
        return self.with_metadata(image_size=None) if square else checkpoint  # a square goes without saying

    def without_head(self) -> Self:
        """Ending in features."""
        canonical = mapping.to_canonical(self.arrays, self.layout)
        return self._with_canonical({k: v for k, v in canonical.items() if not k.startswith("head/")})

    def with_classes(self, num_classes: int) -> Self:
        """With a fresh head of zeros, as Google's fine-tuning starts; unchanged if it has that many classes, 0 for none."""
        if num_classes == self.sizes["num_classes"]:
            return self
        if num_classes < 0:
            raise CheckpointError(f"{self.source}: num_classes must be a whole number of at least 0, not {num_classes}")
        if not num_classes:
            return self.without_head()
        shapes = mapping.shapes(GOOGLE, self.sizes | {"num_classes": num_classes})
        head: dict[str, Array] = {k: np.zeros(s, self.dtype) for k, s in shapes.items() if k.startswith("head/")}
        return self._with_canonical(mapping.to_canonical(self.without_head().arrays, self.layout) | head)

    def with_selected_classes(self, classes: Sequence[int]) -> Self:
        """With a head for some of its classes in another order; their logits stay bit-equal, labels go along."""
        found = self.sizes["num_classes"]
        wrong = [index for index in classes if not 0 <= index < found]
        if wrong or not classes or len(set(classes)) != len(classes):
            raise CheckpointError(f"{self.source}: classes must be different numbers from 0 to {found - 1}: {wrong or classes}")
        chosen = list(classes)
        canonical = mapping.to_canonical(self.arrays, self.layout)
        for name in ("head/kernel", "head/bias"):
            array = canonical[name]
            canonical[name] = derived(array, (*array.shape[:-1], len(chosen)), lambda values: values[..., chosen])
        labels = self.metadata.labels
        selected = self._with_canonical(canonical)
        return selected if labels is None else selected.with_metadata(labels=tuple(labels[i] for i in chosen))

    def resized(self, image_size: int | Size, *, resample: bool = False) -> Self:
        """For images of another size in pixels.

        Whole multiples of the old size follow the paper's rule (Appendix C), after which the logits are the mean of the old
        ones over the parts of the image. Any other grid is an approximation, made only with `resample`: token filters are
        resampled as images.
        """
        config, size = self.config, as_size(image_size, "image_size")
        new = (size[0] // config.patch_size[0], size[1] // config.patch_size[1])
        if size[0] % config.patch_size[0] or size[1] % config.patch_size[1]:
            raise CheckpointError(f"{self.source}: {size[0]}x{size[1]} pixels are no whole number of patches")
        factor = new[0] // config.grid[0]
        canonical = mapping.to_canonical(self.arrays, self.layout)
        if resample:
            canonical = resolution.resampled(canonical, old_grid=config.grid, new_grid=new)
        elif new == (factor * config.grid[0], factor * config.grid[1]) and factor:
            canonical = resolution.expanded(canonical, old_grid=config.grid, factor=factor)
        else:
            raise CheckpointError(
                f"{self.source}: {size[0]}x{size[1]} is no whole multiple of {config.image_size[0]}x{config.image_size[1]}, so "
                "there is no exact rule; to resample the token filters, an approximation, say --resample or resample=True"
            )
        arrays = mapping.from_canonical(canonical, self.layout)
        metadata = replace(self.metadata, image_size=size)
        return replace(self, arrays=arrays, metadata=metadata, claimed=None).with_image_size(size)

    def as_numpy(self) -> dict[str, np.ndarray]:
        """The arrays by name, read."""
        return {name: np.asarray(array) for name, array in self.arrays.items()}

    def as_torch(self) -> "dict[str, torch.Tensor]":
        """The arrays by name as torch tensors of their own, bfloat16 included: a state_dict of the layout."""
        from .containers.pt import to_torch

        return {name: to_torch(array).clone() for name, array in self.arrays.items()}

    def as_linen(self) -> dict[str, Any]:
        """What Google's Flax Linen code takes: `{"params": ...}`, google's names as a nested dictionary."""
        tree: dict[str, Any] = {}
        for name, array in self.to("google").arrays.items():
            *folders, leaf = name.split("/")
            node = tree
            for folder in folders:
                node = node.setdefault(folder, {})
            node[leaf] = np.asarray(array)
        return {"params": tree}

    def require_finite(self) -> Self:
        """One that raises CheckpointError as soon as an array with NaN or infinity is read."""

        def check(name: str) -> Callable[[np.ndarray], np.ndarray]:
            def change(values: np.ndarray) -> np.ndarray:
                if not _all_finite(values):
                    nan, inf = np.isnan(values).sum(), np.isinf(values).sum()
                    raise CheckpointError(
                        f"{self.source}: {name}: {nan} NaN and {inf} infinite values; to load them all the same, "
                        "say --allow-nonfinite or allow_nonfinite=True"
                    )
                return values

            return change

        arrays = {name: changed(array, array.dtype, check(name)) for name, array in self.arrays.items()}
        return replace(self, arrays=arrays)

    def require_variant(self, variant: str) -> None:
        """Raise CheckpointError unless the widths, depth and patch are those of a variant such as "B/16"."""
        patch, sizes = variant_sizes(variant)
        wanted = sizes | {"patch_height": patch, "patch_width": patch}
        wrong = [f"{name} {self.sizes[name]}, wanted {size}" for name, size in wanted.items() if self.sizes[name] != size]
        if wrong:
            raise CheckpointError(f"not a Mixer-{variant}: found {'; '.join(wrong)}")

    def require_depth(self, num_blocks: int | None = None) -> None:
        """Raise CheckpointError unless there are so many blocks; with None, as many as Mixers of these widths have."""
        found, wanted = self.sizes["num_blocks"], num_blocks or self.metadata.num_blocks
        if wanted is not None and found != wanted:
            raise CheckpointError(f"found {found} blocks, wanted {wanted}")
        if wanted is None and (usual := _usual_depth(self.sizes)) not in (None, found):
            raise CheckpointError(
                f"found {found} blocks, but Mixer-{variant_letter(self.sizes)}, whose widths these are, has {usual}: is the "
                f"file whole? If it is, say --blocks {found} or num_blocks={found}"
            )

    def _with_canonical(self, canonical: Arrays) -> Self:
        """Other weights in the same layout; labels stay only where the head does."""
        metadata = replace(self.metadata, labels=None)
        arrays = mapping.from_canonical(canonical, self.layout)
        return replace(self, arrays=arrays, metadata=metadata, claimed=None)


def read(
    source: str | os.PathLike[str] | Checkpoint,
    *,
    variant: str | None = None,
    num_classes: int | None = None,
    num_blocks: int | None = None,
    image_size: int | Size | None = None,
    gelu: Gelu | None = None,
    layer_norm_epsilon: float | None = None,
    dtype: str | np.dtype | None = None,
    allow_nonfinite: bool = False,
    key: str | None = None,
) -> Checkpoint:
    """A checkpoint from a file or an Orbax folder, in whatever layout it is; values are read when asked for.

    The name of a published file, "imagenet1k/Mixer-B_16" or "hf:owner/name", is fetched unless it is in the cache.

    `variant` refuses all but, say, "B/16". Another `num_classes` than the file's gives a fresh zero head, with a warning
    that says so; 0 drops the head. `num_blocks` says that a depth no published Mixer has is meant, `image_size` (pixels)
    what grid the tokens form. `gelu` and `layer_norm_epsilon` override the file's numerics. `dtype` rounds, and is needed
    to read float64. `key` names one of several sets of weights in a file. A Checkpoint as source gets the same treatment,
    save for what can be wrong in a file only.

    Raises CheckpointError, naming the file and every fault; NaN and infinity are found when their array is read.
    """
    if isinstance(source, str) and is_published(source) and not os.path.exists(source):
        from .download import download  # the network is for those who ask for it

        source = download(source)
    if isinstance(source, str) and re.match(r"\w+://", source):
        raise CheckpointError(
            f"{source}: an address, not a file: download it and give its path, or give the name of a published file"
        )
    path = None if isinstance(source, Checkpoint) else Path(source)
    try:
        checkpoint = source if isinstance(source, Checkpoint) else _open(Path(source), key, allow_nonfinite)
        if variant is not None:
            checkpoint.require_variant(variant)
        checkpoint.require_depth(num_blocks)
        if num_blocks is not None and _usual_depth(checkpoint.sizes) not in (None, num_blocks):
            checkpoint = checkpoint.with_metadata(num_blocks=int(num_blocks))  # it travels, so that nobody is asked again
        if path is not None and checkpoint.dtype == np.float64 and dtype is None:
            raise CheckpointError(
                "float64 weights, which no published Mixer has: keep them with --dtype float64 or round them with "
                "--dtype float32; in Python that is dtype='float64' of convert.read, and param_dtype='float64' of load"
            )
        if image_size is not None:
            checkpoint = checkpoint.with_image_size(image_size)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.source if path is None else path}: {error}") from None
    overrides = {"gelu": gelu, "layer_norm_epsilon": layer_norm_epsilon}
    checkpoint = checkpoint.with_metadata(**{name: value for name, value in overrides.items() if value is not None})
    if path is not None:
        checkpoint.warn_of_assumed_numerics(stacklevel=3)
    found = checkpoint.sizes["num_classes"]
    if num_classes is not None and num_classes != found:
        checkpoint = checkpoint.with_classes(num_classes)
        if num_classes:
            warnings.warn(f"{checkpoint.source}: the head for {found} classes is now zeros for {num_classes}", stacklevel=3)
    return checkpoint if dtype is None else checkpoint.astype(dtype)


def write(
    path: str | os.PathLike[str],
    checkpoint: Checkpoint,
    *,
    layout: str | None = None,
    dtype: str | np.dtype | None = None,
    force: bool = False,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Write a checkpoint in a layout (None: the one it has); the ending of `path` says the format.

    That is .npz, .safetensors, .pt, .pth, or none for an Orbax folder. What was written is read back and compared, bit by
    bit, before it gets its name: it appears whole or not at all. An existing file is replaced only with `force`, the
    checkpoint's own source never. `progress` is called with the bytes of every array, when it is written and when it is
    compared.
    """
    path = Path(path)
    name = containers.for_writing(path)
    if path.exists() and os.path.exists(checkpoint.source) and path.samefile(checkpoint.source):
        raise CheckpointError(f"{path}: is the source itself; give another name")
    checkpoint = checkpoint if layout is None else checkpoint.to(layout)
    checkpoint = checkpoint if dtype is None else checkpoint.astype(dtype)
    format = containers.module(name)
    # Google's files say nothing, so an .npz of ours in its names says only what saying nothing would not mean.
    silent = name == "npz" and checkpoint.layout.certain
    said = checkpoint.metadata.said(beyond=Metadata.default(checkpoint.layout) if silent else None)
    said = containers.sealed(said)
    arrays = _counting(checkpoint.arrays, progress)
    size = checkpoint.num_parameters * checkpoint.dtype.itemsize
    with (
        memory.reused(),
        ThreadPoolExecutor(1) as aside,
        whole_or_nothing(path, size=size, folder=name == "orbax", force=force) as written,
    ):
        if name == "safetensors":
            canonical, so_far = _fingerprinting(arrays, checkpoint.layout, aside)
            format.write(written, mapping.from_canonical(canonical, checkpoint.layout), said, so_far)
        else:
            format.write(written, arrays, said)
        synced = aside.submit(sync, written)
        back = format.read(written)
        wrong = unequal(arrays, back.arrays)
        synced.result()
        if wrong or (back.metadata or {}) != said:
            raise CheckpointError(f"{path}: what was written does not read back the same: {', '.join(wrong[:3]) or 'metadata'}")


def usual_layout(path: str | os.PathLike[str]) -> str:
    """The layout that the world expects in the format that the ending of `path` says."""
    return USUAL_LAYOUT[containers.for_writing(Path(path))]


def _open(path: Path, key: str | None, allow_nonfinite: bool) -> Checkpoint:
    if not path.exists():
        known = "" if path.suffix else "; published checkpoints, nearest first:\n  " + "\n  ".join(nearest(str(path)))
        raise CheckpointError(f"no such file or folder{known}")
    content = containers.module(containers.for_reading(path)).read(path)
    if not content.arrays:
        raise CheckpointError("no arrays in it")
    said = containers.unsealed(content.metadata or {})
    checkpoint = Checkpoint._of(_naming(content.arrays, path), key, said, str(path))
    notes = (*checkpoint.notes, *_left_out(content.others))
    checkpoint = replace(checkpoint, notes=notes, claimed=content.fingerprint, verified=content.verified)
    return checkpoint if allow_nonfinite else checkpoint.require_finite()


def _usual_depth(sizes: Mapping[str, object]) -> int | None:
    """How many blocks a published Mixer of these widths has."""
    letter = variant_letter(sizes)
    return VARIANTS[letter]["num_blocks"] if letter else None


def _left_out(others: Sequence[str]) -> list[str]:
    return [f"{len(others)} entries are no arrays: {', '.join(others[:5])}"] if others else []


def _fingerprinting(arrays: Arrays, layout: Layout, aside: ThreadPoolExecutor) -> tuple[dict[str, Array], Callable[[], str]]:
    """The canonical arrays, and the fingerprint of those that have been read through them: of all in the end.

    Digests are made in the thread `aside`, one array at a time, since all that wait would stay in memory.
    """
    digests: dict[str, str] = {}
    running: list[Future[str]] = []

    def settled() -> dict[str, str]:
        while running:
            running.pop().result()
        return digests

    def record(name: str) -> Callable[[np.ndarray], np.ndarray]:
        def change(values: np.ndarray) -> np.ndarray:
            settled()
            running.append(aside.submit(lambda: digests.setdefault(name, digest(values))))
            return values

        return change

    canonical = mapping.to_canonical(arrays, layout)
    watched = {name: changed(array, array.dtype, record(name)) for name, array in canonical.items()}
    return watched, lambda: fingerprint_of(settled())


def _naming(arrays: Arrays, path: Path) -> Arrays:
    """Arrays whose faults, found when their values are read, name the file too."""

    def named(array: Array) -> Array:
        def read(index: int | None) -> np.ndarray:
            try:
                return np.asarray(array if index is None else array[index])
            except CheckpointError as error:
                raise CheckpointError(f"{path}: {error}") from None

        return LazyArray(array.shape, array.dtype, read, by_item=getattr(array, "by_item", False))

    return {name: named(array) for name, array in arrays.items()}


def _counting(arrays: Arrays, progress: Callable[[int], object] | None) -> Arrays:
    if progress is None:
        return arrays

    def count(values: np.ndarray) -> np.ndarray:
        progress(values.nbytes)
        return values

    return {name: changed(array, array.dtype, count) for name, array in arrays.items()}


def _all_finite(values: np.ndarray) -> bool:
    with np.errstate(all="ignore"):
        total = values.sum(dtype=np.float32 if values.dtype.itemsize == 2 else None)
    return bool(np.isfinite(total)) or bool(np.isfinite(values).all())


def _all(values: Any, kind: type) -> bool:
    return isinstance(values, tuple) and all(isinstance(value, kind) for value in values)
