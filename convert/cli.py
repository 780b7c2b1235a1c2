"""What both command lines share: a person's mistake is one message and an exit code, and a signal cleans up."""

import argparse
import contextlib
import ctypes
import os
import signal
import sys
import warnings
from collections.abc import Callable

from .checkpoint import Checkpoint, read
from .config import Size, variant_sizes
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
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _give_memory_back() -> None:
    """Have glibc return every array's memory when it is freed, where it would keep what lies between living ones."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(-3, CHUNK + (1 << 13))  # M_MMAP_THRESHOLD; what is gone in a moment stays below


def add_reading_options(parser: argparse.ArgumentParser) -> None:
    """The options of `convert.read` that any command with a checkpoint to read takes."""
    parser.add_argument("--image-size", type=size, metavar="HxW", help="pixels, where the tokens are no square grid")
    parser.add_argument("--blocks", type=int, metavar="N", help="that this depth is meant, if no published Mixer has it")
    parser.add_argument("--variant", type=variant, metavar="B/16", help="refuse any other")
    parser.add_argument("--dtype", choices=WEIGHTS, help="round to it, to nearest even; needed for float64")
    parser.add_argument("--key", help="which of several sets of weights in the file, such as state_dict_ema")
    parser.add_argument("--allow-nonfinite", action="store_true", help="take NaN and infinity for values")


def read_asked(arguments: argparse.Namespace) -> Checkpoint:
    """The checkpoint `arguments.source` with the options of `add_reading_options`."""
    return read(
        arguments.source,
        variant=arguments.variant,
        num_blocks=arguments.blocks,
        image_size=arguments.image_size,
        dtype=arguments.dtype,
        allow_nonfinite=arguments.allow_nonfinite,
        key=arguments.key,
    )


def size(text: str) -> Size:
    """ "224" or "224x448" (height first) as an argument."""
    height, _, width = text.partition("x")
    if not (height.isdecimal() and (width or height).isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: 224 or 224x448, height first")
    return int(height), int(width or height)


def variant(text: str) -> str:
    try:
        variant_sizes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text
