"""One remote as the target of one VM's incremental backup."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from uuid import UUID

import trio

from proxy.disks.writing import Shape
from proxy.formats.vhd import BLOCK_SIZE, NO_UUID
from proxy.jobs.copying import NoConsumers
from proxy.jobs.targets import RemoteTarget, delete_old, plan_retention
from proxy.repository.incremental_writer import open_incremental_backup

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from proxy.disks.disk import Disk
    from proxy.formats.vhd_directory import Compression
    from proxy.jobs.disk_copying import DiskConsumer
    from proxy.jobs.incremental_metadata import ExportedDisk
    from proxy.repository.incremental_writer import IncrementalBackupWriter
    from proxy.repository.parents import Parent
    from proxy.tasks import Task


@dataclass(frozen=True, slots=True)
class DiskPart:
    """One disk on its way to one target."""

    exported: ExportedDisk
    disk: Disk
    parent: Parent | None
    consumer: DiskConsumer


@dataclass(slots=True)
class Progress:
    """Bytes of all disks of a VM: known as each is opened."""

    disks: int
    opened: int = 0
    total: int = 0

    def add(self, disk: Disk) -> None:
        self.opened += 1
        self.total += len(disk.blocks) * BLOCK_SIZE

    @property
    def is_estimated(self) -> bool:
        return self.opened < self.disks


@dataclass(slots=True)
class IncrementalCopy:
    """What all targets of one incremental backup have in common."""

    vm_uuid: str
    job_id: str
    schedule_id: str
    timestamp: int
    """Milliseconds."""
    newest_parent: str
    """Date name of the youngest parent of any disk: ours must sort behind it."""
    stored: set[str]
    """Receives the id of each target that has its backup, even if its task fails later."""
    codec: Compression
    """For the blocks of disks without parent, where the remote keeps directories."""
    max_merged: int | None
    progress: Progress
    bottleneck: Callable[[], str]
    metadata: Mapping[str, Any] | None = None
    """Without the fields that differ between targets; set before the parts end."""
    is_differencing: dict[str, bool] = field(default_factory=dict[str, bool])
    """By the reference of each disk, as it was really exported."""


class IncrementalTarget:
    """Stores the disks that it is given, then the metadata, on one remote."""

    def __init__(self, target: RemoteTarget, copy: IncrementalCopy) -> None:
        self.target = target
        self.failed = False
        self._copy = copy
        self._send, self._parts = trio.open_memory_channel[DiskPart](float("inf"))
        self._ended = False
        self._complete = False
        self._moved = 0

    @property
    def id(self) -> str:
        return self.target.id

    def give(self, part: DiskPart) -> None:
        """One more disk.  Its consumer is left when this target fails."""
        if self.failed:
            part.consumer.leave()
            return
        self._send.send_nowait(part)

    def end(self, *, complete: bool) -> None:
        """No more disks; unless ``complete`` nothing becomes a backup.  The first call counts."""
        if not self._ended:
            self._ended, self._complete = True, complete
            self._send.close()

    async def run(self, export: Task) -> None:
        """Retention, transfer, metadata inside the ``export`` task.

        Until the metadata is written a failure or a cancel leaves nothing on the remote.
        """
        copy, settings = self._copy, self.target.settings
        old, tags = await plan_retention(
            self.target, copy.vm_uuid, copy.schedule_id, copy.timestamp, mode="delta"
        )
        # The oldest few, and of these the youngest first: whatever is left stays a chain.
        old = list(reversed(old if copy.max_merged is None else old[: copy.max_merged]))
        if settings.delete_first:
            await delete_old(export, self.target, copy.vm_uuid, old)
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
            await writer.commit({**copy.metadata, "tags": tags})
        copy.stored.add(self.target.id)
        if not settings.delete_first:
            await delete_old(export, self.target, copy.vm_uuid, old)

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
        copy, parent, disk = self._copy, part.parent, part.disk
        assert (parent is not None) == disk.is_differencing
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
        """Give back what waits for a target that has ended."""
        self.failed = True
        while True:
            try:
                self._parts.receive_nowait().consumer.leave()
            except (trio.WouldBlock, trio.EndOfChannel, trio.ClosedResourceError):
                return
