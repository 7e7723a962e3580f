"""VHD: footer, dynamic header, block allocation table; bytes in, values out.

Offsets and meanings are those of Microsoft's "Virtual Hard Disk Image Format Specification"
1.0, with what Xen Orchestra and XAPI make of it: the footer's time counts from 1970, the
parent's name is a path relative to the child, a present block is present as a whole (its
bitmap is all ones), and ``current_size`` is exact whatever the geometry says.

Everything that contradicts the format raises ``Corrupt`` whose ``data`` says ``what`` is
wrong and at which ``offset``; nothing else is raised, whatever the bytes.  Reserved bytes are
kept as they are when a structure is packed again.
"""

from __future__ import annotations

import math
import struct
import sys
from array import array
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Final
from uuid import UUID

from proxy.errors import Corrupt, Refused

if TYPE_CHECKING:
    from collections.abc import Iterable

SECTOR: Final = 512
FOOTER_SIZE: Final = 512
HEADER_SIZE: Final = 1024
BLOCK_SIZE: Final = 2 * 1024 * 1024
BITMAP_SIZE: Final = 512
"""One bit a sector of a block: exactly one sector for blocks of 2 MiB."""
STORED_BLOCK: Final = BITMAP_SIZE + BLOCK_SIZE
"""Bytes of a block in a file: bitmap, then data."""
TABLE_OFFSET: Final = FOOTER_SIZE + HEADER_SIZE
UNUSED: Final = 0xFFFFFFFF
"""The table's entry of a block that is not there."""
FULL_BITMAP: Final = b"\xff" * BITMAP_SIZE
NO_UUID: Final = UUID(int=0)
MAX_VIRTUAL_SIZE: Final = 2**41 - 8192
"""Above it XAPI exports and takes qcow2 only."""
LONGEST_NAME: Final = 256
"""UTF-16 code units of a parent's name."""
MAX_ENTRIES: Final = 64 * 1024 * 1024
"""Blocks of the largest disk that is read (128 TiB): bounds what hostile headers cost."""
MAX_BLOCKS: Final = UNUSED // (STORED_BLOCK // SECTOR) + 1
"""Blocks that a table can give a place of their own: about 2 TiB."""

_TAIL: Final = 428
_FOOTER = struct.Struct(">8sIIQI4sI4sQQHBBII16s428s")
_HEADER = struct.Struct(">8sQQIIII16sII512s192s256s")
_FOOTER_COOKIE: Final = b"conectix"
_HEADER_COOKIE: Final = b"cxsparse"
_VERSION: Final = 0x00010000
_NOWHERE: Final = 0xFFFFFFFFFFFFFFFF
_FOOTER_CHECKSUM, _HEADER_CHECKSUM = 64, 36


class DiskType(IntEnum):
    FIXED = 2
    DYNAMIC = 3
    DIFFERENCING = 4


def checksum(data: bytes, at: int) -> int:
    """Ones' complement of the sum of all bytes but the four of the checksum ``at``."""
    return ~(sum(data) - sum(data[at : at + 4])) & 0xFFFFFFFF


def geometry(size: int) -> tuple[int, int, int]:
    """``(cylinders, heads, sectors per track)`` that covers ``size`` bytes, up to 127.5 GiB.

    Divisions are not rounded and cylinders are rounded up, as Xen Orchestra does.
    """
    total = min(-(-size // SECTOR), 65535 * 16 * 255)
    if total >= 65535 * 16 * 63:
        sectors, heads, tracks = 255, 16, total / 255
    else:
        sectors = 17
        tracks = total / 17
        heads = max(4, math.floor((tracks + 1023) / 1024))
        if tracks >= heads * 1024 or heads > 16:
            sectors, heads, tracks = 31, 16, total / 31
        if tracks >= heads * 1024:
            sectors, heads, tracks = 63, 16, total / 63
    return math.ceil(tracks / heads), heads, sectors


@dataclass(frozen=True, slots=True, kw_only=True)
class Footer:
    """The footer; sizes in bytes, ``timestamp`` in seconds since 1970."""

    current_size: int
    original_size: int
    disk_type: DiskType
    uuid: UUID
    timestamp: int = 0
    geometry: tuple[int, int, int] = (0, 0, 0)
    features: int = 2
    creator_application: bytes = b"xo  "
    creator_version: int = 0
    creator_host_os: bytes = b"Wi2k"
    tail: bytes = field(default=bytes(_TAIL), repr=False)
    """Saved state, hidden flag and reserved bytes."""

    @classmethod
    def make(cls, size: int, disk_type: DiskType, uuid: UUID, *, timestamp: int) -> Footer:
        """The footer of a new disk of exactly ``size`` bytes."""
        return cls(
            current_size=size,
            original_size=size,
            disk_type=disk_type,
            uuid=uuid,
            timestamp=timestamp,
            geometry=geometry(size),
        )

    def pack(self) -> bytes:
        data = _FOOTER.pack(
            _FOOTER_COOKIE,
            self.features,
            _VERSION,
            FOOTER_SIZE,
            self.timestamp,
            self.creator_application,
            self.creator_version,
            self.creator_host_os,
            self.original_size,
            self.current_size,
            *self.geometry,
            self.disk_type,
            0,
            self.uuid.bytes,
            self.tail,
        )
        return _with_checksum(data, _FOOTER_CHECKSUM)

    @classmethod
    def parse(cls, data: bytes | memoryview, *, offset: int = 0) -> Footer:
        """Read a footer.  ``offset`` is where it stood, for the error.

        Only dynamic and differencing disks are accepted: a fixed one has no table.
        """
        raw = bytes(data)
        if len(raw) != FOOTER_SIZE:
            raise _corrupt("footer cut", f"the footer has {len(raw)} of 512 bytes", offset)
        (
            cookie,
            features,
            version,
            data_offset,
            timestamp,
            application,
            application_version,
            host_os,
            original_size,
            current_size,
            cylinders,
            heads,
            sectors,
            disk_type,
            stored_checksum,
            uuid,
            tail,
        ) = _FOOTER.unpack(raw)
        if cookie != _FOOTER_COOKIE:
            raise _corrupt("footer cookie", "no VHD footer", offset)
        if stored_checksum != checksum(raw, _FOOTER_CHECKSUM):
            raise _corrupt("footer checksum", "the checksum of the footer is wrong", offset + 64)
        if version != _VERSION:
            raise _corrupt("footer version", f"unknown version {version:#x}", offset + 12)
        if data_offset != FOOTER_SIZE:
            raise _corrupt("footer data offset", "the header is not behind the footer", offset + 16)
        if disk_type not in (DiskType.DYNAMIC, DiskType.DIFFERENCING):
            raise _corrupt("disk type", f"disk type {disk_type} cannot be read", offset + 60)
        if original_size > current_size:
            raise _corrupt("disk size", "the disk is smaller than it was made", offset + 40)
        return cls(
            current_size=current_size,
            original_size=original_size,
            disk_type=DiskType(disk_type),
            uuid=UUID(bytes=uuid),
            timestamp=timestamp,
            geometry=(cylinders, heads, sectors),
            features=features,
            creator_application=application,
            creator_version=application_version,
            creator_host_os=host_os,
            tail=tail,
        )

    @property
    def is_differencing(self) -> bool:
        return self.disk_type is DiskType.DIFFERENCING


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The dynamic header.  ``parent_name`` is empty for a disk without parent."""

    max_entries: int
    """Blocks that the table has room for."""
    table_offset: int = TABLE_OFFSET
    block_size: int = BLOCK_SIZE
    parent_uuid: UUID = NO_UUID
    parent_timestamp: int = 0
    parent_name: str = ""
    reserved1: int = 0
    locators: bytes = field(default=bytes(192), repr=False)
    """Eight parent locators, which nobody resolves."""
    reserved2: bytes = field(default=bytes(256), repr=False)

    def pack(self) -> bytes:
        """``ValueError`` when the parent's name has more than 256 UTF-16 units."""
        name = self.parent_name.encode("utf-16-be")
        if len(name) > 2 * LONGEST_NAME:
            raise ValueError(f"the name of the parent is too long: {self.parent_name!r}")
        data = _HEADER.pack(
            _HEADER_COOKIE,
            _NOWHERE,
            self.table_offset,
            _VERSION,
            self.max_entries,
            self.block_size,
            0,
            self.parent_uuid.bytes,
            self.parent_timestamp,
            self.reserved1,
            name,
            self.locators,
            self.reserved2,
        )
        return _with_checksum(data, _HEADER_CHECKSUM)

    @classmethod
    def parse(cls, data: bytes | memoryview, *, offset: int = FOOTER_SIZE) -> Header:
        """Read a header; see :func:`check` for what depends on the footer."""
        raw = bytes(data)
        if len(raw) != HEADER_SIZE:
            raise _corrupt("header cut", f"the header has {len(raw)} of 1024 bytes", offset)
        (
            cookie,
            data_offset,
            table_offset,
            version,
            max_entries,
            block_size,
            stored_checksum,
            parent_uuid,
            parent_timestamp,
            reserved1,
            name,
            locators,
            reserved2,
        ) = _HEADER.unpack(raw)
        if cookie != _HEADER_COOKIE:
            raise _corrupt("header cookie", "no VHD header", offset)
        if stored_checksum != checksum(raw, _HEADER_CHECKSUM):
            raise _corrupt("header checksum", "the checksum of the header is wrong", offset + 36)
        if version != _VERSION:
            raise _corrupt("header version", f"unknown version {version:#x}", offset + 24)
        if data_offset != _NOWHERE:
            raise _corrupt("header data offset", "more data than this format has", offset + 8)
        if block_size != BLOCK_SIZE:
            raise _corrupt("block size", f"blocks of {block_size} bytes, not 2 MiB", offset + 32)
        if table_offset < TABLE_OFFSET:
            raise _corrupt("table offset", "the table lies inside the header", offset + 16)
        if max_entries > MAX_ENTRIES:
            raise _corrupt("table size", f"a table of {max_entries} blocks", offset + 28)
        return cls(
            max_entries=max_entries,
            table_offset=table_offset,
            block_size=block_size,
            parent_uuid=UUID(bytes=parent_uuid),
            parent_timestamp=parent_timestamp,
            parent_name=_name(name, offset + 64),
            reserved1=reserved1,
            locators=locators,
            reserved2=reserved2,
        )


def _name(raw: bytes, offset: int) -> str:
    try:
        text = raw.decode("utf-16-be")
    except UnicodeDecodeError as error:
        raise _corrupt("parent name", "the parent's name is no UTF-16", offset) from error
    return text.partition("\0")[0]


def check(footer: Footer, header: Header) -> None:
    """Raise ``Corrupt`` when the table cannot hold every block of the disk."""
    if header.max_entries < blocks_of(footer.current_size):
        raise _corrupt(
            "table size",
            f"a table of {header.max_entries} blocks for {footer.current_size} bytes",
            FOOTER_SIZE + 28,
        )


def blocks_of(size: int) -> int:
    """Blocks of a disk of ``size`` bytes."""
    return -(-size // BLOCK_SIZE)


def table_size(entries: int) -> int:
    """Bytes of a table in a file: whole sectors, at least one."""
    return max(1, -(-4 * entries // SECTOR)) * SECTOR


def parse_table(data: bytes | memoryview, entries: int) -> array[int]:
    """The first ``entries`` of a table, sector numbers or :data:`UNUSED`."""
    if len(data) < 4 * entries:
        raise _corrupt("table cut", f"the table has {len(data) // 4} of {entries} entries", 0)
    table = array("I")
    table.frombytes(memoryview(data)[: 4 * entries])
    if sys.byteorder == "little":
        table.byteswap()
    return table


def pack_table(table: array[int]) -> bytes:
    """A table as it stands in a file, filled up with ones to a whole sector."""
    raw = array("I", table)
    if sys.byteorder == "little":
        raw.byteswap()
    return raw.tobytes().ljust(table_size(len(table)), b"\xff")


def empty_table(entries: int) -> array[int]:
    return array("I", [UNUSED]) * entries


def sequential_table(order: Iterable[int], entries: int) -> array[int]:
    """The table of a file whose blocks follow it one after another in this ``order``.

    ``ValueError`` for a block that comes twice or is none of ``entries``; ``Refused``
    (``EFBIG``) when the last one's place is above what a table can tell.
    """
    table = empty_table(entries)
    sector = (TABLE_OFFSET + table_size(entries)) // SECTOR
    for index in order:
        if not 0 <= index < entries or table[index] != UNUSED:
            raise ValueError(f"block {index} comes twice, or is none of {entries}")
        if sector >= UNUSED:
            raise Refused(
                "the blocks of this disk have more than the 2 TiB that a VHD file can hold",
                code="EFBIG",
                data={"size": sector * SECTOR},
            )
        table[index] = sector
        sector += STORED_BLOCK // SECTOR
    return table


_PER_PIECE: Final = 1 << 18
_NOT_ONES: Final = b"\1" * 255 + b"\0"


def present_flags(table: array[int]) -> bytes:
    """One byte an entry: 1 where its block is there, else 0."""
    flags = bytearray()
    for first in range(0, len(table), _PER_PIECE):  # a piece at a time bounds the memory
        # An entry is used when one of its bytes is not all ones; ``or`` over all entries at
        # once, as large integers: a table of a million entries takes milliseconds.
        lanes = table[first : first + _PER_PIECE].tobytes().translate(_NOT_ONES)
        used = 0
        for lane in range(4):
            used |= int.from_bytes(lanes[lane::4], "little")
        flags += used.to_bytes(len(lanes) // 4, "little")
    return bytes(flags)


def stream_size(entries: int, present: int) -> int:
    """Bytes of a VHD file with ``present`` of ``entries`` blocks, as this daemon lays it out."""
    return TABLE_OFFSET + table_size(entries) + present * STORED_BLOCK + FOOTER_SIZE


def _with_checksum(data: bytes, at: int) -> bytes:
    return data[:at] + struct.pack(">I", checksum(data, at)) + data[at + 4 :]


def _corrupt(what: str, message: str, offset: int) -> Corrupt:
    return Corrupt(f"corrupt VHD: {message}", data={"what": what, "offset": offset})
