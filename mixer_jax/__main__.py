"""python -m mixer_jax: what a person does with a Mixer."""

import argparse
import json
import sys
from pathlib import Path

from convert import CheckpointError, MixerConfig
from convert.cli import add_reading_options, guarded, read_asked


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
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
    from .demo import run

    run(arguments.weights, arguments.folder, validate=arguments.validate)


def _config(arguments: argparse.Namespace) -> MixerConfig:
    name = arguments.source
    if Path(name).exists() or Path(name).suffix:
        return read_asked(arguments).config
    try:
        return MixerConfig.named(name, num_classes=arguments.num_classes, image_size=arguments.image_size or 224)
    except ValueError as error:
        raise CheckpointError(f"{name}: no such file, and {error}") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mixer_jax",
        description="MLP-Mixer in JAX, mirrored in PyTorch.",
        epilog="example: python -m mixer_jax summary B/16",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser("summary", help="parameters and FLOPs of a variant or a file, by module")
    command.add_argument("source", metavar="NAME|FILE", help="B/16 and the like, or a checkpoint")
    command.add_argument("--num-classes", type=int, default=1000, help="of a variant; a file has its own (default: 1000)")
    command.add_argument("--json", action="store_true", help="one line of JSON")
    add_reading_options(command)
    command.set_defaults(run=summary)

    command = commands.add_parser("demo", help="train on digits, convert, compare; or the latter two with a released file")
    command.add_argument("weights", nargs="?", type=Path, metavar="Mixer-B_16.npz", help="start from this file")
    command.add_argument("--folder", type=Path, default=Path("demo-output"), help="where files go (default: demo-output)")
    command.add_argument("--validate", action="store_true", help="judge the recipe on a part of the training digits")
    command.set_defaults(run=demo)
    return parser


def entry() -> None:
    sys.exit(main())


if __name__ == "__main__":
    entry()
