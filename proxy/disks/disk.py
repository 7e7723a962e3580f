"""What every virtual disk is here: a size, a set of blocks, and a way to read them in order.

A block is 2 MiB of the disk at byte ``index * 2 MiB``; the last one is padded with zeros.  A block
travels in a :class:`~proxy.runtime.buffers.Buffer` of :data:`~proxy.formats.vhd.STORED_BLOCK`
bytes: the bitmap of a VHD block (all ones), then the data.  So it goes to and from VHD files
and VHD directories without being copied or joined.
"""

from __future__ import annotations

import contextlib
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

import trio

from proxy.errors import Corrupt, Refused
from proxy.formats.vhd import BITMAP_SIZE, BLOCK_SIZE, FULL_BITMAP, STORED_BLOCK, blocks_of
from proxy.runtime.background import background
from proxy.runtime.buffers import Buffer, BufferPool

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
    from contextlib import AbstractAsyncContextManager


class Blocks:
    """Which of a disk's ``count`` blocks are present.  Immutable; iterates upwards."""

    __slots__ = ("_flags",)

    def __init__(self, flags: bytes) -> None:
        """``flags`` has one byte a block, 1 where it is present, else 0."""
        self._flags = flags

    @property
    def flags(self) -> bytes:
        """One byte a block, 1 where it is present."""
        return self._flags

    @classmethod
    def of(cls, indexes: Iterable[int], count: int) -> Blocks:
        """Raises ``IndexError`` for an index that is negative or not below ``count``."""
        flags = bytearray(count)
        for index in indexes:
            if index < 0:
                raise IndexError(f"there is no block {index}")
            flags[index] = 1
        return cls(bytes(flags))

    @classmethod
    def everything(cls, count: int) -> Blocks:
        return cls(b"\1" * count)

    @property
    def count(self) -> int:
        """Blocks of the disk, present or not."""
        return len(self._flags)

    def __len__(self) -> int:
        return self._flags.count(1)

    def __contains__(self, index: int) -> bool:
        return 0 <= index < len(self._flags) and self._flags[index] == 1

    def __iter__(self) -> Iterator[int]:
        index = self._flags.find(1)
        while index >= 0:
            yield index
            index = self._flags.find(1, index + 1)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Blocks) and self._flags == other._flags

    def __hash__(self) -> int:
        return hash(self._flags)

    def __or__(self, other: Blocks) -> Blocks:
        """The union, as long as the longer of the two."""
        size = max(self.count, other.count)
        merged = int.from_bytes(self._flags, "little") | int.from_bytes(other._flags, "little")
        return Blocks(merged.to_bytes(size, "little"))

    def resized(self, count: int) -> Blocks:
        """The same blocks of a disk of ``count``: those behind its end are gone."""
        return Blocks(self._flags[:count].ljust(count, b"\0"))

    def __repr__(self) -> str:
        return f"<{len(self)} of {self.count} blocks>"


@dataclass(frozen=True, slots=True)
class Block:
    """One block on its way.  Whoever has it last calls :meth:`release`."""

    index: int
    buffer: Buffer

    @property
    def stored(self) -> memoryview:
        """Bitmap and data, as a VHD holds them."""
        return self.buffer.memory

    @property
    def data(self) -> memoryview:
        return self.buffer.memory[BITMAP_SIZE:]

    def release(self) -> None:
        """This holder is done with it; the last one gives the buffer back."""
        self.buffer.release()


class BlockReader(Protocol):
    """Blocks in the order in which they come; used by one task."""

    async def next(self) -> Block | None:
        """The next block, ``None`` behind the last.

        Each present block comes exactly once.  Raises what reading raises: ``Corrupt``,
        ``Unreachable``, ``XapiError``…, and raises it again whenever it is called after; so
        ``None`` means that the source confirmed its end.  A cancelled call takes no block.
        """
        ...


class Disk(Protocol):
    """A virtual disk that can be read once from its first to its last block.

    Disks that can be read at any place are :class:`RandomDisk` and may be read any number of
    times.  Whoever opened the disk closes it: a disk is made by an ``async with``.
    """

    virtual_size: int
    """Bytes; whole sectors of 512 in every disk that XAPI knows."""
    is_differencing: bool
    """Blocks that it lacks are those of its parent; otherwise they are zeros."""
    blocks: Blocks
    """Those that it has itself, never its parent's."""

    @property
    def order(self) -> Sequence[int]:
        """The indexes of :attr:`blocks` in the order in which :meth:`read` gives them."""
        ...

    def read(self, pool: BufferPool) -> AbstractAsyncContextManager[BlockReader]:
        """Read all blocks of :attr:`blocks`, ascending unless the source is a stream that
        has them in another order.

        ``pool`` (see :func:`block_pool`) bounds the memory and the read-ahead.  Leaving the
        block early stops reading; a cancel leaves nothing running.
        """
        ...


class RandomDisk(Disk, Protocol):
    """A disk whose blocks can be read in any order, several at once."""

    async def read_block(self, index: int, into: memoryview) -> None:
        """Fill ``into`` (:data:`STORED_BLOCK` bytes, its bitmap already all ones) with a present
        block.  Raises ``Corrupt`` when it is not what its format says.  On cancel the
        content of ``into`` is undefined.
        """
        ...


class RandomAccess:
    """What disks with random access have in common; they bring ``blocks`` and ``read_block``."""

    @property
    def order(self: RandomDisk) -> Sequence[int]:
        return tuple(self.blocks)

    def read(self: RandomDisk, pool: BufferPool) -> AbstractAsyncContextManager[BlockReader]:
        """See :meth:`Disk.read`; several blocks are read at once."""
        return read_in_order(self, pool)


DEPTH: Final = 4
"""Blocks that are read at once from a disk with random access."""


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """Say of an error of the block which file it is about, unless it says so itself."""
    try:
        yield
    except (Corrupt, Refused) as error:
        if "path" in error.data:
            raise
        raise type(error)(
            f"'{path}': {error.message}", code=error.code, data={**error.data, "path": path}
        ) from error


def block_pool(count: int) -> BufferPool:
    """A pool of ``count`` buffers for whole blocks; their bitmaps are all ones."""
    return BufferPool(count, STORED_BLOCK, prefix=FULL_BITMAP)


def block_count(virtual_size: int) -> int:
    return blocks_of(virtual_size)


def length_of(index: int, virtual_size: int) -> int:
    """Bytes of block ``index`` that belong to the disk: 2 MiB but for the last."""
    return min(BLOCK_SIZE, virtual_size - index * BLOCK_SIZE)


@contextlib.asynccontextmanager
async def read_in_order(
    disk: RandomDisk, pool: BufferPool, *, depth: int = DEPTH
) -> AsyncIterator[BlockReader]:
    """:meth:`Disk.read` for a disk with random access: up to ``depth`` reads at once, in order.

    The first error is raised in its block's turn, after the blocks before it, and ends the
    reading.  While a block is there to be given, no buffer is waited for: several disks can
    share a pool without waiting for each other in a ring.
    """
    async with background() as nursery:
        reader = _Ahead(disk, pool, nursery, depth)
        try:
            yield reader
        finally:
            reader.close()


class _Ahead:
    """Starts reads as long as the pool gives buffers at once, at least one."""

    def __init__(
        self, disk: RandomDisk, pool: BufferPool, nursery: trio.Nursery, depth: int
    ) -> None:
        self._disk = disk
        self._pool = pool
        self._nursery = nursery
        self._depth = depth
        self._left = iter(disk.blocks)
        self._upcoming = next(self._left, None)
        self._reads: deque[_Read] = deque()
        self._failure: Exception | None = None

    async def next(self) -> Block | None:
        if self._failure is not None:
            raise self._failure
        await self._start()
        if not self._reads:
            return None
        read = self._reads[0]
        await read.done.wait()
        self._reads.popleft()
        if read.error is not None:
            read.buffer.release()
            self._failure = read.error
            raise read.error
        return Block(read.index, read.buffer)

    async def _start(self) -> None:
        while self._upcoming is not None and len(self._reads) < self._depth:
            buffer = self._pool.try_acquire()
            if buffer is None:
                if self._reads:
                    return
                buffer = await self._pool.acquire()
            read = _Read(self._upcoming, buffer)
            self._upcoming = next(self._left, None)
            self._reads.append(read)
            self._nursery.start_soon(read.run, self._disk)

    def close(self) -> None:
        """Give back what was read ahead; reads under way give back theirs when they end."""
        for read in self._reads:
            read.abandoned = True
            if read.done.is_set():
                read.buffer.release()
        self._reads.clear()


class _Read:
    def __init__(self, index: int, buffer: Buffer) -> None:
        self.index = index
        self.buffer = buffer
        self.done = trio.Event()
        self.error: Exception | None = None
        self.abandoned = False

    async def run(self, disk: RandomDisk) -> None:
        try:
            await disk.read_block(self.index, self.buffer.memory)
            self.buffer.length = len(self.buffer.memory)
        except Exception as error:  # noqa: BLE001  raised in its turn by ``next``
            self.error = error
        finally:
            self.done.set()
            if self.abandoned:
                self.buffer.release()
