"""Storing one incremental backup of a VM on a remote."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING
from uuid import UUID

from proxy.disks.writing import Shape
from proxy.formats.vhd import NO_UUID
from proxy.jobs.disk_parts import DiskParts
from proxy.jobs.remote_retention import delete_old, plan_retention
from proxy.repository.incremental_writer import open_incremental_backup

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from proxy.jobs.remote_target import RemoteTarget
    from proxy.jobs.target import DiskPart, IncrementalCopy
    from proxy.repository.incremental_writer import IncrementalBackupWriter
    from proxy.repository.parents import Parent
    from proxy.tasks import Task


class IncrementalTarget(DiskParts):
    """Stores the disks that it is given, then the metadata, on one remote."""

    def __init__(
        self,
        target: RemoteTarget,
        copy: IncrementalCopy,
        parents: Mapping[str, Parent],
        *,
        others: Collection[str] = (),
    ) -> None:
        """``others``: names that the backup cannot have."""
        super().__init__(copy)
        self.target = target
        self._others = others
        self._parents = parents

    @property
    def id(self) -> str:
        return self.target.id

    async def run(self, export: Task) -> None:
        copy, settings = self._copy, self.target.settings
        old, tags = await plan_retention(
            export, self.target, copy.schedule_id, copy.timestamp, mode="delta"
        )
        most = settings.max_merged_deltas_per_run
        # The oldest few, and of these the youngest first: whatever is left stays a chain.
        old = list(reversed(old if most is None else old[: int(most)]))
        if settings.delete_first:
            await delete_old(export, old)
        async with open_incremental_backup(
            self.target.remote,
            copy.vm_uuid,
            copy.timestamp,
            after=copy.newest_parent,
            others=self._others,
        ) as writer:
            async with export.child("transfer") as transfer:
                transfer.progress(0, copy.progress.total, estimated=True)
                await self.store_parts(partial(self._store, writer, transfer))
                transfer.complete_progress()
                transfer.result = {"size": writer.size}
            await self.target.lock.check()
            assert copy.metadata is not None
            backup = await writer.commit({**copy.metadata, "tags": tags})
        self.target.stored = backup.id
        copy.stored.add(self.target.id)
        if not settings.delete_first:
            await delete_old(export, old)

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

        async with writer.disk(
            part.exported.ref,
            copy.job_id,
            part.exported.source_uuid,
            shape,
            compression=copy.codec if parent is None else parent.compression,
            sums=part.consumer.sums,
        ) as stored:
            await part.consumer.store(stored, self.moving(transfer))
