"""python -m mixer_jax: what a person does with a Mixer."""

import argparse
import io
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from convert import CheckpointError, read
from convert.cli import names_of_reading_options, reading_options, refuse_ignored, require_verb, run_guarded

from .commands.device_options import DEVICE_OPTIONS, processes_of
from .commands.parsers import command_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .commands.model_options import ModelOptions


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = command_line()
    require_verb(parser, argv, VERBS, ", ".join(VERBS))
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command == "finetune" and arguments.checkpoint is None and len(rest) == 1 and not rest[0].startswith("-"):
        arguments.checkpoint, arguments.data = arguments.data, rest.pop()  # options stood between the two
    if rest:
        arguments.usage(f"unrecognized arguments: {' '.join(rest)}")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
    processes = processes_of(vars(arguments))
    return (run_guarded if processes is None else processes.run)(lambda: VERBS[arguments.command](arguments))


def summary(arguments: argparse.Namespace) -> None:
    from .commands.summary import config_of, is_file, summarize, summary_as_dict

    source, variant = arguments.source, {}
    if is_file(source):
        refuse_ignored(arguments, ["num_classes"], f"is for a variant, and {source} is a file, which has its own")
    else:
        reading = [name for name in names_of_reading_options() if name != "image_size"]
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


def finetune(arguments: argparse.Namespace) -> int:
    from .commands.config_options import config_changes
    from .commands.finetune import run

    if (arguments.checkpoint is None) == (arguments.from_scratch is None):
        arguments.usage("give CHECKPOINT and DATA, or DATA and --from-scratch")
    names = ("from_scratch", "resume", "threads", "save_minutes", "preset", "mesh", "split_weights")
    options = {name: getattr(arguments, name) for name in names}
    what = arguments.checkpoint, arguments.data, arguments.run_folder, config_changes(vars(arguments))
    return run(*what, reading=reading_options(arguments), **options)


def pack(arguments: argparse.Namespace) -> None:
    from .commands.pack import run

    if arguments.check == (arguments.out is not None):
        arguments.usage("give DATA and OUT, or OUT and --check")
    if arguments.check:
        refuse_ignored(arguments, ["shard_images"], "is for packing, and --check packs nothing; leave it out")
    run(arguments.data, arguments.out, shard_images=arguments.shard_images, threads=arguments.threads)


def parity(arguments: argparse.Namespace) -> int:
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
    except CheckpointError:
        raise
    except ValueError as error:
        arguments.usage(str(error))
    if "flax" not in (a.name, b.name):
        refuse_ignored(arguments, DEVICE_OPTIONS, "is for flax, and neither implementation is")
    names = ("other", "images", "seed", "draws", "explain", "exact", "predict_devices", "html", "force", "mesh")
    options = {name: getattr(arguments, name) for name in names}
    report = parity(arguments.source, a=a, b=b, count=arguments.count or 1, reading=reading_options(arguments), **options)
    print(json.dumps(as_dict(report)) if arguments.json else as_text(report))
    return 0 if report.passed else 1


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


def publish(arguments: argparse.Namespace) -> None:
    from .commands.publish import run

    names = ("licence", "evaluation", "labels", "force")
    options = {name: getattr(arguments, name) for name in names}
    run(arguments.source, arguments.folder, push_to=arguments.push, reading=reading_options(arguments), **options)


def export(arguments: argparse.Namespace) -> None:
    from .commands.export import export
    from .export.program import ExportOptions

    names = ("features", "softmax", "uint8")
    options = ExportOptions(dtype=arguments.program_dtype, **{name: getattr(arguments, name) for name in names})
    reading = reading_options(arguments)
    print(export(arguments.source, arguments.out, options=options, reading=reading, force=arguments.force))


def _model_options(arguments: argparse.Namespace) -> "ModelOptions":
    from .commands.model_options import ModelOptions
    from .export.formats import is_exported

    if is_exported(arguments.source):
        reading = [name for name in names_of_reading_options() if name != "preprocess"]  # its images need one still
        refuse_ignored(arguments, [*reading, *DEVICE_OPTIONS], f"{arguments.source} is an exported program; leave it out")
        if arguments.implementation != "flax":
            arguments.usage(f"--implementation: {arguments.source} is an exported program; leave it out")
    if arguments.implementation == "torch":
        refuse_ignored(arguments, DEVICE_OPTIONS, "is for --implementation flax")
    names = ("source", "implementation", "labels", "batch_size", "threads", "mesh")
    options = {name: getattr(arguments, name) for name in names}
    return ModelOptions(reading=reading_options(arguments), use_exif=arguments.exif, **options)


VERBS = {verb.__name__: verb for verb in (summary, demo, predict, evaluate, finetune, pack, parity, draw, export, publish)}


def entry() -> None:
    sys.exit(main())


if __name__ == "__main__":
    entry()
