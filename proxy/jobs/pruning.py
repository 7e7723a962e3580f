"""Which of a job's snapshots on the pool go before and after an attempt at a VM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from proxy.jobs.disk_snapshots import destroy_group, expired_groups, list_disk_snapshots
from proxy.jobs.job_snapshots import expired, list_snapshots, unfinished_snapshots
from proxy.xapi import vms

if TYPE_CHECKING:
    from proxy.jobs.vm_backup import VmBackup

Record = dict[str, Any]


async def prune(backup: VmBackup, *, include_unfinished: bool = False) -> None:
    """Destroy the job's snapshots beyond the retention of the schedule that made each.

    A job that makes deltas keeps its newest exported one, whatever retention says and whether
    this attempt has targets or not: the next delta begins there.  ``include_unfinished``: those
    that dead runs left half-made go too.  May be cancelled between any two, and run again.
    """
    xapi = backup.xapi
    vm = await xapi.record("VM", backup.vm_ref)
    if backup.job.mode == "delta":
        await _beyond_the_base(backup, vm)
    else:
        await _all(backup, vm, include_orphans=include_unfinished)
    if include_unfinished:
        for ref in await unfinished_snapshots(xapi, vm, backup.installation, backup.is_live_run):
            await vms.destroy_vm(xapi, ref, bypass_blocked=True)


def _retention(backup: VmBackup, schedule: str) -> int:
    return backup.job.settings.snapshot_retention(schedule, backup.uuid)


async def _beyond_the_base(backup: VmBackup, vm: Record) -> None:
    xapi = backup.xapi
    groups = await list_disk_snapshots(xapi, vm, backup.job.id)
    for group in expired_groups(groups, lambda schedule: _retention(backup, schedule)):
        await destroy_group(xapi, group)
    # Of a VM without disks there is no group, and nothing that could be a base.
    known = {one.vm_ref for group in groups for one in group}
    without_disks = [
        one
        for one in await list_snapshots(xapi, vm, backup.job.id)
        if one.ref not in known and not await vms.disks(xapi, await xapi.record("VM", one.ref))
    ]
    for one in expired(without_disks, lambda schedule: _retention(backup, schedule)):
        await vms.destroy_vm(xapi, one.ref, bypass_blocked=True)


async def _all(backup: VmBackup, vm: Record, *, include_orphans: bool) -> None:
    xapi = backup.xapi
    snapshots = await list_snapshots(xapi, vm, backup.job.id)
    for one in expired(snapshots, lambda schedule: _retention(backup, schedule)):
        await vms.destroy_vm(xapi, one.ref, bypass_blocked=True)
    if include_orphans:
        # A run that died here before left disks whose VM it had destroyed already.
        for group in await list_disk_snapshots(xapi, vm, backup.job.id):
            if all(one.vm_ref is None for one in group):
                await destroy_group(xapi, group)
