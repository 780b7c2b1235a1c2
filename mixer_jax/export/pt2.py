"""A Mixer as a .pt2 file: `torch.export` with a batch of any size, run by PyTorch without this package.

`torch.export.load` unpickles some entries, evaluates texts as Python, and looks operators up by any name under `torch`. So a
file is opened here only after all that has been found to be harmless: tensors stored as bytes, operators of aten, symbols.
"""

__all__ = ["opened", "write"]

import io
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange

from convert import Checkpoint, CheckpointError
from convert.errors import first_line

from .archive import FOREIGN, Archive
from .program import ExportOptions, Facts, Program, wide

FACTS = "mixer_jax.json"
ENTRIES = re.compile(
    r"models/model\.json|data/weights/(weight_\d+|model_weights_config\.json)|data/constants/model_constants_config\.json"
    rf"|data/sample_inputs/model\.pt|extra/{re.escape(FACTS)}|archive_format|archive_version|byteorder|\.data/\w+"
)
OPERATORS = (  # those of our own programs; among others of aten are some that write files
    "_assert_tensor_metadata.default",
    "add.Tensor",
    "conv2d.default",
    "gelu.default",
    "layer_norm.default",
    "linear.default",
    "mean.dim",
    "mul.Tensor",
    "permute.default",
    "promote_types.default",
    "reshape.default",
    "softmax.int",
    "sym_size.int",
    "to.dtype",
)
PLAIN = re.compile(r"[\w.+-]*")  # no text that does anything when evaluated
TREE = re.compile(r'(?s)(?!.*"type"\s*:\s*"(?!builtins\.(tuple|list|dict)"))[\w\s.,:"\[\]{}]*')
TEXTS = {  # by key in model.json: operators that are looked up, and texts that are evaluated
    "target": re.compile("|".join(rf"torch\.ops\.aten\.{re.escape(name)}" for name in OPERATORS)),
    "expr_str": re.compile(r"\d+|s\d+|Symbol\('s\d+', positive=True, integer=True\)"),
    "guards_code": re.compile(r"(?!)"),  # nothing: it is run
    "in_spec": TREE,
    "out_spec": TREE,
}


def write(path: Path, checkpoint: Checkpoint, options: ExportOptions) -> None:
    """Write the program with its facts. Raises ImportError without PyTorch."""
    torch = _torch()
    from ..torch_pretrained import load

    facts = Facts.of(checkpoint, options, "torch")
    checkpoint = checkpoint.without_head() if options.features else checkpoint
    model = load(checkpoint, param_dtype=options.dtype, dtype=options.dtype)
    float_dtype = getattr(torch, wide(options.dtype))

    class Whole(torch.nn.Module):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            if options.uint8:
                for name, values in zip(("factor", "offset"), facts.scaling()):
                    self.register_buffer(name, torch.tensor(values, dtype=float_dtype).reshape(-1, 1, 1))

        def forward(self, images: Any) -> Any:
            if options.uint8:
                images = images.to(float_dtype) * self.factor + self.offset
            outputs = self.model(images)
            return torch.softmax(outputs, -1) if options.softmax else outputs

    shape = (2, checkpoint.config.in_channels, *checkpoint.config.image_size)  # PyTorch takes 0 and 1 for constants
    images = torch.zeros(shape, dtype=getattr(torch, facts.input_dtype))
    batch = {"images": {0: torch.export.Dim("batch", min=1)}}
    with torch.no_grad():
        program = torch.export.export(Whole().eval(), (images,), dynamic_shapes=batch)
    with _KeepsFirstError(io.FileIO(path, "w")) as file:
        torch.export.save(program, file, extra_files={FACTS: facts.to_json()})
    if file.error is not None:
        raise file.error


class _KeepsFirstError(io.BufferedWriter):
    """A file that keeps its first error: of one that is raised, as on a full disk, PyTorch's zip writer ends the process."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            if self.error is None:
                super().write(data)
        except OSError as error:
            self.error = error
        return len(data)


def facts_of(path: str | os.PathLike[str]) -> Facts:
    """The facts of a file. Raises CheckpointError for any that `write` did not write, or that could run code when opened."""
    try:
        archive = Archive(path)
        archive.verify()  # PyTorch does not
        entries = {name.partition("/")[2]: name for name in archive.sizes}
        facts = archive.read(entries[f"extra/{FACTS}"])
        unsafe = [name for name in entries if not ENTRIES.fullmatch(name)] + list(_unsafe(archive, entries))
        if len(entries) != len(archive.sizes):
            unsafe.append("more than one program")
    except ImportError:
        raise
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {FOREIGN}: {error}") from None
    except Exception as error:  # JSON can be anything
        raise CheckpointError(f"{path}: {FOREIGN}: {type(error).__name__}: {error}") from None
    if unsafe:
        raise CheckpointError(f"{path}: is not opened, since torch.export.load could run code from it: {unsafe[0]}")
    return Facts.from_json(facts, str(path))


def _unsafe(archive: Archive, entries: dict[str, str]) -> Iterator[str]:
    """What in a file could run code, or take any memory, when PyTorch opens it. `entries` are the names without the folder."""
    torch = _torch()
    for name, full in entries.items():
        if name.endswith("_config.json"):
            for weight, entry in json.loads(archive.read(full))["config"].items():
                if entry["use_pickle"] is not False:
                    yield f"{weight} is pickled"
                elements = math.prod(size["as_int"] for size in entry["tensor_meta"]["sizes"])
                if elements > archive.sizes[entries[f"{Path(name).parent}/{entry['path_name']}"]]:
                    yield f"{weight} has more elements than bytes"
                if "constants" in name:
                    yield f"{name} has constants"
        elif name.endswith("model.pt"):
            try:
                torch.load(io.BytesIO(archive.read(full)), weights_only=True)
            except Exception:  # else PyTorch loads it again without this limit
                yield f"{name} is not of plain tensors"
        elif name.endswith("model.json"):
            yield from _unsafe_texts(json.loads(archive.read(full)))


def _unsafe_texts(value: Any, key: str = "") -> Iterator[str]:
    """Texts that are not as our own programs have them. `metadata` of operators is shown to people and not evaluated."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _unsafe_texts(name)
            yield from () if name == "metadata" else _unsafe_texts(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _unsafe_texts(inner, key)
    elif isinstance(value, str) and not TEXTS.get(key, PLAIN).fullmatch(value):
        yield f"{key} {value[:80]!r}"


def opened(path: str | os.PathLike[str]) -> Program:
    """A program that `write` wrote, on the CPU. Raises CheckpointError for any other file, ImportError without PyTorch."""
    torch = _torch()
    facts = facts_of(path)
    try:
        model = torch.export.load(path).module()
    except Exception as error:  # of other versions, nearly anything
        writer, reader = facts.versions.get("torch"), torch.__version__
        message = f"torch {writer} wrote it, and torch {reader} does not open it: {first_line(error)}"
        raise CheckpointError(f"{path}: {message}") from None

    def run(images: np.ndarray) -> np.ndarray:
        pixels = np.ascontiguousarray(rearrange(images, "b h w c -> b c h w"), facts.input_dtype)
        with torch.inference_mode():
            return model(torch.from_numpy(pixels)).numpy()

    return Program(str(path), facts, run)


def _torch() -> Any:
    try:
        import torch
    except ModuleNotFoundError:
        raise ImportError(".pt2 needs PyTorch: pip install 'mixer-jax[torch]'") from None
    return torch
