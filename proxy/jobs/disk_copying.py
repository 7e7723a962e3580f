"""One disk, read once, given to several writers at the pace of the slowest."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final

import trio

from proxy.disks.disk import Block
from proxy.formats.checksums import MOST_BLOCKS, BlockSums, block_digest
from proxy.jobs.copying import Lane, NoConsumers
from proxy.runtime.background import background
from proxy.runtime.threads import Work, in_thread

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from proxy.disks.disk import Disk
    from proxy.disks.writing import DiskWriter
    from proxy.jobs.rate_limit import RateLimit
    from proxy.runtime.buffers import BufferPool


_AT_ONCE: Final = 4
"""Blocks whose checksums are taken in one go: under a millisecond."""


class DiskConsumer(Lane[Block]):
    """One writer's end of a :class:`DiskFanOut`."""

    def __init__(self, capacity: int, sums: BlockSums | None = None) -> None:
        super().__init__(capacity)
        self.sums = sums
        """Of all blocks, complete when :meth:`store` commits; ``None``: none are taken."""
        self.waited = 0.0
        """Seconds spent in the writer."""

    async def store(self, writer: DiskWriter, moved: Callable[[int], None]) -> None:
        """Write every block, then commit; ``moved`` hears of each block's bytes.

        Raises the source's error where the disk broke, and then commits nothing.
        """
        while (block := await self.next()) is not None:
            size = len(block.data)
            began = trio.current_time()
            await writer.write(block)
            self.waited += trio.current_time() - began
            moved(size)
        began = trio.current_time()
        await writer.commit()
        self.waited += trio.current_time() - began


class DiskFanOut:
    """Reads ``disk`` once.  Consumers are made before :meth:`run`.

    ``capacity`` is the number of buffers of the pool that it will run with.  ``confirm`` is asked
    after the last block, before any consumer hears of the end: what it raises is the disk's error.
    It gets the checksums of all blocks, ``None`` when there are too many.
    """

    def __init__(
        self,
        disk: Disk,
        capacity: int,
        rate: RateLimit | None,
        confirm: Callable[[BlockSums | None], Awaitable[None]] | None = None,
    ) -> None:
        self.disk = disk
        self.waited_source = 0.0
        self.waited_rate = 0.0
        self.when_cancelled: Exception = NoConsumers()
        """What consumers hear of a reading that is cancelled, as by the failure of another disk."""
        self.sums = BlockSums(disk.blocks.count) if disk.blocks.count <= MOST_BLOCKS else None
        """Of the blocks that have passed."""
        self._capacity = capacity
        self._rate = rate
        self._confirm = confirm
        self._hasher = None if self.sums is None else _Hasher(self.sums, capacity)
        self._made: list[DiskConsumer] = []
        self._consumers: list[DiskConsumer] = []

    @property
    def waited_writers(self) -> float:
        """Seconds that the slowest writer took."""
        return max((each.waited for each in self._made), default=0.0)

    def consumer(self) -> DiskConsumer:
        made = DiskConsumer(self._capacity, self.sums)
        self._made.append(made)
        self._consumers.append(made)
        return made

    async def run(self, pool: BufferPool) -> None:
        """Read to the confirmed end, with buffers of ``pool``, which is not kept.

        An error of the source reaches every consumer and is raised; so is ``NoConsumers`` when
        the last of them left.
        """
        failure: Exception | None = None
        complete = False
        try:
            async with background() as nursery:
                if self._hasher is not None:
                    nursery.start_soon(self._hasher.work)
                await self._pump(pool)
                if self._hasher is not None:
                    await self._hasher.finish()
            if self._confirm is not None:
                await self._confirm(self.sums)
            complete = True
        except Exception as error:
            failure = error
            raise
        finally:
            if self._hasher is not None:
                self._hasher.leave()
            for consumer in self._made:
                consumer.end(None if complete else failure or self.when_cancelled)

    async def _pump(self, pool: BufferPool) -> None:
        async with self.disk.read(pool) as reader:
            while True:
                began = trio.current_time()
                block = await reader.next()
                self.waited_source += trio.current_time() - began
                if block is None:
                    return
                size = len(block.data)
                self._distribute(block)
                if self._rate is not None:
                    self.waited_rate += await self._rate.spend(size)

    def _distribute(self, block: Block) -> None:
        # one share is ours and goes last: nobody frees the buffer while it is given out
        block.buffer.share(len(self._consumers) + (1 if self._hasher is None else 2))
        if self._hasher is not None:
            self._hasher.give(block)
        for consumer in list(self._consumers):
            if not consumer.give(block):
                block.release()
                self._consumers.remove(consumer)
        block.release()
        if not self._consumers:
            raise NoConsumers


async def read_together(
    reads: Sequence[Callable[[], Awaitable[None]]], fan_outs: Sequence[DiskFanOut], *, at_once: int
) -> None:
    """Read the disks of one backup, ``at_once`` at a time (0: all); the first error ends it.

    ``fan_outs`` are those of the disks, as each is made: consumers of disks that are cut hear of
    that error.  Raises the first; ``NoConsumers`` only where there is no other, as the consumers
    know why.
    """
    slots = trio.Semaphore(at_once or max(1, len(reads)))
    failures: list[Exception] = []

    async def one(read: Callable[[], Awaitable[None]]) -> None:
        try:
            async with slots:
                await read()
        except Exception as error:  # noqa: BLE001  raised below, outside of the nursery's group
            failures.append(error)
            for fan_out in fan_outs:
                fan_out.when_cancelled = failures[0]
            nursery.cancel_scope.cancel("a disk cannot be read")

    async with trio.open_nursery() as nursery:
        for read in reads:
            nursery.start_soon(one, read)
    if failures:
        real = (error for error in failures if not isinstance(error, NoConsumers))
        raise next(real, failures[0])


def bottleneck(fan_outs: Sequence[DiskFanOut], *, encodes: bool) -> str:
    """The stage that the others wait for; ``encodes``: a slow target may be a slow CPU."""
    waits = {
        "source": sum(each.waited_source for each in fan_outs),
        "maxExportRate": sum(each.waited_rate for each in fan_outs),
        "target": sum(each.waited_writers for each in fan_outs),
    }
    slowest = max(waits, key=lambda stage: waits[stage])
    return "CPU" if slowest == "target" and encodes else slowest


class _Hasher:
    """Takes the checksum of each block once for all writers, beside them."""

    def __init__(self, sums: BlockSums, capacity: int) -> None:
        self._sums = sums
        self._send, self._receive = trio.open_memory_channel["Block"](capacity)
        self._finished = trio.Event()

    def give(self, block: Block) -> None:
        """Takes over a share of the block; never blocks: the channel holds the whole pool."""
        self._send.send_nowait(block)

    async def finish(self) -> None:
        """Every block that was given is counted when this returns."""
        self._send.close()
        await self._finished.wait()

    async def work(self) -> None:
        async for block in self._receive:
            blocks = [block]
            with contextlib.suppress(trio.WouldBlock, trio.EndOfChannel):
                while len(blocks) < _AT_ONCE:
                    blocks.append(self._receive.receive_nowait())
            try:
                await in_thread(Work.CPU, self._hash, blocks)
            finally:
                for each in blocks:
                    each.release()
        self._finished.set()

    def _hash(self, blocks: Sequence[Block]) -> None:
        for block in blocks:
            self._sums[block.index] = block_digest(block.data)

    def leave(self) -> None:
        """Give back what nobody will count; the worker has ended."""
        with contextlib.suppress(trio.WouldBlock, trio.EndOfChannel):
            while True:
                self._receive.receive_nowait().release()
