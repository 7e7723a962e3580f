"""One VM in one run, and the snapshot that every kind of backup reads."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from proxy.errors import Refused
from proxy.jobs.job_snapshots import key_date, sortable
from proxy.jobs.settings import refuse_contradictions
from proxy.jobs.undo import undo_step
from proxy.xapi import ownership, vms
from proxy.xapi.snapshots import take_snapshot

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from proxy.jobs.health_check import HealthChecks
    from proxy.jobs.rate_limit import RateLimit
    from proxy.jobs.requests import VmJob
    from proxy.jobs.settings import Settings
    from proxy.remotes import Remote
    from proxy.repository.damage import DamageNotes
    from proxy.tasks import Task
    from proxy.xapi import Xapi

DESTROY_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class Defaults:
    """Values of the configuration that settings refine, or that no setting says."""

    vhd_directory_compression: Literal["brotli", "gzip", "none"] = "brotli"
    prefer_nbd: bool = False


@dataclass(frozen=True, slots=True)
class VmBackup:
    """One VM in one run, as every attempt sees it."""

    job: VmJob
    run_id: str
    installation: str
    is_live_run: Callable[[str], bool]
    damage: Callable[[Remote], DamageNotes]
    snapshot_name: str
    rate: RateLimit
    xapi: Xapi
    vm_ref: str
    vm: dict[str, Any]
    settings: Settings
    defaults: Defaults
    checks: HealthChecks
    stored: set[str] = field(default_factory=set[str])
    """Ids of the targets that have their backup, whatever happened afterwards."""

    @property
    def uuid(self) -> str:
        return str(self.vm["uuid"])

    @property
    def marks(self) -> dict[str, str]:
        """On what is unfinished on a pool."""
        return ownership.Owner(self.installation, self.run_id).marks

    @property
    def tags(self) -> Sequence[str]:
        return self.vm.get("tags") or ()


async def refuse_vm(backup: VmBackup) -> None:
    """Raise for a VM that must not be backed up; no attempt changes that."""
    vm = backup.vm
    if await _is_replica_of_this_job(backup):
        raise Refused("cannot backup a VM created by this very job", code="EREPLICA")
    operations = set(vm.get("current_operations", {}).values())
    if operations & {"migrate_send", "pool_migrate"}:
        raise Refused("cannot backup a VM currently being migrated", code="EMIGRATING")
    refuse_contradictions(backup.settings)


async def _is_replica_of_this_job(backup: VmBackup) -> bool:
    """A replica that follows its source has the job's keys on its snapshots only."""
    vm, xapi, job_id = backup.vm, backup.xapi, backup.job.id
    keys: dict[str, str] = vm.get("other_config") or {}
    if "start" not in (vm.get("blocked_operations") or {}):
        return False
    if keys.get(ownership.JOB) == job_id:
        return True
    if ownership.SR not in keys:
        return False
    refs: list[str] = vm.get("snapshots") or []
    for ref in refs:
        snapshot = await vms.record_or_none(xapi, "VM", ref)
        theirs: dict[str, str] = {} if snapshot is None else snapshot.get("other_config") or {}
        if theirs.get(ownership.JOB) == job_id and theirs.get(ownership.VM) != backup.uuid:
            return True
    return False


@contextlib.asynccontextmanager
async def snapshot(
    task: Task,
    backup: VmBackup,
    *,
    newer_than: str = "",
    keep: Callable[[], bool] = lambda: False,
) -> AsyncIterator[str]:
    """A snapshot with all its keys for the block.

    When the block fails, also by a cancel, it is destroyed unless ``keep()`` says otherwise;
    when the block ends well it stays, and retention decides.  Its time sorts behind
    ``newer_than`` (a sortable time of an earlier one): the keys know only whole seconds.
    """
    xapi = backup.xapi
    async with contextlib.AsyncExitStack() as stack:
        async with task.child("snapshot") as child:
            ref = await take_snapshot(
                xapi,
                backup.vm_ref,
                checkpoint=backup.settings.checkpoint_snapshot,
                bypass_chain_check=backup.settings.bypass_vdi_chains_check,
                marks=backup.marks,
            )
            await stack.enter_async_context(_destroyed_on_failure(xapi, ref, keep))
            await ownership.set_keys(
                xapi,
                ref,
                {
                    ownership.SR: None,
                    ownership.DATETIME: _key_date(newer_than),
                    ownership.INCLUDE_NON_NBD_QCOW2_FIX: "true",
                    ownership.JOB: backup.job.id,
                    ownership.SCHEDULE: backup.job.schedule_id,
                    ownership.VM: backup.uuid,
                    ownership.RUN: None,
                    ownership.PROXY: None,
                    ownership.SHUT_DOWN: None,
                    ownership.BLOCKED + backup.run_id: None,
                },
            )
            await ownership.set_content_keys(xapi, ref)
            await xapi.call("VM.set_name_label", ref, backup.snapshot_name)
            child.result = await xapi.call("VM.get_uuid", ref)
        yield ref


@contextlib.asynccontextmanager
async def _destroyed_on_failure(
    xapi: Xapi, ref: str, keep: Callable[[], bool]
) -> AsyncIterator[None]:
    try:
        yield
    except BaseException:
        if keep():
            raise
        async with undo_step("destroy the new snapshot", DESTROY_SECONDS):
            await vms.destroy_vm(xapi, ref, bypass_blocked=True)
        raise


def _key_date(newer_than: str) -> str:
    timestamp = time.time() * 1000
    while sortable(date := key_date(timestamp)) <= newer_than:
        timestamp += 1000
    return date


def shuts_down(backup: VmBackup) -> bool:
    """Whether the VM is to be halted for its backup, or for its snapshot."""
    settings = backup.settings
    wanted = settings.offline_backup or settings.offline_snapshot
    return wanted and backup.vm.get("power_state") == "Running"
