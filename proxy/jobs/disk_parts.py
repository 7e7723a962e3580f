"""The disks of an incremental backup on their way to one target, whatever that is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from proxy.jobs.copying import NoConsumers
from proxy.jobs.target import DiskPart, IncrementalCopy

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from proxy.tasks import Task


class DiskParts:
    """What every :class:`~proxy.jobs.target.IncrementalWriter` does alike with its disks."""

    def __init__(self, copy: IncrementalCopy) -> None:
        self.failed = False
        self._copy = copy
        self._send, self._parts = trio.open_memory_channel[DiskPart](float("inf"))
        self._ended = False
        self._complete = False
        self._moved = 0

    def give(self, part: DiskPart) -> None:
        if self.failed:
            part.consumer.leave()
            return
        self._send.send_nowait(part)

    def end(self, *, complete: bool) -> None:
        if not self._ended:
            self._ended, self._complete = True, complete
            self._send.close()

    async def store_parts(self, store: Callable[[DiskPart], Awaitable[None]]) -> None:
        """``store`` every disk as it comes, several at once; the first error ends all.

        Raises ``NoConsumers`` when the disks that came are not all.
        """
        failures: list[Exception] = []

        async def one(part: DiskPart) -> None:
            try:
                await store(part)
            except Exception as error:  # noqa: BLE001  raised below, outside of the nursery's group
                failures.append(error)
                nursery.cancel_scope.cancel("a disk failed")
            finally:
                part.consumer.leave()

        async with trio.open_nursery() as nursery:
            async for part in self._parts:
                nursery.start_soon(one, part)
        if failures:
            raise failures[0]
        if not self._complete:
            raise NoConsumers

    def moving(self, transfer: Task) -> Callable[[int], None]:
        """Hears of the bytes of each block, for the progress of ``transfer``."""
        copy = self._copy

        def moved(size: int) -> None:
            self._moved += size
            transfer.progress(
                self._moved,
                max(copy.progress.total, self._moved),
                estimated=copy.progress.is_estimated,
                bottleneck=copy.bottleneck(),
            )

        return moved

    def leave(self) -> None:
        self.failed = True
        while True:
            try:
                self._parts.receive_nowait().consumer.leave()
            except (trio.WouldBlock, trio.EndOfChannel, trio.ClosedResourceError):
                return
