"""Making a VM from a full backup."""

from __future__ import annotations

import contextlib
import uuid
from typing import TYPE_CHECKING, Any

import trio

from proxy.errors import Corrupt, Refused
from proxy.jobs.restored_vm import dress_restored
from proxy.jobs.undo import undo_step
from proxy.runtime.buffers import Buffer, BufferPool
from proxy.xapi import vm_create, vms
from proxy.xapi.migration import forget_block

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from proxy.jobs.requests import RestoreRequest
    from proxy.jobs.restored_vm import Dress
    from proxy.remotes import FileReader, Remote
    from proxy.repository import BackupRecord
    from proxy.tasks import Task
    from proxy.xapi import Upload, Xapi

_BUFFERS = 4
_DESTROY_SECONDS = 600.0


async def restore_full(
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

    ``marks`` name the run on what is made until ``dress`` finishes it.  After a failure or a
    cancel the half-made VM and its disks are gone.
    """
    for key, given in {
        "mapVdisSrs": request.map_vdis_srs,
        "useDifferentialRestore": request.use_differential_restore,
    }.items():
        if given:
            task.warning(f"the setting '{key}' has no effect on the restore of a full backup")
    sr_ref = await xapi.by_uuid("SR", request.sr_uuid)
    async with task.child("transfer") as transfer:
        path = _xva_path(record)
        async with remote.open_read(path) as file:
            _check_size(record, path, file.size)
            async with (
                xapi.import_vm(sr_ref, length=file.size) as upload,
                _imported(task, xapi) as made,
            ):
                await send_file(transfer, file, upload)
                made.extend(str(ref) for ref in await upload.finish())
                if not made:
                    raise Corrupt("the archive holds no VM: nothing was restored")
                transfer.complete_progress()
                vm_ref = made[0]
                await _mark(xapi, vm_ref, marks)
                await forget_block(xapi, vm_ref)
                if request.new_mac_addresses:
                    await _renew_macs(xapi, vm_ref)
                await dress(xapi, vm_ref, request, record)
                result = {"size": file.size, "id": await xapi.call("VM.get_uuid", vm_ref)}
        transfer.result = result
    return result


@contextlib.asynccontextmanager
async def _imported(task: Task, xapi: Xapi) -> AsyncIterator[list[str]]:
    """Collects the VMs that the block made; destroys them when it fails."""
    made: list[str] = []
    try:
        yield made
    except BaseException:
        for ref in made:
            async with undo_step("destroy the half-restored VM", _DESTROY_SECONDS):
                await vms.destroy_vm(xapi, ref, bypass_blocked=True)
        raise


def _xva_path(record: BackupRecord) -> str:
    """The archive named by the metadata, which may come from anybody: inside its directory."""
    name = (record.backup.xva or "").removeprefix("./")
    if not name or "/" in name or name.startswith("."):
        raise Corrupt(
            f"the metadata of {record.backup.id} names no archive beside it",
            data={"path": record.backup.id},
        )
    return f"{record.backup.id.rpartition('/')[0]}/{name}"


def _check_size(record: BackupRecord, path: str, size: int) -> None:
    expected = record.backup.size
    if expected is not None and int(expected) != size:
        raise Corrupt(
            f"{path} has {size} bytes where its metadata says {int(expected)}: it is not complete",
            data={"path": path, "size": size, "expected": int(expected)},
        )


async def send_file(transfer: Task, file: FileReader, upload: Upload) -> None:
    """File to host, reading ahead while the network takes the block before."""
    pool = BufferPool(_BUFFERS)
    send, receive = trio.open_memory_channel[Buffer](_BUFFERS)
    waited = {"source": 0.0, "target": 0.0}
    failures: list[Exception] = []

    async def read() -> None:
        with send:
            while True:
                buffer = await pool.acquire()
                buffer.length = await file.read_into(buffer.memory)
                if buffer.length == 0:
                    return
                send.send_nowait(buffer)

    async def reading() -> None:
        try:
            await read()
        except Exception as error:  # noqa: BLE001  raised below, outside of the nursery's group
            failures.append(error)
            nursery.cancel_scope.cancel("the remote failed")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(reading)
        transfer.progress(0, file.size)
        try:
            at = trio.current_time()
            async for buffer in receive:
                got = trio.current_time()
                await upload.write(buffer.view)
                buffer.release()
                sent = trio.current_time()
                waited["source"] += got - at
                waited["target"] += sent - got
                at = sent
                transfer.progress(upload.sent, file.size, bottleneck=_slowest(waited, upload))
        except Exception as error:  # noqa: BLE001  raised below, outside of the nursery's group
            failures.append(error)
            nursery.cancel_scope.cancel("the host failed")
    if failures:
        raise failures[0]


def _slowest(waited: dict[str, float], upload: Upload) -> str:
    slowest = max(waited, key=lambda stage: waited[stage])
    return "network" if slowest == "target" and upload.peer_lossy else slowest


async def _mark(xapi: Xapi, vm_ref: str, marks: Mapping[str, str]) -> None:
    """The host made the VM under the name it had: say that it is not finished, in two calls."""
    vm = await xapi.record("VM", vm_ref)
    await xapi.call("VM.set_name_label", vm_ref, vm_create.importing(vm["name_label"]))
    config: dict[str, str] = vm.get("other_config") or {}
    await xapi.call("VM.set_other_config", vm_ref, {**config, **marks})


async def _renew_macs(xapi: Xapi, vm_ref: str) -> None:
    """Replace every VIF by one with a MAC that the host derives from a new seed."""
    vm = await xapi.record("VM", vm_ref)
    await xapi.update_map("VM", vm_ref, "other_config", {"mac_seed": str(uuid.uuid4())})
    for ref in [ref for ref in vm.get("VIFs", []) if vms.is_ref(ref)]:
        vif = await xapi.record("VIF", ref)
        await xapi.call("VIF.destroy", ref)
        new = await xapi.call("VIF.create", {**_creatable(vif), "VM": vm_ref, "MAC": ""})
        if (await xapi.record("VIF", new))["MAC"] == vif["MAC"]:
            raise Refused("the host gave the VM its former MAC address again", code="EMAC")


_VIF_FIELDS = (
    "device",
    "network",
    "MTU",
    "other_config",
    "qos_algorithm_type",
    "qos_algorithm_params",
    "locking_mode",
    "ipv4_allowed",
    "ipv6_allowed",
)


def _creatable(vif: dict[str, Any]) -> dict[str, Any]:
    return {key: vif[key] for key in _VIF_FIELDS if key in vif}
