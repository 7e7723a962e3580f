"""Writing one object of unknown length: a single put when it is small, else parts.

Nothing is to be seen under the object's name before :meth:`ObjectWriter.commit`, and there is no
temporary name.  What a crash leaves is an upload in parts that no listing shows; a bucket's
life-cycle rule removes those ("abort incomplete multipart uploads").

Parts go out at once as far as the memory of the remote allows.  Near the end of the numbers that
a store has for parts, each further part is first written as a hidden object of its own, as large
as one copy may be, which the store then copies to its place: so the length is bounded by the
store's largest object alone, and memory does not grow.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import trio

from proxy.errors import Conflict, NotFound, ProxyError
from proxy.remotes import paths
from proxy.remotes.objects.parts import Sizes
from proxy.remotes.objects.store import Condition
from proxy.runtime.deadlines import undo_within
from proxy.runtime.trouble import tell_trouble

if TYPE_CHECKING:
    from proxy.remotes.objects.parts import Memory
    from proxy.remotes.objects.store import ObjectStore, Upload

_PARTS_AT_ONCE = 8
_UNDO_SECONDS = 60
_COPIED = 1000
"""Numbers of parts that are kept for those that the store copies together."""


class ObjectWriter:
    """See :class:`proxy.remotes.interface.FileWriter`.  ``nursery`` sends the parts and must be
    cancelled before :meth:`discard`."""

    def __init__(
        self,
        store: ObjectStore,
        memory: Memory,
        nursery: trio.Nursery,
        *,
        key: str,
        path: str,
        exclusive: bool,
    ) -> None:
        self.temporary_path = path
        self._store = store
        self._memory = memory
        self._key = key
        self._exclusive = exclusive
        self._parts = _Parts(store, memory, nursery, key)
        self._done = False

    async def write(self, data: bytes | memoryview) -> None:
        await self._parts.write(memoryview(data).cast("B"))

    async def commit(self) -> None:
        condition = Condition(absent=True) if self._exclusive else None
        if condition is not None and not await has_conditions(self._store):
            await refuse_existing(self._store, self._key, self.temporary_path)
            condition = None
        try:
            await self._parts.commit(condition)
        except Conflict as error:
            raise _exists(self.temporary_path) from error
        self._done = True

    async def discard(self) -> None:
        """Give everything back; what is not committed leaves nothing."""
        try:
            if not self._done:
                with undo_within(f"giving up '{self.temporary_path}'", _UNDO_SECONDS):
                    await self._parts.abort()
        except ProxyError as error:
            tell_trouble("unfinished upload left behind", error, path=self.temporary_path)
        finally:
            self._parts.close()


class _Parts:
    """One object being written; ``nested`` for those that become a part of another one."""

    def __init__(
        self,
        store: ObjectStore,
        memory: Memory,
        nursery: trio.Nursery,
        key: str,
        *,
        nested: bool = False,
    ) -> None:
        limits = store.limits
        self._store = store
        self._memory = memory
        self._nursery = nursery
        self.key = key
        self._nested = nested
        self._sizes = Sizes(limits, memory.budget)
        self._direct = limits.most_parts - min(_COPIED, limits.most_parts // 2)
        self._buffer: memoryview | None = None
        self._filled = 0
        self._number = 1
        self._upload: Upload | None = None
        self._slots = trio.Semaphore(_PARTS_AT_ONCE)
        self._under_way = 0
        self._changed = trio.Event()
        self._error: ProxyError | None = None
        self._inner: _Parts | None = None
        self._inner_size = 0

    # -- filling

    async def write(self, data: memoryview) -> None:
        while data:
            self._raise_error()
            if self._is_beyond():
                data = data[await self._write_inner(data) :]
                continue
            if self._buffer is not None and self._filled == len(self._buffer):
                await self._send_part()
                continue
            if self._buffer is None:
                self._buffer = await self._memory.take(self._sizes.of(self._number))
            count = min(len(data), len(self._buffer) - self._filled)
            self._buffer[self._filled : self._filled + count] = data[:count]
            self._filled += count
            data = data[count:]
        await trio.lowlevel.checkpoint()

    def _is_beyond(self) -> bool:
        return not self._nested and self._buffer is None and self._number > self._direct

    async def _write_inner(self, data: memoryview) -> int:
        """Into the object that becomes the next part; how much of ``data``."""
        largest = min(self._store.limits.largest_copy, self._store.limits.largest_part)
        if self._inner is None:
            name = paths.temporary_name(paths.name(self.key), time.time_ns() // 1_000_000)
            key = f"{self.key.rpartition('/')[0]}/{name}".lstrip("/")
            self._inner = _Parts(self._store, self._memory, self._nursery, key, nested=True)
            self._inner_size = 0
        count = min(len(data), largest - self._inner_size)
        await self._inner.write(data[:count])
        self._inner_size += count
        if self._inner_size == largest:
            await self._take_inner()
        return count

    async def _take_inner(self) -> None:
        """Finish the inner object, have it copied to its place and remove it."""
        inner = self._inner
        if inner is None:
            return
        await inner.commit(None)
        upload = await self._opened()
        await upload.copy(self._number, inner.key, 0, self._inner_size)
        await self._store.delete(inner.key)
        inner.close()
        self._inner = None
        self._number += 1

    # -- sending

    async def _opened(self) -> Upload:
        if self._upload is None:
            # one that was begun and is not known could not be given up
            with undo_within(f"beginning '{self.key}'", _UNDO_SECONDS):
                self._upload = await self._store.upload(self.key)
        return self._upload

    async def _send_part(self) -> None:
        upload = await self._opened()
        await self._slots.acquire()
        buffer, filled, number = self._buffer, self._filled, self._number
        assert buffer is not None, "there is something to send"
        self._buffer, self._filled, self._number = None, 0, number + 1
        self._under_way += 1
        self._nursery.start_soon(self._send, upload, number, buffer, filled)

    async def _send(self, upload: Upload, number: int, buffer: memoryview, filled: int) -> None:
        try:
            if self._error is None:
                await upload.send(number, buffer[:filled])
        except ProxyError as error:
            self._error = self._error or error
        finally:
            self._memory.put_back(buffer)
            self._slots.release()
            self._under_way -= 1
            self._changed.set()

    async def commit(self, condition: Condition | None) -> None:
        self._raise_error()
        await self._take_inner()
        if self._upload is None:
            data = self._buffer[: self._filled] if self._buffer is not None else b""
            await self._store.put(self.key, data, condition=condition)
            return
        if self._buffer is not None and self._filled:
            await self._send_part()
        while self._under_way:
            self._changed = trio.Event()
            await self._changed.wait()
        self._raise_error()
        await self._upload.complete(condition=condition)
        self._upload = None

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    # -- giving up

    async def abort(self) -> None:
        """Nothing of it stays.  The nursery that sends has ended."""
        if self._upload is not None:
            await self._upload.abort()
        if self._inner is not None:
            await self._inner.abort()
            await self._store.delete(self._inner.key)

    def close(self) -> None:
        """Give the memory back."""
        if self._buffer is not None:
            buffer, self._buffer = self._buffer, None
            self._memory.put_back(buffer)
        if self._inner is not None:
            self._inner.close()


async def has_conditions(store: ObjectStore) -> bool:
    return bool((await store.capabilities()).get("conditionalPut"))


async def refuse_existing(store: ObjectStore, key: str, path: str) -> None:
    """``Conflict`` when there is such an object; somebody may still make it a moment later."""
    try:
        await store.head(key)
    except NotFound as error:
        if error.code == "ENOENT":
            return
        raise
    raise _exists(path)


def _exists(path: str) -> Conflict:
    return Conflict(
        f"EEXIST: file already exists, write '{path}'", code="EEXIST", data={"path": path}
    )
