"""python -m convert: a checkpoint into another layout or format, what a file is, whether two are the same, fetching one."""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import __version__
from .atomic import check_writable
from .cli import add_reading_options, reading_options, refuse_ignored, require_verb, run_guarded, size, whole_number
from .commands import A2B, NAMES, Changes, compare_files, convert_file, inspect_file, plan_file
from .errors import CheckpointError
from .formats import format_for_writing
from .io import usual_layout
from .labels import read_lines
from .progress import progress_bar

VERBS = ("inspect", "compare", "download", "convert", *A2B)
OTHER_NAMES = {"google": "npz", "pt": "torch", "pth": "torch", "pytorch": "torch", "jax": "flax", "orbax": "flax"}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = _parser()
    if argv and argv[0] not in (*VERBS, "-h", "--help", "--version"):
        meant = "2".join(OTHER_NAMES.get(name, name) for name in argv[0].split("2"))
        if _is_source_or_option(argv[0]):
            argv.insert(0, "convert")  # the verb that may be left out
        elif meant in A2B:
            parser.error(f"no command {argv[0]!r}: did you mean {meant}?")
        elif argv[0] == "publish":
            parser.error("publish is a command of python -m mixer_jax: it measures what these weights compute")
    require_verb(parser, argv, VERBS, f"{', '.join(VERBS[:4])} and A2B, as in npz2torch; A and B are of {', '.join(NAMES)}")
    arguments = parser.parse_args(argv)
    return run_guarded(lambda: arguments.run(arguments))


def _is_source_or_option(word: str) -> bool:
    """Whether a first argument that is no verb can begin the arguments of `convert`."""
    return word.startswith("-") or any(mark in word for mark in "./\\") or os.path.exists(word)


def convert(arguments: argparse.Namespace) -> None:
    if arguments.command in A2B:
        refuse_ignored(arguments, ["to"], f"{arguments.command} names the layout already; leave out one of the two")
    if arguments.resize_to is None:
        refuse_ignored(arguments, ["resample"], "works only with --resize-to")
    source_layout, layout = A2B.get(arguments.command, (None, arguments.to or usual_layout(arguments.target)))
    options: dict[str, Any] = {"layout": layout, "source_layout": source_layout}
    options |= {"reading": reading_options(arguments), "changes": _changes(arguments)}
    if arguments.dry_run:
        target = Path(arguments.target)
        check_writable(target, force=arguments.force, folder=format_for_writing(target).is_folder)
        rows = plan_file(arguments.source, **options)
        print(json.dumps(rows) if arguments.json else _table(rows))
        return
    with progress_bar() as progress:
        done = convert_file(arguments.source, arguments.target, **options, force=arguments.force, progress=progress)
    wrote = (
        f"wrote {done.target}: {done.parameters:,} parameters in {done.arrays} arrays, {done.layout} layout, {done.dtype}; "
        "read back, every bit equal"
    )
    print(json.dumps(asdict(done)) if arguments.json else "\n".join([wrote, *done.notes]))


def inspect(arguments: argparse.Namespace) -> None:
    refuse_ignored(arguments, ["allow_nonfinite"], "inspect counts NaN and infinity in any file; leave it out")
    facts = inspect_file(arguments.source, reading=reading_options(arguments))
    if arguments.json:
        print(json.dumps(facts))
        return
    arrays = facts.pop("arrays")
    for name, value in facts.items():
        print(f"{name:<20}{', '.join(value) if isinstance(value, list) else value}")
    if arguments.arrays:
        print("\n" + _table(arrays))


def compare(arguments: argparse.Namespace) -> None:
    result = compare_files(arguments.source, arguments.other, reading=reading_options(arguments))
    unequal = result.differences
    if arguments.json:
        rows = [asdict(d) | {"max_abs": d.max_abs if math.isfinite(d.max_abs or 0) else str(d.max_abs)} for d in unequal]
        print(json.dumps({"same": not unequal, "differences": rows, "numerics": result.numerics}, allow_nan=False))
    else:
        for difference in unequal:
            by = "" if difference.max_abs is None else f", max abs difference {difference.max_abs:.3g}"
            print(f"{difference.name}: {difference.what}{by}")
        for line in result.numerics:
            print(f"not the same numerics: {line}")
        if not unequal:
            print(f"the same weights: fingerprint {result.fingerprint}")
    if unequal:
        raise CheckpointError(f"not the same weights: {len(unequal)} of {result.arrays} arrays differ")


def download(arguments: argparse.Namespace) -> None:
    from .download import download as fetch  # imports the network's libraries

    print(fetch(arguments.name, cache=arguments.cache, base=arguments.base, force=arguments.force))


def _changes(arguments: argparse.Namespace) -> Changes:
    """--classes is a list, "3,1,2", or the name of a file with a label or an index a line."""
    classes: Any = arguments.classes
    if classes is not None:
        classes = read_lines(classes) if os.path.isfile(classes) else [item.strip() for item in classes.split(",")]
    return Changes(
        drop_head=arguments.drop_head,
        num_classes=arguments.num_classes,
        classes=classes,
        labels=arguments.labels,
        image_size=arguments.resize_to,
        resample=arguments.resample,
    )


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(f"{value:<{width}}" for value, width in zip(line, widths)).rstrip() for line in lines)


def _parser() -> argparse.ArgumentParser:
    names = ", ".join(NAMES)
    parser = argparse.ArgumentParser(
        prog="python -m convert",
        usage="%(prog)s A2B SOURCE TARGET [options]\n       %(prog)s SOURCE TARGET [--to LAYOUT] [options]\n"
        "       %(prog)s inspect FILE | compare FILE FILE | download NAME",
        description="MLP-Mixer checkpoints from one layout to another. A2B is from layout A to layout B, as in npz2torch; each "
        f"is one of {names}. The format follows the ending of the target: .npz, .safetensors, .pt, .pth, .msgpack, or .orbax "
        "and none for an Orbax folder. Without A2B and --to the layout is the one usual in that format.",
        epilog="example: python -m convert npz2torch Mixer-B_16.npz mixer_b16.pt",
    )
    parser.add_argument("--version", action="version", version=f"mixer-jax {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", prog="python -m convert")

    def add(name: str, run: Callable[[argparse.Namespace], None], description: str, **help: Any) -> argparse.ArgumentParser:
        command = commands.add_parser(name, description=description, **help)
        command.set_defaults(run=run, usage=command.error)
        command.add_argument("--json", action="store_true", help="print JSON") if name != "download" else None
        return command

    helps = {
        "convert": "to the layout of --to; the word may be left out",
        "npz2torch": "Google's .npz for PyTorch; A2B of any other pair in the same way",
    }
    for name in ("convert", *A2B):
        layouts = "to another layout" if name == "convert" else "from the {} layout to the {} layout".format(*A2B[name])
        command = add(name, convert, layouts, **({"help": helps[name]} if name in helps else {}))
        command.add_argument("source", help="file, folder of checkpoints, or name of a published file to read")
        command.add_argument("target", help="file or Orbax folder to write")
        to = names if name == "convert" else argparse.SUPPRESS
        command.add_argument("--to", choices=[*NAMES, "google"], metavar="LAYOUT", help=to)
        _add_changing_options(command)
        add_reading_options(command)
    command = add("inspect", inspect, "What a checkpoint is; reads all of it.", help="what a file is")
    command.add_argument("source", metavar="FILE")
    command.add_argument("--arrays", action="store_true", help="list every array: shape, norm, zeros, NaN, infinity")
    add_reading_options(command)
    same = "whether two files hold the same weights; exit code 1 if not"
    command = add("compare", compare, same, help=same)
    command.add_argument("source", metavar="FILE")
    command.add_argument("other", metavar="FILE")
    add_reading_options(command)
    fetched = "fetch a published file into the cache and print its path"
    command = add("download", download, fetched, help=fetched)
    command.add_argument("name", help="imagenet1k/Mixer-B_16 and the like, or hf:timm/mixer_b16_224.goog_in21k_ft_in1k")
    command.add_argument("--cache", metavar="FOLDER", help="cache folder (default: MIXER_JAX_CACHE, or the user's)")
    command.add_argument("--base", metavar="URL", help="address to fetch from (default: MIXER_JAX_BASE_URL, or Google's)")
    command.add_argument("--force", action="store_true", help="fetch again what is in the cache")
    return parser


def _add_changing_options(command: argparse.ArgumentParser) -> None:
    head = command.add_mutually_exclusive_group()
    head.add_argument("--num-classes", type=whole_number(0), metavar="N", help="make a fresh head of zeros for N classes")
    head.add_argument("--drop-head", action="store_true", help="drop the head: the model returns features")
    head.add_argument(
        "--classes",
        metavar="LIST|FILE",
        help='keep these classes, in this order: "3,1,2", or a file of labels or indices, one a line',
    )
    command.add_argument("--labels", metavar="FILE", help="store these class names, one a line, with the weights")
    command.add_argument(
        "--resize-to", type=size, metavar="HxW", help="new input size, a whole multiple of the old (paper, appendix C)"
    )
    command.add_argument("--resample", action="store_true", help="with --resize-to: allow any size, approximately")
    command.add_argument("--dry-run", action="store_true", help="print what would become of each array; write nothing")
    command.add_argument("--force", action="store_true", help="replace an existing target")


def entry() -> None:
    sys.exit(main())


if __name__ == "__main__":
    entry()
