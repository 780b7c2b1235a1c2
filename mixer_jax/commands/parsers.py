"""The command line of `python -m mixer_jax`: the verbs and their options."""

__all__ = ["command_line"]

import argparse
from pathlib import Path

from convert import __version__
from convert.cli import add_reading_options, dtype, preprocessing, whole_number
from convert.dtypes import WEIGHTS

from .device_options import add_device_options

Subparsers = argparse._SubParsersAction  # which argparse gives no public name


def command_line() -> argparse.ArgumentParser:
    """Every verb with its options; `usage` among the values ends with a usage error."""
    parser = argparse.ArgumentParser(
        prog="python -m mixer_jax",
        description="MLP-Mixer in JAX, mirrored in PyTorch.",
        epilog="example: python -m mixer_jax summary B/16",
    )
    parser.add_argument("--version", action="version", version=f"mixer-jax {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    verbs = _add_summary, _add_demo, _add_predict, _add_evaluate, _add_finetune, _add_pack, _add_parity, _add_draw
    for add in (*verbs, _add_export, _add_publish):
        add(commands)
    return parser


def _command(commands: Subparsers, name: str, help: str, *, example: str | None = None) -> argparse.ArgumentParser:
    epilog = f"example: python -m mixer_jax {example}" if example else None
    command = commands.add_parser(name, help=help, epilog=epilog)
    command.set_defaults(usage=command.error)
    return command


def _add_summary(commands: Subparsers) -> None:
    command = _command(commands, "summary", "parameters and FLOPs of a variant or a file, by module")
    command.add_argument("source", metavar="NAME|FILE", help="a variant such as B/16, or a checkpoint")
    command.add_argument("--num-classes", type=whole_number(0), metavar="N", help="classes of a variant (default: 1000)")
    command.add_argument("--json", action="store_true", help="print one line of JSON")
    add_reading_options(command)


def _add_demo(commands: Subparsers) -> None:
    command = _command(commands, "demo", "train on digits, convert, compare Flax with PyTorch; or start from a released file")
    command.add_argument("weights", nargs="?", type=Path, metavar="Mixer-B_16.npz", help="convert and compare this file")
    command.add_argument(
        "--folder", type=Path, default="demo-output", help="write files here, replacing older ones (default: demo-output)"
    )


def _add_predict(commands: Subparsers) -> None:
    example = "predict Mixer-B_16.npz cat.jpg holiday/ --top 3"
    command = _command(commands, "predict", "classes of photographs, or their features", example=example)
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
    command = _command(commands, "evaluate", "accuracy on a folder with a folder for each class", example=example)
    _add_image_options(command, exif=False)
    command.add_argument("folder", metavar="FOLDER", help="has a folder for each class: named by label or synset, or sorted")
    command.add_argument("--json", action="store_true", help="print all figures as one line of JSON")
    real = "count ReaL labels as well (Beyer et al. 2020); FOLDER has ImageNet's validation images under their own names"
    command.add_argument("--real", type=Path, metavar="real.json", help=real)
    command.add_argument("--confusion", type=Path, metavar="OUT.png", help="draw which class is taken for which")
    command.add_argument("--force", action="store_true", help="replace OUT.png")


def _add_finetune(commands: Subparsers) -> None:
    from ..training.config import PRESETS
    from .config_options import add_config_options

    example = "finetune Mixer-B_16.npz pets/ --run pets-run --preset small"
    command = _command(commands, "finetune", "train on one's own images; the same command again goes on", example=example)
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
    add_device_options(command, weights=True)
    reading = command.add_argument_group("reading the checkpoint")
    add_reading_options(reading, without=("image_size", "dtype"))  # these are the run's


def _add_pack(commands: Subparsers) -> None:
    command = _command(
        commands, "pack", "a million labelled images in shards; the same command again goes on", example="pack imagenet packed"
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
        "highest, high or default. Or it is an exported program: onnx:FILE, openvino:FILE, stablehlo:FILE, pt2:FILE. "
        "Exit code: 0 yes, 1 no or an error.",
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
    add_device_options(command)
    add_reading_options(command)
    command.set_defaults(usage=command.error)


def _add_draw(commands: Subparsers) -> None:
    example = "draw Mixer-B_16.npz tokens.png --blocks 0-3,11"
    command = _command(commands, "draw", "a picture of a file's weights, as in the paper", example=example)
    command.add_argument("source", metavar="FILE", help="a checkpoint")
    command.add_argument("picture", type=Path, metavar="OUT.png", help="the picture to write, or .pdf or .svg")
    names, what = ("tokens", "stem", "norms"), "token-mixing units, units of the stem, or the RMS of every array by block"
    command.add_argument("--what", choices=names, default="tokens", help=f"{what} (default: tokens)")
    command.add_argument("--blocks", type=_blocks, metavar="0,1-3", help="blocks to draw (default: the first 3; norms: all)")
    command.add_argument("--units", type=whole_number(1), metavar="N", help="draw only the first N units (default: all)")
    command.add_argument("--force", action="store_true", help="replace OUT.png")
    add_reading_options(command)


def _add_publish(commands: Subparsers) -> None:
    example = "publish pets-run/best pets --preprocess timm_bicubic --licence apache-2.0 --push me/pets"
    command = _command(commands, "publish", "a folder that timm, transformers and load open, for the hub", example=example)
    command.add_argument("source", metavar="FILE", help="a checkpoint; best of a run brings the run's results into the card")
    command.add_argument("folder", metavar="FOLDER", help="folder to write: model.safetensors, config.json and README.md")
    command.add_argument("--licence", "--license", metavar="ID", help="the hub's identifier of the licence, such as apache-2.0")
    command.add_argument("--evaluation", metavar="evaluate.json", help="put what evaluate --json printed into the card")
    command.add_argument("--labels", metavar="FILE", help="names of the classes, one a line")
    command.add_argument("--push", metavar="owner/name", help="upload to this repository; nothing is uploaded without")
    command.add_argument("--force", action="store_true", help="replace an older FOLDER, and with --push the repository's files")
    add_reading_options(command)


def _add_export(commands: Subparsers) -> None:
    example = "export Mixer-B_16.npz mixer.onnx --uint8"
    command = _command(commands, "export", "a program for other runtimes, written only if parity holds", example=example)
    command.add_argument("source", metavar="FILE", help="a checkpoint")
    command.add_argument("out", type=Path, metavar="OUT", help="the program: .onnx, .stablehlo (JAX) or .pt2 (PyTorch)")
    output = command.add_mutually_exclusive_group()
    output.add_argument("--features", action="store_true", help="give the head's input instead of logits")
    output.add_argument("--softmax", action="store_true", help="give softmax scores instead of logits")
    pixels = "take uint8 pixels from 0 to 255, resized and cropped, and scale them inside the program"
    command.add_argument("--uint8", action="store_true", help=pixels)
    usual = f"dtype of weights and computation: {', '.join(WEIGHTS)} (default: float32)"
    command.add_argument("--dtype", dest="program_dtype", type=dtype, default="float32", metavar="DTYPE", help=usual)
    command.add_argument("--force", action="store_true", help="replace OUT")
    add_reading_options(command, without=("dtype",))


def _add_image_options(command: argparse.ArgumentParser, *, exif: bool) -> None:
    command.add_argument("source", metavar="FILE", help="a checkpoint, or a program that export wrote")
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
    add_device_options(command)
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
