"""Peak memory of each process that loads a checkpoint with its weights split over all of them: `python benchmarks/loading.py`.

Real processes over loopback, each with one CPU device, read one synthetic .npz of the published size. Memory is what is not
mapped from files, sampled every millisecond, above what the process had before. Figures go to benchmarks/results/loading.json.
"""

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from devices import synthetic
from measure import HERE, ROOT, machine, show
from worker import versions

from convert import MixerConfig, write

PROCESSES = 1, 2, 4


def anonymous() -> float:
    """MiB in memory that are not mapped from files."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024  # type: ignore[index]


def load(file: str, count: int, index: int, address: str) -> None:
    """As one of the processes: print MiB held and the peak while loading."""
    from mixer_jax.sharding.joining import Processes

    def command() -> None:
        import jax

        import mixer_jax
        from convert import read
        from mixer_jax.sharding.placement import Placement, mesh_of

        jax.block_until_ready(jax.numpy.zeros(8) + 1)
        placement = Placement.checked(mesh_of(), read(file).config, split_weights=True)
        before, highest, done = anonymous(), [0.0], threading.Event()

        def watch() -> None:
            while not done.wait(0.001):
                highest[0] = max(highest[0], anonymous())

        watcher = threading.Thread(target=watch)
        watcher.start()
        model = mixer_jax.load(file, sharding=placement)
        done.set()
        watcher.join()
        figures = {"held_mib": anonymous() - before, "peak_mib": highest[0] - before, "parameters": model.config.num_parameters}
        print(json.dumps(figures), file=sys.stderr)

    sys.exit(Processes(address, count, index).run(command))


def measured(file: Path, count: int) -> dict[str, Any]:
    """The largest figures of so many processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    commands = [[sys.executable, __file__, "--load", file, str(count), str(index), address] for index in range(count)]
    children = [subprocess.Popen(each, env=environment, stderr=subprocess.PIPE, text=True) for each in commands]
    texts = [child.communicate()[1] for child in children]
    if any(child.returncode for child in children):
        raise RuntimeError("\n".join(texts))
    figures = [json.loads(text.splitlines()[-1]) for text in texts]
    return {"processes": count} | {name: round(max(each[name] for each in figures)) for name in ("held_mib", "peak_mib")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="S/32: whether it works")
    parser.add_argument("--load", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of loading.json")
    arguments = parser.parse_args()
    if arguments.load:
        file, count, index, address = arguments.load
        return load(file, int(count), int(index), address)
    variant = "S/32" if arguments.quick else "L/16"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "weights.npz")
        write(file, synthetic(MixerConfig.named(variant)), layout="google")
        rows = [measured(file, count) for count in PROCESSES]
        size = round(file.stat().st_size / 2**20)
    show(rows, variant)
    figures = {"variant": variant, "file_mib": size, "rows": rows, "machine": machine(), "versions": versions()}
    (arguments.results / "loading.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
