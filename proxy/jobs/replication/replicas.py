"""The replicas of a VM on an SR: which there are, which are too old, deleting them.

Two kinds are known: a VM for each transfer (full replication, and incremental replication in
the old days), and a VM that follows its source, with a snapshot for each transfer.  Of the
latter the snapshots are the replicas.  Whoever unblocks the start of a replica, or clones it,
takes it over: it is no replica any more, and never deleted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import trio

from proxy.errors import ProxyError
from proxy.jobs.job_snapshots import keys_of
from proxy.jobs.replication.keys import timestamp_of
from proxy.jobs.undo import UNDO_SECONDS
from proxy.runtime.deadlines import undo_within
from proxy.runtime.trouble import tell_trouble
from proxy.xapi import ownership, vm_create, vms
from proxy.xapi.snapshots import TEMPORARY_NAME
from proxy.xapi.vdi_compare import is_unchanged

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from proxy.tasks import Task
    from proxy.xapi import Xapi

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Replica:
    """One transfer to an SR."""

    xapi: Xapi
    """Of its pool."""
    ref: str
    uuid: str
    timestamp: int
    """Milliseconds."""
    vm_ref: str | None
    """The VM that follows, of which this is a snapshot; ``None``: it is a VM itself."""
    schedule_id: str
    record: Record


async def list_replicas(
    xapi: Xapi, sr_uuid: str, vm_uuid: str, job_id: str, schedule_id: str
) -> list[Replica]:
    """What the job keeps of the VM on the SR, oldest first: all schedules have one follower.

    Read from the pool now.  What is unfinished, or of which the time cannot be told, is not
    listed.
    """
    records: dict[str, Record] = await xapi.call("VM.get_all_records")
    found: list[Replica] = []
    for ref, record in records.items():
        keys = keys_of(record)
        schedule, job = keys.get(ownership.SCHEDULE, ""), keys.get(ownership.JOB, "")
        if job == schedule_id:
            schedule = schedule_id  # so it was in older days
        if schedule != schedule_id and job != job_id:
            continue
        if not _is_replica(record, sr_uuid, vm_uuid):
            continue
        snapshot_of = str(record.get("snapshot_of")) if record.get("is_a_snapshot") else None
        if snapshot_of in records and records[snapshot_of]["uuid"] == vm_uuid:
            continue  # the source's own snapshot, where the SR is in the source's pool
        timestamp = timestamp_of(_date(record))
        if timestamp is not None:
            found.append(
                Replica(xapi, ref, record["uuid"], timestamp, snapshot_of, schedule, record)
            )
    followers = {one.vm_ref for one in found}
    found = [one for one in found if one.ref not in followers]
    return sorted(found, key=lambda one: one.timestamp)


def _is_replica(record: Record, sr_uuid: str, vm_uuid: str) -> bool:
    keys = keys_of(record)
    return (
        not record.get("is_a_template")
        and not record.get("is_control_domain")
        and keys.get(ownership.SR) == sr_uuid
        and keys.get(ownership.VM) == vm_uuid
        and (bool(record.get("is_a_snapshot")) or is_blocked(record))
        and record.get("name_label") != TEMPORARY_NAME
        and not vm_create.is_importing(record.get("name_label"))
    )


def is_blocked(record: Record) -> bool:
    """Whether a replica is still ours: nobody has released its start."""
    return "start" in (record.get("blocked_operations") or {})


def _date(record: Record) -> str:
    label: str = record.get("name_label") or ""
    return keys_of(record).get(ownership.DATETIME) or label[-17:-1]


def time_behind(replicas: Sequence[Replica], timestamp: int) -> int:
    """``timestamp``, or later: replicas know only whole seconds, and the new one sorts last."""
    return max([timestamp, *(replica.timestamp + 1000 for replica in replicas)])


async def delete_replicas(
    task: Task,
    old: Sequence[Replica],
    *,
    marks: Mapping[str, str],
    in_use: Collection[str] = (),
) -> None:
    """Destroy replicas that are too old, the youngest first; those of VMs ``in_use`` only as
    snapshots.

    One that somebody has taken over since it was listed stays, with a warning.  All are
    tried; the first error is raised.  Can be run again after a failure or a cancel, which is
    felt between two replicas.  Disks get ``marks`` and the temporary name before the VM that
    they would be found by is gone: what outlives it is for the next sweep.
    """
    errors: list[ProxyError] = []
    for replica in reversed(old):
        await trio.lowlevel.checkpoint()
        try:
            with undo_within("deleting an old replica", UNDO_SECONDS):
                await _delete(task, replica, marks, in_use)
        except ProxyError as error:
            errors.append(error)
    if errors:
        raise errors[0]
    await trio.lowlevel.checkpoint()


async def _delete(
    task: Task, replica: Replica, marks: Mapping[str, str], in_use: Collection[str]
) -> None:
    xapi = replica.xapi
    record = await vms.record_or_none(xapi, "VM", replica.ref)
    if record is None:
        return
    if replica.vm_ref is None:
        taken = _taken_over(record)
        if taken is not None:
            task.warning(
                "an old replica is kept: somebody uses it",
                {"vm": record["uuid"], "name": record["name_label"], "reason": taken},
            )
            return
        await _destroy(xapi, [(replica.ref, record)], marks)
        return
    follower = await _left_follower(replica, in_use)
    # The VM first: without its snapshot nobody would know what it was.
    both = [(replica.ref, record)]
    if follower is not None:
        both.insert(0, (follower, await xapi.record("VM", follower)))
    await _destroy(xapi, both, marks)


async def _destroy(
    xapi: Xapi, found: Sequence[tuple[str, Record]], marks: Mapping[str, str]
) -> None:
    """Destroy VMs, in this order; those that a failure leaves have their disks as before."""
    condemned: dict[str, list[tuple[str, Record]]] = {}
    try:
        for vm_ref, record in found:
            ours = condemned.setdefault(vm_ref, [])
            for _, vdi_ref, vdi in await vms.disks(xapi, record):
                if not await is_used_elsewhere(xapi, vdi):
                    ours.append((vdi_ref, vdi))
                    await _condemn(xapi, vdi_ref, vdi, marks)
        for vm_ref, _ in found:
            await vms.destroy_vm(xapi, vm_ref, bypass_blocked=True)
    except ProxyError:
        for vm_ref, disks in condemned.items():
            await _reprieve(xapi, vm_ref, disks)
        raise


async def _condemn(xapi: Xapi, ref: str, vdi: Record, marks: Mapping[str, str]) -> None:
    """Make a disk that nobody is going to have any more known as unfinished."""
    await xapi.call("VDI.set_other_config", ref, {**keys_of(vdi), **marks})
    await xapi.call("VDI.set_name_label", ref, TEMPORARY_NAME)


async def _reprieve(xapi: Xapi, vm_ref: str, disks: Sequence[tuple[str, Record]]) -> None:
    """Give the disks of a VM that is still there their names and keys again."""
    try:
        if await vms.record_or_none(xapi, "VM", vm_ref) is None:
            return
        for ref, vdi in disks:
            if await vms.record_or_none(xapi, "VDI", ref) is not None:
                await xapi.call("VDI.set_name_label", ref, vdi["name_label"])
                await xapi.call("VDI.set_other_config", ref, keys_of(vdi))
    except ProxyError as error:
        tell_trouble("could not give the disks of an old replica their names", error, vm=vm_ref)


def _taken_over(record: Record) -> str | None:
    if not is_blocked(record):
        return "its start is not blocked any more"
    if record.get("power_state") not in ("Halted", "Suspended"):
        return "it runs"
    if record.get("snapshots"):
        return "it has snapshots"
    return None


async def _left_follower(replica: Replica, in_use: Collection[str]) -> str | None:
    """The VM that followed, if this is its last replica and nobody has touched it.

    It got a successor: a new one is made when the memory of the source is replicated too, or
    when somebody had written to the old one, and that one stays.
    """
    xapi, vm_ref = replica.xapi, str(replica.vm_ref)
    if vm_ref in in_use:
        return None
    vm = await vms.record_or_none(xapi, "VM", vm_ref)
    if vm is None or vm.get("snapshots") != [replica.ref] or vm.get("is_a_template"):
        return None
    ours = keys_of(vm).get(ownership.SR) == keys_of(replica.record).get(ownership.SR)
    if not ours or not is_blocked(vm) or vm.get("power_state") not in ("Halted", "Suspended"):
        return None
    return vm_ref if await is_untouched(xapi, vm, replica.record) else None


async def is_untouched(xapi: Xapi, vm: Record, snapshot: Record) -> bool:
    """Whether a VM has only disks of its snapshot, and on them what the snapshot has.

    What cannot be told counts as touched.
    """
    frozen = await frozen_disks(xapi, snapshot)
    for _, ref, vdi in await vms.disks(xapi, vm):
        if await why_touched(xapi, ref, vdi, frozen) is not None:
            return False
    return True


async def frozen_disks(xapi: Xapi, snapshot: Record) -> dict[str, str]:
    """The disks of a snapshot by those that they are snapshots of."""
    return {str(vdi.get("snapshot_of")): ref for _, ref, vdi in await vms.disks(xapi, snapshot)}


async def why_touched(xapi: Xapi, ref: str, vdi: Record, frozen: Mapping[str, str]) -> str | None:
    """Why a disk of a replica is not what its snapshot says; ``None``: it is."""
    if ref not in frozen:
        return f"the disk {vdi['uuid']} was added"
    if await is_used_elsewhere(xapi, vdi):
        return f"the disk {vdi['uuid']} is used by another VM"
    try:
        if not await is_unchanged(xapi, ref, vdi, frozen[ref]):
            return f"the disk {vdi['uuid']} was written to"
    except ProxyError as error:
        return f"the disk {vdi['uuid']} cannot be compared: {error.message}"
    return None


async def is_used_elsewhere(xapi: Xapi, vdi: Record) -> bool:
    """Whether more than one VM has the disk; control domains do not count."""
    owners: set[str] = set()
    for vbd_ref in vdi.get("VBDs", []):
        vbd = await vms.record_or_none(xapi, "VBD", vbd_ref)
        vm = None if vbd is None else await vms.record_or_none(xapi, "VM", vbd["VM"])
        if vbd is not None and vm is not None and not vm.get("is_control_domain"):
            owners.add(str(vbd["VM"]))
    return len(owners) > 1
