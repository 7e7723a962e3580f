"""The snapshots of a VM's disks that incremental backups chain on: finding, choosing, pruning.

Other than rolling snapshots they are looked for disk by disk: with ``cbtDestroySnapshotData`` a
base has no VM any more and hardly any data, and is a base all the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from proxy.jobs.job_snapshots import keys_of, sortable
from proxy.xapi import ownership, vms
from proxy.xapi.together import together

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from proxy.xapi import Xapi

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class DiskSnapshot:
    """One snapshot of one disk with a job's keys."""

    ref: str
    uuid: str
    source_uuid: str
    """Of the live disk."""
    datetime: str
    """Sorts by time; equal for the disks of one run."""
    schedule_id: str
    is_exported: bool
    """Some remote got it whole."""
    chain_length: int
    """Deltas since the last key backup of its VM."""
    has_data: bool
    """False: only the map of what changed since is left."""
    vm_ref: str | None
    """The snapshot VM that it belongs to, if there is one."""
    content_key: str = ""
    """Equal for disks of equal content, on any SR; empty for a snapshot of older days."""


Group = list[DiskSnapshot]
"""The snapshots of one run, never empty."""


async def list_disk_snapshots(xapi: Xapi, vm: Record, job_id: str) -> list[Group]:
    """What job ``job_id`` keeps of the disks of ``vm``, oldest run first.

    Read from the pool now.  A snapshot that is attached to anything but one snapshot VM of the
    same run, or whose keys disagree in any way, is somebody else's and left out.
    """
    return await _list(xapi, vm, lambda job: job == job_id)


async def list_disk_snapshots_of_others(xapi: Xapi, vm: Record, job_id: str) -> list[Group]:
    """As :func:`list_disk_snapshots`, what every job but ``job_id`` keeps."""
    return await _list(xapi, vm, lambda job: job not in (None, job_id))


async def _list(xapi: Xapi, vm: Record, is_wanted: Callable[[str | None], bool]) -> list[Group]:
    found: list[DiskSnapshot] = []
    for _, _, disk in await vms.disks(xapi, vm):
        refs = [ref for ref in disk.get("snapshots", []) if vms.is_ref(ref)]

        async def read(ref: str, source: str = disk["uuid"]) -> DiskSnapshot | None:
            return await _read(xapi, ref, source, vm["uuid"], is_wanted)

        found += [one for one in await together(read, refs) if one is not None]
    found.sort(key=lambda one: (one.datetime, one.source_uuid))
    return [list(group) for _, group in groupby(found, key=lambda one: one.datetime)]


async def _read(
    xapi: Xapi, ref: str, source: str, vm_uuid: str, is_wanted: Callable[[str | None], bool]
) -> DiskSnapshot | None:
    record = await vms.record_or_none(xapi, "VDI", ref)
    if record is None:
        return None
    keys = keys_of(record)
    if (
        not is_wanted(keys.get(ownership.JOB))
        or keys.get(ownership.VM) != vm_uuid
        or ownership.COPY_OF in keys
        or ownership.DATETIME not in keys
    ):
        return None
    owners = await _owners(xapi, record)
    if len(owners) > 1 or any(not _same_run(keys, owner) for _, owner in owners):
        return None
    return DiskSnapshot(
        ref=ref,
        uuid=record["uuid"],
        source_uuid=source,
        datetime=sortable(keys[ownership.DATETIME]),
        schedule_id=keys.get(ownership.SCHEDULE, ""),
        is_exported=ownership.EXPORTED in keys,
        chain_length=_number(keys.get(ownership.DELTA_CHAIN_LENGTH)),
        has_data=record.get("type") != "cbt_metadata",
        vm_ref=owners[0][0] if owners else None,
        content_key=keys.get(ownership.CONTENT_KEY, ""),
    )


async def _owners(xapi: Xapi, vdi: Record) -> list[tuple[str, Record]]:
    """The VMs that a disk is attached to; control domains do not count."""
    found: dict[str, Record] = {}
    for vbd_ref in vdi.get("VBDs", []):
        vbd = await vms.record_or_none(xapi, "VBD", vbd_ref)
        if vbd is None:
            continue
        vm = await vms.record_or_none(xapi, "VM", vbd["VM"])
        if vm is not None and not vm.get("is_control_domain"):
            found[vbd["VM"]] = vm
    return list(found.items())


def _same_run(keys: dict[str, str], owner: Record) -> bool:
    theirs = keys_of(owner)
    same = (ownership.DATETIME, ownership.JOB, ownership.VM)
    return bool(owner.get("is_a_snapshot")) and all(keys.get(k) == theirs.get(k) for k in same)


def _number(text: str | None) -> int:
    return int(text) if text is not None and text.isdecimal() else 0


def newest_exported(groups: Sequence[Group]) -> Group:
    """The group that a delta can be taken from: the newest of which a remote got anything."""
    for group in reversed(groups):
        exported = [one for one in group if one.is_exported]
        if exported:
            return exported
    return []


def chain_length(group: Group) -> int:
    return max((one.chain_length for one in group), default=0)


def expired_groups(groups: Sequence[Group], retention: Callable[[str], int]) -> list[Group]:
    """Those beyond the retention of the schedule that made each.

    The newest of all schedules that was exported always stays: it is the next run's base.
    """
    base = newest_exported(groups)
    kept_time = base[0].datetime if base else ""
    by_schedule: dict[str, list[Group]] = {}
    for group in groups:
        by_schedule.setdefault(group[0].schedule_id, []).append(group)
    gone: list[Group] = []
    for schedule_id, ours in by_schedule.items():
        keep = max(0, retention(schedule_id))
        gone += ours[: len(ours) - keep] if keep else ours
    return [group for group in gone if group[0].datetime != kept_time]


async def destroy_group(xapi: Xapi, group: Group) -> None:
    """Destroy a run's snapshot: its VM with its disks, and the disks that have none.

    Can be run again after a failure or a cancel.
    """
    for vm_ref in dict.fromkeys(one.vm_ref for one in group if one.vm_ref is not None):
        await vms.destroy_vm(xapi, vm_ref, bypass_blocked=True)
    for one in group:
        if one.vm_ref is None:
            await vms.destroy_vdi(xapi, one.ref)
