"""Damage to files, by kinds, and counts of what reading makes of it.

`python mutations.py FOLDER FORMAT KIND AMOUNT` is for folders, where threads of TensorStore print complaints of their own.
"""

import collections
import json
import random
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from conftest import TINY, random_weights
from test_convert import equal, saved_by_big_vision, saved_by_others

import convert
from convert import Checkpoint, CheckpointError, MixerConfig

SMALLEST = MixerConfig.named("S/1", image_size=(1, 2), num_classes=2, in_channels=1).replace(
    num_blocks=1, hidden_dim=2, tokens_mlp_dim=1, channels_mlp_dim=1
)
LARGER = TINY.replace(num_blocks=10)  # with headers and directories of more than 4 KiB


def original(config: MixerConfig = SMALLEST) -> Checkpoint:
    """With an epsilon that no layout has, so that losing it would show."""
    labels = ("cat", "dog", "ant", "cow", "emu")[: config.num_classes]
    weights = Checkpoint.from_arrays(random_weights(config))
    return weights.with_metadata(layer_norm_epsilon=3e-5, gelu="exact", labels=labels).with_image_size(config.image_size)


def by_convert(path: Path, config: MixerConfig, layout: str) -> Checkpoint:
    convert.write(path, original(config), layout=layout)
    return original(config).to(layout)


def by_numpy(path: Path, config: MixerConfig, layout: str) -> Checkpoint:
    np.savez_compressed(path, **random_weights(config))
    return Checkpoint.from_arrays(random_weights(config))


def by_safetensors(path: Path, config: MixerConfig, layout: str) -> Checkpoint:
    weights = Checkpoint.from_arrays(random_weights(config)).to(layout)
    saved_by_others(path, {name: np.ascontiguousarray(array) for name, array in weights.arrays.items()})  # it forgets strides
    return Checkpoint.from_arrays(weights.arrays)


def by_flax(path: Path, config: MixerConfig, layout: str) -> Checkpoint:
    saved_by_others(path, random_weights(config))
    return Checkpoint.from_arrays(random_weights(config))


def by_big_vision(path: Path, config: MixerConfig, layout: str) -> Checkpoint:
    saved_by_big_vision(path, {f"params/{name}": array for name, array in random_weights(config).items()})
    return Checkpoint.from_arrays(random_weights(config))


FORMATS = {  # writer, ending, layout
    "npz": (by_convert, ".npz", "flax"),
    "npz deflated by NumPy": (by_numpy, ".npz", "google"),
    "safetensors": (by_convert, ".safetensors", "timm"),
    "safetensors of the library": (by_safetensors, ".safetensors", "timm"),
    "msgpack": (by_convert, ".msgpack", "google"),
    "pt": (by_convert, ".pt", "timm"),
    "orbax": (by_convert, "", "flax"),
    "msgpack of Flax": (by_flax, ".msgpack", "google"),
    "orbax of others": (by_flax, "", "google"),
    "bigvision": (by_big_vision, "", "google"),
}


def flipped(whole: bytes, step: int) -> Iterator[bytes]:
    """With one bit flipped, every `step`-th of them."""
    for bit in range(0, 8 * len(whole), step):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        yield data


def cut(whole: bytes, step: int) -> Iterator[bytes]:
    """Cut at every `step`-th length."""
    return (whole[:length] for length in range(0, len(whole), step))


def mutated(whole: bytes, count: int) -> Iterator[bytes]:
    """So many times with a stretch replaced: flipped, cut off, inserted, deleted, swapped, zeroed or doubled."""
    chance = random.Random(len(whole))

    def place() -> int:
        """Anywhere, or near the start or the end, where there are headers and directories."""
        near = chance.randrange(min(len(whole), 16_384))
        return chance.choice((chance.randrange(len(whole)), near, len(whole) - 1 - near))

    while count:
        at, length = place(), chance.choice((1, 1, 2, 4, 8, 17, 64, 300))
        before, stretch, after = whole[:at], whole[at : at + length], whole[at + length :]
        other = place() if chance.random() < 0.5 else (at + length * chance.randint(1, 20)) % len(whole)
        a, b = sorted((at, other))
        size = min(length, b - a, len(whole) - b)
        data = {
            "flip": before + bytes([stretch[0] ^ 1 << chance.randrange(8)]) + whole[at + 1 :],
            "cut": before,
            "insert": before + chance.randbytes(length) + stretch + after,
            "delete": before + after,
            "swap": whole[:a] + whole[b : b + size] + whole[a + size : b] + whole[a : a + size] + whole[b + size :],
            "zero": before + bytes(len(stretch)) + after,
            "double": before + stretch + stretch + after,
        }[chance.choice(("flip", "flip", "flip", "cut", "insert", "delete", "swap", "zero", "double"))]
        if data != whole:
            count -= 1
            yield data


def outcome(path: Path, expected: Checkpoint) -> str:
    try:
        checkpoint = convert.read(path)
        arrays = checkpoint.as_numpy()
    except CheckpointError as error:
        return "refused" if str(error).startswith(str(path)) else "traceback"
    except Exception:
        traceback.print_exc()
        return "traceback"
    if checkpoint.metadata == expected.metadata and equal(arrays, expected.arrays):
        return "harmless"
    assert not checkpoint.verified
    return "wrong"


def campaign(folder: Path, format: str, kind: str, amount: int) -> dict[str, int]:
    """The outcomes of a kind of damage to every file of a checkpoint, with their numbers."""
    write, ending, layout = FORMATS[format]
    path, counts = folder / f"w{ending}", collections.Counter(refused=0, harmless=0, wrong=0, traceback=0)
    expected = write(path, LARGER if kind == "mutated" and format != "bigvision" else SMALLEST, layout)
    for file in sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]:
        whole = file.read_bytes()
        for data in {"flipped": flipped, "cut": cut, "mutated": mutated}[kind](whole, amount if whole else 0):
            file.write_bytes(data)
            counts[outcome(path, expected)] += 1
        file.write_bytes(whole)
        assert outcome(path, expected) == "harmless"
    return counts


if __name__ == "__main__":
    print(json.dumps(campaign(Path(sys.argv[1]), *sys.argv[2:4], int(sys.argv[4]))))
