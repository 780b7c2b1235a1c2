"""What both command lines share: a person's mistake is one message and an exit code, and a signal cleans up."""

import argparse
import difflib
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, get_args

from .config import Gelu, Size, variant_sizes
from .dtypes import WEIGHTS, weights_dtype
from .errors import CheckpointError
from .io import ReadOptions
from .preprocessing import PREPROCESSING_NAMES, canonical


def run_guarded(command: Callable[[], int | None]) -> int:
    """Run a command: its own exit code, or 1 after `error: ...` on standard error, or 130 and 143 after Ctrl-C and SIGTERM.

    A fault of the program itself keeps its traceback.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that temporary files go
    logging.getLogger("asyncio").disabled = True  # Orbax's, which says at the very end what an error has said
    if not isinstance(sys.unraisablehook, _WithoutClosedLoops):
        sys.unraisablehook = _WithoutClosedLoops(sys.unraisablehook)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"note: {message}", file=sys.stderr)
            return command() or 0
    except BrokenPipeError:  # the reader of our output, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (CheckpointError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except MemoryError as error:
        print(f"error: not enough memory: {str(error) or 'none is left'}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


@dataclass(frozen=True)
class _WithoutClosedLoops:
    """A `sys.unraisablehook` without what threads of TensorStore say of results that nobody waits for after a failure."""

    before: Callable[[Any], object]

    def __call__(self, unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            self.before(unraisable)


def require_verb(parser: argparse.ArgumentParser, argv: list[str], verbs: Collection[str], known: str) -> None:
    """End with a usage error, naming the nearest verb and `known` ones, where the first argument is none of them."""
    if argv and not argv[0].startswith("-") and argv[0] not in verbs:
        near = [f"did you mean {verb}?" for verb in difflib.get_close_matches(argv[0], verbs, n=1)]
        parser.error(" ".join([f"no command {argv[0]!r}:", *near, f"the commands are {known}"]))


def refuse_ignored(arguments: argparse.Namespace, options: Iterable[str], why: str) -> None:
    """End with a usage error if one of these options was given: the command would ignore it.

    What was not given is None or False: these options have no other default.
    """
    values = {name: getattr(arguments, name) for name in options}
    given = [f"--{name.replace('_', '-')}" for name, value in values.items() if value is not None and value is not False]
    if given:
        arguments.usage(f"{', '.join(given)}: {why}")


def add_reading_options(parser: argparse.ArgumentParser | argparse._ArgumentGroup, *, without: Collection[str] = ()) -> None:
    """The options of ReadOptions, for every command that reads a checkpoint; `without` those that mean something else there."""
    parser.set_defaults(**dict.fromkeys(without))
    if "image_size" not in without:
        pixels = "input size in pixels, needed when the patch grid is not square"
        parser.add_argument("--image-size", type=size, metavar="HxW", help=pixels)
    parser.add_argument(
        "--depth", type=whole_number(1), metavar="N", help="number of blocks, for a depth no published Mixer has"
    )
    parser.add_argument("--variant", type=variant, metavar="B/16", help="fail unless the checkpoint is this variant")
    if "dtype" not in without:
        cast = f"cast weights to {', '.join(WEIGHTS)}; required for float64 files"
        parser.add_argument("--dtype", type=dtype, metavar="DTYPE", help=cast)
    parser.add_argument("--gelu", choices=get_args(Gelu), help="GELU that the weights were trained with (default: the file's)")
    parser.add_argument(
        "--layer-norm-epsilon", type=float, metavar="E", help="LayerNorm epsilon of the weights (default: the file's)"
    )
    names = f"{', '.join(PREPROCESSING_NAMES)} or a description (docs/converting.md) of what images go through"
    parser.add_argument("--preprocess", type=preprocessing, metavar="NAME", help=f"{names} (default: the file's)")
    parser.add_argument("--key", help="which of several sets of weights in the file, such as state_dict_ema")
    parser.add_argument(
        "--step", type=whole_number(0), metavar="N", help="which of several checkpoints in a folder (default: the newest)"
    )
    parser.add_argument("--allow-nonfinite", action="store_true", help="accept NaN and infinity in the weights")


def names_of_reading_options() -> list[str]:
    """Of `add_reading_options`, as argparse names them."""
    parser = argparse.ArgumentParser()
    add_reading_options(parser)
    return list(vars(parser.parse_args([])))


def reading_options(arguments: argparse.Namespace) -> ReadOptions:
    """The values of `add_reading_options`."""
    return ReadOptions(
        variant=arguments.variant,
        num_blocks=arguments.depth,
        image_size=arguments.image_size,
        gelu=arguments.gelu,
        layer_norm_epsilon=arguments.layer_norm_epsilon,
        preprocessing=arguments.preprocess,
        dtype=arguments.dtype,
        allow_nonfinite=arguments.allow_nonfinite,
        key=arguments.key,
        step=arguments.step,
    )


def size(text: str) -> Size:
    """ "224" or "224x448" (height first) as an argument."""
    height, _, width = text.partition("x")
    sides = (height, width or height)
    if not all(side.isdecimal() and int(side) for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: give 224 or 224x448, height first")
    return int(sides[0]), int(sides[1])


def whole_number(least: int) -> Callable[[str], int]:
    """The type of an argument that is a whole number of at least `least`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return parse


def _checked(check: Callable[[str], object], text: str) -> str:
    """An argument that `check` takes, or the usage error that it explains."""
    try:
        check(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def dtype(text: str) -> str:
    """The name of a dtype for weights; bf16 is bfloat16."""
    return weights_dtype(_checked(weights_dtype, text)).name


def preprocessing(text: str) -> str:
    return canonical(_checked(canonical, text))


def variant(text: str) -> str:
    return _checked(variant_sizes, text)
