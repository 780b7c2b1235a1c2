"""python -m mixer_jax: what a person does with a Mixer."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from convert import CheckpointError, MixerConfig, __version__
from convert.checkpoint import PREPROCESSING
from convert.cli import add_reading_options, guarded, read_asked, refuse_ignored, require_verb, whole_number
from convert.config import variant_sizes
from convert.published import is_published

if TYPE_CHECKING:
    from .sides import Side


VERBS = ("summary", "demo", "predict", "evaluate", "parity", "draw")


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser()
    require_verb(parser, argv, VERBS, ", ".join(VERBS))
    arguments = parser.parse_args(argv)
    return guarded(lambda: arguments.run(arguments))


def summary(arguments: argparse.Namespace) -> None:
    config = _config(arguments)
    rows = config.modules()
    if arguments.json:
        modules = [{"name": r.name, "count": r.count, "parameters": r.parameters, "flops": r.flops} for r in rows]
        print(json.dumps({"parameters": config.num_parameters, "forward_flops": config.forward_flops, "modules": modules}))
        return
    height, width = config.image_size
    print(f"Mixer-{config.variant or 'of other sizes'}: {config.num_tokens} tokens of {config.hidden_dim} channels ", end="")
    print(f"from images of {height}x{width} pixels, {config.num_classes or 'no'} classes\n")
    print(f"{'module':<24}{'each':>14}{'count':>7}{'parameters':>14}{'GFLOPs/image':>14}")
    for r in rows:
        print(f"{r.name:<24}{r.parameters:>14,}{r.count:>7}{r.count * r.parameters:>14,}{r.count * r.flops / 1e9:>14.3f}")
    print(f"{'all':<45}{config.num_parameters:>14,}{config.forward_flops / 1e9:>14.3f}")


def demo(arguments: argparse.Namespace) -> None:
    if arguments.validate and arguments.weights:
        arguments.usage(f"--validate is of training, and {arguments.weights} has been trained")
    if arguments.validate:
        refuse_ignored(arguments, ["folder"], "--validate writes nothing; leave out one of them")
    from .demo import run

    run(arguments.weights, arguments.folder or Path("demo-output"), validate=arguments.validate)


def predict(arguments: argparse.Namespace) -> None:
    if arguments.against and arguments.features:
        arguments.usage("--features are those of one preprocessing: leave out --against")
    if not arguments.features:
        refuse_ignored(arguments, ["force"], "replaces OUT.npy, and --features does not name one")
    if arguments.against and not arguments.json:
        refuse_ignored(arguments, ["top"], "--against shows the best class of each preprocessing; --json has more")
    from .predict import run

    run(arguments)


def evaluate(arguments: argparse.Namespace) -> None:
    if not arguments.confusion:
        refuse_ignored(arguments, ["force"], "replaces OUT.png, and --confusion does not name one")
    from .evaluate import run

    run(arguments)


def parity(arguments: argparse.Namespace) -> None:
    if arguments.self_test and (arguments.other or arguments.images or arguments.b or arguments.html):
        arguments.usage("--self-test is of one FILE on one side, --a, on noise, and writes no page")
    if arguments.self_test:
        refuse_ignored(
            arguments, ["explain", "exact", "predict"], "is of two sides, and --self-test of one; leave out one of them"
        )
    if arguments.images:
        refuse_ignored(arguments, ["count"], "is of noise, and --images names the images; leave out one of them")
    else:
        refuse_ignored(arguments, ["preprocess"], "is of images, and noise takes none: name them with --images")
    if not arguments.html:
        refuse_ignored(arguments, ["force"], "replaces OUT.html, and --html does not name one")
    arguments.count = arguments.count or 2
    if arguments.exact and any(side and side.dtype not in ("float32", "float64") for side in (arguments.a, arguments.b)):
        arguments.usage("--exact is asked in float64")
    if arguments.images:
        from .predict import require_images

        arguments.images = require_images(arguments.images)
    from .parity_command import run

    if not run(arguments):
        sys.exit(1)


def draw(arguments: argparse.Namespace) -> None:
    from .draw import run

    run(arguments)


def _config(arguments: argparse.Namespace) -> MixerConfig:
    name = arguments.source
    if Path(name).exists() or Path(name).suffix or is_published(name):
        refuse_ignored(arguments, ["num_classes"], f"is of a variant, and {name} is a file, which has its own")
        return read_asked(arguments).config
    reading = ["blocks", "variant", "dtype", "key", "allow_nonfinite"]
    refuse_ignored(arguments, reading, f"is of a file, and {name} is none; leave it out")
    try:
        variant_sizes(name)
    except ValueError as error:
        raise CheckpointError(f"{name}: no such file, and {error}") from None
    classes = 1000 if arguments.num_classes is None else arguments.num_classes
    try:
        return MixerConfig.named(name, num_classes=classes, image_size=arguments.image_size or 224)
    except ValueError as error:
        raise CheckpointError(f"{name}: {error}") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mixer_jax",
        description="MLP-Mixer in JAX, mirrored in PyTorch.",
        epilog="example: python -m mixer_jax summary B/16",
    )
    parser.add_argument("--version", action="version", version=f"mixer-jax {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser("summary", help="parameters and FLOPs of a variant or a file, by module")
    command.add_argument("source", metavar="NAME|FILE", help="B/16 and the like, or a checkpoint")
    command.add_argument(
        "--num-classes", type=whole_number(0), metavar="N", help="of a variant; a file has its own (default: 1000)"
    )
    command.add_argument("--json", action="store_true", help="one line of JSON")
    add_reading_options(command)
    command.set_defaults(run=summary, usage=command.error)

    command = commands.add_parser("demo", help="train on digits, convert, compare; or the latter two with a released file")
    command.add_argument("weights", nargs="?", type=Path, metavar="Mixer-B_16.npz", help="start from this file")
    command.add_argument("--folder", type=Path, help="where files go (default: demo-output)")
    command.add_argument("--validate", action="store_true", help="judge the recipe on a part of the training digits")
    command.set_defaults(run=demo, usage=command.error)

    command = commands.add_parser(
        "predict",
        help="classes of photographs, or their features",
        epilog="example: python -m mixer_jax predict Mixer-B_16.npz cat.jpg holiday/ --top 3",
    )
    _add_image_options(command)
    command.add_argument("images", nargs="+", metavar="IMAGE", help="an image, a folder, or - for a list on standard input")
    command.add_argument("--top", type=whole_number(1), metavar="K", help="so many classes an image (default: 5)")
    command.add_argument("--json", action="store_true", help="one line of JSON an image")
    command.add_argument(
        "--features", type=Path, metavar="OUT.npy", help="write what the head sees: a row an image, NaN for an unreadable one"
    )
    command.add_argument("--against", choices=PREPROCESSING, metavar="NAME", help="another preprocessing to compare with")
    command.add_argument("--ignore-exif", action="store_true", help="do not turn images upright")
    command.add_argument("--force", action="store_true", help="replace OUT.npy")
    command.set_defaults(run=predict, usage=command.error)

    command = commands.add_parser(
        "evaluate",
        help="accuracy on a folder of class folders",
        epilog="example: python -m mixer_jax evaluate Mixer-B_16.npz imagenet/val",
    )
    _add_image_options(command)
    command.add_argument("folder", metavar="FOLDER", help="has a folder for each class: named by label, by synset, or sorted")
    command.add_argument("--json", action="store_true", help="one line of JSON with all figures")
    command.add_argument("--confusion", type=Path, metavar="OUT.png", help="draw which class is taken for which")
    command.add_argument("--upright", action="store_true", help="turn images as EXIF says; published evaluations do not")
    command.add_argument("--force", action="store_true", help="replace OUT.png")
    command.set_defaults(run=evaluate, usage=command.error)

    command = commands.add_parser(
        "parity",
        help="whether two implementations compute the same, where they part, and why",
        description="SIDE is NAME[:DEVICE[:DTYPE[:PRECISION]]], as in torch:gpu:bfloat16:default. NAME is flax, torch, timm or "
        "referee; DEVICE cpu, gpu or tpu; PRECISION, that of products, highest, high or default. Exit code: 0 yes, 1 no.",
        epilog="example: python -m mixer_jax parity Mixer-B_16.npz --a flax:gpu --b torch:cpu --html parity.html",
    )
    command.add_argument("source", metavar="FILE", help="a checkpoint")
    command.add_argument("other", nargs="?", metavar="FILE_B", help="the second side's, if it is another")
    command.add_argument("--a", type=_side, metavar="SIDE", help="the first side (default: flax)")
    command.add_argument("--b", type=_side, metavar="SIDE", help="the second side (default: torch)")
    command.add_argument("--images", nargs="+", metavar="PATH", help="images or folders of them (default: noise)")
    command.add_argument("--preprocess", choices=PREPROCESSING, metavar="NAME", help="of images (default: what the file says)")
    command.add_argument("--count", type=whole_number(1), metavar="N", help="images of noise (default: 2)")
    command.add_argument("--seed", type=whole_number(0), default=0, help="of noise and of the budget's draws (default: 0)")
    command.add_argument("--draws", type=_draws, default=8, metavar="N", help="for the budget, 8 (default) or more")
    command.add_argument("--explain", action="store_true", help="how much of the gap each choice makes, and what is left")
    command.add_argument("--exact", action="store_true", help="in float64: are the logits the same float32 numbers")
    command.add_argument("--predict", action="store_true", help="what GPUs and TPUs are expected to give")
    command.add_argument("--self-test", action="store_true", help="identities of FILE on the first side alone")
    command.add_argument("--json", action="store_true", help="one line of JSON")
    command.add_argument("--html", type=Path, metavar="OUT.html", help="write the report as one page")
    command.add_argument("--force", action="store_true", help="replace OUT.html")
    add_reading_options(command)
    command.set_defaults(run=parity, usage=command.error)

    command = commands.add_parser(
        "draw",
        help="a picture of a file's weights, as in the paper",
        epilog="example: python -m mixer_jax draw Mixer-B_16.npz tokens.png --only 0,1,5",
    )
    command.add_argument("source", metavar="FILE", help="a checkpoint")
    command.add_argument("picture", type=Path, metavar="OUT.png", help="or .pdf or .svg")
    command.add_argument(
        "--what",
        choices=("tokens", "stem", "norms"),
        default="tokens",
        help="token-mixing units beside their closest inverses, units of the stem, or norms by block (default: tokens)",
    )
    command.add_argument(
        "--only", type=_numbers, metavar="0,1,5", help="these blocks (default: the first three; all for the norms)"
    )
    command.add_argument("--units", type=whole_number(1), metavar="N", help="the first so many units as drawn (default: all)")
    command.add_argument("--force", action="store_true", help="replace OUT.png")
    add_reading_options(command)
    command.set_defaults(run=draw, usage=command.error)
    return parser


def _add_image_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", metavar="FILE", help="a checkpoint")
    command.add_argument(
        "--preprocess", choices=PREPROCESSING, metavar="NAME", help=f"{', '.join(PREPROCESSING)} (default: what the file says)"
    )
    command.add_argument("--labels", type=Path, metavar="FILE", help="names of the classes, one a line")
    command.add_argument(
        "--batch", type=whole_number(1), metavar="N", help="images computed at once (default: 8 on a CPU, else 64)"
    )
    command.add_argument("--threads", type=whole_number(1), metavar="N", help="that decode images (default: one a core)")
    command.add_argument("--side", choices=("flax", "twin"), default="flax", help="the model that computes (default: flax)")
    add_reading_options(command)


def _numbers(text: str) -> list[int]:
    if not all(part.isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of blocks: 0,1,5")
    return [int(part) for part in text.split(",")]


def _draws(text: str) -> int:
    draws = whole_number(1)(text)
    if draws < 8:
        raise argparse.ArgumentTypeError("fewer than 8 draws say too little")
    return draws


def _side(text: str) -> "Side":
    from .sides import Side

    try:
        return Side.parsed(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def entry() -> None:
    sys.exit(main())


if __name__ == "__main__":
    entry()
