"""python -m convert: a checkpoint into another layout or format, what a file is, whether two are the same, fetching one."""

import argparse
import itertools
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from . import __version__, containers, mapping
from .checkpoint import Checkpoint, usual_layout, write
from .cli import add_reading_options, guarded, read_asked, refuse_ignored, require_verb, size, whole_number
from .errors import CheckpointError
from .files import check_writable
from .identity import can_be, differences, fingerprint
from .labels import read_labels, read_lines
from .layouts import ALIASES, LAYOUTS, layout_named
from .published import is_published

NAMES = sorted({*LAYOUTS, *ALIASES} - {"google"})  # google's files are known as npz here
A2B = {f"{a}2{b}": (layout_named(a).name, layout_named(b).name) for a, b in itertools.permutations(NAMES, 2)}
VERBS = ("inspect", "compare", "download", "convert", *A2B)
MEANT = {"google": "npz", "pt": "torch", "pth": "torch", "pytorch": "torch", "jax": "flax", "orbax": "flax"}  # for a suggestion


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = _parser()
    meant = "2".join(MEANT.get(name, name) for name in argv[0].split("2")) if argv else ""
    if meant in A2B and argv[0] not in VERBS and not os.path.exists(argv[0]):
        parser.error(f"no command {argv[0]!r}: did you mean {meant}?")
    if argv and _is_source(argv):
        argv.insert(0, "convert")  # the verb goes without saying
    require_verb(parser, argv, VERBS, f"{', '.join(VERBS[:4])} and A2B, as in npz2torch; A and B are of {', '.join(NAMES)}")
    arguments = parser.parse_args(argv)
    return guarded(lambda: arguments.run(arguments))


def _is_source(argv: list[str]) -> bool:
    """Whether the first argument is no verb but a file, or an option of the verb `convert`."""
    first = argv[0]
    if first in (*VERBS, "-h", "--help", "--version"):
        return False
    names_a_file = os.path.exists(first) or bool(Path(first).suffix) or os.sep in first or is_published(first)
    return names_a_file or first.startswith("-") or any(word.partition("=")[0] == "--to" for word in argv)


def convert(arguments: argparse.Namespace) -> None:
    if arguments.command in A2B:
        refuse_ignored(arguments, ["to"], f"{arguments.command} says the layout already; leave out one of them")
    if arguments.resize_to is None:
        refuse_ignored(arguments, ["resample"], "says how --resize-to goes about it, which is not there")
    containers.for_writing(Path(arguments.target))
    check_writable(Path(arguments.target), force=arguments.force)
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
    refuse_ignored(arguments, ["allow_nonfinite"], "inspect counts NaN and infinity in any file; leave it out")
    arguments.allow_nonfinite = True
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
    entries = ("gelu", "layer_norm_epsilon", "image_size", "preprocessing")
    numerics = sides[0].metadata.differences(sides[1].metadata, entries)
    if arguments.json:
        rows = [asdict(d) | {"largest": d.largest if math.isfinite(d.largest or 0) else str(d.largest)} for d in found]
        print(json.dumps({"same": not found, "differences": rows, "numerics": numerics}, allow_nan=False))
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

    print(fetch(arguments.name, cache=arguments.cache, base=arguments.base, force=arguments.force))


def _changed(checkpoint: Checkpoint, arguments: argparse.Namespace) -> Checkpoint:
    """The checkpoint with the head, the labels and the grid that were asked for."""
    if arguments.drop_head:
        checkpoint = checkpoint.without_head()
    if arguments.num_classes is not None:
        checkpoint = checkpoint.with_classes(arguments.num_classes)
    if arguments.classes is not None:
        checkpoint = checkpoint.with_selected_classes(_indices(arguments.classes, checkpoint.metadata.labels))
    if arguments.labels is not None:
        checkpoint = checkpoint.with_metadata(labels=read_labels(arguments.labels, checkpoint.sizes["num_classes"]))
    if arguments.resize_to is not None:
        checkpoint = checkpoint.resized(arguments.resize_to, resample=arguments.resample)
    return checkpoint


def _indices(asked: str, labels: tuple[str, ...] | None) -> list[int]:
    """Classes as "3,1,2", or a file with a label or an index a line."""
    items = read_lines(asked) if os.path.exists(asked) else asked.split(",")
    known = {label: index for index, label in enumerate(labels or ())}
    unknown = [item for item in items if item not in known and not item.isdecimal()]
    if unknown:
        raise CheckpointError(f"--classes: no class {unknown[0]!r}: an index" + (" or one of the labels" if labels else ""))
    return [known[item] if item in known else int(item) for item in items]


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
    if layout.told_sizes and (sizes := _sizes_in_timms_terms(checkpoint)):
        notes.append(f"{layout.name}'s own code needs {layout.told_sizes.format(**sizes)} for these weights")
    if layout.headless and not checkpoint.sizes["num_classes"]:
        notes.append(layout.headless)
    wrote = (
        f"wrote {target}: {checkpoint.num_parameters:,} parameters in {len(checkpoint.arrays)} arrays, {layout.name} layout, "
        f"{checkpoint.dtype}; read back, every bit equal"
    )
    facts = {"layout": layout.name, "dtype": checkpoint.dtype.name, "parameters": checkpoint.num_parameters}
    return {"wrote": wrote, "target": str(target), "notes": notes, **facts}


def _sizes_in_timms_terms(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The widths as factors of hidden_dim, and the image size; None where they are what timm takes for granted."""
    try:
        config = checkpoint.config
    except CheckpointError:  # nobody has said what grid the tokens form
        return None
    ratio = tuple(_factor(width, config.hidden_dim) for width in (config.tokens_mlp_dim, config.channels_mlp_dim))
    if (ratio, config.image_size) == ((0.5, 4.0), (224, 224)):
        return None
    height, width = config.image_size
    return {"mlp_ratio": ratio, "image_size": height if height == width else (height, width)}


def _factor(width: int, hidden_dim: int) -> float:
    """What timm multiplies hidden_dim by, and cuts to a whole number."""
    factor = width / hidden_dim
    return factor if int(factor * hidden_dim) == width else math.nextafter(factor, math.inf)


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
        return "stated" if entry in checkpoint.stated else f"{checkpoint.layout.name}'s default"

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
    names = ", ".join(NAMES)
    parser = argparse.ArgumentParser(
        prog="python -m convert",
        usage="%(prog)s A2B SOURCE TARGET [options]\n       %(prog)s SOURCE TARGET [--to LAYOUT] [options]\n"
        "       %(prog)s inspect FILE | compare FILE FILE | download NAME",
        description="MLP-Mixer checkpoints from one layout to another. A2B is from layout A to layout B, as in npz2torch; each "
        f"is one of {names}. The format follows the ending of the target: .npz, .safetensors, .pt, .pth, or none for an Orbax "
        "folder. Without A2B and --to the layout is the one usual in that format.",
        epilog="example: python -m convert npz2torch Mixer-B_16.npz mixer_b16.pt",
    )
    parser.add_argument("--version", action="version", version=f"mixer-jax {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", prog="python -m convert")

    def add(name: str, run: Callable[[argparse.Namespace], None], description: str, **help: Any) -> argparse.ArgumentParser:
        command = commands.add_parser(name, description=description, **help)
        command.set_defaults(run=run, usage=command.error)
        return command

    helps = {
        "convert": "to the layout of --to; the word may be left out",
        "npz2torch": "Google's .npz for PyTorch; A2B of any other pair in the same way",
    }
    for name in ("convert", *A2B):
        layouts = "to another layout" if name == "convert" else "from the {} layout to the {} layout".format(*A2B[name])
        command = add(name, convert, layouts, **({"help": helps[name]} if name in helps else {}))
        command.add_argument("source", help="a file or an Orbax folder")
        command.add_argument("target", help="what to write")
        to = names if name == "convert" else argparse.SUPPRESS
        command.add_argument("--to", choices=[*NAMES, "google"], metavar="LAYOUT", help=to)
        _add_changing_options(command)
        add_reading_options(command)
    command = add("inspect", inspect, "What a checkpoint is; reads all of it.", help="what a file is")
    command.add_argument("source", metavar="FILE")
    command.add_argument("--json", action="store_true", help="one line of JSON")
    add_reading_options(command)
    same = "whether two files hold the same weights; exit code 1 if not"
    command = add("compare", compare, same, help=same)
    command.add_argument("source", metavar="FILE")
    command.add_argument("other", metavar="FILE")
    command.add_argument("--json", action="store_true", help="one line of JSON")
    add_reading_options(command)
    fetched = "fetch a published file into the cache and print its path"
    command = add("download", download, fetched, help=fetched)
    command.add_argument("name", help="imagenet1k/Mixer-B_16 and the like, or hf:timm/mixer_b16_224.goog_in21k_ft_in1k")
    command.add_argument("--cache", metavar="FOLDER", help="instead of MIXER_JAX_CACHE or the user's cache folder")
    command.add_argument("--base", metavar="URL", help="another address to fetch from, also MIXER_JAX_BASE_URL")
    command.add_argument("--force", action="store_true", help="fetch again what is in the cache")
    return parser


def _add_changing_options(command: argparse.ArgumentParser) -> None:
    head = command.add_mutually_exclusive_group()
    head.add_argument("--num-classes", type=whole_number(0), metavar="N", help="a fresh head of zeros")
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
