"""One disk, read once, given to several writers at the pace of the slowest."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import trio

from proxy.jobs.copying import NoConsumers

if TYPE_CHECKING:
    from collections.abc import Callable

    from proxy.disks.disk import Block, Disk
    from proxy.disks.writing import DiskWriter
    from proxy.jobs.rate_limit import RateLimit
    from proxy.runtime.buffers import BufferPool


class DiskConsumer:
    """One writer's end of a :class:`DiskFanOut`; used by one task."""

    def __init__(self, capacity: int) -> None:
        self._send, self._receive = trio.open_memory_channel["Block"](capacity)
        self._failure: Exception | None = None
        self.waited = 0.0
        """Seconds spent in the writer."""

    async def store(self, writer: DiskWriter, moved: Callable[[int], None]) -> None:
        """Write every block, then commit; ``moved`` hears of each block's bytes.

        Raises the source's error where the disk broke, and then commits nothing.
        """
        while (block := await self._next()) is not None:
            size = len(block.data)
            began = trio.current_time()
            await writer.write(block)
            self.waited += trio.current_time() - began
            moved(size)
        began = trio.current_time()
        await writer.commit()
        self.waited += trio.current_time() - began

    async def _next(self) -> Block | None:
        try:
            return await self._receive.receive()
        except trio.EndOfChannel:
            if self._failure is not None:
                raise self._failure from None
            return None

    def give(self, block: Block) -> bool:
        """Whether the writer is still there; never blocks: the channel holds the whole pool."""
        try:
            self._send.send_nowait(block)
        except trio.BrokenResourceError:
            return False
        return True

    def end(self, failure: Exception | None) -> None:
        """No more blocks; with ``failure`` the disk was not complete."""
        self._failure = failure
        self._send.close()

    def leave(self) -> None:
        """Want nothing more; what is queued goes back to the pool."""
        with contextlib.suppress(trio.WouldBlock, trio.EndOfChannel, trio.ClosedResourceError):
            while True:
                self._receive.receive_nowait().buffer.release()
        self._receive.close()


class DiskFanOut:
    """Reads ``disk`` once.  Consumers are made before :meth:`run`."""

    def __init__(self, disk: Disk, pool: BufferPool, rate: RateLimit | None) -> None:
        self.disk = disk
        self.waited_source = 0.0
        self.waited_rate = 0.0
        self._pool = pool
        self._rate = rate
        self._made: list[DiskConsumer] = []
        self._consumers: list[DiskConsumer] = []

    @property
    def waited_writers(self) -> float:
        """Seconds that the slowest writer took."""
        return max((each.waited for each in self._made), default=0.0)

    def consumer(self) -> DiskConsumer:
        made = DiskConsumer(self._pool.count)
        self._made.append(made)
        self._consumers.append(made)
        return made

    async def run(self) -> None:
        """Read to the confirmed end.

        An error of the source reaches every consumer and is raised; so is ``NoConsumers`` when
        the last of them left.
        """
        failure: Exception | None = NoConsumers()  # also what a cancel leaves
        try:
            await self._pump()
            failure = None
        except Exception as error:
            failure = error
            raise
        finally:
            for consumer in self._made:
                consumer.end(failure)

    async def _pump(self) -> None:
        async with self.disk.read(self._pool) as reader:
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
        block.buffer.share(len(self._consumers) + 1)
        for consumer in list(self._consumers):
            if not consumer.give(block):
                block.buffer.release()
                self._consumers.remove(consumer)
        block.buffer.release()
        if not self._consumers:
            raise NoConsumers
