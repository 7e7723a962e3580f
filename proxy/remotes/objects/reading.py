"""Reading one object by ranges, ahead of a reader that goes straight through it.

All ranges are of one version of the object: when it is replaced meanwhile the read fails with
``ESTALE``, it never mixes two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from proxy.errors import ProxyError, Unreachable
from proxy.runtime.buffers import BufferPool

if TYPE_CHECKING:
    from proxy.remotes.objects.store import ObjectStat, ObjectStore
    from proxy.runtime.buffers import Buffer

CHUNK = 2 * 1024 * 1024
AHEAD = 4
"""Chunks that are fetched before they are asked for."""


class ObjectReader:
    """See :class:`proxy.remotes.interface.FileReader`.  ``nursery`` fetches ahead."""

    def __init__(
        self, store: ObjectStore, key: str, status: ObjectStat, nursery: trio.Nursery
    ) -> None:
        self.size = status.size
        self._store = store
        self._key = key
        self._etag = status.etag
        self._nursery = nursery
        self._position = 0
        self._next = 0
        """Where the chunk begins that is fetched next."""
        self._pool = BufferPool(AHEAD + 1, CHUNK)
        self._chunks: dict[int, _Chunk] = {}
        self._straight = False

    async def read_into(self, buffer: memoryview) -> int:
        wanted = min(len(buffer), self.size - self._position)
        if wanted <= 0:
            await trio.lowlevel.checkpoint()
            return 0
        if not self._straight and not (0 < self._position < self.size - wanted):
            # the first read, or one that ends it: perhaps all that is read
            await self._fetch(self._position, buffer[:wanted])
        else:
            self._straight = True
            await self._copy(self._position, buffer[:wanted])
        self._position += wanted
        return wanted

    async def read_at(self, offset: int, length: int) -> bytes:
        content = bytearray(max(min(length, self.size - offset), 0))
        return bytes(content[: await self.read_into_at(offset, memoryview(content))])

    async def read_into_at(self, offset: int, buffer: memoryview) -> int:
        wanted = max(min(len(buffer), self.size - offset), 0)
        await self._fetch(offset, buffer[:wanted])
        return wanted

    async def _fetch(self, offset: int, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            count = await self._store.get_into(
                self._key, offset + done, buffer[done:], etag=self._etag
            )
            if not count:
                raise Unreachable(
                    f"EPROTO: the store sends nothing of '{self._key}' at {offset + done}",
                    code="EPROTO",
                    data={"path": self._key},
                )
            done += count
        await trio.lowlevel.checkpoint()

    # -- ahead

    async def _copy(self, offset: int, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            start = await self._chunk_at(offset + done)
            chunk = self._chunks[start]
            await chunk.ready.wait()
            if chunk.error is not None:
                self._forget(start)  # so that the next call can succeed
                raise chunk.error
            skipped = offset + done - start
            count = min(chunk.buffer.length - skipped, len(buffer) - done)
            buffer[done : done + count] = chunk.buffer.memory[skipped : skipped + count]
            done += count

    async def _chunk_at(self, offset: int) -> int:
        """The start of the chunk that holds ``offset``; fetches it and those behind it."""
        for start in [each for each in self._chunks if each + CHUNK <= offset]:
            self._forget(start)
        here = next((each for each in self._chunks if each <= offset < each + CHUNK), None)
        if here is None:
            for start in list(self._chunks):
                self._forget(start)
            here = self._next = offset
            self._begin(await self._pool.acquire())
        while self._next < self.size and (buffer := self._pool.try_acquire()) is not None:
            self._begin(buffer)
        return here

    def _begin(self, buffer: Buffer) -> None:
        chunk = _Chunk(buffer, min(CHUNK, self.size - self._next))
        self._chunks[self._next] = chunk
        self._nursery.start_soon(self._fill, chunk, self._next)
        self._next += CHUNK

    async def _fill(self, chunk: _Chunk, start: int) -> None:
        try:
            await self._fetch(start, chunk.buffer.view)
        except ProxyError as error:
            chunk.error = error
        finally:
            chunk.ready.set()
            if chunk.forgotten:
                chunk.buffer.release()

    def _forget(self, start: int) -> None:
        chunk = self._chunks.pop(start)
        if chunk.ready.is_set():
            chunk.buffer.release()
        chunk.forgotten = True


class _Chunk:
    def __init__(self, buffer: Buffer, length: int) -> None:
        buffer.length = length
        self.buffer = buffer
        self.ready = trio.Event()
        self.error: ProxyError | None = None
        self.forgotten = False
