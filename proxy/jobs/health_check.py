"""Health checks: what was just backed up is made a VM, which must boot.

The check of a VM never fails its backup: it is a task of its own, whose failure XO and
``task.get`` count for the VM, and no retry follows from it.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import msgspec

from proxy.errors import NoSuchObject, NotFound, ProxyError
from proxy.jobs.incremental_restore import restore_incremental
from proxy.jobs.requests import RestoreRequest
from proxy.jobs.restore import restore_full
from proxy.jobs.traffic import told
from proxy.jobs.trial_copy import copy_in_pool, copy_to_pool
from proxy.jobs.trial_vm import boot, trial_vm
from proxy.repository import backup_path, date_name, read_backup
from proxy.xapi import ownership, vm_create

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Mapping, Sequence

    from proxy.jobs.requests import BackupRequest
    from proxy.jobs.services import Services
    from proxy.jobs.settings import Settings
    from proxy.jobs.trial_vm import TrialVm
    from proxy.remotes import Remote
    from proxy.repository import BackupRecord
    from proxy.tasks import Task
    from proxy.xapi import Xapi

NAME: Final = "health check"
_NEVER: Final = "xo:no-health-check"
"""A tag that starts so: ``xo:no-health-check=<reason>`` too."""
_FILTERED: Final = "This VM doesn't match the health check's tags for this schedule"


@dataclass(frozen=True, slots=True)
class Wanted:
    """A check that is to be made."""

    sr_uuid: str
    seconds: float
    """For the start, the tools and the script of the guest together."""


def wanted(settings: Settings, tags: Sequence[str]) -> Wanted | None:
    """The check that ``settings`` (of the target) ask for a VM with these tags."""
    if settings.health_check_sr is None or is_filtered(settings, tags):
        return None
    return Wanted(settings.health_check_sr, settings.health_check_seconds)


def is_filtered(settings: Settings, tags: Sequence[str]) -> bool:
    """Whether the VM's tags keep it from a check that the settings ask for."""
    if settings.health_check_sr is None:
        return False
    chosen = settings.health_check_vms_with_tags
    never = any(tag.startswith(_NEVER) for tag in tags)
    return never or (bool(chosen) and not set(chosen) & set(tags))


async def tell_filtered(parent: Task) -> None:
    """A task that says that the VM is not checked, for XO's logs and reports."""
    async with parent.child(NAME) as check:
        check.info(_FILTERED)


class HealthChecks:
    """Those of one run.  Any number of tasks may use it."""

    def __init__(self, services: Services, request: BackupRequest, root: Task) -> None:
        self._services = services
        self._request = request
        self._root = root
        self._marks = ownership.Owner(services.installation, root.id).marks
        self._specs: dict[str, Mapping[str, Any]] = {}
        """Of the pool of each SR."""

    async def find_srs(self, sr_uuids: Iterable[str]) -> None:
        """Before anything is touched: raise ``NotFound`` for an SR that no pool has.

        A pool that cannot be asked now is a warning: it is no reason to make no backup, and the
        checks will say it again.
        """
        for uuid in sorted(set(sr_uuids)):
            try:
                await self._pool_of(uuid)
            except NotFound:
                raise
            except ProxyError as error:
                self._root.warning(
                    "the health check's SR cannot be looked at now",
                    {"id": uuid, "error": error.message},
                )

    async def of_backup(
        self,
        parent: Task,
        check: Wanted,
        remote: Remote,
        backup_id: str,
        **properties: Any,
    ) -> None:
        """Restore the backup (path of its metadata) that is on ``remote``, and boot it.

        The caller holds the VM's lock.  What goes wrong is in the log of the task.
        """
        async with self._task(parent, properties) as task:
            record = await read_backup(remote, backup_path(backup_id))
            async with self._health_pool(check) as xapi, trial_vm(xapi, self._marks) as trial:
                with told(task, remote):
                    await self._restore(task, check, remote, record, trial)
                await self._boot(task, check, trial)

    async def of_replica(
        self, parent: Task, check: Wanted, xapi: Xapi, vm_ref: str, **properties: Any
    ) -> None:
        """Copy the replica ``vm_ref`` on the pool of ``xapi`` and boot the copy.

        The replica itself is only read.  What goes wrong is in the log of the task.
        """
        async with self._task(parent, properties) as task, self._health_pool(check) as health:
            sr_ref = await health.by_uuid("SR", check.sr_uuid)
            async with trial_vm(health, self._marks) as trial:
                if await _are_one(xapi, health):
                    await copy_in_pool(task, trial, vm_ref, sr_ref)
                else:
                    await copy_to_pool(task, xapi, vm_ref, trial, sr_ref)
                await self._boot(task, check, trial)

    # -- inside ------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _task(self, parent: Task, properties: Mapping[str, Any]) -> AsyncIterator[Task]:
        try:
            async with parent.child(NAME, **properties) as task:
                yield task
        except Exception:  # noqa: BLE001, S110  in the log of the task; the backup is there
            pass

    @contextlib.asynccontextmanager
    async def _health_pool(self, check: Wanted) -> AsyncIterator[Xapi]:
        spec = await self._pool_of(check.sr_uuid)
        async with self._services.xapi(spec) as xapi:
            await self._services.sweeper.contact(self._root, xapi)
            yield xapi

    async def _pool_of(self, sr_uuid: str) -> Mapping[str, Any]:
        """The pool that has the SR: the one that the call says, else the first that knows it.

        XO says it for an SR in the schedule's settings only.
        """
        if sr_uuid in self._specs:
            return self._specs[sr_uuid]
        request = self._request
        said = request.xapis.get(request.record_to_xapi.get(sr_uuid, ""))
        unreachable: ProxyError | None = None
        for spec in [said] if said is not None else request.xapis.values():
            try:
                async with self._services.xapi(spec) as xapi:
                    await xapi.by_uuid("SR", sr_uuid)
            except NoSuchObject:
                continue
            except ProxyError as error:
                unreachable = error
                continue
            self._specs[sr_uuid] = spec
            return spec
        if unreachable is not None:
            raise unreachable
        raise NotFound(
            f"no pool of this call has the SR {sr_uuid} of the health check: correct healthCheckSr",
            data={"id": sr_uuid, "type": "SR"},
        )

    async def _restore(
        self, task: Task, check: Wanted, remote: Remote, record: BackupRecord, trial: TrialVm
    ) -> None:
        request = RestoreRequest(
            backup_id=record.backup.id, remote={}, sr_uuid=check.sr_uuid, xapi={}
        )

        async def dress(
            xapi: Xapi, vm_ref: str, request: RestoreRequest, record: BackupRecord
        ) -> None:
            del request
            made = vm_create.own_name(await xapi.call("VM.get_name_label", vm_ref))
            name = record.metadata["vm"].get("name_label")
            date = date_name(record.backup.timestamp)
            await trial.dress(vm_ref, f"{name if isinstance(name, str) else made} ({date})")

        restore = restore_full if record.backup.mode == "full" else restore_incremental
        await restore(
            task, request, remote, _unguarded(record), trial.xapi, marks=self._marks, dress=dress
        )

    @staticmethod
    async def _boot(task: Task, check: Wanted, trial: TrialVm) -> None:
        assert trial.vm_ref is not None
        await boot(task, trial.xapi, trial.vm_ref, check.seconds)


def _unguarded(record: BackupRecord) -> BackupRecord:
    """What is made of it is never under HA, which might start it on its networks, nor blocked."""
    vm: dict[str, Any] = {**record.metadata["vm"], "ha_always_run": False, "blocked_operations": {}}
    return msgspec.structs.replace(record, metadata={**record.metadata, "vm": vm})


async def _are_one(one: Xapi, other: Xapi) -> bool:
    """Whether two sessions, perhaps by different addresses, are on the same pool."""
    if one is other:
        return True
    uuids = [await xapi.call("pool.get_uuid", xapi.pool_ref) for xapi in (one, other)]
    return bool(uuids[0] == uuids[1])
