"""The checksums of a stored disk's blocks, as a file beside the disk; bytes in, values out.

::

    magic, version, places, disk uuid, blocks, entries     40 bytes
    size u64, mtime u64 (µs)         where the disk was when they were taken: one or two places
    index u32 for each entry         ascending
    digest u64 for each entry        XXH3-64 of the block's 2 MiB, the last one padded with zeros
    digest u64                       of everything before it

All numbers are little-endian.  Bytes that contradict this raise ``Corrupt``, nothing else.
"""

from __future__ import annotations

import struct
import sys
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple
from uuid import UUID

import xxhash

from proxy.errors import Corrupt

if TYPE_CHECKING:
    from collections.abc import Iterator

MOST_BLOCKS: Final = 8 * 1024 * 1024
"""Blocks of a disk of 16 TiB, the largest that a pool makes: bounds the memory of all this."""

_MAGIC: Final = b"xo-xxh3\0"
_VERSION: Final = 1
_HEAD = struct.Struct("<8sHH16sII4x")
_PLACE = struct.Struct("<QQ")
_DIGEST = struct.Struct("<Q")
_MOST_PLACES: Final = 2
LONGEST: Final = (
    _HEAD.size + _MOST_PLACES * _PLACE.size + MOST_BLOCKS * (4 + _DIGEST.size) + _DIGEST.size
)
"""Bytes of the largest file."""


def block_digest(data: memoryview) -> int:
    """Of a block's 2 MiB; about 0.2 ms without the GIL."""
    return xxhash.xxh3_64_intdigest(data)


class BlockSums:
    """The digest of each block that has one, of a disk with ``count`` blocks.

    Nine bytes a block, present or not.
    """

    __slots__ = ("_digests", "_known")

    def __init__(self, count: int) -> None:
        self._known = bytearray(count)
        self._digests = array("Q", bytes(8 * count))

    @property
    def count(self) -> int:
        """Blocks of the disk."""
        return len(self._known)

    @property
    def flags(self) -> bytes:
        """One byte a block, 1 where it has a digest."""
        return bytes(self._known)

    def __len__(self) -> int:
        return self._known.count(1)

    def __iter__(self) -> Iterator[int]:
        """The indexes that have a digest, ascending."""
        index = self._known.find(1)
        while index >= 0:
            yield index
            index = self._known.find(1, index + 1)

    def __setitem__(self, index: int, digest: int) -> None:
        self._digests[index] = digest
        self._known[index] = 1

    def get(self, index: int) -> int | None:
        if 0 <= index < len(self._known) and self._known[index]:
            return self._digests[index]
        return None

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, BlockSums)
            and self._known == other._known
            and self._digests == other._digests
        )

    __hash__ = None  # type: ignore[assignment]  # it can change

    def under(self, newer: BlockSums) -> BlockSums:
        """Those of the disk that comes of merging ``newer`` into this one: it has ``newer``'s
        length, and ``newer``'s blocks win.  Both must know every block of their disks."""
        merged = BlockSums(newer.count)
        length = min(self.count, newer.count)
        merged._known[:length] = self._known[:length]
        merged._digests[:length] = self._digests[:length]
        for index in newer:
            merged[index] = newer._digests[index]
        return merged


class Place(NamedTuple):
    """Size and time of a file that the disk consists of: equal as long as nobody wrote it."""

    size: int
    mtime: int
    """Microseconds since 1970."""


@dataclass(frozen=True, slots=True)
class Checksums:
    """``places`` is the disk's file, or ``bat`` and ``footer`` of its directory."""

    uuid: UUID
    places: tuple[Place, ...]
    sums: BlockSums

    def encode(self) -> bytes:
        """Blocking: a second for a disk of 8 TiB."""
        indexes = array("I", self.sums)
        digests = array("Q", (self.sums.get(index) or 0 for index in indexes))
        head = _HEAD.pack(
            _MAGIC,
            _VERSION,
            len(self.places),
            self.uuid.bytes,
            self.sums.count,
            len(indexes),
        )
        places = b"".join(_PLACE.pack(*place) for place in self.places)
        body = head + places + _little(indexes) + _little(digests)
        return body + _DIGEST.pack(xxhash.xxh3_64_intdigest(body))

    @classmethod
    def decode(cls, data: bytes) -> Checksums:
        """Blocking, as :meth:`encode`.  ``Corrupt`` for anything that it does not write."""
        if len(data) < _HEAD.size + _DIGEST.size:
            raise _corrupt(f"{len(data)} bytes are no file of checksums", "cut")
        magic, version, count, uuid, blocks, entries = _HEAD.unpack_from(data)
        if magic != _MAGIC or version != _VERSION:
            raise _corrupt("no file of checksums, or one of another version", "magic")
        if not 1 <= count <= _MOST_PLACES or entries > blocks or blocks > MOST_BLOCKS:
            raise _corrupt(f"{entries} checksums of {blocks} blocks in {count} places", "counts")
        indexes_at = _HEAD.size + count * _PLACE.size
        digests_at = indexes_at + 4 * entries
        end = digests_at + 8 * entries
        if len(data) != end + _DIGEST.size:
            raise _corrupt(f"{len(data)} bytes instead of {end + _DIGEST.size}", "size")
        if xxhash.xxh3_64_intdigest(memoryview(data)[:end]) != _DIGEST.unpack_from(data, end)[0]:
            raise _corrupt("its own checksum is wrong", "checksum")
        indexes = _array("I", data[indexes_at:digests_at])
        digests = _array("Q", data[digests_at:end])
        sums = BlockSums(blocks)
        last = -1
        for index, digest in zip(indexes, digests, strict=True):
            if not last < index < blocks:
                raise _corrupt(f"block {index} of {blocks} stands behind block {last}", "index")
            sums[index] = digest
            last = index
        places = tuple(
            Place(*_PLACE.unpack_from(data, _HEAD.size + position * _PLACE.size))
            for position in range(count)
        )
        return cls(UUID(bytes=uuid), places, sums)


def _little(values: array[int]) -> bytes:
    if sys.byteorder != "little":
        values = array(values.typecode, values)
        values.byteswap()
    return values.tobytes()


def _array(typecode: str, data: bytes) -> array[int]:
    values: array[int] = array(typecode)
    values.frombytes(data)
    if sys.byteorder != "little":
        values.byteswap()
    return values


def _corrupt(message: str, what: str) -> Corrupt:
    return Corrupt(f"corrupt checksums: {message}", data={"what": what})
