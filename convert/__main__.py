"""python -m convert: a checkpoint into another layout or format, what a file is, whether two are the same, fetching one."""

import argparse
import itertools
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from . import containers, mapping
from .checkpoint import Checkpoint, usual_layout, write
from .cli import add_reading_options, guarded, read_asked, size
from .errors import CheckpointError
from .identity import can_be, differences, fingerprint
from .layouts import ALIASES, LAYOUTS, layout_named

NAMES = sorted({*LAYOUTS, *ALIASES} - {"google"})  # google's files are known as npz here
A2B = {f"{a}2{b}": (layout_named(a).name, layout_named(b).name) for a, b in itertools.permutations(NAMES, 2)}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv and argv[0] not in (*A2B, "convert") and ("--to" in argv or os.path.exists(argv[0])):
        argv.insert(0, "convert")  # the verb goes without saying
    arguments = _parser().parse_args(argv)
    return guarded(lambda: arguments.run(arguments))


def convert(arguments: argparse.Namespace) -> None:
    checkpoint = read_asked(arguments)
    source, target = A2B.get(arguments.command, (None, arguments.to))
    if source not in (None, checkpoint.layout.name):
        right = [name for name, pair in A2B.items() if pair == (checkpoint.layout.name, target)]
        raise CheckpointError(
            f"{arguments.source}: is in the {checkpoint.layout.name} layout, not {source}: use "
            + " or ".join([*right[:2], f"--to {target}"])
        )
    checkpoint = _changed(checkpoint, arguments)
    target = layout_named(target or usual_layout(arguments.target)).name
    if arguments.dry_run:
        plan = mapping.plan(checkpoint.arrays, checkpoint.layout, layout_named(target))
        rows = [[*row, checkpoint.dtype.name] for row in plan]
        _print_table(["source", "target", "axes", "dtype"], rows, arguments.json)
        return
    bytes_moved = 2 * checkpoint.num_parameters * checkpoint.dtype.itemsize  # written, then compared
    with tqdm(total=bytes_moved, unit="B", unit_scale=True, delay=2, disable=None, leave=False) as bar:
        write(arguments.target, checkpoint, layout=target, force=arguments.force, progress=bar.update)
    told = _told(checkpoint.to(target), arguments.target)
    print(json.dumps(told) if arguments.json else "\n".join([told["wrote"], *told["notes"]]))


def inspect(arguments: argparse.Namespace) -> None:
    arguments.allow_nonfinite = True  # they are counted, not refused
    checkpoint = read_asked(arguments)
    facts, arrays = _facts(checkpoint, Path(checkpoint.source)), _statistics(checkpoint)
    if checkpoint.claimed not in (None, facts["fingerprint"]):
        raise CheckpointError(
            f"{arguments.source}: damaged: states the fingerprint {checkpoint.claimed}, its arrays have {facts['fingerprint']}"
        )
    if arguments.json:
        print(json.dumps(facts | {"arrays": arrays}))
        return
    for name, value in facts.items():
        print(f"{name:<20}{', '.join(value) if isinstance(value, list) else value}")
    print()
    _print_table(list(arrays[0]), [list(row.values()) for row in arrays], False)


def compare(arguments: argparse.Namespace) -> None:
    sides = []
    for source in (arguments.source, arguments.other):
        arguments.source = source
        sides.append(read_asked(arguments))
    left, right = (mapping.to_canonical(side.arrays, side.layout) for side in sides)
    found = list(differences(left, right))
    numerics = [
        f"{name}: {getattr(sides[0].metadata, name)} against {getattr(sides[1].metadata, name)}"
        for name in ("gelu", "layer_norm_epsilon", "image_size", "preprocessing")
        if getattr(sides[0].metadata, name) != getattr(sides[1].metadata, name)
    ]
    if arguments.json:
        print(json.dumps({"same": not found, "differences": [asdict(d) for d in found], "numerics": numerics}))
    else:
        for difference in found:
            by = "" if difference.largest is None else f", largest difference {difference.largest:.3g}"
            print(f"{difference.name}: {difference.what}{by}")
        print("\n".join(f"not the same numerics: {line}" for line in numerics), end="\n" * bool(numerics))
        if not found:
            print(f"the same weights: fingerprint {fingerprint(left, layout_named('google'))}")
    if found:
        raise CheckpointError(f"not the same weights: {len(found)} of {len(left.keys() | right.keys())} arrays differ")


def download(arguments: argparse.Namespace) -> None:
    from .download import download as fetch

    with tqdm(unit="B", unit_scale=True, delay=2, disable=None, leave=False) as bar:

        def progress(done: int, total: int | None) -> None:
            bar.total = total
            bar.update(done - bar.n)

        print(fetch(arguments.name, cache=arguments.cache, base=arguments.base, progress=progress, force=arguments.force))


def _changed(checkpoint: Checkpoint, arguments: argparse.Namespace) -> Checkpoint:
    """The checkpoint with the head, the labels and the grid that were asked for."""
    if arguments.drop_head:
        checkpoint = checkpoint.without_head()
    if arguments.num_classes is not None:
        checkpoint = checkpoint.with_classes(arguments.num_classes)
    if arguments.classes is not None:
        checkpoint = checkpoint.with_selected_classes(_indices(arguments.classes, checkpoint.metadata.labels))
    if arguments.labels is not None:
        checkpoint = checkpoint.with_metadata(labels=tuple(_lines(arguments.labels)))
    if arguments.resize_to is not None:
        checkpoint = checkpoint.resized(arguments.resize_to, resample=arguments.resample)
    return checkpoint


def _indices(asked: str, labels: tuple[str, ...] | None) -> list[int]:
    """Classes as "3,1,2", or a file with a label or an index a line."""
    items = _lines(asked) if os.path.exists(asked) else asked.split(",")
    known = {label: index for index, label in enumerate(labels or ())}
    unknown = [item for item in items if item not in known and not item.isdecimal()]
    if unknown:
        raise CheckpointError(f"--classes: no class {unknown[0]!r}: an index" + (" or one of the labels" if labels else ""))
    return [known[item] if item in known else int(item) for item in items]


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines()


def _told(checkpoint: Checkpoint, target: str) -> dict[str, Any]:
    """What a person should know of the file that was just written and compared."""
    layout, metadata = checkpoint.layout, checkpoint.metadata
    notes = [
        *(f"note: {note}" for note in checkpoint.notes),
        f"numerics: {metadata.gelu} GELU, LayerNorm epsilon {metadata.layer_norm_epsilon:g}; mixer_jax finds them in the file",
    ]
    if metadata.gelu != layout.gelu:
        remedy = layout.tanh_remedy if metadata.gelu == "tanh" else ""
        notes.append(
            f"{layout.name}'s own code computes the {layout.gelu} GELU: logits would be off by about 5e-4 of their spread"
            + (f"; {remedy} makes them equal" if remedy else "")
        )
    if metadata.layer_norm_epsilon != layout.layer_norm_epsilon:
        notes.append(
            f"{layout.name}'s own code has the epsilon {layout.layer_norm_epsilon:g}: logits would be off by about 1e-5 of "
            f"their spread; its LayerNorms with eps={metadata.layer_norm_epsilon:g} make them equal"
        )
    wrote = (
        f"wrote {target}: {checkpoint.num_parameters:,} parameters in {len(checkpoint.arrays)} arrays, {layout.name} layout, "
        f"{checkpoint.dtype}; read back, every bit equal"
    )
    facts = {"layout": layout.name, "dtype": checkpoint.dtype.name, "parameters": checkpoint.num_parameters}
    return {"wrote": wrote, "target": str(target), "notes": notes, **facts}


def _facts(checkpoint: Checkpoint, path: Path) -> dict[str, Any]:
    metadata, sizes, format = checkpoint.metadata, checkpoint.sizes, containers.for_reading(path)
    published: list[str] = []
    try:
        config = checkpoint.config
        variant = config.variant or "none of the published ones"
        known = "said" if metadata.image_size else "assumed, being square"
        grid = f"{config.grid[0]}x{config.grid[1]} ({known}), images of {config.image_size[0]}x{config.image_size[1]} pixels"
        published = can_be(config)
    except CheckpointError as error:
        variant, grid = "none of the published ones", f"unknown: {error}"

    def origin(entry: str) -> str:
        return "the file says so" if entry in checkpoint.stated else f"{checkpoint.layout.name}'s default"

    return {
        "layout": checkpoint.layout.name,
        "format": format,
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
        "integrity": "as written, by the file's checksums"
        if checkpoint.verified
        else "cannot be verified: the file has no checksums",
        "fingerprint": fingerprint(checkpoint.arrays, checkpoint.layout),
        "can be": published or "none of the published files",
        "notes": list(checkpoint.notes) or "none",
    }


def _statistics(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """A row for every array: its norm, and what is odd in it."""
    rows = []
    for name, array in checkpoint.arrays.items():
        values = np.asarray(array).astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            norm = f"{np.sqrt((values**2).sum()):.6g}"
        rows.append(
            {
                "array": name,
                "shape": "x".join(map(str, values.shape)),
                "norm": norm,
                "zeros": f"{(values == 0).mean():.2%}",
                "NaN": int(np.isnan(values).sum()),
                "infinite": int(np.isinf(values).sum()),
            }
        )
    return rows


def _print_table(header: list[str], rows: list[list[Any]], as_json: bool) -> None:
    if as_json:
        print(json.dumps([dict(zip(header, row)) for row in rows]))
        return
    widths = [max(len(str(row[column])) for row in [header, *rows]) for column in range(len(header))]
    for row in [header, *rows]:
        print("  ".join(f"{value!s:<{width}}" for value, width in zip(row, widths)).rstrip())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m convert",
        usage="%(prog)s SOURCE TARGET [--to LAYOUT] [options]\n       %(prog)s A2B SOURCE TARGET [options]\n"
        "       %(prog)s inspect FILE | compare FILE FILE | download NAME",
        description="MLP-Mixer checkpoints from one layout to another. The format follows the ending of the target: .npz, "
        ".safetensors, .pt, .pth, or none for an Orbax folder. Without --to the layout is the one usual in that format.",
        epilog=f"A2B is a pair of {', '.join(NAMES)}. Example: python -m convert npz2torch Mixer-B_16.npz mixer_b16.pt",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in ("convert", *A2B):
        described = f"from the {A2B[name][0]} layout to the {A2B[name][1]} layout" if name in A2B else "to another layout"
        command = commands.add_parser(name, description=described)
        command.add_argument("source", help="a file or an Orbax folder")
        command.add_argument("target", help="what to write")
        command.add_argument("--to", choices=[*NAMES, "google"], metavar="LAYOUT", help=", ".join(NAMES))
        _add_changing_options(command)
        add_reading_options(command)
        command.set_defaults(run=convert)
    command = commands.add_parser("inspect", help="what a file is", description="What a checkpoint is; reads all of it.")
    command.add_argument("source", metavar="FILE")
    command.add_argument("--json", action="store_true", help="one line of JSON")
    add_reading_options(command)
    command.set_defaults(run=inspect)
    command = commands.add_parser("compare", help="whether two files hold the same weights; exit code 1 if not")
    command.add_argument("source", metavar="FILE")
    command.add_argument("other", metavar="FILE")
    command.add_argument("--json", action="store_true", help="one line of JSON")
    add_reading_options(command)
    command.set_defaults(run=compare)
    command = commands.add_parser("download", help="fetch a published file into the cache and print its path")
    command.add_argument("name", help="imagenet1k/Mixer-B_16 and the like, or hf:timm/mixer_b16_224.goog_in21k_ft_in1k")
    command.add_argument("--cache", metavar="FOLDER", help="instead of MIXER_JAX_CACHE or the user's cache folder")
    command.add_argument("--base", metavar="URL", help="another address to fetch from, also MIXER_JAX_BASE_URL")
    command.add_argument("--force", action="store_true", help="fetch again what is in the cache")
    command.set_defaults(run=download)
    return parser


def _add_changing_options(command: argparse.ArgumentParser) -> None:
    head = command.add_mutually_exclusive_group()
    head.add_argument("--num-classes", type=int, metavar="N", help="a fresh head of zeros")
    head.add_argument("--drop-head", action="store_true", help="end in features")
    head.add_argument(
        "--classes", metavar="LIST|FILE", help='some classes in another order: "3,1,2", or a file of a label a line'
    )
    command.add_argument("--labels", metavar="FILE", help="names of the classes, one a line, to travel with the weights")
    command.add_argument("--resize-to", type=size, metavar="HxW", help="for images so large, a whole multiple (paper, app. C)")
    command.add_argument("--resample", action="store_true", help="with --resize-to: any size, approximately")
    command.add_argument("--dry-run", action="store_true", help="print what would become of each array")
    command.add_argument("--force", action="store_true", help="replace an existing target")
    command.add_argument("--json", action="store_true", help="one line of JSON")


def entry() -> None:
    sys.exit(main())


if __name__ == "__main__":
    entry()
