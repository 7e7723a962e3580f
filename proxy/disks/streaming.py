"""Disks that come as a stream of bytes: read forward, ahead of their consumer, to a proven end."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final, NoReturn, Protocol

import trio

from proxy.errors import Corrupt
from proxy.runtime.background import background

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from proxy.disks.disk import Block, BlockReader
    from proxy.runtime.buffers import BufferPool

_AHEAD: Final = 4
"""Blocks that are read before the consumer asks for them."""
_PIECE: Final = 64 * 1024


class ByteSource(Protocol):
    """A stream of bytes with an end that must be confirmed."""

    async def read_into(self, view: memoryview, /) -> int:
        """Fill ``view`` with what is there; at least one byte, 0 at the end."""
        ...

    async def finish(self) -> None:
        """After the last byte: raise unless the source says that it was all and all well."""
        ...


class Exact:
    """A source read in exact pieces, forward only; knows its offset.

    ``kind`` is what it should be, for the errors: ``Corrupt`` with ``what`` and ``offset``.
    """

    def __init__(self, source: ByteSource, kind: str) -> None:
        self.offset = 0
        self.largest_gap: int | None = None
        """Bytes that may be left out at one place, where the format bounds them."""
        self._source = source
        self._kind = kind

    async def begin(self, view: memoryview) -> None:
        """:meth:`fill` for the first bytes, which may be no image but the host's error."""
        count = await self.fill_up_to(view)
        self.refuse_answer(bytes(view[:count]), 0)
        if count < len(view):
            await self.raise_cut()

    async def fill(self, view: memoryview) -> None:
        """Fill all of ``view``.  See :meth:`raise_cut` for a stream that ends before."""
        if await self.fill_up_to(view) < len(view):
            await self.raise_cut()

    async def fill_up_to(self, view: memoryview) -> int:
        """Fill ``view`` as far as the stream goes."""
        done = 0
        while done < len(view):
            count = await self._source.read_into(view[done:])
            if count == 0:
                break
            done += count
            self.offset += count
        return done

    async def skip_to(self, offset: int) -> None:
        """Throw away what lies before ``offset``."""
        gap = offset - self.offset
        if gap < 0:
            message = f"byte {offset} is wanted when it is read up to {self.offset}"
            raise self.corrupt("order", message, self.offset)
        if self.largest_gap is not None and gap > self.largest_gap:
            raise self.corrupt("gap", f"{gap} bytes to what comes next", self.offset)
        scrap = memoryview(bytearray(min(gap, _PIECE)))
        while (gap := offset - self.offset) > 0:
            await self.fill(scrap[:gap])

    async def last(self, start: bytes, size: int, *, only_zeros_before: bool) -> bytes:
        """The last ``size`` bytes of ``start`` and the rest of the stream.

        Fewer when there are no more; more, from the first of them on, when what comes
        before should be zeros and is not.
        """
        kept = start
        scrap = memoryview(bytearray(_PIECE))
        while True:
            if only_zeros_before and kept[:-size].strip(b"\0"):
                return kept.lstrip(b"\0")
            kept = kept[-size:]
            count = await self._source.read_into(scrap)
            if count == 0:
                return kept
            self.offset += count
            kept += scrap[:count]

    async def drain(self) -> None:
        """Read to the end."""
        await self.last(b"", 1, only_zeros_before=False)

    async def finish(self) -> None:
        """Have the source confirm its end."""
        await self._source.finish()

    async def raise_cut(self) -> NoReturn:
        """The stream ended too early: the source's reason, if it knows one, else ``Corrupt``."""
        await self._source.finish()
        raise self.corrupt("stream cut", f"it ends at byte {self.offset}", self.offset)

    def refuse_answer(self, data: bytes, offset: int) -> None:
        """XAPI tells an error that it meets after its head by a second answer in the body.

        ``Corrupt`` when ``data``, which was read at ``offset``, begins with one.
        """
        text = data.lstrip(b"\0\xff")  # behind blank space or the padding of a table
        if text.startswith(b"HTTP/"):
            line = text.split(b"\r\n")[0][:100].decode("ascii", "replace")
            message = f"invalid HTTP header in response body: the host answered an error: {line}"
            raise self.corrupt("HTTP answer", message, offset)

    def corrupt(self, what: str, message: str, offset: int) -> Corrupt:
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
            block.release()
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
        with contextlib.suppress(trio.EndOfChannel):
            return await self._receive.receive()
        if self.failure is not None:
            raise self.failure
        return None

    def close(self) -> None:
        with contextlib.suppress(trio.WouldBlock, trio.EndOfChannel, trio.ClosedResourceError):
            while True:
                self._receive.receive_nowait().release()
        self._receive.close()
