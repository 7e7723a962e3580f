"""qcow2 as the pool streams and takes it.

Out: version 3, clusters of 64 KiB, only those that are not zero or differ from the base, whose
name is not told.  In: tables first, then clusters without a gap between them, written over
what the disk holds.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from proxy.errors import Corrupt
from proxy.formats.qcow2 import HEADER_SIZE, Header
from proxy.simulator.disks import UNIT, ZEROS, DiskContent, Stamped
from proxy.simulator.receiving import SteppedReceiver

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator

    from proxy.simulator.images import Sending
    from proxy.simulator.receiving import Wanted

CLUSTER = 65536
_ENTRIES = CLUSTER // 8
_COUNTS = CLUSTER // 2
_HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQIIQ")
_COPIED = 1 << 63
_COMPRESSED = 1 << 62
_OFFSET = 0x00FF_FFFF_FFFF_FE00


# Out


def qcow2_pieces(sending: Sending) -> tuple[Iterator[memoryview], int]:
    """The pieces of a stream and its length in bytes.  Reads the disk, and its base, before."""
    clusters = list(_clusters(sending))
    front = _front(sending.content.size, clusters)
    return _pieces(sending.content, clusters, front), len(front) + len(clusters) * CLUSTER


def _clusters(sending: Sending) -> Iterator[int]:
    content = sending.content
    per_unit = UNIT // CLUSTER
    for block in sending.blocks():
        for number in (2 * block, 2 * block + 1):
            ours = content.stored(number) if content.visible(number) else None
            whole = isinstance(ours, Stamped) and content.visible(number) == UNIT
            if sending.base is None and whole:
                yield from range(number * per_unit, (number + 1) * per_unit)
                continue
            for cluster in range(number * per_unit, (number + 1) * per_unit):
                other = ZEROS[:CLUSTER]
                if sending.base is not None:
                    other = _cluster(sending.base.content, cluster)
                if bytes(_cluster(content, cluster)) != bytes(other):
                    yield cluster


def _cluster(content: DiskContent, cluster: int) -> memoryview:
    """With zeros behind the end of the disk."""
    offset = cluster * CLUSTER
    length = max(0, min(CLUSTER, content.size - offset))
    pieces = content.read(offset, length) if length else None
    if pieces is None:
        return ZEROS[:CLUSTER]
    if len(pieces) == 1 and length == CLUSTER:
        return pieces[0]
    return memoryview(b"".join(pieces).ljust(CLUSTER, b"\0"))


def _front(size: int, clusters: list[int]) -> bytes:
    """Header, table and blocks of reference counts, L1 table, L2 tables."""
    entries = -(-size // CLUSTER // _ENTRIES)
    l1_clusters = -(-entries // _ENTRIES)
    used = sorted({cluster // _ENTRIES for cluster in clusters})
    bare = 1 + l1_clusters + len(used) + len(clusters)
    counts = tables = 0
    while counts * _COUNTS < bare + counts + tables:
        counts += 1
        tables = -(-counts // _ENTRIES)
    l1_at = 1 + tables + counts
    l2_at = l1_at + l1_clusters
    header = _HEADER.pack(
        b"QFI\xfb",
        3,
        0,
        0,
        16,
        size,
        0,
        entries,
        l1_at * CLUSTER if entries else 0,
        CLUSTER,
        tables,
        0,
        0,
        0,
        0,
        0,
        4,
        112,
        0,
    )
    l1 = [0] * entries
    for place, number in enumerate(used, l2_at):
        l1[number] = place * CLUSTER | _COPIED
    l2 = {number: [0] * _ENTRIES for number in used}
    for place, cluster in enumerate(clusters, l2_at + len(used)):
        l2[cluster // _ENTRIES][cluster % _ENTRIES] = place * CLUSTER | _COPIED
    return b"".join(
        [
            _padded(header),
            _padded(_words((1 + tables + nth) * CLUSTER for nth in range(counts))),
            _padded(b"\0\1" * (bare + counts + tables)),
            _padded(_words(l1)),
            *(_words(l2[number]) for number in used),
        ]
    )


def _words(values: Iterable[int]) -> bytes:
    return b"".join(value.to_bytes(8, "big") for value in values)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % CLUSTER)


def _pieces(content: DiskContent, clusters: list[int], front: bytes) -> Iterator[memoryview]:
    yield memoryview(front)
    for cluster in clusters:
        yield _cluster(content, cluster)


# In


class Qcow2Receiver(SteppedReceiver):
    """Writes a stream's clusters into ``content`` as they come.

    With what is known of XAPI's own reader: it takes no compressed clusters, no image without
    data and no gap between clusters, and it counts the L1 entries of each cluster of that
    table from zero, so that with a second one data lands in wrong places.
    """

    def __init__(self, content: DiskContent, _length: int) -> None:
        self._content = content
        super().__init__()

    def steps(self) -> Generator[Wanted]:
        head = memoryview(bytearray(HEADER_SIZE))
        yield head
        header = Header.parse(head)
        size = header.cluster_size
        yield self.gap(header.l1_offset)
        l1 = memoryview(bytearray(8 * header.l1_size))
        yield l1
        places: dict[int, int] = {}
        raw = memoryview(bytearray(size))
        for nth, place in _used(l1):
            yield self.gap(place)
            yield raw
            for number, at in _used(raw):
                places[at] = (nth % header.table_entries * header.table_entries + number) * size
        if not places:
            raise Corrupt("no data at all")
        yield self.gap(min(places))
        for at in sorted(places):
            if at != self._position:
                raise Corrupt(f"a cluster at {at} when byte {self._position} was read")
            yield raw
            self._store(places[at], raw)

    def _store(self, offset: int, data: memoryview) -> None:
        inside = max(0, min(len(data), self._content.size - offset))
        if bytes(data[inside:]).strip(b"\0"):
            raise Corrupt(f"data beyond the end of the disk, at {offset + inside}")
        if inside:
            self._content.write(offset, data[:inside])


def _used(table: memoryview) -> Iterator[tuple[int, int]]:
    for number, (entry,) in enumerate(struct.iter_unpack(">Q", table)):
        if entry & _COMPRESSED:
            raise Corrupt("compressed clusters")
        if entry & _OFFSET:
            yield number, entry & _OFFSET
