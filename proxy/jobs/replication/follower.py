"""The replica that follows its source: whether it can be updated, or somebody has taken it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from proxy.jobs.job_snapshots import keys_of
from proxy.jobs.replication.replicas import frozen_disks, is_blocked, is_used_elsewhere, why_touched
from proxy.xapi import ownership, vm_create, vms

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from proxy.jobs.replication.replicas import Replica
    from proxy.jobs.replication.sr_target import SrTarget

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Follower:
    """A replica that is to get new disks in the place of those that it has."""

    ref: str
    record: Record
    disks: list[tuple[str, Record]]
    """Reference and record of each disk that it has now."""

    def is_still(self, record: Record) -> bool:
        """Whether the VM is as it was when it was found fit: nobody came in between."""
        drives = sorted(record.get("VBDs") or [])
        return why_not_ours(record) is None and drives == sorted(self.record.get("VBDs") or [])


async def find_follower(target: SrTarget, replicas: Sequence[Replica]) -> Follower | str:
    """The VM of the youngest replica, or why it cannot be updated (empty: there is none).

    It must be as its last transfer has left it.  Otherwise it is somebody's: it stays as it
    is, and the next replica is a new VM.  Disks that a run of ours was putting in place when
    it died say nothing about anybody.
    """
    xapi = target.xapi
    youngest = next((one for one in reversed(replicas) if one.vm_ref is not None), None)
    if youngest is None:
        return ""
    ref = str(youngest.vm_ref)
    vm = await vms.record_or_none(xapi, "VM", ref)
    if vm is None:
        return "the VM of the last replica is gone"
    reason = why_not_ours(vm)
    if keys_of(vm).get(ownership.SR) != target.sr_uuid:
        reason = f"{vm['name_label']} is not marked as a replica on this SR"
    if reason is not None:
        return reason
    frozen = await frozen_disks(xapi, youngest.record)
    found: list[tuple[str, Record]] = []
    for _, vdi_ref, vdi in await vms.disks(xapi, vm):
        reason = await _why_somebodys(target, vdi_ref, vdi, frozen)
        if reason is not None:
            return reason
        found.append((vdi_ref, vdi))
    return Follower(ref, vm, found)


async def _why_somebodys(
    target: SrTarget, vdi_ref: str, vdi: Record, frozen: Mapping[str, str]
) -> str | None:
    if not _is_left_by_us(target, vdi):
        return await why_touched(target.xapi, vdi_ref, vdi, frozen)
    if await is_used_elsewhere(target.xapi, vdi):
        return f"the disk {vdi['uuid']} is used by another VM"
    return None


def why_not_ours(vm: Record) -> str | None:
    """Why a VM may not be updated by us, as far as its record tells."""
    if vm.get("is_a_snapshot") or vm.get("is_a_template"):
        return "the last replica became a template"
    if not is_blocked(vm):
        return "the start of the last replica is not blocked any more"
    if vm.get("power_state") != "Halted":
        return f"the last replica is {str(vm.get('power_state')).lower()}"
    if vm.get("current_operations"):
        return "the last replica is being worked on"
    return None


def _is_left_by_us(target: SrTarget, vdi: Record) -> bool:
    """Whether a run of this installation that is over left the disk unfinished."""
    keys, backup = keys_of(vdi), target.backup
    run = keys.get(ownership.RUN)
    if run is None or not vm_create.is_importing(vdi.get("name_label")):
        return False
    if keys.get(ownership.PROXY) != backup.installation:
        return False
    return run == backup.run_id or not backup.is_live_run(run)
