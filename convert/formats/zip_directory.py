"""Checks the directory of a zip against the rest of the file; zipfile and torch trust whatever it lists.

One flipped bit in a length hides the entries behind it. So every byte of the file must belong to a member, to the directory
or to the end record, and all must agree on the number of members.
"""

import struct
import zipfile
from pathlib import Path
from typing import NamedTuple

from ..byte_ranges import OpenFile
from ..errors import CheckpointError

LOCAL, DIRECTORY, END, DESCRIPTOR = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"PK\x07\x08"
END64, LOCATOR = b"PK\x06\x06", b"PK\x06\x07"


class Member(NamedTuple):
    """An entry of the directory, and where in the file its bytes begin."""

    info: zipfile.ZipInfo
    offset: int


def read_directory(path: Path, file: OpenFile) -> tuple[list[Member], bytes]:
    """The members and the comment of a zip. Raises CheckpointError where its parts do not fit together without a gap."""
    try:
        with zipfile.ZipFile(path) as archive:
            infos, comment = archive.infolist(), archive.comment
    except Exception as error:  # a damaged directory can fail in any way that parsing it can
        raise CheckpointError(f"truncated or damaged ({error}): fetch or write it again") from None
    start, size, entries = _end_record(file, len(comment))
    listed = _listed(file.read(start, size).tobytes())
    if not len(infos) == listed == entries:
        raise CheckpointError(
            f"damaged: the zip's end record counts {entries} members, its directory lists {min(listed, len(infos))}: "
            "fetch or write the file again"
        )
    members, reached = {}, 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        if info.header_offset != reached:
            raise _gap(info.filename, info.header_offset, reached)
        offset = _data(file, info)
        reached = offset + info.compress_size
        if reached > start:
            raise CheckpointError(f"{info.filename}: claims {info.compress_size} bytes, more than the file can hold")
        reached += _descriptor(file, info, reached)
        members[info.header_offset] = Member(info, offset)
    if reached != start:
        raise _gap("the zip's directory", start, reached)
    return [members[info.header_offset] for info in infos], comment


def _end_record(file: OpenFile, comment: int) -> tuple[int, int, int]:
    """Where the directory starts, its size, and its number of entries."""
    at = file.size - comment - 22
    mark, disk, disks, here, entries, size, start, length = struct.unpack("<4s4H2LH", file.read(at, 22).tobytes())
    if mark != END or length != comment:  # zipfile takes a comment that is cut short
        raise CheckpointError("truncated, or with something after its end: fetch or write it again")
    locator, where, total = struct.unpack("<4s4xQL", file.read(at - 20, 20).tobytes()) if at >= 20 else (b"", 0, 0)
    if locator == LOCATOR:
        mark, length, *wide = struct.unpack("<4sQ4x2L4Q", file.read(where, 56).tobytes())
        fields = zip((disk, disks, here, entries, size, start), wide, (16, 16, 16, 16, 32, 32))
        differ = any(value not in (value64, (1 << bits) - 1) for value, value64, bits in fields)
        if mark != END64 or where + 12 + length != at - 20 or total > 1 or differ:
            raise CheckpointError("damaged: the zip's two end records do not agree: fetch or write it again")
        disk, disks, here, entries, size, start, at = *wide, where
    if disk or disks or here != entries:
        raise CheckpointError("damaged, or a zip of several parts: fetch or write it again")
    if start + size != at:
        raise _gap("the zip's end record", at, start + size)
    return start, size, entries


def _listed(directory: bytes) -> int:
    """How many entries the directory has by their own lengths. Raises CheckpointError unless they fill it exactly."""
    at = count = 0
    while directory[at : at + 4] == DIRECTORY and at + 46 <= len(directory):
        at += 46 + sum(struct.unpack_from("<3H", directory, at + 28))
        count += 1
    if at != len(directory):
        raise CheckpointError(
            f"damaged: the zip's directory is {len(directory)} bytes, its entries take {at}: fetch or write the file again"
        )
    return count


def _data(file: OpenFile, info: zipfile.ZipInfo) -> int:
    """Where the bytes of a member begin."""
    local = file.read(info.header_offset, 30).tobytes()
    if not local.startswith(LOCAL):
        raise CheckpointError("the zip's directory points at something else: damaged")
    return info.header_offset + 30 + sum(struct.unpack("<HH", local[26:30]))


def _descriptor(file: OpenFile, info: zipfile.ZipInfo, at: int) -> int:
    """The size of the descriptor that a writer which cannot go back puts behind a member's bytes: its CRC-32 and sizes."""
    if not info.flag_bits & 8:
        return 0
    following = file.read(at, min(24, file.size - at)).tobytes()
    for mark in (DESCRIPTOR, b""):
        for sizes in ("LL", "QQ"):
            try:
                wanted = mark + struct.pack(f"<L{sizes}", info.CRC, info.compress_size, info.file_size)
            except struct.error:  # a size that needs 64 bits
                continue
            if following.startswith(wanted):
                return len(wanted)
    raise CheckpointError(f"{info.filename}: what follows its bytes does not repeat their CRC-32 and size: damaged")


def _gap(what: str, actual: int, expected: int) -> CheckpointError:
    return CheckpointError(
        f"damaged: {what} is at byte {actual} of the zip, what is before it ends at {expected}: fetch or write the file again"
    )
