"""A seeded campaign of damage to a file: every kind of mutation, counted by what reading makes of it.

`python mutations.py FOLDER FORMAT COUNT` is for Orbax, whose threads complain on their own of what they were given.
"""

import collections
import json
import random
import sys
import traceback
from pathlib import Path

import numpy as np
from conftest import random_weights

import convert
from convert import Checkpoint, CheckpointError, MixerConfig
from convert.arrays import same_bytes
from convert.checkpoint import Metadata

CONFIG = MixerConfig(  # small, with headers and directories of more than 4 KiB
    patch_size=(2, 3),
    image_size=(8, 15),
    num_blocks=10,
    hidden_dim=7,
    tokens_mlp_dim=11,
    channels_mlp_dim=13,
    num_classes=5,
)


def original() -> Checkpoint:
    """With an epsilon that no layout has, so that losing it would show."""
    weights = Checkpoint.from_arrays(random_weights(CONFIG))
    return weights.with_metadata(layer_norm_epsilon=3e-5, gelu="exact", labels=("cat", "dog", "ant", "cow", "emu"))


def by_convert(path: Path, layout: str) -> Checkpoint:
    convert.write(path, original(), layout=layout)
    return original().to(layout)


def by_numpy(path: Path, layout: str) -> Checkpoint:
    np.savez_compressed(path, **random_weights(CONFIG))
    return Checkpoint.from_arrays(random_weights(CONFIG))


def by_safetensors(path: Path, layout: str) -> Checkpoint:
    from safetensors.numpy import save_file

    weights = Checkpoint.from_arrays(random_weights(CONFIG)).to(layout)
    save_file({name: np.ascontiguousarray(array) for name, array in weights.arrays.items()}, path)  # it forgets strides
    return Checkpoint.from_arrays(weights.arrays)


FORMATS = {  # writer, ending, layout
    "npz": (by_convert, ".npz", "google"),
    "npz deflated by NumPy": (by_numpy, ".npz", "google"),
    "safetensors": (by_convert, ".safetensors", "timm"),
    "safetensors of the library": (by_safetensors, ".safetensors", "timm"),
    "pt": (by_convert, ".pt", "timm"),
    "orbax": (by_convert, "", "flax"),
}


def flip(data: bytearray, at: int, length: int, chance: random.Random) -> None:
    data[at] ^= 1 << chance.randrange(8)


def cut(data: bytearray, at: int, length: int, chance: random.Random) -> None:
    del data[at:]


def insert(data: bytearray, at: int, length: int, chance: random.Random) -> None:
    data[at:at] = chance.randbytes(length)


def delete(data: bytearray, at: int, length: int, chance: random.Random) -> None:
    del data[at : at + length]


def swap(data: bytearray, at: int, length: int, chance: random.Random) -> None:
    """Two stretches of one length, of the same part of the file as often as not."""
    other = place(data, chance) if chance.random() < 0.5 else at + length * chance.randint(1, 20)
    a, b = sorted((at, other))
    length = min(length, b - a, len(data) - b)
    data[a : a + length], data[b : b + length] = data[b : b + length], data[a : a + length]


def zero(data: bytearray, at: int, length: int, chance: random.Random) -> None:
    data[at : at + length] = bytes(len(data[at : at + length]))


def double(data: bytearray, at: int, length: int, chance: random.Random) -> None:
    data[at:at] = data[at : at + length]


MUTATIONS = (flip, flip, flip, cut, insert, delete, swap, zero, double)
OUTCOMES = ("refused", "harmless", "wrong", "traceback")


def place(data: bytearray, chance: random.Random) -> int:
    """Anywhere, or near the start or the end: there are headers and directories."""
    kind, near = chance.randrange(3), min(len(data), 16_384)
    return {0: chance.randrange(len(data)), 1: chance.randrange(near), 2: len(data) - 1 - chance.randrange(near)}[kind]


def mutated(whole: bytes, chance: random.Random) -> bytes:
    data, mutate = bytearray(whole), chance.choice(MUTATIONS)
    mutate(data, place(data, chance), chance.choice((1, 1, 2, 4, 8, 17, 64, 300)), chance)
    return bytes(data)


def outcome(path: Path, wanted: dict[str, np.ndarray], metadata: Metadata) -> str:
    try:
        read = convert.read(path)
        arrays = read.as_numpy()
    except CheckpointError as error:
        return "refused" if str(error).startswith(str(path)) else "traceback"
    except Exception:
        traceback.print_exc()
        return "traceback"
    same = arrays.keys() == wanted.keys() and read.metadata == metadata
    return "harmless" if same and all(same_bytes(array, wanted[name]) for name, array in arrays.items()) else "wrong"


def campaign(folder: Path, format: str, count: int) -> dict[str, int]:
    """How many of so many mutations of a file came out how."""
    write, ending, layout = FORMATS[format]
    path, chance = folder / f"w{ending}", random.Random(format)
    checkpoint = write(path, layout)
    wanted = checkpoint.as_numpy(), checkpoint.metadata
    assert outcome(path, *wanted) == "harmless"
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.stat().st_size) if path.is_dir() else [path]
    counts = collections.Counter(dict.fromkeys(OUTCOMES, 0))
    while sum(counts.values()) < count:
        file = chance.choice(files)
        whole = file.read_bytes()
        data = mutated(whole, chance)
        if data == whole:
            continue
        file.write_bytes(data)
        counts[outcome(path, *wanted)] += 1
        file.write_bytes(whole)
    assert outcome(path, *wanted) == "harmless"
    return counts


if __name__ == "__main__":
    print(json.dumps(campaign(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))))
