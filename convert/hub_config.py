"""config.json beside weights, as timm and transformers write it for the Hugging Face hub: what it says of the weights."""

__all__ = ["CONFIG_FILE", "config_for", "configured", "is_in_hub_cache", "weights_in"]

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from .checkpoint import Checkpoint
from .config import Gelu, Size, variant_sizes
from .errors import CheckpointError
from .formats import FORMATS
from .preprocessing import Described, canonical

CONFIG_FILE = "config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the hub's names, the preferred one first
MOST_BYTES = 16 << 20  # 21,843 classes with their descriptions take about 3 MiB

ARCHITECTURE = re.compile(r"mixer_([sblh])(\d{1,4})_\d{1,5}([_.]\w+)*", re.ASCII)  # timm's names, with or without a tag
SHARD = re.compile(r"-\d{5}-of-\d{5}\.")
GELUS: dict[str, Gelu] = {"gelu": "exact", "gelu_tanh": "tanh"}  # timm's names of activations
IRRELEVANT = {"drop_rate", "proj_drop_rate", "drop_path_rate", "nlhb"}  # arguments of training and initialisation
UNDERSTOOD = IRRELEVANT | {"num_classes", "in_chans", "img_size", "patch_size", "num_blocks", "embed_dim", "mlp_ratio"}
UNDERSTOOD |= {"act_layer", "global_pool"}
OPTION = "--preprocess or ReadOptions(preprocessing=...) overrides it"


def weights_in(folder: Path) -> Path | None:
    """The file of weights in a folder: under the hub's name, or beside a config.json the only one; None if there is none."""
    endings = {ending for format in FORMATS.values() if not format.is_folder for ending in format.endings}
    named = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    if named or not (folder / CONFIG_FILE).is_file():
        return named[0] if named else None
    files = sorted(file for file in folder.iterdir() if file.suffix in endings and file.is_file())
    if any(SHARD.search(file.name) for file in files):
        raise CheckpointError(f"weights in {len(files)} shards, which are not read: save them as one file (max_shard_size)")
    if len(files) > 1:
        raise CheckpointError(f"{len(files)} files of weights beside {CONFIG_FILE}: give the path of one, such as {files[0]}")
    return files[0] if files else None


def config_for(weights: Path, source: Path) -> Path | None:
    """The config.json that speaks of `weights`: beside them, if they have the hub's name or `source` is their folder."""
    config = weights.with_name(CONFIG_FILE)
    return config if config.is_file() and (weights.name in WEIGHTS or source == weights.parent) else None


def is_in_hub_cache(weights: Path) -> bool:
    """Whether the hub's client has put them there, which gets config.json too if there is one."""
    return weights.name in WEIGHTS and weights.parent.parent.name == "snapshots"


def configured(checkpoint: Checkpoint, config_file: Path, overridden: Collection[str]) -> Checkpoint:
    """The checkpoint with what its config.json says, but for the `overridden` fields of Metadata.

    Raises CheckpointError for all that contradicts the weights or their own metadata, and for what is not understood.
    """
    tree = _parsed(config_file)
    if not tree.keys() & {"architecture", "model_type", "pretrained_cfg", "model_args", "num_classes", "input_size"}:
        note = f"{CONFIG_FILE} beside it is neither timm's nor transformers', and is not used"
        return replace(checkpoint, notes=(*checkpoint.notes, note))
    config = HubConfig.of(tree, with_preprocessing="preprocessing" not in overridden)
    faults = [
        f"{name}: {CONFIG_FILE} says {size}, the weights have {checkpoint.sizes[name]}"
        for name, size in config.sizes.items()
        if size != checkpoint.sizes[name]
    ]
    if faults:
        raise CheckpointError("; ".join(faults))
    own, explicit = checkpoint.metadata, checkpoint.explicit
    values: dict[str, Any] = {"gelu": config.gelu, "preprocessing": config.preprocessing, "labels": config.labels}
    values["layer_norm_epsilon"] = config.gelu and 1e-6  # which timm's config cannot change
    values = {name: value for name, value in values.items() if value is not None and name not in overridden}
    stated = {name: getattr(own, name) for name in values if name in explicit and getattr(own, name) is not None}
    if config.image_size is not None and "image_size" not in overridden:
        values["image_size"] = config.image_size
        if "image_size" in explicit:
            stated["image_size"] = checkpoint.config.image_size
    for name, value in stated.items():
        if value != values[name]:
            ours, theirs = _short(value), _short(values[name])
            raise CheckpointError(f"{name}: {CONFIG_FILE} says {theirs}, the file itself {ours}; correct one of them")
    return _with_values(checkpoint, {name: value for name, value in values.items() if name not in stated})


def _with_values(checkpoint: Checkpoint, values: dict[str, Any]) -> Checkpoint:
    try:
        size = values.pop("image_size", None)
        sized = checkpoint if size is None else checkpoint.with_image_size(size)
        changed = sized.with_metadata(**values)
    except CheckpointError as error:
        raise CheckpointError(f"{CONFIG_FILE}: {error}") from None
    return replace(changed, origins={**checkpoint.origins, **dict.fromkeys(values, CONFIG_FILE)})


@dataclass(frozen=True)
class HubConfig:
    """What a config.json says, None where it does not. `sizes` has those of mapping.Sizes that follow from it."""

    sizes: dict[str, int]
    image_size: Size | None
    gelu: Gelu | None
    preprocessing: str | None
    labels: tuple[str, ...] | None

    @classmethod
    def of(cls, tree: Mapping[str, Any], *, with_preprocessing: bool = True) -> Self:
        """Of the whole file. Older ones have the keys of pretrained_cfg at the top."""
        cfg = _value(tree, "pretrained_cfg", _is_table, "an object") or tree
        arguments = _value(tree, "model_args", _is_table, "an object") or {}
        arguments = {name: value for name, value in arguments.items() if value is not None}
        model_type = _value(tree, "model_type", _is_text, "a text")
        if model_type not in (None, "timm_wrapper"):
            raise CheckpointError(f"{CONFIG_FILE} is that of a {model_type!r} model, not of a Mixer")
        if unknown := [name for name in arguments if name not in UNDERSTOOD and arguments[name] is not False]:
            raise CheckpointError(f"{CONFIG_FILE}: model_args: {', '.join(unknown[:3])} may change what the model computes")
        if arguments.get("global_pool", "avg") != "avg":
            raise CheckpointError(f"{CONFIG_FILE}: global_pool must be 'avg', not {_short(arguments['global_pool'])}")
        gelu = _value(arguments, "act_layer", lambda name: _is_text(name) and name in GELUS, f"one of {', '.join(GELUS)}")
        input_size = _value(cfg, "input_size", lambda v: _is_list(v, _is_positive) and len(v) == 3, "[channels, height, width]")
        channels = _value(arguments, "in_chans", _is_count, COUNT) or (input_size or [None])[0]
        img_size = _value(arguments, "img_size", _is_size, SIZE)
        classes = _value(arguments, "num_classes", _is_count, COUNT)
        for table in (tree,) if model_type else (cfg, tree):  # pretrained_cfg may be about weights that these started from
            classes = _value(table, "num_classes", _is_count, COUNT) if table.get("num_classes") is not None else classes
        architecture = _value({**cfg, **tree}, "architecture", _is_text, "a text")
        sizes = _sizes(architecture, arguments) | {"in_channels": channels, "num_classes": classes}
        return cls(
            sizes={name: size for name, size in sizes.items() if size is not None},
            image_size=_pair(img_size) if img_size is not None else tuple(input_size[1:]) if input_size else None,
            gelu=GELUS[gelu] if gelu else None,
            preprocessing=_preprocessing(cfg) if with_preprocessing else None,
            labels=_labels({**cfg, **tree}),
        )


def _sizes(architecture: str | None, arguments: Mapping[str, Any]) -> dict[str, int | None]:
    """What timm makes of the name of a model and the arguments that were given besides."""
    named: dict[str, int] = {}
    patch = ratio = None
    if architecture is not None:
        match = ARCHITECTURE.fullmatch(architecture)
        if not match or not int(match[2]):
            raise CheckpointError(f"{CONFIG_FILE}: architecture {_short(architecture)} is not a Mixer such as mixer_b16_224")
        patch, named = variant_sizes(f"{match[1].upper()}/{match[2]}")
        ratio = [0.5, 4]
    hidden = _value(arguments, "embed_dim", _is_count, COUNT) or named.get("hidden_dim")
    ratio = _value(arguments, "mlp_ratio", _is_ratio, "one or two numbers above 0") or ratio
    tokens, channels = _pair(ratio) if ratio else (None, None)
    patch = _value(arguments, "patch_size", _is_size, SIZE) or patch
    height, width = _pair(patch) if patch else (None, None)
    return {
        "num_blocks": _value(arguments, "num_blocks", _is_count, COUNT) or named.get("num_blocks"),
        "hidden_dim": hidden,
        "tokens_mlp_dim": int(tokens * hidden) if tokens and hidden else None,
        "channels_mlp_dim": int(channels * hidden) if channels and hidden else None,
        "patch_height": height,
        "patch_width": width,
    }


def _preprocessing(cfg: Mapping[str, Any]) -> str | None:
    """The canonical text; None if the config says nothing about it."""
    keys: dict[str, tuple[Callable[[Any], bool], str]] = {
        "interpolation": (_is_text, "a text"),
        "crop_pct": (_is_number, "a number"),
        "mean": (lambda v: _is_list(v, _is_number), "a list of numbers"),
        "std": (lambda v: _is_list(v, _is_number), "a list of numbers"),
    }
    try:
        values = {key: _value(cfg, key, *check) for key, check in keys.items()}
        mode = _value(cfg, "crop_mode", _is_text, "a text") or "center"
        if missing := [key for key, value in values.items() if value is None]:
            if len(missing) == len(values):
                return None
            raise CheckpointError(f"{CONFIG_FILE}: does not say {', '.join(missing)}")
        interpolation, crop_pct, mean, std = values.values()
        try:
            return canonical(str(Described(interpolation, mode, float(crop_pct), tuple(mean), tuple(std))))
        except CheckpointError as error:
            raise CheckpointError(f"{CONFIG_FILE}: {error}") from None
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {OPTION}") from None


def _labels(tree: Mapping[str, Any]) -> tuple[str, ...] | None:
    """A name for each class: of id2label (transformers), else of label_names (timm); their descriptions, if all have one."""
    key = next((key for key in ("id2label", "label_names", "labels") if tree.get(key)), None)
    if key is None:
        return None
    names = tree[key]
    if isinstance(names, Mapping):
        if set(names) != set(map(str, range(len(names)))):
            raise CheckpointError(f"{CONFIG_FILE}: {key} must have the keys 0 to {len(names) - 1}")
        names = [names[str(i)] for i in range(len(names))]
    if not _is_list(names, _is_text):
        raise CheckpointError(f"{CONFIG_FILE}: {key} must be names of classes, not {_short(names)}")
    indices = _value(tree, "label2id", _is_table, "an object") or {}
    if key == "id2label" and any(type(i) is not int or names[i : i + 1] != [name] for name, i in indices.items()):
        raise CheckpointError(f"{CONFIG_FILE}: label2id contradicts id2label")
    if all(re.fullmatch(r"LABEL_\d+", name) for name in names):  # what transformers writes where there are none
        return None
    words = _value(tree, "label_descriptions", _is_table, "an object") or {}
    described = [words.get(name) for name in names]
    return tuple(described if _is_list(described, _is_text) else names)


def _parsed(config_file: Path) -> dict[str, Any]:
    if config_file.stat().st_size > MOST_BYTES:
        raise CheckpointError(f"{CONFIG_FILE} beside it is larger than {MOST_BYTES >> 20} MiB")
    try:
        tree = json.loads(config_file.read_text("utf-8"), parse_constant=float)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{CONFIG_FILE} beside it is not JSON ({error}): fetch it again") from None
    if not isinstance(tree, dict):
        raise CheckpointError(f"{CONFIG_FILE} beside it must be an object, not {_short(tree)}")
    return tree


COUNT, SIZE = "a whole number", "a size in pixels"


def _value(table: Mapping[str, Any], key: str, is_right: Callable[[Any], bool], what: str) -> Any:
    """The value of a key, None if it is absent or null. Raises CheckpointError unless it is right."""
    value = table.get(key)
    if value is None or is_right(value):
        return value
    raise CheckpointError(f"{CONFIG_FILE}: {key} must be {what}, not {_short(value)}")


def _is_table(value: Any) -> bool:
    return isinstance(value, dict)


def _is_text(value: Any) -> bool:
    """Without control characters, which a terminal would obey, and halves of characters, which JSON can have."""
    return isinstance(value, str) and not re.search("[\0-\x1f\x7f-\x9f\ud800-\udfff]", value)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _is_positive(value: Any) -> bool:
    return _is_count(value) and value > 0


def _is_size(value: Any) -> bool:
    """One number of pixels, or height and width."""
    return _is_positive(value) or (_is_list(value, _is_positive) and len(value) == 2)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 2**31  # not NaN either


def _is_ratio(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return 1 <= len(values) <= 2 and all(_is_number(ratio) and ratio > 0 for ratio in values)


def _is_list(value: Any, is_right: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and bool(value) and all(map(is_right, value))


def _pair(value: Any) -> Any:
    """One value for both, as timm takes it."""
    values = value if isinstance(value, list) else [value]
    return values[0], values[-1]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
