"""A checkpoint as a program for other runtimes, written only if it computes what the NumPy model does."""

__all__ = ["Exported", "export"]

import os
from dataclasses import dataclass, replace
from pathlib import Path

from convert import CheckpointError, ReadOptions, read
from convert.atomic import atomic_files, check_writable
from convert.dtypes import weights_dtype

from ..export.formats import format_of
from ..export.program import ExportOptions, Facts
from ..parity.proof import Proof, prove
from ..parity.report import as_lines

PLAIN = ExportOptions()


@dataclass(frozen=True)
class Exported:
    """A program that has been written: its files, the weights' bytes among theirs, its facts and its proof."""

    path: Path
    num_bytes: int
    facts: Facts
    proof: Proof

    def __str__(self) -> str:
        options = self.facts.options
        what = f"{self.proof.output} in {options.dtype}" + (" from uint8 pixels" if options.uint8 else "")
        lines = as_lines(self.proof.table)
        return "\n".join([f"{self.path}: {what}, {self.num_bytes:,} bytes", *lines])


def export(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    options: ExportOptions = PLAIN,
    reading: ReadOptions = ReadOptions(),
    force: bool = False,
) -> Exported:
    """Write a checkpoint as a program by the ending of `out`: .onnx, .stablehlo or .pt2.

    The program is written under a temporary name, opened again and run at batch sizes 1, 2 and 7: outside parity's tolerance
    nothing is left. Raises CheckpointError for that and whatever does not fit, ImportError where a package is missing.
    """
    out = Path(out)
    format = format_of(out)
    check_writable(out, force=force)
    checkpoint = read(source, replace(reading, allow_float64=True))
    copies = 2 if out.suffix == ".stablehlo" else 1  # its weights are written before they are zipped
    size = int(1.05 * copies * checkpoint.num_parameters * weights_dtype(options.dtype).itemsize) + 2**20
    with atomic_files(out, size=size, force=force) as new:
        try:
            format.write(new, checkpoint, options)
            program = format.opened(new)
            proof = prove(program, checkpoint)
        except CheckpointError as error:
            raise CheckpointError(f"{str(error).replace(str(new), str(out))}; nothing was written") from None
        except OSError as error:
            fault = str(error).replace(str(new), str(out))
            raise CheckpointError(f"{out}: cannot be exported: {fault}; nothing was written") from None
        num_bytes = sum(file.stat().st_size for file in new.parent.iterdir())
    return Exported(out, num_bytes, program.facts, proof)
