"""Reused blocks of memory, counted: what bounds the memory of every transfer.

A transfer owns one :class:`BufferPool`.  The reader acquires a buffer, fills it, and hands
it to one or more consumers; when the last of them releases it, it goes back to the pool and
wakes a waiting reader.  Nothing is copied or joined on the way.
"""

from __future__ import annotations

import mmap
from collections import deque

import trio

BLOCK = 2 * 1024 * 1024
"""Bytes in one buffer: also the block of every virtual disk format in use here."""


class Buffer:
    """``length`` valid bytes at the start of ``memory``; shared by ``holders`` consumers."""

    __slots__ = ("_holders", "_pool", "length", "memory")

    def __init__(self, pool: BufferPool, memory: memoryview) -> None:
        self._pool = pool
        self._holders = 1
        self.memory = memory
        self.length = 0

    @property
    def view(self) -> memoryview:
        """The valid bytes.  Must not be used after the last :meth:`release`."""
        return self.memory[: self.length]

    def share(self, holders: int) -> None:
        """Say how many consumers will call :meth:`release`; one after ``acquire``."""
        self._holders = holders

    def release(self) -> None:
        """This consumer is done; the last one gives the memory back.  Never blocks."""
        assert self._holders > 0, "released more often than shared"
        self._holders -= 1
        if self._holders == 0:
            self._pool.put_back(self.memory)


class BufferPool:
    """At most ``count`` buffers of ``size`` bytes, allocated when first needed.

    Every buffer starts with ``prefix`` when it is acquired, whatever its last holder did.
    """

    def __init__(self, count: int, size: int = BLOCK, *, prefix: bytes = b"") -> None:
        self.size = size
        self.count = count
        self._prefix = prefix
        self._made = 0
        # The memory alone: buffers know their pool, and a cycle would keep a finished
        # transfer's memory until the garbage collector comes by.
        self._free: deque[memoryview] = deque()
        self._semaphore = trio.Semaphore(count, max_value=count)

    async def acquire(self) -> Buffer:
        """Wait for a free buffer.  On cancel nothing is taken."""
        await self._semaphore.acquire()
        return self._take()

    def try_acquire(self) -> Buffer | None:
        """A buffer when one is to be had without waiting."""
        try:
            self._semaphore.acquire_nowait()
        except trio.WouldBlock:
            return None
        return self._take()

    def _take(self) -> Buffer:
        if self._free:
            memory = self._free.pop()
        else:
            try:
                # Pages of their own: freed memory of this size in the heap is not given back.
                memory = memoryview(mmap.mmap(-1, self.size))
            except OSError:
                self._semaphore.release()
                raise
            self._made += 1
        memory[: len(self._prefix)] = self._prefix
        return Buffer(self, memory)

    def put_back(self, memory: memoryview) -> None:
        self._free.append(memory)
        self._semaphore.release()

    @property
    def in_use(self) -> int:
        """Buffers that are neither free nor unmade."""
        return self._made - len(self._free)
