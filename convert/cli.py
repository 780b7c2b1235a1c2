"""What both command lines share: a person's mistake is one message and an exit code, and a signal cleans up."""

import argparse
import contextlib
import ctypes
import difflib
import os
import signal
import sys
import warnings
from collections.abc import Callable, Collection, Iterable
from typing import get_args

from .checkpoint import Checkpoint, read
from .config import Gelu, Size, variant_sizes
from .dtypes import WEIGHTS
from .errors import CheckpointError
from .files import CHUNK


def guarded(command: Callable[[], object]) -> int:
    """Run a command: 0, or 1 after `error: ...` on standard error, or 130 and 143 after Ctrl-C and SIGTERM.

    A fault of the program itself keeps its traceback.
    """
    _give_memory_back()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that temporary files go
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"note: {message}", file=sys.stderr)
            command()
    except BrokenPipeError:  # whoever reads our output has seen enough
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


def _give_memory_back() -> None:
    """Have glibc return every array's memory when it is freed, where it would keep what lies between living ones."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(-3, CHUNK + (1 << 13))  # M_MMAP_THRESHOLD; what is gone in a moment stays below


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


def add_reading_options(parser: argparse.ArgumentParser) -> None:
    """The options of `convert.read` that any command with a checkpoint to read takes."""
    parser.add_argument("--image-size", type=size, metavar="HxW", help="pixels, where the tokens are no square grid")
    parser.add_argument(
        "--blocks", type=whole_number(1), metavar="N", help="that this depth is meant, if no published Mixer has it"
    )
    parser.add_argument("--variant", type=variant, metavar="B/16", help="refuse any other")
    parser.add_argument("--dtype", choices=WEIGHTS, help="round to it, to nearest even; needed for float64")
    parser.add_argument("--gelu", choices=get_args(Gelu), help="GELU that the weights were trained with (default: the file's)")
    parser.add_argument(
        "--layer-norm-epsilon", type=float, metavar="E", help="LayerNorm epsilon of the weights (default: the file's)"
    )
    parser.add_argument("--key", help="which of several sets of weights in the file, such as state_dict_ema")
    parser.add_argument("--allow-nonfinite", action="store_true", help="take NaN and infinity for values")


def read_asked(arguments: argparse.Namespace) -> Checkpoint:
    """The checkpoint `arguments.source` with the options of `add_reading_options`."""
    return read(
        arguments.source,
        variant=arguments.variant,
        num_blocks=arguments.blocks,
        image_size=arguments.image_size,
        gelu=arguments.gelu,
        layer_norm_epsilon=arguments.layer_norm_epsilon,
        dtype=arguments.dtype,
        allow_nonfinite=arguments.allow_nonfinite,
        key=arguments.key,
    )


def size(text: str) -> Size:
    """ "224" or "224x448" (height first) as an argument."""
    height, _, width = text.partition("x")
    sides = (height, width or height)
    if not all(side.isdecimal() and int(side) for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: 224 or 224x448, height first")
    return int(sides[0]), int(sides[1])


def whole_number(least: int) -> Callable[[str], int]:
    """The type of an argument that is a whole number of at least `least`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least {least}")
        return int(text)

    return parse


def variant(text: str) -> str:
    try:
        variant_sizes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text
