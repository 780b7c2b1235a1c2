"""A new process, from a weight file to logits: `python first_logits.py NAME WEIGHTS IMAGES CONFIG RESULTS`.

`mixer_jax` is what the library offers; `official` what Google's code does: np.load, a nested dictionary, Linen, jit. `load`
and `numpy` only load, the latter every array with NumPy; `imports` only imports what `mixer_jax` does. Beside the logits it
writes JSON: the seconds after the imports (`mixer_jax` imports as it goes, as the library does), this program's peak memory,
and what JAX counted of the persistent compilation cache where there is one.
"""

import collections
import json
import os
import sys
import time
from pathlib import Path

import numpy as np


def with_numpy(weights: str) -> dict[str, np.ndarray]:
    with np.load(weights, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


if __name__ == "__main__":
    name, weights, images, sizes, results = sys.argv[1:]
    import mixer_jax  # which imports nothing yet

    if name == "official":
        import jax
        from flax.traverse_util import unflatten_dict
        from linen_mixer import MlpMixer

        from convert import MixerConfig
    if name in ("load", "imports"):
        import jax
        from flax import nnx

        import mixer_jax.model
        import mixer_jax.pretrained
    counts: collections.Counter[str] = collections.Counter()
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        import jax

        jax.monitoring.register_event_listener(lambda event, **_: counts.update([event.rpartition("/")[2]]))
    logits = np.empty(0)
    started = time.perf_counter()
    if name == "mixer_jax":
        logits = np.asarray(mixer_jax.compiled(mixer_jax.load(weights))(np.load(images)))
    elif name == "official":
        model, tree = MlpMixer(MixerConfig(**json.loads(sizes))), unflatten_dict(with_numpy(weights), sep="/")
        logits = np.asarray(jax.jit(model.apply)({"params": tree}, np.load(images)))
    elif name == "load":
        jax.block_until_ready(nnx.state(mixer_jax.load(weights)))
    elif name == "numpy":
        arrays = with_numpy(weights)
    figures = {"seconds": time.perf_counter() - started, **{key: counts[key] for key in ("cache_hits", "cache_misses")}}
    np.save(results, logits)
    if sys.platform == "linux":  # the peak that getrusage reports starts at the size of the process that started this one
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        figures["peak_mib"] = int(status["VmHWM"].split()[0]) / 1024
    Path(results).with_suffix(".json").write_text(json.dumps(figures))
