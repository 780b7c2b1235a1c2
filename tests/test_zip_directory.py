"""A zip's directory is believed only where it accounts for every byte of the file."""

import io
import itertools
import struct
import zipfile

import numpy as np
import pytest
from conftest import TINY, random_weights
from test_convert import equal

import convert
from convert import Checkpoint, CheckpointError
from convert.byte_ranges import OpenFile
from convert.formats.zip_directory import DESCRIPTOR, DIRECTORY, END, END64, read_directory


def members(path) -> list[str]:
    return [member.info.filename for member in read_directory(path, OpenFile(path))[0]]


def flipped(path, at: int, bit: int):
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)
    return path


def entry(path, name: str) -> int:
    """Where the directory's entry of a member begins."""
    return path.read_bytes().rindex(DIRECTORY, 0, path.read_bytes().rindex(name.encode()))


def with_the_head_last(tmp_path):
    weights = random_weights(TINY)
    np.savez(tmp_path / "w.npz", **dict(sorted(weights.items(), key=lambda item: item[0].startswith("head/"))))
    return weights, tmp_path / "w.npz"


COMMENT_LENGTH = 32  # its place in a directory's entry


def test_one_flipped_bit_in_a_comment_length_does_not_make_the_head_vanish(tmp_path):
    """zipfile takes the entries behind it, head/bias and head/kernel, for a comment: what is left is a whole model."""
    weights, path = with_the_head_last(tmp_path)
    flipped(path, entry(path, "stem/kernel.npy") + COMMENT_LENGTH, 7)
    with zipfile.ZipFile(path) as archive:
        assert {f"{name}.npy" for name in weights} - set(archive.namelist()) == {"head/kernel.npy", "head/bias.npy"}
    with pytest.raises(CheckpointError, match=rf"^{path}: damaged: the zip's directory is \d+ bytes, its entries take \d+"):
        convert.read(path)


def test_no_flipped_bit_of_a_length_or_the_end_record_loses_an_array(tmp_path):
    """Of the three lengths in the entry before the head's two, which can hide just those, and of the end record."""
    weights, path = with_the_head_last(tmp_path)
    whole = path.read_bytes()
    refused, start = 0, entry(path, "stem/kernel.npy")
    places = [*range(start + 28, start + 34), *range(len(whole) - 22, len(whole))]
    for at, bit in itertools.product(places, range(8)):
        path.write_bytes(whole)
        flipped(path, at, bit)
        try:
            arrays = convert.read(path).as_numpy()
        except CheckpointError:
            refused += 1
        else:
            assert equal(arrays, weights), f"byte {at}, bit {bit}"
    assert refused > 0.9 * 8 * len(places)


@pytest.mark.torch
def test_a_pt_whose_directory_hides_members_from_the_checksums_is_refused(tmp_path):
    path = tmp_path / "w.pt"
    convert.write(path, Checkpoint.from_arrays(random_weights(TINY)), layout="timm")
    names = members(path)
    flipped(path, entry(path, names[-2]) + COMMENT_LENGTH, 7)
    with zipfile.ZipFile(path) as archive:
        assert len(archive.namelist()) < len(names)
    with pytest.raises(CheckpointError, match=rf"^{path}: damaged: the zip's directory is \d+ bytes"):
        convert.read(path)


def damage(path, pattern: bytes, at: int, value: bytes):
    data = bytearray(path.read_bytes())
    place = data.rindex(pattern) + at
    data[place : place + len(value)] = value
    path.write_bytes(data)


class Pipe(io.RawIOBase):
    """What cannot go back: the sizes of a member follow its bytes."""

    def __init__(self, file):
        self.write = file.write

    def writable(self):
        return True


def to_a_pipe(save):
    def write(path, **arrays):
        with open(path, "wb") as file:
            save(Pipe(file), **arrays)

    return write


PARTS = "damaged, or a zip of several parts"


@pytest.mark.parametrize(
    ("pattern", "at", "value", "message"),
    [
        (END, 8, b"\x01\x00\x01\x00", "counts 1 members, its directory lists 2: fetch or write the file again"),
        (END, 8, b"\x01\x00", PARTS),
        (END, 4, b"\x01\x00", PARTS),
        (END, 16, struct.pack("<L", 50), r"the zip's end record is at byte \d+ of the zip, what is before it ends at \d+"),
        (END, 20, b"\x01\x00", r"truncated, or with something after its end|File is not a zip file"),
        (END64, 24, b"\x03", "damaged: the zip's two end records do not agree"),
        (DESCRIPTOR, 4, b"oops", "b.npy: what follows its bytes does not repeat their CRC-32 and size: damaged"),
    ],
)
def test_an_end_record_or_descriptor_that_lies_is_refused(tmp_path, monkeypatch, pattern, at, value, message):
    if pattern == END64:
        monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 10)
    path = tmp_path / "w.npz"
    (to_a_pipe(np.savez) if pattern == DESCRIPTOR else np.savez)(path, a=np.ones(3), b=np.ones(4))
    damage(path, pattern, at, value)
    with pytest.raises(CheckpointError, match=message):
        members(path)


def test_bytes_that_belong_to_nothing_are_refused(tmp_path):
    """In front, between two members, before the directory; each time the offsets are made to fit."""
    path = tmp_path / "w.npz"
    np.savez(path, a=np.ones(3), b=np.ones(4))
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        second = archive.getinfo("b.npy").header_offset
    directory = whole.index(DIRECTORY)
    for place in (second, directory):
        data = bytearray(whole[:place] + b"hidden" + whole[place:])
        struct.pack_into("<L", data, len(data) - 6, directory + 6)
        if place == second:
            struct.pack_into("<L", data, data.rindex(DIRECTORY) + 42, second + 6)
        path.write_bytes(data)
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
        what = "b.npy" if place == second else "the zip's directory"
        wanted = rf"{what} is at byte {place + 6} of the zip, what is before it ends at {place}"
        with pytest.raises(CheckpointError, match=wanted):
            members(path)


def appended(path, **arrays):
    for name, array in arrays.items():
        with zipfile.ZipFile(path, "a") as archive, archive.open(f"{name}.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array(member, array)


WRITERS = [np.savez, np.savez_compressed, to_a_pipe(np.savez), to_a_pipe(np.savez_compressed), appended]


@pytest.mark.parametrize("writer", WRITERS, ids=["stored", "deflated", "stored, piped", "deflated, piped", "appended"])
@pytest.mark.parametrize("limit", [None, 10, 1000])
def test_every_writer_of_valid_zips_is_read(tmp_path, monkeypatch, writer, limit):
    """With a `limit`, fields of 64 bits for whatever takes more bytes than that, as for files beyond 4 GiB."""
    if limit:
        monkeypatch.setattr(zipfile, "ZIP64_LIMIT", limit)
        monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 20)
    path, weights = tmp_path / "w.npz", random_weights(TINY)
    writer(path, **weights)
    assert (b"PK\x06\x06" in path.read_bytes()) == bool(limit)
    assert equal(convert.read(path).arrays, weights)


@pytest.mark.torch
def test_what_torch_saves_is_read(tmp_path):
    import torch

    weights = random_weights(TINY)
    state = {name: torch.from_numpy(array) for name, array in weights.items()}
    torch.save(state, tmp_path / "by name.pt")
    with open(tmp_path / "open.pt", "wb") as file:
        torch.save(state, file)
    for path in tmp_path.iterdir():
        assert equal(convert.read(path).arrays, weights)
