"""python -m convert: a checkpoint into another layout or format, or what a file is."""

import argparse
import itertools
import json
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from . import containers
from .checkpoint import Checkpoint, write
from .cli import add_reading_options, guarded, read_asked
from .errors import CheckpointError
from .layouts import ALIASES, LAYOUTS, layout_named

NAMES = sorted({*LAYOUTS, *ALIASES} - {"google"})  # google's files are known as npz here
COMMANDS = {
    f"{source}2{target}": (layout_named(source).name, layout_named(target).name)
    for source, target in itertools.permutations(NAMES, 2)
    if layout_named(source) != layout_named(target)
}


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    return guarded(lambda: arguments.run(arguments))


def convert(arguments: argparse.Namespace) -> None:
    source, target = COMMANDS[arguments.command]
    checkpoint = read_asked(arguments)
    if checkpoint.layout.name != source:
        right = [name for name, pair in COMMANDS.items() if pair == (checkpoint.layout.name, target)]
        raise CheckpointError(
            f"{arguments.source}: is in the {checkpoint.layout.name} layout, not {source}"
            + (f": use {' or '.join(right)}" if right else "; it is already what was asked for")
        )
    bytes_moved = 2 * checkpoint.num_parameters * checkpoint.dtype.itemsize  # written, then compared
    with tqdm(total=bytes_moved, unit="B", unit_scale=True, delay=2, disable=None, leave=False) as bar:
        write(arguments.target, checkpoint, layout=target, force=arguments.force, progress=bar.update)
    for line in _told(checkpoint.to(target), arguments.target):
        print(line)


def inspect(arguments: argparse.Namespace) -> None:
    arguments.allow_nonfinite = True  # they are counted, not refused
    checkpoint = read_asked(arguments)
    facts = _facts(checkpoint, Path(arguments.source))
    if arguments.json:
        print(json.dumps(facts))
    else:
        for name, value in facts.items():
            print(f"{name:<20}{value}")


def _told(checkpoint: Checkpoint, target: str) -> list[str]:
    """What a person should know of the file that was just written and compared."""
    layout, metadata = checkpoint.layout, checkpoint.metadata
    lines = [
        f"wrote {target}: {checkpoint.num_parameters:,} parameters in {len(checkpoint.arrays)} arrays, {layout.name} layout, "
        f"{checkpoint.dtype}; read back, every bit equal",
        f"numerics: {metadata.gelu} GELU, LayerNorm epsilon {metadata.layer_norm_epsilon:g}; mixer_jax finds them in the file",
    ]
    if metadata.gelu != layout.gelu:
        remedy = layout.tanh_remedy if metadata.gelu == "tanh" else ""
        lines.append(
            f"{layout.name}'s own code computes the {layout.gelu} GELU: logits would be off by about 5e-4 of their spread"
            + (f"; {remedy} makes them equal" if remedy else "")
        )
    if metadata.layer_norm_epsilon != layout.layer_norm_epsilon:
        lines.append(
            f"{layout.name}'s own code uses epsilon {layout.layer_norm_epsilon:g}: set {metadata.layer_norm_epsilon:g}"
        )
    return lines


def _facts(checkpoint: Checkpoint, path: Path) -> dict[str, object]:
    metadata, sizes = checkpoint.metadata, checkpoint.sizes
    try:
        config = checkpoint.config
        variant = config.variant or "none of the published ones"
        known = "said" if metadata.image_size else "assumed, being square"
        grid = f"{config.grid[0]}x{config.grid[1]} ({known}), images of {config.image_size[0]}x{config.image_size[1]} pixels"
    except CheckpointError as error:
        variant, grid = "none of the published ones", f"unknown: {error}"
    nonfinite = sum(int((~np.isfinite(np.asarray(array))).sum()) for array in checkpoint.arrays.values())

    def origin(entry: str) -> str:
        return "the file says so" if entry in checkpoint.stated else f"{checkpoint.layout.name}'s default"

    return {
        "layout": checkpoint.layout.name,
        "format": containers.for_reading(path),
        "variant": variant,
        "patch": f"{sizes['patch_height']}x{sizes['patch_width']} pixels of {sizes['in_channels']} channels",
        "grid": grid,
        "tokens": sizes["num_tokens"],
        "blocks": sizes["num_blocks"],
        "hidden_dim": sizes["hidden_dim"],
        "tokens_mlp_dim": sizes["tokens_mlp_dim"],
        "channels_mlp_dim": sizes["channels_mlp_dim"],
        "classes": sizes["num_classes"] or "none: no head",
        "labels": len(metadata.labels) if metadata.labels else "none",
        "dtype": checkpoint.dtype.name,
        "parameters": checkpoint.num_parameters,
        "gelu": f"{metadata.gelu} ({origin('gelu')})",
        "layer_norm_epsilon": f"{metadata.layer_norm_epsilon:g} ({origin('layer_norm_epsilon')})",
        "preprocessing": f"{metadata.preprocessing or 'unknown'} ({origin('preprocessing')})",
        "NaN or infinite": nonfinite,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m convert",
        description="MLP-Mixer checkpoints from one layout to another. The format follows the ending of the target: .npz, "
        ".safetensors, .pt, .pth, or none for an Orbax folder.",
        epilog="example: python -m convert npz2torch Mixer-B_16.npz mixer_b16.pt",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (source, target) in COMMANDS.items():
        command = commands.add_parser(name, help=f"from the {source} layout to the {target} layout")
        command.add_argument("source", help="a file or an Orbax folder")
        command.add_argument("target", help="what to write")
        command.add_argument("--force", action="store_true", help="replace an existing target")
        add_reading_options(command)
        command.set_defaults(run=convert)
    command = commands.add_parser("inspect", help="what a file is", description="What a checkpoint is; reads all of it.")
    command.add_argument("source", metavar="FILE")
    command.add_argument("--json", action="store_true", help="one line of JSON")
    add_reading_options(command)
    command.set_defaults(run=inspect)
    return parser


def entry() -> None:
    sys.exit(main())


if __name__ == "__main__":
    entry()
