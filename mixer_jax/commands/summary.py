"""Parameters and FLOPs of a Mixer by module."""

__all__ = ["config_of", "summarize", "summary_as_dict"]

from pathlib import Path
from typing import Any

from convert import CheckpointError, MixerConfig, ReadOptions, read
from convert.config import VARIANTS
from convert.published import is_published


def is_file(source: str) -> bool:  # and not a variant
    return Path(source).exists() or bool(Path(source).suffix) or is_published(source)


def config_of(source: str, options: ReadOptions, **sizes: Any) -> MixerConfig:
    """The config of a checkpoint, or of a variant such as "B/16" with these sizes of MixerConfig.named."""
    if is_file(source):
        return read(source, options).config
    try:
        return MixerConfig.named(source, **sizes)
    except ValueError as error:
        missing = "" if source.partition("/")[0] in VARIANTS else "no such file, and "
        raise CheckpointError(f"{source}: {missing}{error}") from None


def summarize(config: MixerConfig) -> str:
    """A table with a row for each module."""
    height, width = config.image_size
    name = f"Mixer-{config.variant}" if config.variant else "a Mixer of no published size"
    classes = f"{config.num_classes or 'no'} classes"
    lines = [
        f"{name}: images of {height}x{width} pixels, {config.num_tokens} tokens of {config.hidden_dim} channels, {classes}\n",
        f"{'module':<24}{'each':>14}{'count':>7}{'parameters':>14}{'GFLOPs/image':>14}",
    ]
    for m in config.modules():
        total = f"{m.count * m.parameters:>14,}{m.count * m.flops / 1e9:>14.3f}"
        lines.append(f"{m.name:<24}{m.parameters:>14,}{m.count:>7}{total}")
    lines.append(f"{'all':<45}{config.num_parameters:>14,}{config.forward_flops / 1e9:>14.3f}\n")
    return "\n".join([*lines, "FLOPs are those of the matmuls, 2 per multiply-add"])


def summary_as_dict(config: MixerConfig) -> dict[str, object]:
    """Parameters and FLOPs, 2 per multiply-add; those of a module are of each of its `count`."""
    modules = [vars(module) for module in config.modules()]
    return {"parameters": config.num_parameters, "forward_flops": config.forward_flops, "modules": modules}
