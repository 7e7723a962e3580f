"""Making a VM from an incremental backup."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast
from uuid import UUID

import trio

from proxy.disks.disk import block_pool
from proxy.disks.opening import open_chain
from proxy.errors import Conflict, Corrupt, NotFound
from proxy.formats.vhd import BLOCK_SIZE
from proxy.jobs.differential_restore import Nearest, find_nearest
from proxy.jobs.restored_vm import dress_restored
from proxy.jobs.undo import undo_step
from proxy.repository.paths import disk_path
from proxy.xapi import vm_create, vms
from proxy.xapi.vdi_import import import_vdi

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from proxy.disks.disk import Disk
    from proxy.jobs.requests import RestoreRequest
    from proxy.jobs.restored_vm import Dress
    from proxy.remotes import Remote
    from proxy.repository import BackupRecord
    from proxy.runtime.buffers import BufferPool
    from proxy.tasks import Task
    from proxy.xapi import Xapi

_BUFFERS = 10
"""Of 2 MiB, over all disks of the VM."""
_DISKS_AT_ONCE = 4
_DESTROY_SECONDS = 600.0

Record = dict[str, Any]


@dataclass(slots=True)
class _Disk:
    """One disk of the backup, open, with where it goes."""

    ref: str
    """Of the VDI in the backup's records."""
    vdi: Record
    content: Disk | None
    """What is sent; with ``nearest`` only the difference to it, if there is any."""
    sr_ref: str
    nearest: Nearest | None
    made: str = ""
    """Reference of the new VDI."""


async def restore_incremental(
    task: Task,
    request: RestoreRequest,
    remote: Remote,
    record: BackupRecord,
    xapi: Xapi,
    *,
    marks: Mapping[str, str],
    dress: Dress = dress_restored,
) -> dict[str, Any]:
    """Restore inside ``task``; answers ``{size, id}`` with the new VM's uuid.

    ``size`` is the bytes of the blocks sent.  ``marks`` name the run on what is made until
    ``dress`` finishes it.  After a failure or a cancel the half-made VM
    and its disks are gone.
    """
    metadata = record.metadata
    if not isinstance(metadata.get("vmSnapshot"), dict):
        raise Corrupt(
            f"the metadata of {record.backup.id} has no record of the snapshot: it is older than"
            " what can be restored",
            data={"path": record.backup.id},
        )
    restore = _Restore(task, request, remote, record, xapi, marks, dress)
    async with task.child("transfer") as transfer:
        result = await restore.run(transfer)
        transfer.result = result
    return result


class _Restore:
    def __init__(
        self,
        task: Task,
        request: RestoreRequest,
        remote: Remote,
        record: BackupRecord,
        xapi: Xapi,
        marks: Mapping[str, str],
        dress: Dress,
    ) -> None:
        self._task = task
        self._request = request
        self._remote = remote
        self._record = record
        self._metadata = record.metadata
        self._xapi = xapi
        self._marks = marks
        self._dress = dress
        self._sent = 0

    async def run(self, transfer: Task) -> dict[str, Any]:
        xapi = self._xapi
        memory_ref = self._metadata["vmSnapshot"].get("suspend_VDI")
        async with contextlib.AsyncExitStack() as stack:
            disks = await self._open_disks(stack, memory_ref)
            total = sum(_blocks(disk.content) for disk in disks) * BLOCK_SIZE
            transfer.progress(0, total)
            made = await stack.enter_async_context(_undone_on_failure(xapi))
            memory = next((disk for disk in disks if disk.ref == memory_ref), None)
            if memory is None and vms.is_ref(memory_ref):
                self._task.warning("Suspend VDI not available for this suspended VM")
            if memory is not None:
                await self._make_disk(memory, made)
            vm_ref = await vm_create.create_vm(
                xapi,
                self._metadata["vm"],
                marks=self._marks,
                new_mac_addresses=self._request.new_mac_addresses,
                suspend_vdi=None if memory is None else memory.made,
            )
            made.vm = vm_ref
            await vm_create.dress_vm(xapi, vm_ref, self._metadata["vm"])
            for disk in disks:
                if disk is not memory:
                    await self._make_disk(disk, made)
                    await self._attach(disk, vm_ref)
            await self._make_interfaces(vm_ref)
            await self._send_all(transfer, disks, total)
            await self._refuse_deleted()
            for lost in await vm_create.restore_vtpms(
                xapi, vm_ref, cast("list[str | None]", self._metadata.get("vtpms") or [])
            ):
                self._task.warning(lost)
            transfer.complete_progress()
            # The disks first, the VM's name last: what a crash leaves of the VM still says by
            # name and marks that it is unfinished, and the disks go with it.
            for disk in disks:
                await vm_create.release_vdi(xapi, disk.made, disk.vdi)
            await vm_create.release_vm(xapi, vm_ref, self._metadata["vm"])
            await self._dress(xapi, vm_ref, self._request, self._record)
            return {"size": total, "id": await xapi.call("VM.get_uuid", vm_ref)}

    # -- the backup's side -------------------------------------------------------------------

    async def _open_disks(
        self, stack: contextlib.AsyncExitStack, memory_ref: object
    ) -> list[_Disk]:
        """Every disk that is wanted, with its whole chain; nothing is made before all are open."""
        xapi, request = self._xapi, self._request
        vhds = self._metadata.get("vhds")
        if not isinstance(vhds, dict):
            raise self._corrupt("names no disks")
        found: list[_Disk] = []
        default_sr = await xapi.by_uuid("SR", request.sr_uuid)
        vdis = self._records("vdis")
        for ref, relative in cast("dict[str, Any]", vhds).items():
            vdi = vdis.get(ref)
            path = disk_path(self._record.backup.id, str(relative))
            if vdi is None or path is None:
                raise self._corrupt(f"has no usable record of the disk {relative!r}")
            if vdi.get("uuid") in request.map_vdis_srs:
                sr_uuid = request.map_vdis_srs[vdi["uuid"]]
                if sr_uuid is None:
                    continue
                sr_ref = await xapi.by_uuid("SR", sr_uuid)
            else:
                sr_ref = default_sr
            nearest: Nearest | None = None
            if request.use_differential_restore and ref != memory_ref:
                nearest = await find_nearest(
                    xapi, self._remote, self._record, vdi, sr_ref, path, stack
                )
            if nearest is None:
                content: Disk | None = await stack.enter_async_context(
                    open_chain(self._remote, path)
                )
            else:
                content = nearest.difference
                self._task.info(
                    "differential restore",
                    {
                        "disk": vdi["uuid"],
                        "snapshot": nearest.snapshot_uuid,
                        "blocks": _blocks(content),
                    },
                )
            found.append(_Disk(ref, vdi, content, sr_ref, nearest))
        return found

    def _records(self, field: str) -> dict[str, Record]:
        """Records by reference; an old backup may lack them."""
        return self._metadata.get(field) or {}

    def _corrupt(self, what: str) -> Corrupt:
        path = self._record.backup.id
        return Corrupt(f"the metadata of {path} {what}", data={"path": path})

    async def _refuse_deleted(self) -> None:
        """A backup that is deleted meanwhile may be merged into the next while we read it."""
        path = self._record.backup.id
        try:
            await self._remote.stat(path)
        except NotFound as error:
            raise Conflict(
                f"{path} was deleted while it was restored: nothing was kept of the restore",
                code="EDELETED",
                data={"path": path},
            ) from error

    # -- the pool's side ---------------------------------------------------------------------

    async def _make_disk(self, disk: _Disk, made: _Made) -> None:
        xapi = self._xapi
        if disk.nearest is None:
            disk.made = await vm_create.create_vdi(xapi, disk.vdi, disk.sr_ref, marks=self._marks)
            made.vdis.append(disk.made)
            return

        disk.made = await vm_create.clone_vdi(
            xapi,
            disk.nearest.snapshot_ref,
            disk.vdi,
            marks=self._marks,
            made=made.vdis.append,
        )

    async def _attach(self, disk: _Disk, vm_ref: str) -> None:
        for record in self._records("vbds").values():
            if record.get("VDI") == disk.ref:
                await vm_create.create_vbd(self._xapi, record, vm_ref, disk.made)

    async def _make_interfaces(self, vm_ref: str) -> None:
        networks = await vm_create.Networks.read(self._xapi)
        for record in self._records("vifs").values():
            made = await vm_create.create_vif(
                self._xapi,
                record,
                vm_ref,
                networks,
                new_mac_address=self._request.new_mac_addresses,
            )
            if made is None:
                self._task.warning(
                    "no network of the pool fits an interface of the VM: it is left out",
                    {"device": record.get("device"), "network": record.get("$network$name_label")},
                )

    async def _send_all(self, transfer: Task, disks: list[_Disk], total: int) -> None:
        pool = block_pool(_BUFFERS)
        slots = trio.Semaphore(_DISKS_AT_ONCE)
        failures: list[Exception] = []

        def moved(size: int) -> None:
            self._sent += size
            transfer.progress(min(self._sent, total), total)

        async def one(disk: _Disk) -> None:
            try:
                async with slots:
                    await self._send(disk, pool, moved)
            except Exception as error:  # noqa: BLE001  raised below, outside of the nursery's group
                failures.append(error)
                nursery.cancel_scope.cancel("a disk failed")

        async with trio.open_nursery() as nursery:
            for disk in disks:
                nursery.start_soon(one, disk)
        if failures:
            raise failures[0]

    async def _send(self, disk: _Disk, pool: BufferPool, moved: Any) -> None:
        if disk.content is None:
            return
        await import_vdi(
            self._xapi,
            disk.made,
            disk.content,
            pool,
            uuid=UUID(disk.vdi["uuid"]),
            progress=moved,
        )


def _blocks(disk: Disk | None) -> int:
    return 0 if disk is None else len(disk.blocks)


@dataclass(slots=True)
class _Made:
    """What exists on the pool so far."""

    vm: str | None
    vdis: list[str]


@contextlib.asynccontextmanager
async def _undone_on_failure(xapi: Xapi) -> AsyncIterator[_Made]:
    made = _Made(None, [])
    try:
        yield made
    except BaseException:
        if made.vm is not None:
            async with undo_step("destroy the half-restored VM", _DESTROY_SECONDS):
                await vms.destroy_vm(xapi, made.vm, bypass_blocked=True)
        for ref in made.vdis:
            async with undo_step("destroy a half-restored disk", _DESTROY_SECONDS):
                await vms.destroy_vdi(xapi, ref)
        raise
