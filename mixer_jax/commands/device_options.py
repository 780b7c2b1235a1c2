"""The options of commands that run on many devices, and as one of several processes."""

__all__ = ["DEVICE_OPTIONS", "add_device_options", "processes_of"]

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from convert.cli import whole_number

if TYPE_CHECKING:
    from ..sharding.joining import Processes

DEVICE_OPTIONS = ("mesh", "coordinator", "processes", "process", "cluster")


def add_device_options(command: argparse.ArgumentParser, *, weights: bool = False) -> None:
    """`weights` adds the option that splits them."""
    add = command.add_argument_group("many devices and processes (docs/scaling.md)").add_argument
    add("--mesh", metavar="data=4,model=2", help="images over data, widths of MLPs over model (default: all devices on data)")
    if weights:
        add("--split-weights", action="store_true", help="split weights and the optimizer's state over data as well (FSDP)")
    add("--coordinator", metavar="HOST:PORT", help="where process 0 listens; with --processes and --process")
    add("--processes", type=whole_number(1), metavar="N", help="number of processes that run this command")
    add("--process", type=whole_number(0), metavar="I", help="which of them this is, from 0")
    cluster = "this is one of several processes, as the variables of SLURM, Open MPI or a TPU pod say"
    add("--cluster", action="store_true", help=cluster)


def processes_of(values: Mapping[str, Any]) -> "Processes | None":
    """How this process joins others, from the values of the options by name; None where it is alone."""
    coordinator, count, index = given = [values.get(name) for name in ("coordinator", "processes", "process")]
    cluster, none = values.get("cluster", False), [None] * 3
    if given == none and not cluster:
        return None
    if cluster and given != none:
        values["usage"]("--cluster finds the other processes by itself: leave out --coordinator, --processes and --process")
    if not cluster and None in given:
        values["usage"]("one of several processes needs --coordinator HOST:PORT, --processes N and --process I")
    if count is not None and index is not None and index >= count:
        values["usage"](f"--process {index} is not one of {count} processes, which are numbered from 0")
    from ..sharding.joining import Processes

    return Processes(coordinator, count, index)
