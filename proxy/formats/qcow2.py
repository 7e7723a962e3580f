"""qcow2: header, L1 and L2 tables of images that stream; bytes in, values out.

Facts are those of QEMU's "Qcow2 Image File Format" (versions 2 and 3).  A disk is made of
clusters; the L2 tables say where each lies in the file, the L1 table where the L2 tables lie.
What is read here is what a pool streams: tables first, then the clusters in the order of the
disk.  Compressed and encrypted images, external data files and subclusters are refused.

Everything that contradicts the format raises ``Corrupt`` whose ``data`` says ``what`` is
wrong and at which ``offset``; nothing else is raised, whatever the bytes.  Reference counts
are written but never read: they matter to those who write into an image.
"""

from __future__ import annotations

import functools
import struct
import sys
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from proxy.errors import Corrupt
from proxy.formats.vhd import BLOCK_SIZE, SECTOR, blocks_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

HEADER_SIZE: Final = 104
"""Bytes of a header that are read; the smallest cluster has 512."""
CLUSTER_BITS: Final = 16
"""Clusters of 64 KiB, which XAPI and Xen Orchestra write too."""
MAX_VIRTUAL_SIZE: Final = 64 * 2**40
"""Largest disk that is read, four times the largest of XCP-ng: bounds what hostile headers
cost."""

_MAGIC: Final = b"QFI\xfb"
_HEADER = struct.Struct(">4sIQIIQIIQQIIQ")
_HEADER_3 = struct.Struct(">QQQII")
_SMALLEST_BITS, _LARGEST_BITS = 9, 21
_LARGEST_L1: Final = 4 * 1024 * 1024
"""Entries; QEMU's own limit."""
_MOST_TABLES: Final = 128 * 1024
"""L2 tables of the largest disk with clusters of 64 KiB."""
_LONGEST_NAME: Final = 1023
_SLACK: Final = 64 * 1024 * 1024
"""Bytes of a file that neither its disk nor its tables explain."""

COPIED: Final = 1 << 63
"""The bit of an entry whose cluster has one user."""
_COMPRESSED: Final = 1 << 62
_ZERO: Final = 1
_OFFSET: Final = 0x00FF_FFFF_FFFF_FE00
"""Bits 9 to 55 of an entry."""
_L1_RESERVED: Final = ~(COPIED | _OFFSET)
_L2_RESERVED: Final = ~(COPIED | _COMPRESSED | _OFFSET | _ZERO)

_ROW: Final = 32
"""Entries that are looked at together."""
_ONE: Final = ord("1")

_CORRUPT, _EXTERNAL, _EXTENDED = 1 << 1, 1 << 2, 1 << 4
_KNOWN: Final = 0b11111
"""Incompatible features with a meaning.  Dirty (bit 0) is about reference counts, and a type
of compression (bit 3) about clusters that are refused one by one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The header; sizes and offsets in bytes."""

    size: int
    """Of the virtual disk."""
    l1_size: int
    """Entries of the L1 table: at least one for each L2 table."""
    l1_offset: int
    refcount_offset: int
    refcount_clusters: int
    version: int = 2
    cluster_bits: int = CLUSTER_BITS
    backing_offset: int = 0
    """Where the name of the parent stands; 0 without parent."""
    backing_size: int = 0
    refcount_order: int = 4

    @property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    @property
    def table_entries(self) -> int:
        """Clusters that one L2 table describes."""
        return self.cluster_size // 8

    @property
    def clusters(self) -> int:
        """Of the disk, the last one perhaps in part."""
        return -(-self.size // self.cluster_size)

    @property
    def tables(self) -> int:
        """L2 tables that describe the whole disk."""
        return -(-self.clusters // self.table_entries)

    @property
    def longest(self) -> int:
        """Bytes of the largest file that this disk explains.

        Nothing lies behind it, so what is skipped on the way to an offset is bounded too.
        """
        clusters = self.clusters + self.tables + -(-8 * self.l1_size // self.cluster_size) + 1
        counts = clusters * (1 << self.refcount_order) // 8
        return clusters * self.cluster_size + 2 * counts + _SLACK

    def pack(self) -> bytes:
        """A header of version 2, which has no more fields."""
        assert self.version == 2, "only version 2 is written"
        return _HEADER.pack(
            _MAGIC,
            self.version,
            self.backing_offset,
            self.backing_size,
            self.cluster_bits,
            self.size,
            0,
            self.l1_size,
            self.l1_offset,
            self.refcount_offset,
            self.refcount_clusters,
            0,
            0,
        )

    @classmethod
    def parse(cls, data: bytes | memoryview) -> Header:
        """Read the first :data:`HEADER_SIZE` bytes of an image."""
        raw = bytes(data[:HEADER_SIZE])
        if len(raw) != HEADER_SIZE:
            raise _corrupt("header cut", f"its header has {len(raw)} of 104 bytes", 0)
        (
            magic,
            version,
            backing_offset,
            backing_size,
            cluster_bits,
            size,
            encryption,
            l1_size,
            l1_offset,
            refcount_offset,
            refcount_clusters,
            _snapshots,
            _snapshots_offset,
        ) = _HEADER.unpack_from(raw)
        if magic != _MAGIC:
            raise _corrupt("magic", "no qcow2 header", 0)
        if version not in (2, 3):
            raise _corrupt("version", f"unknown version {version}", 4)
        if not _SMALLEST_BITS <= cluster_bits <= _LARGEST_BITS:
            raise _corrupt("cluster size", f"clusters of 2^{cluster_bits} bytes", 20)
        if encryption:
            raise _corrupt("encryption", f"it is encrypted (method {encryption})", 32)
        refcount_order = 4 if version == 2 else _parse_features(raw, 1 << cluster_bits)
        header = cls(
            size=size,
            l1_size=l1_size,
            l1_offset=l1_offset,
            refcount_offset=refcount_offset,
            refcount_clusters=refcount_clusters,
            version=version,
            cluster_bits=cluster_bits,
            backing_offset=backing_offset,
            backing_size=backing_size,
            refcount_order=refcount_order,
        )
        header._check()
        return header

    def _check(self) -> None:
        """Raise ``Corrupt`` for sizes and places that no image has."""
        if self.size > MAX_VIRTUAL_SIZE or self.size % SECTOR or self.tables > _MOST_TABLES:
            raise _corrupt("disk size", f"a disk of {self.size} bytes", 24)
        if not self.tables <= self.l1_size <= _LARGEST_L1:
            raise _corrupt(
                "L1 size", f"{self.l1_size} L1 entries for a disk of {self.size} bytes", 36
            )
        if self.tables:
            _check_offset(self, self.l1_offset, "L1 offset", 40)
        if self.backing_offset and self.backing_size > _LONGEST_NAME:
            raise _corrupt("backing file", "the name of its parent is too long", 16)


def _parse_features(raw: bytes, cluster_size: int) -> int:
    """Check what version 3 adds; the order of its reference counts."""
    incompatible, _compatible, _autoclear, order, length = _HEADER_3.unpack_from(raw, 72)
    if incompatible & ~_KNOWN:
        raise _corrupt("features", f"unknown features {incompatible:#x}", 72)
    if incompatible & _CORRUPT:
        raise _corrupt("corrupt bit", "it is marked as corrupt", 72)
    if incompatible & _EXTERNAL:
        raise _corrupt("external data", "its data is in another file", 72)
    if incompatible & _EXTENDED:
        raise _corrupt("extended L2", "its clusters are divided", 72)
    if order > 6:
        raise _corrupt("refcount order", f"reference counts of 2^{order} bits", 96)
    if not HEADER_SIZE <= length <= cluster_size or length % 8:
        raise _corrupt("header length", f"a header of {length} bytes", 100)
    return int(order)


def _check_offset(header: Header, offset: int, what: str, at: int) -> None:
    """Raise ``Corrupt`` unless a cluster may lie at ``offset``."""
    if offset % header.cluster_size:
        raise _corrupt(what, f"{offset:#x} is inside a cluster", at)
    if not header.cluster_size <= offset <= header.longest - header.cluster_size:
        raise _corrupt(what, f"{offset:#x} lies outside of the image", at)


def parse_l1(data: bytes | memoryview, header: Header) -> dict[int, int]:
    """Where each L2 table lies, by its number; in the order of the file.

    ``data`` has an entry for each of ``header.tables``.
    """
    found: dict[int, int] = {}
    for number, entry in enumerate(_words(data)):
        if not entry:
            continue
        at = header.l1_offset + 8 * number
        if entry & _L1_RESERVED:
            raise _corrupt("L1 entry", f"unknown bits in {entry:#x}", at)
        _check_offset(header, entry & _OFFSET, "L1 entry", at)
        found[number] = entry & _OFFSET
    ordered = dict(sorted(found.items(), key=lambda item: item[1]))
    if len(set(ordered.values())) < len(ordered):
        raise _corrupt("L1 entry", "two entries with one L2 table", header.l1_offset)
    return ordered


@dataclass(frozen=True, slots=True)
class Table:
    """What an L2 table says, in little memory: two bits a cluster and its jumps."""

    data: int
    """Bit n: cluster n of the table is in the file."""
    zeros: int
    """Bit n: cluster n is zeros without being in the file."""
    jumps: array[int]
    """How many of its clusters lie before each place that does not follow the one before."""
    offsets: array[int]
    """These places."""
    end: int
    """Behind the last cluster."""


def parse_l2(data: bytes | memoryview, header: Header, number: int, offset: int) -> Table:
    """Read L2 table ``number``, which lies at ``offset``.

    ``Corrupt`` when its clusters do not lie in the order of the disk: a stream has them only
    once.
    """
    size = header.cluster_size
    raw = bytes(data)
    wanted = min(header.table_entries, header.clusters - number * header.table_entries)
    held = bytearray(b"0" * wanted)
    zeros = bytearray(held)
    jumps, offsets = array("I"), array("Q")
    count = 0
    end = 0
    for first in range(0, wanted, _ROW):
        last = min(first + _ROW, wanted)
        part = raw[8 * first : 8 * last]
        if part.count(0) == len(part):
            continue
        if count and part == row(end | COPIED, last - first, size):  # as nearly all are
            held[first:last] = b"1" * (last - first)
            count += last - first
            end += (last - first) * size
            continue
        for place, entry in enumerate(_words(part), first):
            if not entry:
                continue
            at = offset + 8 * place
            where = _parse_entry(header, entry, at)
            if where is None:
                zeros[place] = _ONE
                continue
            if where < end:
                raise _corrupt("cluster order", f"a cluster at {where:#x} comes late", at)
            if where != end or not count:
                jumps.append(count)
                offsets.append(where)
            held[place] = _ONE
            count += 1
            end = where + size
    if end > header.longest:
        raise _corrupt("L2 entry", f"{end:#x} lies outside of the image", offset)
    return Table(_bits(held), _bits(zeros), jumps, offsets, end)


def _parse_entry(header: Header, entry: int, at: int) -> int | None:
    """The offset of a used cluster; ``None`` for one that is zeros."""
    if entry & _COMPRESSED:
        raise _corrupt("compressed cluster", "it has compressed clusters", at)
    if entry & _L2_RESERVED:
        raise _corrupt("L2 entry", f"unknown bits in {entry:#x}", at)
    where = entry & _OFFSET
    if entry & _ZERO:
        if header.version == 2:
            raise _corrupt("L2 entry", "a cluster of zeros, which version 2 lacks", at)
        return None
    _check_offset(header, where, "L2 entry", at)
    return where


def _bits(flags: bytearray) -> int:
    """Bit n for digit n."""
    flags.reverse()
    return int(flags or b"0", 2)


@dataclass(frozen=True, slots=True)
class Span:
    """``length`` bytes from ``start`` of a block lie at ``offset`` of the image."""

    start: int
    length: int
    offset: int


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a block of 2 MiB comes from."""

    index: int
    spans: list[Span]
    """Ascending in the block and in the image."""
    clear: list[tuple[int, int]]
    """``(start, end)`` of what is zeros.  What is left belongs to the parent."""


class ClusterMap:
    """All clusters of an image, as blocks of 2 MiB.

    ``tables`` by their number; ``start`` is where their own bytes ended: all data lies behind.
    Without parent (``is_differencing`` false) what is not in the image is zeros.
    """

    def __init__(
        self, header: Header, tables: Mapping[int, Table], start: int, *, is_differencing: bool
    ) -> None:
        self._header = header
        self._tables = {number: tables[number] for number in sorted(tables)}
        self._is_differencing = is_differencing
        self._per_block = BLOCK_SIZE // header.cluster_size
        self._check_order(start)
        count = blocks_of(header.size)
        present, partial = bytearray(count), bytearray(count)
        for index in self._described():
            data, zeros, inside = self._of_block(index)
            held = data | zeros if is_differencing else data
            if held:
                present[index] = 1
                partial[index] = is_differencing and held != inside
        self.present = bytes(present)
        """One byte a block: 1 where the image has any of it."""
        self.partial = bytes(partial)
        """1 where it has not all of it and the rest is the parent's."""

    def _check_order(self, start: int) -> None:
        for number, table in self._tables.items():
            if table.offsets:
                if table.offsets[0] < start:
                    message = f"clusters of L2 table {number} come before its end or others"
                    raise _corrupt("cluster order", message, table.offsets[0])
                start = table.end

    def _described(self) -> Iterator[int]:
        """Blocks about which some table says something, ascending."""
        covered = self._header.table_entries * self._header.cluster_size
        done = 0
        for number in self._tables:
            first = max(done, number * covered // BLOCK_SIZE)
            done = blocks_of(min((number + 1) * covered, self._header.size))
            yield from range(first, done)

    def _of_block(self, index: int) -> tuple[int, int, int]:
        """Bits of the clusters of a block: in the file, zeros, inside the disk."""
        first = index * self._per_block
        count = min(self._per_block, self._header.clusters - first)
        data = zeros = done = 0
        while done < count:  # a block of tiny clusters has several tables
            number, place = divmod(first + done, self._header.table_entries)
            part = min(count - done, self._header.table_entries - place)
            table = self._tables.get(number)
            if table is not None:
                mask = (1 << part) - 1
                data |= (table.data >> place & mask) << done
                zeros |= (table.zeros >> place & mask) << done
            done += part
        return data, zeros, (1 << count) - 1

    def placements(self) -> Iterator[Placement]:
        """All present blocks, ascending in the disk and in the image."""
        size = self._header.cluster_size
        runs = self._runs()
        offset = left = 0
        index = self.present.find(1)
        while index >= 0:
            data, zeros, inside = self._of_block(index)
            block_end = min(BLOCK_SIZE, self._header.size - index * BLOCK_SIZE)
            spans: list[Span] = []
            for first, count in _ones(data):
                place, end = first * size, (first + count) * size
                while place < end:
                    if not left:
                        offset, left = next(runs)
                    length = min(end - place, left)
                    # of the last cluster, only what is inside the disk
                    spans.append(Span(place, min(length, block_end - place), offset))
                    offset += length
                    left -= length
                    place += length
            empty = zeros if self._is_differencing else inside & ~data
            clear = [
                (first * size, min((first + count) * size, block_end))
                for first, count in _ones(empty)
            ]
            if block_end < BLOCK_SIZE:
                clear.append((block_end, BLOCK_SIZE))
            yield Placement(index, spans, clear)
            index = self.present.find(1, index + 1)

    def _runs(self) -> Iterator[tuple[int, int]]:
        """``(offset, length)`` of everything in the file, in its order."""
        size = self._header.cluster_size
        for table in self._tables.values():
            ends = [*table.jumps[1:], table.data.bit_count()]
            for offset, first, end in zip(table.offsets, table.jumps, ends, strict=False):
                yield offset, (end - first) * size


def _ones(bits: int) -> Iterator[tuple[int, int]]:
    """``(first, count)`` of each row of ones."""
    done = 0
    while bits:
        skip = (bits & -bits).bit_length() - 1
        bits >>= skip
        count = (~bits & bits + 1).bit_length() - 1
        yield done + skip, count
        bits >>= count
        done += skip + count


def row(first: int, count: int, size: int) -> bytes:
    """``count`` entries from ``first`` on, each ``size`` above the one before."""
    ones, steps = _lanes(count, size)
    return (first * ones + steps).to_bytes(8 * count, "big")


@functools.lru_cache(maxsize=64)
def _lanes(count: int, size: int) -> tuple[int, int]:
    """1, 1, … and 0, ``size``, 2 ``size``, … as words of one number."""
    ones = int.from_bytes((1).to_bytes(8, "big") * count, "big")
    steps = b"".join((size * number).to_bytes(8, "big") for number in range(count))
    return ones, int.from_bytes(steps, "big")


def _words(data: bytes | memoryview) -> array[int]:
    words = array("Q")
    words.frombytes(bytes(data))
    if sys.byteorder == "little":
        words.byteswap()
    return words


def _corrupt(what: str, message: str, offset: int) -> Corrupt:
    return Corrupt(f"corrupt qcow2: {message}", data={"what": what, "offset": offset})
