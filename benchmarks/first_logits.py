"""A new process, from a weight file to logits: `python first_logits.py SIDE WEIGHTS IMAGES RESULTS`; prints one line of JSON.

`ours` is what the library offers; `official` what Google's code does: np.load, a nested dictionary, Linen, jit. The sides
`load` and `numpy` only load, the latter every array with NumPy; `imports` only imports what `ours` does. The JSON has the
seconds after the imports (`ours` imports as it goes, as the library does), and what JAX's monitoring counted of the
persistent compilation cache where there is one.
"""

import collections
import json
import os
import sys
import time
from pathlib import Path

import numpy as np

CACHE = "/jax/compilation_cache/"
LINUX = sys.platform == "linux"
COUNTED = "JAX_COMPILATION_CACHE_DIR" in os.environ


def ours(weights: str, images: np.ndarray) -> np.ndarray:
    return np.asarray(mixer_jax.compiled(mixer_jax.load(weights))(images))


def official(weights: str, images: np.ndarray) -> np.ndarray:
    tree: dict = {}
    for name, array in numpy(weights).items():
        *folders, leaf = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = array
    blocks = sum(name.startswith("MixerBlock_") for name in tree)
    patch, width = tree["stem"]["kernel"].shape[0], tree["stem"]["kernel"].shape[-1]
    config = MixerConfig(
        image_size=images.shape[1:3],
        patch_size=(patch, patch),
        num_blocks=blocks,
        hidden_dim=width,
        tokens_mlp_dim=len(tree["MixerBlock_0"]["token_mixing"]["Dense_0"]["bias"]),
        channels_mlp_dim=len(tree["MixerBlock_0"]["channel_mixing"]["Dense_0"]["bias"]),
        num_classes=len(tree["head"]["bias"]),
    )
    return np.asarray(jax.jit(linen_mixer.MlpMixer(config).apply)({"params": tree}, images))


def load(weights: str, images: np.ndarray) -> np.ndarray:
    model = mixer_jax.load(weights)
    jax.block_until_ready(nnx.state(model))
    return np.empty(0)


def numpy(weights: str) -> dict[str, np.ndarray]:
    with np.load(weights, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


SIDES = {
    "ours": ours,
    "official": official,
    "load": load,
    "numpy": lambda weights, images: (numpy(weights), np.empty(0))[1],
    "imports": lambda weights, images: np.empty(0),
}

if __name__ == "__main__":
    side, weights, images, results = sys.argv[1:]
    import mixer_jax  # which imports nothing yet

    if side == "official":
        import jax
        import linen_mixer

        from convert import MixerConfig
    if side in ("load", "imports"):
        import jax
        from flax import nnx

        import mixer_jax.model
        import mixer_jax.pretrained
    counts: collections.Counter[str] = collections.Counter()
    if COUNTED:
        import jax

        jax.monitoring.register_event_listener(lambda event, **_: counts.update([event]))
    started = time.perf_counter()
    logits = SIDES[side](weights, np.load(images))
    seconds = time.perf_counter() - started
    np.save(results, logits)
    cache = {event.removeprefix(CACHE): count for event, count in counts.items() if event.startswith(CACHE)}
    # The peak of this program alone; what getrusage tells starts at the size of the process that started it.
    said = {"seconds": seconds, "cache": cache}
    if LINUX:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        said["peak_mib"] = int(status["VmHWM"].split()[0]) / 1024
    print(json.dumps(said))
