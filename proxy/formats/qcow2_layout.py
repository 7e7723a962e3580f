"""qcow2: where everything of a new image goes, and its tables."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from proxy.formats.qcow2 import CLUSTER_BITS, COPIED, Header, row
from proxy.formats.vhd import BLOCK_SIZE, blocks_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


def image_size(virtual_size: int, order: Sequence[int]) -> int:
    """Bytes of an image with these blocks of 2 MiB; see :class:`Layout`."""
    return _Counts(virtual_size, order).total << _bits_for(virtual_size)


def _bits_for(virtual_size: int) -> int:
    """64 KiB, or the smallest clusters with which the L1 table is a single one.

    XAPI's import counts the entries of every cluster of the L1 table from zero, so that with
    two of them (above 4 TiB) it would write data to wrong places.
    """
    bits = CLUSTER_BITS
    while virtual_size > 1 << (3 * bits - 6):
        bits += 1
    return bits


class _Counts:
    """How many clusters each part of an image has."""

    def __init__(self, virtual_size: int, order: Sequence[int]) -> None:
        size = 1 << _bits_for(virtual_size)
        per_block = BLOCK_SIZE // size
        entries = size // 8
        self.disk = -(-virtual_size // size)
        self.tables = -(-self.disk // entries)
        self.used = sorted({index * per_block // entries for index in order})
        """Numbers of the L2 tables that are written."""
        self.data = len(order) * per_block
        last = blocks_of(virtual_size) - 1
        if last in order:
            self.data -= (last + 1) * per_block - self.disk
        self.refcount_tables = 0
        self.refcount_blocks = 0
        self.total = 2 + len(self.used) + self.data  # with the header and the L1 table
        while (blocks := -(-self.total // (size // 2))) != self.refcount_blocks:
            # the clusters that hold the counts are counted too
            tables = -(-blocks // entries)
            self.total += blocks - self.refcount_blocks + tables - self.refcount_tables
            self.refcount_blocks, self.refcount_tables = blocks, tables


class Layout:
    """A new image: header, reference counts, L1 table, the used L2 tables, data.

    As Xen Orchestra writes it: version 2, no backing file, all clusters used once, nothing
    between them, the virtual size rounded up to a cluster (XAPI's import counts whole ones).
    The blocks of ``order`` follow :meth:`metadata` in that order, each :meth:`length_of` bytes.
    """

    def __init__(self, virtual_size: int, order: Sequence[int]) -> None:
        counts = _Counts(virtual_size, order)
        self._counts = counts
        self._bits = _bits_for(virtual_size)
        self._cluster = 1 << self._bits
        self._per_block = BLOCK_SIZE // self._cluster
        self.size = counts.total * self._cluster
        """Bytes of the image."""
        self._places = array("I", bytes(4 * blocks_of(virtual_size)))
        place = counts.total - counts.data
        for index in order:
            self._places[index] = place
            place += self.length_of(index) // self._cluster

    def length_of(self, index: int) -> int:
        """Bytes of a block in the image: whole clusters."""
        clusters = min(self._per_block, self._counts.disk - index * self._per_block)
        return clusters * self._cluster

    def metadata(self) -> Iterator[bytes]:
        """Everything before the data, cluster by cluster."""
        counts = self._counts
        blocks_at = 1 + counts.refcount_tables
        l1_at = blocks_at + counts.refcount_blocks
        yield self._padded(
            Header(
                size=counts.disk * self._cluster,
                l1_size=counts.tables,
                l1_offset=l1_at * self._cluster,
                refcount_offset=self._cluster,
                refcount_clusters=counts.refcount_tables,
                cluster_bits=self._bits,
            ).pack()
        )
        entries = self._cluster // 8
        for first in range(0, counts.refcount_blocks, entries):
            count = min(entries, counts.refcount_blocks - first)
            yield self._padded(self._entries(blocks_at + first, count))
        for first in range(0, counts.total, self._cluster // 2):
            yield self._padded(b"\0\1" * min(self._cluster // 2, counts.total - first))
        l1 = bytearray(self._cluster)
        for place, number in enumerate(counts.used, l1_at + 1):
            l1[8 * number : 8 * number + 8] = self._entries(place, 1, COPIED)
        yield bytes(l1)
        for number in counts.used:
            yield self._l2(number)

    def _l2(self, number: int) -> bytes:
        blocks = self._cluster // 8 // self._per_block
        first = number * blocks
        absent = bytes(8 * self._per_block)
        return self._padded(
            b"".join(
                self._entries(place, self.length_of(index) // self._cluster, COPIED)
                if place
                else absent
                for index, place in enumerate(self._places[first : first + blocks], first)
            )
        )

    def _entries(self, first: int, count: int, flags: int = 0) -> bytes:
        """Entries of clusters that follow each other."""
        return row(first * self._cluster | flags, count, self._cluster)

    def _padded(self, data: bytes) -> bytes:
        return data.ljust(self._cluster, b"\0")
