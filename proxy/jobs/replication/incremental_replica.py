"""Incremental replication: disks first, each on a base that the SR has, then the VM of them."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import UUID

import trio

from proxy.disks.disk import block_pool
from proxy.errors import Corrupt
from proxy.formats.vhd import BLOCK_SIZE
from proxy.jobs.disk_parts import DiskParts
from proxy.jobs.replication.follower import Follower, find_follower
from proxy.jobs.replication.replica_vm import NewDisk, ReplicaVm
from proxy.jobs.replication.replicas import delete_replicas
from proxy.jobs.undo import Undo, undone_on_failure
from proxy.xapi import ownership, vm_create, vms
from proxy.xapi.vdi_import import import_vdi

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from proxy.disks.disk import Block, BlockReader, Disk
    from proxy.jobs.disk_copying import DiskConsumer
    from proxy.jobs.replication.sr_target import SrTarget
    from proxy.jobs.target import DiskPart, IncrementalCopy
    from proxy.runtime.buffers import BufferPool
    from proxy.tasks import Task


class IncrementalReplica(DiskParts):
    """One transfer to one SR; see :class:`proxy.jobs.target.IncrementalWriter`.

    Every disk is a new one, made of its base where there is one: until the VM gets its new
    disks, nothing of the replica is touched.
    """

    def __init__(self, target: SrTarget, copy: IncrementalCopy) -> None:
        super().__init__(copy)
        self._target = target
        self._disks: list[NewDisk] = []
        self._size = 0
        self._timestamp = copy.timestamp

    @property
    def id(self) -> str:
        return self._target.id

    async def run(self, export: Task) -> None:
        target, settings = self._target, self._target.settings
        replicas, old = await target.replicas(export)
        self._timestamp = target.time_behind(self._copy.timestamp)
        follower = await find_follower(target, replicas)
        if isinstance(follower, Follower):
            used = {follower.ref}
        else:
            used = set[str]()
            if follower:
                export.info("a new replica is made", {"reason": follower})
        if settings.delete_first:
            # The bases must live until they are cloned: at least one delta needs them.
            bases = {base.vm_ref for base in target.bases.values()}
            first = [one for one in old if one.ref not in bases]
            await delete_replicas(export, first, marks=target.marks, in_use=used)
            old = [one for one in old if one.ref in bases]
        async with undone_on_failure() as undo, export.child("transfer") as transfer:
            transfer.progress(0, self._copy.progress.total, estimated=True)
            await self.store_parts(partial(self._store, undo, transfer))
            replica = ReplicaVm(target, self._copy, self._disks, self._size, self._timestamp, undo)
            await replica.put_in_place(
                transfer, follower if isinstance(follower, Follower) else None
            )
            transfer.complete_progress()
            transfer.result = {"size": self._size}
        await delete_replicas(export, old, marks=target.marks, in_use={replica.ref})

    async def _store(self, undo: Undo, transfer: Task, part: DiskPart) -> None:
        target, exported, disk = self._target, part.exported, part.disk
        record = {**exported.vdi, "other_config": self._keys(exported.vdi)}
        made = partial(self._made, undo)
        if disk.is_differencing:
            base = target.bases.get(exported.source_uuid)
            if base is None:
                raise Corrupt(f"no validated target base for {exported.source_uuid}")
            ref = await vm_create.clone_vdi(
                target.xapi, base.ref, record, marks=target.marks, made=made
            )
        else:
            ref = await vm_create.create_vdi(target.xapi, record, target.sr_ref, marks=target.marks)
            made(ref)
        moved = self.moving(transfer)
        if len(disk.blocks):
            await import_vdi(
                target.xapi,
                ref,
                _Received(disk, part.consumer, moved),
                block_pool(1),
                uuid=UUID(exported.vdi["uuid"]),
                progress=_nothing,
            )
        else:
            # A host does not take an image without data; its end must be confirmed all the same.
            while (block := await part.consumer.next()) is not None:
                block.release()
        self._disks.append(NewDisk(ref, exported))
        self._size += len(disk.blocks) * BLOCK_SIZE

    def _made(self, undo: Undo, ref: str) -> None:
        undo.add("destroy a half-made disk", partial(vms.destroy_vdi, self._target.xapi, ref))

    def _keys(self, vdi: dict[str, Any]) -> dict[str, str]:
        """What the source's disk has, with our keys in the place of those of its backups."""
        return {
            **ownership.without_keys(vdi.get("other_config") or {}),
            **self._target.keys(self._timestamp),
            ownership.CONTENT_KEY: str(vdi["uuid"]),
            ownership.INCLUDE_NON_NBD_QCOW2_FIX: "true",
        }


def _nothing(_size: int) -> None:
    """Bytes are counted as blocks are received."""


class _Received:
    """A disk whose blocks come from a fan-out."""

    def __init__(self, disk: Disk, consumer: DiskConsumer, moved: Callable[[int], None]) -> None:
        self.virtual_size = disk.virtual_size
        self.is_differencing = disk.is_differencing
        self.blocks = disk.blocks
        self._order = disk.order
        self._consumer = consumer
        self._moved = moved

    @property
    def order(self) -> Sequence[int]:
        return self._order

    @contextlib.asynccontextmanager
    async def read(self, pool: BufferPool) -> AsyncIterator[BlockReader]:
        """The blocks bring their buffers: ``pool`` is not needed."""
        del pool
        yield _Receiving(self._consumer, self._moved)


class _Receiving:
    def __init__(self, consumer: DiskConsumer, moved: Callable[[int], None]) -> None:
        self._consumer = consumer
        self._moved = moved
        self._given: tuple[float, int] | None = None

    async def next(self) -> Block | None:
        """As :meth:`proxy.disks.disk.BlockReader.next`; who asks is done with the one before."""
        if self._given is not None:
            since, size = self._given
            self._consumer.waited += trio.current_time() - since
            self._moved(size)
        block = await self._consumer.next()
        self._given = None if block is None else (trio.current_time(), len(block.data))
        return block
