"""qcow2 as a stream: what XAPI exports and imports of disks that are too large for a VHD."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from proxy.disks.disk import Block, Blocks, RandomAccess
from proxy.disks.streaming import Exact, read_ahead
from proxy.errors import Corrupt
from proxy.formats import qcow2
from proxy.formats.qcow2_layout import Layout, image_size
from proxy.formats.vhd import BITMAP_SIZE, BLOCK_SIZE
from proxy.runtime.threads import Work, in_thread

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from contextlib import AbstractAsyncContextManager

    from proxy.disks.disk import BlockReader, Disk, RandomDisk
    from proxy.disks.streaming import ByteSource
    from proxy.formats.qcow2 import ClusterMap, Header, Table
    from proxy.runtime.buffers import BufferPool

_MOST_JUMPS: Final = 4 * 1024 * 1024
"""Places where a cluster does not follow the one before; XAPI streams have none."""
_ZEROS: Final = memoryview(bytes(BLOCK_SIZE))


class Qcow2Stream:
    """A disk that comes as a qcow2 stream; read once, by one task.

    A differencing stream has clusters of 64 KiB, so that a block may be here only in part.  The
    rest of it is the parent's: set :attr:`parent` before reading when :attr:`partial` is not
    empty.  Such a block is given whole, the parent's bytes with the stream's over them.
    """

    def __init__(
        self, stream: Exact, header: Header, clusters: ClusterMap, *, is_differencing: bool
    ) -> None:
        self.virtual_size = header.size
        self.is_differencing = is_differencing
        self.blocks = Blocks(clusters.present)
        self.partial = Blocks(clusters.partial)
        """Blocks of which the stream has some clusters only; none unless differencing."""
        self.parent: RandomDisk | None = None
        """What the stream differs from, down to its full disk; stays open while reading."""
        self._stream = stream
        self._clusters = clusters

    @property
    def order(self) -> Sequence[int]:
        return tuple(self.blocks)

    def read(self, pool: BufferPool) -> AbstractAsyncContextManager[BlockReader]:
        """See :meth:`proxy.disks.disk.Disk.read`.

        ``next`` raises ``Corrupt`` (``what`` is "partial block") at a block that needs a parent
        which is not there, and what reading the parent raises.
        """
        return read_ahead(self._blocks, pool)

    async def _blocks(self, pool: BufferPool, give: Callable[[Block], Awaitable[None]]) -> None:
        # The parent's blocks are read ahead of the stream, several at once, into the very
        # buffers that the stream then fills up.
        async with _Beneath(self).read(pool) as beneath:
            for placement in self._clusters.placements():
                block = await beneath.next()
                assert block is not None
                assert block.index == placement.index
                try:
                    await self._lay_over(block.data, placement)
                except BaseException:
                    block.release()
                    raise
                await give(block)
        await self._stream.drain()
        await self._stream.finish()

    async def _lay_over(self, data: memoryview, placement: qcow2.Placement) -> None:
        for span in placement.spans:
            await self._stream.skip_to(span.offset)
            await self._stream.fill(data[span.start : span.start + span.length])
        for start, end in placement.clear:
            data[start:end] = _ZEROS[: end - start]


class _Beneath(RandomAccess):
    """What lies under the clusters of a stream: the parent's content in partial blocks, nothing
    in particular in others."""

    def __init__(self, stream: Qcow2Stream) -> None:
        self.virtual_size = stream.virtual_size
        self.is_differencing = stream.is_differencing
        self.blocks = stream.blocks
        self._partial = stream.partial
        self._parent = stream.parent

    async def read_block(self, index: int, into: memoryview) -> None:
        if index not in self._partial:
            return
        parent = self._parent
        if parent is not None and index in parent.blocks:
            await parent.read_block(index, into)
        elif parent is not None and not parent.is_differencing:
            into[BITMAP_SIZE:] = _ZEROS
        else:
            raise Corrupt(
                f"corrupt qcow2 stream: the rest of block {index} is not in a parent",
                data={"what": "partial block", "block": index, "offset": index * BLOCK_SIZE},
            )


async def open_qcow2_stream(
    source: ByteSource, *, is_differencing: bool | None = None
) -> Qcow2Stream:
    """Read what comes before the data: header, L1 table, L2 tables.

    ``is_differencing`` says whether the export had a base, which an XAPI stream does not tell;
    without it the disk is differencing if it names a backing file.  Raises ``Corrupt`` with
    ``what`` and ``offset``, also for images that cannot be read forward: the tables must stand
    before all clusters, these in the order of the disk.  Raises what the source raises.
    """
    stream = Exact(source, "qcow2")
    head = bytearray(qcow2.HEADER_SIZE)
    await stream.begin(memoryview(head))
    header = qcow2.Header.parse(memoryview(head))
    stream.largest_gap = header.longest
    if is_differencing is None:
        is_differencing = header.backing_offset != 0
    elif header.backing_offset and not is_differencing:
        raise Corrupt(
            "corrupt qcow2: a full export names a backing file",
            data={"what": "backing file", "offset": 8},
        )
    tables = await _read_tables(stream, header)
    clusters = await in_thread(
        Work.CPU,
        lambda: qcow2.ClusterMap(header, tables, stream.offset, is_differencing=is_differencing),
    )
    return Qcow2Stream(stream, header, clusters, is_differencing=is_differencing)


async def _read_tables(stream: Exact, header: Header) -> dict[int, Table]:
    tables: dict[int, Table] = {}
    if not header.tables:
        return tables
    await stream.skip_to(header.l1_offset)
    raw = memoryview(bytearray(8 * header.tables))
    await stream.fill(raw)
    l1 = qcow2.parse_l1(raw, header)
    raw = memoryview(bytearray(header.cluster_size))
    jumps = 0
    for number, offset in l1.items():
        await stream.skip_to(offset)
        await stream.fill(raw)
        table = qcow2.parse_l2(raw, header, number, offset)
        tables[number] = table
        jumps += len(table.jumps)
        if jumps > _MOST_JUMPS:
            raise Corrupt(
                "corrupt qcow2: its clusters are scattered over the image",
                data={"what": "cluster order", "offset": offset},
            )
    return tables


# Writing


def qcow2_length(disk: Disk) -> int:
    """Bytes of ``disk`` as :func:`send_qcow2` sends it."""
    return image_size(disk.virtual_size, _sent(disk))


async def send_qcow2(
    disk: Disk, pool: BufferPool, sink: Callable[[memoryview], Awaitable[None]]
) -> None:
    """Give ``disk`` to ``sink`` as a qcow2 stream of :func:`qcow2_length` bytes.

    The stream names no parent: a differencing disk is written over what is in its place.  A
    view is valid only during the call that it is given to.  On cancel the stream is cut.
    """
    layout = Layout(disk.virtual_size, _sent(disk))
    for piece in layout.metadata():
        await sink(memoryview(piece))
    if not disk.blocks:
        for index in _sent(disk):
            await sink(_ZEROS[: layout.length_of(index)])
    expected = iter(disk.order)
    async with disk.read(pool) as reader:
        while (block := await reader.next()) is not None:
            try:
                if block.index != next(expected, None):
                    raise ValueError(f"block {block.index} is not the one announced")
                await sink(block.data[: layout.length_of(block.index)])
            finally:
                block.release()
    if (missing := next(expected, None)) is not None:
        raise Corrupt(
            f"the disk ended before its block {missing}",
            data={"what": "blocks missing", "offset": missing * BLOCK_SIZE},
        )


def _sent(disk: Disk) -> Sequence[int]:
    """The blocks that travel: XAPI's import fails on an image without any data, so of an empty
    disk the first one."""
    return disk.order or range(0 if disk.is_differencing else min(1, disk.blocks.count))
