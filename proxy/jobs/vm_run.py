"""A run over VMs: opens the targets, queues the VMs, retries what failed."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any

import trio

from proxy.errors import Busy, Canceled, Many, NotFound, ProxyError, Refused
from proxy.jobs import full_backup, incremental_backup
from proxy.jobs.opening import failed, open_remotes
from proxy.jobs.power import start_left_off
from proxy.jobs.rate_limit import RateLimit
from proxy.jobs.targets import RemoteTarget
from proxy.jobs.vm_backup import Defaults, VmBackup, refuse_vm
from proxy.repository import lock_vm
from proxy.runtime.deadlines import deadline

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from contextlib import AbstractAsyncContextManager

    from proxy.jobs.requests import VmJob
    from proxy.jobs.services import Services
    from proxy.jobs.settings import Settings
    from proxy.remotes import Remote
    from proxy.tasks import Task
    from proxy.xapi import Xapi


async def run_vm_job(services: Services, job: VmJob, root: Task) -> None:
    """The work of a job's root task.  What fails inside a VM fails that VM's task only."""
    settings = job.settings.run
    for key in job.settings.unknown_keys():
        root.warning(f"the setting '{key}' is not known and has no effect")
    async with contextlib.AsyncExitStack() as stack:
        remotes = await open_remotes(
            services,
            job.request,
            job.remote_ids,
            root,
            stack,
            seconds=settings.get_remote_timeout / 1000,
        )
        if not remotes and settings.snapshot_retention == 0:
            return
        root.info("vms", {"vms": job.vms})
        run = _VmRun(services, job, root, remotes)
        async with trio.open_nursery() as nursery:
            for vm_uuid in job.vms:
                nursery.start_soon(run.one_vm, vm_uuid)


class _VmRun:
    """The VMs of one run."""

    def __init__(
        self, services: Services, job: VmJob, root: Task, remotes: dict[str, Remote]
    ) -> None:
        self._services = services
        self._job = job
        self._root = root
        self._remotes = remotes
        settings = job.settings.run
        self._rate = RateLimit(settings.max_export_rate)
        at_once = int(settings.concurrency)
        self._slots = trio.Semaphore(at_once if at_once > 0 else max(1, len(job.vms)))
        self._ends_at = (
            trio.current_time() + settings.timeout / 1000 if settings.timeout else float("inf")
        )

    async def one_vm(self, vm_uuid: str) -> None:
        """Wait for a slot, then back up one VM; every end of it stands in the log."""
        try:
            try:
                async with self._slots:
                    await self._in_slot(vm_uuid)
            except trio.Cancelled:
                if not any(c.properties.get("id") == vm_uuid for c in self._root.children):
                    async with self._vm_task(vm_uuid, None):
                        await trio.lowlevel.checkpoint()
                raise
        except Exception:  # noqa: BLE001, S110  in the log of the VM's task
            pass

    def _vm_task(self, vm_uuid: str, label: str | None) -> AbstractAsyncContextManager[Task]:
        named = {} if label is None else {"name_label": label}
        properties: dict[str, Any] = {"id": vm_uuid, "type": "VM", **named}
        return self._root.child("backup VM", **properties)

    async def _in_slot(self, vm_uuid: str) -> None:
        try:
            xapi_spec = self._xapi_of(vm_uuid)
        except ProxyError as error:
            await failed(self._vm_task(vm_uuid, None), error)
            return
        async with contextlib.AsyncExitStack() as stack:
            try:
                xapi = await stack.enter_async_context(self._services.xapi(xapi_spec))
                await self._services.sweeper.contact(self._root, xapi)
                ref = await xapi.by_uuid("VM", vm_uuid)
                vm = await xapi.record("VM", ref)
            except Exception as error:  # noqa: BLE001  a VM without task would pass for a success
                await failed(self._vm_task(vm_uuid, None), error)
                return
            async with self._vm_task(vm_uuid, vm["name_label"]) as task:
                settings = self._job.settings.vm(vm_uuid, vm.get("tags", ()))
                left = self._ends_at - trio.current_time()
                with (
                    deadline("the job's timeout", _seconds(left)),
                    deadline("the VM's timeout", settings.vm_timeout / 1000),
                ):
                    await self._attempts(task, xapi, ref, vm, settings)

    def _xapi_of(self, uuid: str) -> dict[str, Any]:
        request = self._job.request
        spec = request.xapis.get(request.record_to_xapi.get(uuid, ""))
        if spec is None:
            raise NotFound(f"no XAPI associated to {uuid}", data={"id": uuid})
        return dict(spec)

    async def _attempts(
        self, task: Task, xapi: Xapi, ref: str, vm: dict[str, Any], settings: Settings
    ) -> None:
        """Try, and try again at once for the targets that have no backup yet."""
        missing = self._targets_of(vm, settings)
        tries = max(0, settings.n_retries_vm_backup_failures) + 1
        backup = self._vm_backup(xapi, ref, vm, settings)
        refuse_vm(backup)
        if await start_left_off(task, backup):
            backup = self._vm_backup(xapi, ref, await xapi.record("VM", ref), settings)
        for attempt in range(1, tries + 1):
            try:
                failed = await self._attempt(task, backup, missing)
                error: Exception | None = None
            except Canceled:
                raise
            except Exception as caught:  # noqa: BLE001  raised below when no attempt is left
                failed, error = [one for one in missing if one not in backup.stored], caught
            if error is None and not failed:
                return
            done = bool(missing) and not failed  # and the trouble came afterwards
            last = done or attempt == tries or task.cancel_requested
            if last:
                if error is not None:
                    raise error
                return  # some targets have the backup; the failed exports speak for the others
            reason = str(error) if error is not None else f"{len(failed)} targets failed"
            task.retry("Retry the VM backup due to an error", {"attempt": attempt, "error": reason})
            missing = {one: missing[one] for one in failed}
            vm = await xapi.record("VM", ref)
            backup = self._vm_backup(xapi, ref, vm, settings)

    def _vm_backup(self, xapi: Xapi, ref: str, vm: dict[str, Any], settings: Settings) -> VmBackup:
        config = self._services.config
        return VmBackup(
            job=self._job,
            run_id=self._root.id,
            installation=self._services.installation,
            is_live_run=lambda run: self._services.tasks.live(run) is not None,
            damage=self._services.damage,
            snapshot_name=_fill_template(
                config.backups.snapshot_name_label_tpl, self._job.name, vm
            ),
            rate=self._rate,
            xapi=xapi,
            vm_ref=ref,
            vm=vm,
            settings=settings,
            defaults=Defaults(
                vhd_directory_compression=config.backups.vhd_directory_compression,
                prefer_nbd=config.xapi_options.prefer_nbd,
            ),
        )

    def _targets_of(self, vm: dict[str, Any], settings: Settings) -> dict[str, Settings]:
        """Settings of every remote that is to get this VM."""
        if settings.export_retention <= 0:
            return {}
        found = {
            remote_id: self._job.settings.target(vm["uuid"], remote_id)
            for remote_id in self._remotes
        }
        return {key: value for key, value in found.items() if value.export_retention > 0}

    async def _attempt(
        self, task: Task, backup: VmBackup, wanted: dict[str, Settings]
    ) -> list[str]:
        if not wanted and backup.settings.snapshot_retention == 0:
            if self._job.remote_ids:
                raise Refused("no target is left for this VM", code="ENOTARGET")
            return []
        async with self._locked(task, backup.uuid, wanted) as targets:
            lost = [one for one in wanted if one not in {target.id for target in targets}]
            if self._job.mode == "delta" and targets:
                return lost + await incremental_backup.back_up(task, backup, targets)
            return lost + await full_backup.back_up(task, backup, targets)

    @contextlib.asynccontextmanager
    async def _locked(
        self, task: Task, vm_uuid: str, wanted: dict[str, Settings]
    ) -> AsyncIterator[list[RemoteTarget]]:
        """Hold the VM's directory on each target; one that cannot be had is a failed export."""
        targets: list[RemoteTarget] = []
        errors: list[Exception] = []
        async with contextlib.AsyncExitStack() as stack:
            for remote_id, settings in wanted.items():
                remote = self._remotes[remote_id]
                try:
                    lock = await stack.enter_async_context(
                        lock_vm(
                            remote,
                            vm_uuid,
                            owner=self._root.id,
                            wait=settings.get_remote_timeout / 1000,
                            waiting=partial(_tell_wait, task, remote_id),
                        )
                    )
                except ProxyError as error:
                    errors.append(error)
                    await failed(
                        task.child("export", id=remote_id, type="remote", isFull=True), error
                    )
                    continue
                targets.append(RemoteTarget(remote_id, remote, settings, lock))
            if wanted and not targets:
                raise (
                    errors[0]
                    if len(errors) == 1
                    else Many.all_targets("writer.beforeBackup()", errors)
                )
            yield targets


def _tell_wait(task: Task, remote_id: str, busy: Busy) -> None:
    """Else a run that waits looks like one that hangs."""
    task.info(
        "waiting for whoever holds the VM's backups",
        {"remote": remote_id, "reason": busy.message, **busy.data},
    )


def _seconds(left: float) -> float:
    """A bound for ``deadline``, where 0 means none."""
    return 0.0 if left == float("inf") else max(left, 0.001)


def _fill_template(template: str, job_name: str, vm: dict[str, Any]) -> str:
    """Fill in ``{job.name}`` and ``{vm.name_label}``; a backslash takes the next sign as it is."""
    values = {"{job.name}": job_name, "{vm.name_label}": vm["name_label"]}
    filled, position = "", 0
    while position < len(template):
        if template[position] == "\\" and position + 1 < len(template):
            filled += template[position + 1]
            position += 2
            continue
        key = next((key for key in values if template.startswith(key, position)), None)
        if key is None:
            filled += template[position]
            position += 1
        else:
            filled += values[key]
            position += len(key)
    return filled
