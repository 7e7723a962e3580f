"""Storing one incremental backup of a VM on a remote."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING
from uuid import UUID

import trio

from proxy.disks.writing import Shape
from proxy.formats.vhd import NO_UUID
from proxy.jobs.copying import NoConsumers
from proxy.jobs.remote_retention import delete_old, plan_retention
from proxy.jobs.target import DiskPart, IncrementalCopy
from proxy.repository.incremental_writer import open_incremental_backup

if TYPE_CHECKING:
    from collections.abc import Mapping

    from proxy.jobs.remote_target import RemoteTarget
    from proxy.repository.incremental_writer import IncrementalBackupWriter
    from proxy.repository.parents import Parent
    from proxy.tasks import Task


class IncrementalTarget:
    """Stores the disks that it is given, then the metadata, on one remote."""

    def __init__(
        self, target: RemoteTarget, copy: IncrementalCopy, parents: Mapping[str, Parent]
    ) -> None:
        self.target = target
        self.failed = False
        self._copy = copy
        self._parents = parents
        self._send, self._parts = trio.open_memory_channel[DiskPart](float("inf"))
        self._ended = False
        self._complete = False
        self._moved = 0

    @property
    def id(self) -> str:
        return self.target.id

    def give(self, part: DiskPart) -> None:
        if self.failed:
            part.consumer.leave()
            return
        self._send.send_nowait(part)

    def end(self, *, complete: bool) -> None:
        if not self._ended:
            self._ended, self._complete = True, complete
            self._send.close()

    async def run(self, export: Task) -> None:
        copy, settings = self._copy, self.target.settings
        old, tags = await plan_retention(
            self.target, copy.schedule_id, copy.timestamp, mode="delta"
        )
        most = settings.max_merged_deltas_per_run
        # The oldest few, and of these the youngest first: whatever is left stays a chain.
        old = list(reversed(old if most is None else old[: int(most)]))
        if settings.delete_first:
            await delete_old(export, old)
        async with open_incremental_backup(
            self.target.remote, copy.vm_uuid, copy.timestamp, after=copy.newest_parent
        ) as writer:
            async with export.child("transfer") as transfer:
                transfer.progress(0, copy.progress.total, estimated=True)
                await self._store_parts(writer, transfer)
                transfer.complete_progress()
                transfer.result = {"size": writer.size}
            await self.target.lock.check()
            assert copy.metadata is not None
            backup = await writer.commit({**copy.metadata, "tags": tags})
        self.target.stored = backup.id
        copy.stored.add(self.target.id)
        if not settings.delete_first:
            await delete_old(export, old)

    async def _store_parts(self, writer: IncrementalBackupWriter, transfer: Task) -> None:
        failures: list[Exception] = []

        async def one(part: DiskPart) -> None:
            try:
                await self._store(writer, transfer, part)
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

    async def _store(self, writer: IncrementalBackupWriter, transfer: Task, part: DiskPart) -> None:
        copy, disk = self._copy, part.disk
        parent = self._parents[part.exported.source_uuid] if disk.is_differencing else None
        shape = Shape(
            virtual_size=disk.virtual_size,
            order=disk.order,
            uuid=UUID(part.exported.vdi["uuid"]),
            is_differencing=disk.is_differencing,
            parent_uuid=NO_UUID if parent is None else parent.uuid,
            parent_name="" if parent is None else parent.name,
            timestamp=int(time.time()),
        )

        def moved(size: int) -> None:
            self._moved += size
            transfer.progress(
                self._moved,
                max(copy.progress.total, self._moved),
                estimated=copy.progress.is_estimated,
                bottleneck=copy.bottleneck(),
            )

        async with writer.disk(
            part.exported.ref,
            copy.job_id,
            part.exported.source_uuid,
            shape,
            compression=copy.codec if parent is None else parent.compression,
            sums=part.consumer.sums,
        ) as stored:
            await part.consumer.store(stored, moved)

    def leave(self) -> None:
        self.failed = True
        while True:
            try:
                self._parts.receive_nowait().consumer.leave()
            except (trio.WouldBlock, trio.EndOfChannel, trio.ClosedResourceError):
                return
