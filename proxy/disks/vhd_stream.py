"""VHD as a stream: what XAPI exports, and what it imports."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final, Protocol

import trio

from proxy.disks.bitmap import settle_bitmap
from proxy.disks.disk import Block, Blocks, block_count, length_of
from proxy.disks.vhd_file import check_table
from proxy.errors import Corrupt
from proxy.formats import vhd
from proxy.runtime.background import background

if TYPE_CHECKING:
    from array import array
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
    from contextlib import AbstractAsyncContextManager
    from uuid import UUID

    from proxy.disks.disk import BlockReader, Disk
    from proxy.formats.vhd import Footer, Header
    from proxy.runtime.buffers import BufferPool

_AHEAD: Final = 4
"""Blocks that are read before the consumer asks for them."""
_LARGEST_GAP: Final = 64 * 1024 * 1024
"""Bytes between two blocks: parent locators, maps and padding have a few KiB."""


class ByteSource(Protocol):
    """A stream of bytes with an end that must be confirmed."""

    async def read_into(self, view: memoryview, /) -> int:
        """Fill ``view`` with what is there; at least one byte, 0 at the end."""
        ...

    async def finish(self) -> None:
        """After the last byte: raise unless the source says that it was all and all well."""
        ...


class VhdStream:
    """A disk that comes as a stream; read once, by one task."""

    def __init__(self, stream: Exact, footer: Footer, header: Header, table: array[int]) -> None:
        self.footer = footer
        self.header = header
        self.virtual_size = footer.current_size
        self.is_differencing = footer.is_differencing
        self._stream = stream
        self._table = table
        used = [index for index, sector in enumerate(table) if sector != vhd.UNUSED]
        self._order = tuple(sorted(used, key=table.__getitem__))
        self.blocks = Blocks.of(used, len(table))

    @property
    def order(self) -> Sequence[int]:
        """By their place in the stream."""
        return self._order

    def read(self, pool: BufferPool) -> AbstractAsyncContextManager[BlockReader]:
        """See :meth:`proxy.disks.disk.Disk.read`."""
        return read_ahead(self._blocks, pool)

    async def _blocks(self, pool: BufferPool, give: Callable[[Block], Awaitable[None]]) -> None:
        stream = self._stream
        for index in self._order:
            await stream.skip_to(self._table[index] * vhd.SECTOR)
            length = length_of(index, self.virtual_size)
            buffer = await pool.acquire()
            try:
                at = stream.offset
                # The last block may be cut where the disk ends, or be padded to 2 MiB: what
                # follows its own bytes is skipped like any gap.
                await stream.fill(buffer.memory[: vhd.BITMAP_SIZE + length])
                try:
                    settle_bitmap(buffer.memory, length, is_differencing=self.is_differencing)
                except Corrupt as error:
                    raise Corrupt(error.message, data={**error.data, "offset": at}) from error
                buffer.length = len(buffer.memory)
            except BaseException:
                buffer.release()
                raise
            await give(Block(index, buffer))
        await self._end()

    async def _end(self) -> None:
        """The stream must end with its footer: one cut behind its last block is not whole."""
        rest = await self._stream.last(vhd.FOOTER_SIZE)
        at = self._stream.offset - len(rest)
        if vhd.Footer.parse(rest, offset=at) != self.footer:
            raise _corrupt("end footer", "the footer at its end is not the one at its start", at)
        await self._stream.finish()


async def open_vhd_stream(source: ByteSource) -> VhdStream:
    """Read what comes before the blocks: footer, header, table.

    Raises ``Corrupt`` with ``what`` and ``offset``, or what the source raises.
    """
    stream = Exact(source, "VHD")
    head = bytearray(vhd.FOOTER_SIZE + vhd.HEADER_SIZE)
    await stream.fill(memoryview(head))
    footer = vhd.Footer.parse(bytes(head[: vhd.FOOTER_SIZE]))
    header = vhd.Header.parse(bytes(head[vhd.FOOTER_SIZE :]))
    vhd.check(footer, header)
    await stream.skip_to(header.table_offset)
    count = block_count(footer.current_size)
    raw = bytearray(4 * count)
    await stream.fill(memoryview(raw))
    table = vhd.parse_table(memoryview(raw), count)
    check_table(table, header, footer.current_size, None)
    return VhdStream(stream, footer, header, table)


class Exact:
    """A source read in exact pieces, forward only; knows its offset.

    ``kind`` is what it should be, for the errors.
    """

    def __init__(self, source: ByteSource, kind: str) -> None:
        self.offset = 0
        self.largest_gap = _LARGEST_GAP
        """Bytes that may be left out at one place."""
        self._source = source
        self._kind = kind

    async def fill(self, view: memoryview) -> None:
        """Fill all of ``view``.  ``Corrupt`` when the stream ends before."""
        start = self.offset
        done = 0
        while done < len(view):
            count = await self._source.read_into(view[done:])
            if count == 0:
                raise self._corrupt("stream cut", f"it ends at byte {self.offset}", self.offset)
            done += count
            self.offset += count
        if start == 0 and bytes(view[:5]) == b"HTTP/":
            # XAPI answers an error that it meets after its head with a second answer
            raise self._corrupt("HTTP answer", "invalid HTTP header in response body", 0)

    async def skip_to(self, offset: int) -> None:
        """Throw away what lies before ``offset``."""
        gap = offset - self.offset
        if gap < 0:
            message = f"byte {offset} is wanted when it is read up to {self.offset}"
            raise self._corrupt("order", message, self.offset)
        if gap > self.largest_gap:
            raise self._corrupt("gap", f"{gap} bytes to what comes next", self.offset)
        scrap = memoryview(bytearray(min(gap, 64 * 1024)))
        while gap > 0:
            await self.fill(scrap[:gap])
            gap = offset - self.offset

    async def last(self, size: int) -> bytes:
        """Read to the end; the last ``size`` bytes, fewer when there are no more."""
        kept = bytearray()
        scrap = memoryview(bytearray(64 * 1024))
        start = self.offset
        while (count := await self._source.read_into(scrap)) > 0:
            self.offset += count
            if self.offset - start > self.largest_gap:
                raise self._corrupt("gap", "it goes on behind its last block", self.offset)
            kept += scrap[:count]
            del kept[:-size]
        return bytes(kept)

    async def drain(self) -> None:
        """Read to the end."""
        await self.last(1)

    async def finish(self) -> None:
        await self._source.finish()

    def _corrupt(self, what: str, message: str, offset: int) -> Corrupt:
        return Corrupt(
            f"corrupt {self._kind} stream: {message}", data={"what": what, "offset": offset}
        )


@contextlib.asynccontextmanager
async def read_ahead(
    produce: Callable[[BufferPool, Callable[[Block], Awaitable[None]]], Awaitable[None]],
    pool: BufferPool,
) -> AsyncIterator[BlockReader]:
    """Run ``produce(pool, give)`` beside the block, a few blocks ahead of its consumer.

    What ``produce`` raises is raised by ``next``, behind the blocks given before.  Leaving
    cancels it and gives all buffers back.
    """
    send, receive = trio.open_memory_channel["Block"](_AHEAD)
    reader = _Ahead(receive)

    async def run() -> None:
        with send:
            try:
                await produce(pool, give)
            except Exception as error:  # noqa: BLE001  raised by ``next``
                reader.failure = error

    async def give(block: Block) -> None:
        try:
            await send.send(block)
        except BaseException:
            block.buffer.release()
            raise

    async with background() as nursery:
        nursery.start_soon(run)
        try:
            yield reader
        finally:
            nursery.cancel_scope.cancel()
            reader.close()


class _Ahead:
    def __init__(self, receive: trio.MemoryReceiveChannel[Block]) -> None:
        self.failure: Exception | None = None
        self._receive = receive

    async def next(self) -> Block | None:
        try:
            return await self._receive.receive()
        except trio.EndOfChannel:
            if self.failure is not None:
                raise self.failure from None
            return None

    def close(self) -> None:
        with contextlib.suppress(trio.WouldBlock, trio.EndOfChannel, trio.ClosedResourceError):
            while True:
                self._receive.receive_nowait().buffer.release()
        self._receive.close()


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
    call that it is given to.  On cancel the stream is cut.
    """
    count = block_count(disk.virtual_size)
    table = vhd.empty_table(count)
    first = (vhd.TABLE_OFFSET + vhd.table_size(count)) // vhd.SECTOR
    for position, index in enumerate(disk.order):
        table[index] = first + position * (vhd.STORED_BLOCK // vhd.SECTOR)
    disk_type = vhd.DiskType.DIFFERENCING if disk.is_differencing else vhd.DiskType.DYNAMIC
    footer = vhd.Footer.make(disk.virtual_size, disk_type, uuid, timestamp=timestamp).pack()
    head = footer + vhd.Header(max_entries=count).pack() + vhd.pack_table(table)
    await sink(memoryview(head))
    async with disk.read(pool) as reader:
        while (block := await reader.next()) is not None:
            try:
                await sink(block.stored)
            finally:
                block.buffer.release()
    await sink(memoryview(footer))


def _corrupt(what: str, message: str, offset: int) -> Corrupt:
    return Corrupt(f"corrupt VHD stream: {message}", data={"what": what, "offset": offset})
