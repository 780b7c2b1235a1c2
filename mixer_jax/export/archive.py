"""The zip file of an exported program, read only if all of it is accounted for: no gap, nothing compressed, no name twice.

Entries are as long as they say, since none is compressed, and each is read against its CRC-32.
"""

__all__ = ["FOREIGN", "Archive"]

import os
import zipfile
from pathlib import Path

from convert import CheckpointError
from convert.byte_ranges import ByteRange, OpenFile, Window
from convert.formats.zip_directory import Member, read_directory

ENCRYPTED = 1
FOREIGN = "is not a program that mixer_jax exported, or is damaged"


class Archive:
    """Entries by name. Raises CheckpointError for another file, and with the name of an entry that is not as it was written."""

    def __init__(self, path: str | os.PathLike[str]):
        self._file = OpenFile(path)
        members, _ = read_directory(Path(path), self._file)
        self._members = {member.info.filename: member for member in members}
        for name, (info, _) in self._members.items():
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & ENCRYPTED:
                raise CheckpointError(f"{name} is compressed or encrypted, and export writes neither")
        if len(self._members) != len(members):
            raise CheckpointError("has an entry twice")

    @property
    def sizes(self) -> dict[str, int]:
        """In bytes, by name."""
        return {name: member.info.file_size for name, member in self._members.items()}

    def read(self, name: str) -> bytes:
        info, offset = self._member(name)
        try:
            return ByteRange(self._file, offset, info.file_size, info.CRC).all().tobytes()
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error}") from None

    def window(self, name: str) -> Window:
        """The entry as a file, whose CRC-32 is not checked: for a format that has its own."""
        info, offset = self._member(name)
        return Window(self._file, offset, info.file_size)

    def _member(self, name: str) -> Member:
        if name not in self._members:
            raise CheckpointError(f"has no entry {name}")
        return self._members[name]

    def verify(self) -> None:
        """Read every entry."""
        for name in self._members:
            self.read(name)
