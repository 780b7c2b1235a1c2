"""python -m mixer_jax: what a person does with a Mixer."""

import argparse
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from convert import __version__, read
from convert.cli import (
    add_reading_options,
    preprocessing,
    reading_options,
    refuse_ignored,
    require_verb,
    run_guarded,
    whole_number,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .commands.model_options import ModelOptions


Subparsers = argparse._SubParsersAction  # which argparse gives no public name
VERBS = ("summary", "demo", "predict", "evaluate", "finetune", "pack", "parity", "draw")


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser()
    require_verb(parser, argv, VERBS, ", ".join(VERBS))
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command == "finetune" and arguments.checkpoint is None and len(rest) == 1 and not rest[0].startswith("-"):
        arguments.checkpoint, arguments.data = arguments.data, rest.pop()  # options stood between the two
    if rest:
        arguments.usage(f"unrecognized arguments: {' '.join(rest)}")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
    return run_guarded(lambda: arguments.run(arguments))


def summary(arguments: argparse.Namespace) -> None:
    from .commands.summary import config_of, is_file, summarize, summary_as_dict

    source, variant = arguments.source, {}
    if is_file(source):
        refuse_ignored(arguments, ["num_classes"], f"is for a variant, and {source} is a file, which has its own")
    else:
        reading = ["depth", "variant", "dtype", "key", "step", "allow_nonfinite", "gelu", "layer_norm_epsilon", "preprocess"]
        refuse_ignored(arguments, reading, f"is for a file, and {source} is none; leave it out")
        sizes = {"num_classes": arguments.num_classes, "image_size": arguments.image_size}
        variant = {name: value for name, value in sizes.items() if value is not None}
    config = config_of(source, reading_options(arguments), **variant)
    print(json.dumps(summary_as_dict(config)) if arguments.json else summarize(config))


def demo(arguments: argparse.Namespace) -> None:
    from .commands.demo import demo

    demo(arguments.weights, arguments.folder)


def predict(arguments: argparse.Namespace) -> None:
    if arguments.against and arguments.features:
        arguments.usage("--features are those of one preprocessing: leave out --against")
    if not arguments.features:
        refuse_ignored(arguments, ["force"], "replaces OUT.npy, and --features does not name one")
    if arguments.against and not arguments.json:
        refuse_ignored(arguments, ["top"], "--against shows the best class of each preprocessing; --json has more")
    from .commands.predict import run

    options = {name: getattr(arguments, name) for name in ("top", "features", "against", "force")}
    run(_model_options(arguments), arguments.images, as_json=arguments.json, **options)


def evaluate(arguments: argparse.Namespace) -> None:
    if not arguments.confusion:
        refuse_ignored(arguments, ["force"], "replaces OUT.png, and --confusion does not name one")
    from .commands.evaluate import run

    options = {"real": arguments.real, "confusion": arguments.confusion, "as_json": arguments.json, "force": arguments.force}
    run(_model_options(arguments), arguments.folder, **options)


def finetune(arguments: argparse.Namespace) -> None:
    from .commands.config_options import config_changes
    from .commands.finetune import run

    if (arguments.checkpoint is None) == (arguments.from_scratch is None):
        arguments.usage("give CHECKPOINT and DATA, or DATA and --from-scratch")
    options = {name: getattr(arguments, name) for name in ("from_scratch", "resume", "threads", "save_minutes", "preset")}
    what = arguments.checkpoint, arguments.data, arguments.run_folder, config_changes(vars(arguments))
    code = run(*what, reading=reading_options(arguments), **options)
    if code:
        sys.exit(code)


def pack(arguments: argparse.Namespace) -> None:
    from .commands.pack import run

    if arguments.check == (arguments.out is not None):
        arguments.usage("give DATA and OUT, or OUT and --check")
    if arguments.check:
        refuse_ignored(arguments, ["shard_images"], "is for packing, and --check packs nothing; leave it out")
    run(arguments.data, arguments.out, shard_images=arguments.shard_images, threads=arguments.threads)


def parity(arguments: argparse.Namespace) -> None:
    if arguments.images:
        refuse_ignored(arguments, ["count"], "is for noise, and --images names the images; leave out one of them")
    else:
        refuse_ignored(arguments, ["preprocess"], "is for images, and noise needs none: name images with --images")
    if not arguments.html:
        refuse_ignored(arguments, ["force"], "replaces OUT.html, and --html does not name one")
    from .commands.parity import implementation_of, parity
    from .parity.report import as_dict, as_text

    try:
        a, b = (implementation_of(text, exact=arguments.exact) for text in (arguments.a, arguments.b))
    except ValueError as error:
        arguments.usage(str(error))
    names = ("other", "images", "seed", "draws", "explain", "exact", "predict_devices", "html", "force")
    options = {name: getattr(arguments, name) for name in names}
    report = parity(arguments.source, a=a, b=b, count=arguments.count or 1, reading=reading_options(arguments), **options)
    print(json.dumps(as_dict(report)) if arguments.json else as_text(report))
    if not report.passed:
        sys.exit(1)


def draw(arguments: argparse.Namespace) -> None:
    if arguments.what == "stem":
        refuse_ignored(arguments, ["blocks"], "the stem is in no block; leave it out")
    if arguments.what == "norms":
        refuse_ignored(arguments, ["units"], "norms are of whole arrays; leave it out")
    from .pictures.files import check_path, require_matplotlib, save
    from .pictures.weights import draw_norms, draw_stem, draw_tokens

    path, force = arguments.picture, arguments.force
    require_matplotlib()
    check_path(path, source=arguments.source, force=force)
    checkpoint = read(arguments.source, reading_options(arguments))
    verbs: dict[str, Callable[..., Figure]] = {"tokens": draw_tokens, "stem": draw_stem, "norms": draw_norms}
    given = {name: getattr(arguments, name) for name in ("blocks", "units") if getattr(arguments, name) is not None}
    figure = verbs[arguments.what](checkpoint, **given)
    save(figure, path, force=force)
    print(f"{path}: {figure.get_suptitle()}")


def _model_options(arguments: argparse.Namespace) -> "ModelOptions":
    from .commands.model_options import ModelOptions

    options = {name: getattr(arguments, name) for name in ("source", "implementation", "labels", "batch_size", "threads")}
    return ModelOptions(reading=reading_options(arguments), use_exif=arguments.exif, **options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mixer_jax",
        description="MLP-Mixer in JAX, mirrored in PyTorch.",
        epilog="example: python -m mixer_jax summary B/16",
    )
    parser.add_argument("--version", action="version", version=f"mixer-jax {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    verbs = _add_summary, _add_demo, _add_predict, _add_evaluate, _add_finetune, _add_pack, _add_parity, _add_draw
    for add in verbs:
        add(commands)
    return parser


def _command(
    commands: Subparsers, run: Callable[[argparse.Namespace], None], help: str, *, example: str | None = None
) -> argparse.ArgumentParser:
    epilog = f"example: python -m mixer_jax {example}" if example else None
    command = commands.add_parser(run.__name__, help=help, epilog=epilog)
    command.set_defaults(run=run, usage=command.error)
    return command


def _add_summary(commands: Subparsers) -> None:
    command = _command(commands, summary, "parameters and FLOPs of a variant or a file, by module")
    command.add_argument("source", metavar="NAME|FILE", help="a variant such as B/16, or a checkpoint")
    command.add_argument("--num-classes", type=whole_number(0), metavar="N", help="classes of a variant (default: 1000)")
    command.add_argument("--json", action="store_true", help="print one line of JSON")
    add_reading_options(command)


def _add_demo(commands: Subparsers) -> None:
    command = _command(commands, demo, "train on digits, convert, compare Flax with PyTorch; or start from a released file")
    command.add_argument("weights", nargs="?", type=Path, metavar="Mixer-B_16.npz", help="convert and compare this file")
    command.add_argument(
        "--folder", type=Path, default="demo-output", help="write files here, replacing older ones (default: demo-output)"
    )


def _add_predict(commands: Subparsers) -> None:
    example = "predict Mixer-B_16.npz cat.jpg holiday/ --top 3"
    command = _command(commands, predict, "classes of photographs, or their features", example=example)
    _add_image_options(command, exif=True)
    command.add_argument("images", nargs="+", metavar="IMAGE", help="an image, a folder, or - for a list on standard input")
    command.add_argument("--top", type=whole_number(1), metavar="K", help="show the K best classes (default: 5)")
    command.add_argument("--json", action="store_true", help="print one line of JSON for each image")
    rows = "write the head's input, a row an image, NaN for an unreadable one"
    command.add_argument("--features", type=Path, metavar="OUT.npy", help=rows)
    command.add_argument("--against", type=preprocessing, metavar="NAME", help="compare with this preprocessing")
    command.add_argument("--force", action="store_true", help="replace OUT.npy")


def _add_evaluate(commands: Subparsers) -> None:
    example = "evaluate Mixer-B_16.npz imagenet/val"
    command = _command(commands, evaluate, "accuracy on a folder with a folder for each class", example=example)
    _add_image_options(command, exif=False)
    command.add_argument("folder", metavar="FOLDER", help="has a folder for each class: named by label or synset, or sorted")
    command.add_argument("--json", action="store_true", help="print all figures as one line of JSON")
    real = "count ReaL labels as well (Beyer et al. 2020); FOLDER has ImageNet's validation images under their own names"
    command.add_argument("--real", type=Path, metavar="real.json", help=real)
    command.add_argument("--confusion", type=Path, metavar="OUT.png", help="draw which class is taken for which")
    command.add_argument("--force", action="store_true", help="replace OUT.png")


def _add_finetune(commands: Subparsers) -> None:
    from .commands.config_options import add_config_options
    from .training.config import PRESETS

    example = "finetune Mixer-B_16.npz pets/ --run pets-run --preset small"
    command = _command(commands, finetune, "train on one's own images; the same command again goes on", example=example)
    command.usage = "python -m mixer_jax finetune [-h] [CHECKPOINT] DATA --run FOLDER [options]"
    command.add_argument("checkpoint", nargs="?", metavar="CHECKPOINT", help="a checkpoint to begin with")
    data = "a folder of class folders, or of train/, val/ and test/; a table of path and label; files of CIFAR or MNIST; "
    data += "digits; or what pack made of these"
    command.add_argument("data", metavar="DATA", help=data)
    groups = add_config_options(command)
    run, images, model = (groups[name].add_argument for name in ("run", "data and images", "model"))
    run("--run", dest="run_folder", required=True, type=Path, metavar="FOLDER", help="folder of the run")
    run("--resume", action="store_true", help="go on with the run in FOLDER; an error if there is none")
    run("--preset", choices=PRESETS, default="official", help="other defaults; those below are official's (default: official)")
    images("--threads", type=whole_number(1), metavar="N", help="image-decoding threads (default: one per core)")
    scratch = "begin with random weights instead of a checkpoint; S/4,num_blocks=2,hidden_dim=64 changes sizes"
    usual = "minutes from one saved state to the next, where evaluations are further apart (default: 10)"
    run("--save-minutes", type=float, default=10, metavar="N", help=usual)
    model("--from-scratch", metavar="S/32", help=scratch)
    reading = command.add_argument_group("reading the checkpoint")
    add_reading_options(reading, without=("image_size", "dtype"))  # these are the run's


def _add_pack(commands: Subparsers) -> None:
    command = _command(
        commands, pack, "a million labelled images in shards; the same command again goes on", example="pack imagenet packed"
    )
    command.add_argument("data", metavar="DATA", help="what finetune takes as DATA; or with --check a packed folder")
    command.add_argument("out", nargs="?", metavar="OUT", help="folder to pack into, which finetune takes as DATA")
    command.add_argument(
        "--shard-images",
        type=whole_number(1),
        metavar="N",
        help="images in a shard (default: 4,000, or more for above 2 million)",
    )
    command.add_argument(
        "--threads", type=whole_number(1), metavar="N", help="threads that read images (default: one per core)"
    )
    command.add_argument("--check", action="store_true", help="read every packed image and compare its checksum")


def _add_parity(commands: Subparsers) -> None:
    command = commands.add_parser(
        "parity",
        help="whether two implementations compute the same, where they start to differ, and why",
        description="An implementation (IMPL) is NAME[:DEVICE[:DTYPE[:PRECISION]]], as in torch:gpu:bfloat16:default. NAME is "
        "flax, torch, timm or numpy (the paper's equations in float64); DEVICE is cpu, gpu or tpu; PRECISION, of matmuls, is "
        "highest, high or default. Exit code: 0 yes, 1 no or an error.",
        epilog="example: python -m mixer_jax parity Mixer-B_16.npz --a flax:gpu --b torch:cpu --html parity.html",
    )
    command.add_argument("source", metavar="FILE", help="a checkpoint")
    command.add_argument("other", nargs="?", metavar="FILE_B", help="checkpoint of the second implementation (default: FILE)")
    command.add_argument("--a", default="flax", metavar="IMPL", help="first implementation (default: flax)")
    command.add_argument("--b", default="torch", metavar="IMPL", help="second implementation (default: torch)")
    command.add_argument("--images", nargs="+", metavar="PATH", help="images or folders of images (default: noise)")
    command.add_argument("--count", type=whole_number(1), metavar="N", help="number of noise images (default: 1)")
    command.add_argument(
        "--seed", type=whole_number(0), default=0, metavar="N", help="seed of noise and simulated rounding (default: 0)"
    )
    command.add_argument(
        "--draws",
        type=whole_number(8),
        default=8,
        metavar="N",
        help="simulated runs for the tolerance, at least 8 (default: 8)",
    )
    command.add_argument("--explain", action="store_true", help="show how much of the difference each choice makes")
    command.add_argument("--exact", action="store_true", help="compare in float64: are the logits the same float32 numbers?")
    command.add_argument("--predict-devices", action="store_true", help="show what GPUs and TPUs are expected to give")
    command.add_argument("--json", action="store_true", help="print one line of JSON")
    command.add_argument("--html", type=Path, metavar="OUT.html", help="write the report as one page")
    command.add_argument("--force", action="store_true", help="replace OUT.html")
    add_reading_options(command)
    command.set_defaults(run=parity, usage=command.error)


def _add_draw(commands: Subparsers) -> None:
    example = "draw Mixer-B_16.npz tokens.png --blocks 0-3,11"
    command = _command(commands, draw, "a picture of a file's weights, as in the paper", example=example)
    command.add_argument("source", metavar="FILE", help="a checkpoint")
    command.add_argument("picture", type=Path, metavar="OUT.png", help="the picture to write, or .pdf or .svg")
    names, what = ("tokens", "stem", "norms"), "token-mixing units, units of the stem, or the RMS of every array by block"
    command.add_argument("--what", choices=names, default="tokens", help=f"{what} (default: tokens)")
    command.add_argument("--blocks", type=_blocks, metavar="0,1-3", help="blocks to draw (default: the first 3; norms: all)")
    command.add_argument("--units", type=whole_number(1), metavar="N", help="draw only the first N units (default: all)")
    command.add_argument("--force", action="store_true", help="replace OUT.png")
    add_reading_options(command)


def _add_image_options(command: argparse.ArgumentParser, *, exif: bool) -> None:
    command.add_argument("source", metavar="FILE", help="a checkpoint")
    command.add_argument("--labels", type=Path, metavar="FILE", help="names of the classes, one a line")
    usual = "images computed at once (default: 8 on a CPU, else 64)"
    command.add_argument("--batch-size", type=whole_number(1), metavar="N", help=usual)
    command.add_argument("--threads", type=whole_number(1), metavar="N", help="image-decoding threads (default: one per core)")
    yes_or_no, names = argparse.BooleanOptionalAction, ("flax", "torch")
    command.add_argument(
        "--exif",
        action=yes_or_no,
        default=exif,
        help=f"rotate images by their EXIF orientation (default: {'yes' if exif else 'no, as published evaluations do'})",
    )
    command.add_argument("--implementation", choices=names, default="flax", help="model that computes (default: flax)")
    add_reading_options(command)


def _blocks(text: str) -> list[int]:
    """ "0,1-3" as an argument."""
    blocks: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        last = last if "-" in part else first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last) < 1000):
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of blocks such as 0,1-3")
        blocks += range(int(first), int(last) + 1)
    return blocks


def entry() -> None:
    sys.exit(main())


if __name__ == "__main__":
    entry()
