"""The fields of FinetuneConfig as options of a command line."""

__all__ = ["add_config_options", "config_changes"]

import argparse
from collections.abc import Callable, Mapping
from typing import Any

from convert.cli import dtype, size

from ..training.config import HELP, FinetuneConfig

NONE = "none"  # the text of an option that turns something off
OPTIONAL: dict[str, Callable[[str], object]] = {
    "image_size": size,
    "dtype": dtype,
    "momentum_dtype": dtype,
    "randaugment": float,
    "ema_decay": float,
}
METAVARS: dict[Callable[[str], object], str] = {size: "HxW", dtype: "DTYPE", int: "N", str: "TEXT"}  # of others: X


def add_config_options(parser: argparse.ArgumentParser) -> dict[str, argparse._ArgumentGroup]:
    """An option for each field, in groups, which are returned by their names."""
    groups = {name: parser.add_argument_group(name) for name in HELP}
    defaults = FinetuneConfig().as_dict()
    for group, name, text in ((groups[group], *item) for group, texts in HELP.items() for item in texts.items()):
        option, kind = f"--{name.replace('_', '-')}", type(defaults[name])
        shown = f"{text} (default: {defaults[name]})" if defaults[name] is not None else text
        if kind is bool:
            group.add_argument(option, dest=f"config_{name}", action=argparse.BooleanOptionalAction, help=shown)
        else:
            parse: Callable[[str], object] = OPTIONAL.get(name, kind)
            metavar = METAVARS.get(parse, "X")
            group.add_argument(option, dest=f"config_{name}", type=_or_none(parse), metavar=metavar, help=shown)
    return groups


def config_changes(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that a command line names, for `FinetuneConfig.of`."""
    values = {name: given[f"config_{name}"] for texts in HELP.values() for name in texts}
    return {name: None if value == NONE else value for name, value in values.items() if value is not None}


def _or_none(parse: Callable[[str], object]) -> Callable[[str], object]:
    """An argument that may be "none" as well."""

    def parsed(text: str) -> object:
        return NONE if text == NONE else parse(text)

    parsed.__name__ = getattr(parse, "__name__", "value")  # which argparse shows in its message
    return parsed
