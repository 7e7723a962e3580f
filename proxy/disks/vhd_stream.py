"""VHD as a stream: what XAPI exports, and what it imports."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Final

from proxy.disks.bitmap import settle_bitmap
from proxy.disks.disk import Block, Blocks, block_count, length_of
from proxy.disks.streaming import Exact, read_ahead
from proxy.disks.vhd_places import about_block, check_table
from proxy.disks.writing import Announced, Shape
from proxy.formats import vhd
from proxy.runtime.threads import Work, in_thread

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from contextlib import AbstractAsyncContextManager
    from uuid import UUID

    from proxy.disks.disk import BlockReader, Disk
    from proxy.disks.streaming import ByteSource
    from proxy.formats.vhd import Header
    from proxy.runtime.buffers import BufferPool

_ENTRIES_PER_READ: Final = 1 << 18


class VhdStream:
    """A disk that comes as a stream; read once, by one task."""

    def __init__(
        self,
        stream: Exact,
        raw_footer: bytes,
        header: Header,
        table: array[int],
        order: Sequence[int],
    ) -> None:
        self.footer = vhd.Footer.parse(raw_footer)
        self.header = header
        self.virtual_size = self.footer.current_size
        self.is_differencing = self.footer.is_differencing
        self.blocks = Blocks(vhd.present_flags(table))
        self.order = order
        """By their place in the stream."""
        self._raw_footer = raw_footer
        self._stream = stream
        self._table = table
        self._was_read = False

    def read(self, pool: BufferPool) -> AbstractAsyncContextManager[BlockReader]:
        """See :meth:`proxy.disks.disk.Disk.read`.  ``ValueError`` when it was called before.

        After the last block the stream must bring the footer of its start once more, and
        nothing else but zeros; then the source must confirm its end.
        """
        if self._was_read:
            raise ValueError("a stream can be read only once")
        self._was_read = True
        return read_ahead(self._produce, pool)

    async def _produce(self, pool: BufferPool, give: Callable[[Block], Awaitable[None]]) -> None:
        stream = self._stream
        rest = b""
        for index in self.order:
            await stream.skip_to(self._table[index] * vhd.SECTOR)
            buffer = await pool.acquire()
            try:
                rest = await self._fill(index, buffer.memory)
                buffer.length = len(buffer.memory)
            except BaseException:
                buffer.release()
                raise
            await give(Block(index, buffer))
        await self._end(rest)

    async def _fill(self, index: int, stored: memoryview) -> bytes:
        """Read one block; what was read behind it, when it is the last one and cut."""
        start = self._stream.offset
        length = length_of(index, self.virtual_size)
        wanted = vhd.BITMAP_SIZE + length
        rest = b""
        if length < vhd.BLOCK_SIZE and index == self.order[-1]:
            # It may end where the disk does, or be padded with anything to 2 MiB.
            count = await self._stream.fill_up_to(stored)
            if count < wanted:
                await self._stream.raise_cut()
            if count < len(stored):
                rest = bytes(stored[wanted:count])
        else:
            await self._stream.fill(stored[:wanted])
        with about_block(index, start):
            settle_bitmap(stored, length, is_differencing=self.is_differencing)
        return rest

    async def _end(self, rest: bytes) -> None:
        """A stream that was cut right behind its last block is not whole."""
        stream = self._stream
        if not self.order:
            start = bytearray(2 * vhd.SECTOR)
            rest = bytes(start[: await stream.fill_up_to(memoryview(start))])
            stream.refuse_answer(rest, stream.offset - len(rest))
        # Without blocks, locators or a map may follow the table, which nothing tells to skip.
        rest = await stream.last(rest, vhd.FOOTER_SIZE, only_zeros_before=bool(self.order))
        at = stream.offset - len(rest)
        stream.refuse_answer(rest, at)
        if len(rest) <= vhd.FOOTER_SIZE:  # this is the end, the right one or not
            await stream.finish()
        if rest != self._raw_footer or at % vhd.SECTOR:
            raise stream.corrupt("end footer", "it does not end with the footer of its start", at)


async def open_vhd_stream(source: ByteSource) -> VhdStream:
    """Read what comes before the blocks: footer, header, table.

    Tolerant as :func:`~proxy.disks.vhd_file.open_vhd_file`, but for blocks before the table.
    Raises ``Corrupt`` with ``what`` and ``offset``, or what the source raises.
    """
    stream = Exact(source, "VHD")
    head = bytearray(vhd.FOOTER_SIZE + vhd.HEADER_SIZE)
    await stream.begin(memoryview(head))
    raw_footer = bytes(head[: vhd.FOOTER_SIZE])
    footer = vhd.Footer.parse(raw_footer)
    header = vhd.Header.parse(bytes(head[vhd.FOOTER_SIZE :]))
    vhd.check(footer, header)
    await stream.skip_to(header.table_offset)
    table = await _read_table(stream, block_count(footer.current_size))
    order = await in_thread(Work.CPU, check_table, table, header, footer.current_size, None)
    if order and table[order[0]] * vhd.SECTOR < stream.offset:
        raise stream.corrupt(
            "block place", f"block {order[0]} comes before the table", table[order[0]] * vhd.SECTOR
        )
    return VhdStream(stream, raw_footer, header, table, order)


async def _read_table(stream: Exact, count: int) -> array[int]:
    """In pieces: what a header announces costs memory only when it comes."""
    table = array("I")
    piece = memoryview(bytearray(4 * min(count, _ENTRIES_PER_READ)))
    while (missing := count - len(table)) > 0:
        entries = min(missing, _ENTRIES_PER_READ)
        await stream.fill(piece[: 4 * entries])
        table.extend(vhd.parse_table(piece, entries))
    return table


def vhd_length(disk: Disk) -> int:
    """Bytes of ``disk`` as :func:`send_vhd` sends it."""
    return vhd.stream_size(block_count(disk.virtual_size), len(disk.blocks))


async def send_vhd(
    disk: Disk,
    pool: BufferPool,
    sink: Callable[[memoryview], Awaitable[None]],
    *,
    uuid: UUID,
    timestamp: int,
) -> None:
    """Give ``disk`` to ``sink`` as a VHD stream of :func:`vhd_length` bytes.

    Differencing if the disk is, without naming a parent.  A view is valid only during the
    call that it is given to.  Raises what the disk and the sink raise, ``Refused``
    (``EFBIG``) for more than a VHD can hold.  On an error or a cancel the stream is cut.
    """
    shape = Shape(
        virtual_size=disk.virtual_size,
        order=disk.order,
        uuid=uuid,
        timestamp=timestamp,
        is_differencing=disk.is_differencing,
    )
    await sink(memoryview(await in_thread(Work.CPU, shape.pack_start)))
    announced = Announced(shape.order)
    async with disk.read(pool) as reader:
        while (block := await reader.next()) is not None:
            try:
                announced.came(block.index)
                await sink(block.stored)
            finally:
                block.release()
    announced.all_came()
    await sink(memoryview(shape.pack_footer()))
