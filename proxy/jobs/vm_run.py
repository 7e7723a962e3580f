"""A run over VMs: opens the destinations, queues the VMs, retries what failed."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any

import trio

from proxy.errors import ProxyError, Refused
from proxy.jobs import full_backup, incremental_backup
from proxy.jobs.attempts import try_targets
from proxy.jobs.distribution import DistributedDestination
from proxy.jobs.health_check import HealthChecks, is_filtered, tell_filtered
from proxy.jobs.opening import failed, open_remotes, open_srs
from proxy.jobs.power import start_left_off
from proxy.jobs.remote_target import RemoteDestination
from proxy.jobs.run_limits import RunLimits
from proxy.jobs.target import none_left
from proxy.jobs.vm_backup import Defaults, VmBackup, refuse_vm
from proxy.runtime.deadlines import time_limit

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from proxy.jobs.requests import VmJob
    from proxy.jobs.services import Services
    from proxy.jobs.settings import Settings
    from proxy.jobs.target import Destination, Target
    from proxy.tasks import Task
    from proxy.xapi import Xapi


async def run_vm_job(services: Services, job: VmJob, root: Task) -> None:
    """The work of a job's root task.  What fails inside a VM fails that VM's task only."""
    settings = job.settings.run
    for sentence in job.settings.without_effect():
        root.warning(sentence)
    checks = HealthChecks(services, job.request, root)
    targets = [*job.remote_ids, *job.sr_ids]
    await checks.find_srs(job.settings.health_check_srs([*job.vms, *targets]))
    async with contextlib.AsyncExitStack() as stack:
        srs = await open_srs(
            services,
            job.request,
            job.sr_ids,
            root,
            stack,
            seconds=settings.get_remote_timeout / 1000,
        )
        remotes = await open_remotes(
            services,
            job.request,
            job.remote_ids,
            root,
            stack,
            seconds=settings.get_remote_timeout / 1000,
        )
        destinations: list[Destination] = [
            RemoteDestination(key, remote) for key, remote in remotes.items()
        ]
        if settings.distribute_backups and len(destinations) > 1:
            destinations = [DistributedDestination(destinations)]
        if settings.distribute_replications and len(srs) > 1:
            destinations.append(DistributedDestination(srs))
        else:
            destinations += srs
        if not destinations and settings.snapshot_retention == 0:
            if not job.remote_ids and not job.sr_ids:
                root.warning("the job has no remote, no SR and keeps no snapshot: nothing is done")
            return
        root.info("vms", {"vms": job.vms})
        run = _VmRun(services, job, root, destinations, checks)
        async with trio.open_nursery() as nursery:
            for vm_uuid in job.vms:
                nursery.start_soon(run.one_vm, vm_uuid)


class _VmRun:
    """The VMs of one run."""

    def __init__(
        self,
        services: Services,
        job: VmJob,
        root: Task,
        destinations: Sequence[Destination],
        checks: HealthChecks,
    ) -> None:
        self._services = services
        self._job = job
        self._root = root
        self._destinations = {one.id: one for one in destinations}
        self._checks = checks
        settings = job.settings.run
        self._limits = RunLimits(
            root,
            parts=len(job.vms),
            concurrency=settings.concurrency,
            rate=settings.export_rate(),
            timeout=settings.timeout,
        )

    async def one_vm(self, vm_uuid: str) -> None:
        """Wait for a slot, then back up one VM; every end of it stands in the log."""
        await self._limits.in_slot(
            ("id", vm_uuid), partial(self._vm_task, vm_uuid, None), partial(self._back_up, vm_uuid)
        )

    def _vm_task(self, vm_uuid: str, label: str | None) -> AbstractAsyncContextManager[Task]:
        named = {} if label is None else {"name_label": label}
        properties: dict[str, Any] = {"id": vm_uuid, "type": "VM", **named}
        return self._root.child("backup VM", **properties)

    async def _back_up(self, vm_uuid: str) -> None:
        try:
            xapi_spec = self._job.request.xapi_of(vm_uuid)
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
                self._job.settings.refuse_wrong([vm_uuid])
                settings = self._job.settings.vm(vm_uuid, vm.get("tags", ()))
                with (
                    self._limits.time_limit(),
                    time_limit("the VM's timeout", settings.vm_timeout / 1000),
                ):
                    await self._attempts(task, xapi, ref, vm, settings)

    async def _attempts(
        self, task: Task, xapi: Xapi, ref: str, vm: dict[str, Any], settings: Settings
    ) -> None:
        """Try, and try again at once for the targets that have no backup yet."""
        wanted = self._wanted(vm, settings)
        backup = self._vm_backup(xapi, ref, vm, settings)
        await refuse_vm(backup)
        if await start_left_off(task, backup):
            backup = self._vm_backup(xapi, ref, await xapi.record("VM", ref), settings)

        stored: set[str] = set()

        async def attempt(number: int, missing: Mapping[str, Settings]) -> list[str]:
            nonlocal backup
            if number > 1:
                backup = self._vm_backup(xapi, ref, await xapi.record("VM", ref), settings)
            try:
                return await self._attempt(task, backup, missing)
            finally:
                stored.update(backup.stored)

        await try_targets(
            task,
            wanted,
            attempt,
            tries=max(0, settings.n_retries_vm_backup_failures) + 1,
            has=lambda target: target in backup.stored,
            message="Retry the VM backup due to an error",
            export_ids=lambda target: self._destinations[target].export_ids,
        )
        if stored and is_filtered(settings, backup.tags):
            await tell_filtered(task)

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
            rate=self._limits.rate,
            xapi=xapi,
            vm_ref=ref,
            vm=vm,
            settings=settings,
            defaults=Defaults(
                vhd_directory_compression=config.backups.vhd_directory_compression,
                prefer_nbd=config.xapi_options.prefer_nbd,
            ),
            checks=self._checks,
        )

    def _wanted(self, vm: dict[str, Any], settings: Settings) -> dict[str, Settings]:
        """Settings of every destination that is to get this VM."""
        found: dict[str, Settings] = {}
        for key, destination in self._destinations.items():
            there = self._job.settings.target(vm["uuid"], key)
            if destination.retention(settings) > 0 and destination.retention(there) > 0:
                found[key] = there
        return found

    async def _attempt(
        self, task: Task, backup: VmBackup, wanted: Mapping[str, Settings]
    ) -> list[str]:
        if not wanted and backup.settings.snapshot_retention == 0:
            if self._job.remote_ids or self._job.sr_ids:
                raise Refused("no target is left for this VM", code="ENOTARGET")
            return []
        async with self._targets(task, backup, wanted) as targets:
            lost = [one for one in wanted if one not in {target.id for target in targets}]
            if self._job.mode == "delta" and targets:
                return lost + await incremental_backup.back_up(task, backup, targets)
            return lost + await full_backup.back_up(task, backup, targets)

    @contextlib.asynccontextmanager
    async def _targets(
        self, task: Task, backup: VmBackup, wanted: Mapping[str, Settings]
    ) -> AsyncIterator[list[Target]]:
        """Each target for the attempt; one that cannot be had is a failed export."""
        targets: list[Target] = []
        errors: list[Exception] = []
        async with contextlib.AsyncExitStack() as stack:
            for key, settings in wanted.items():
                destination = self._destinations[key]
                try:
                    targets.append(
                        await stack.enter_async_context(destination.target(task, backup, settings))
                    )
                except ProxyError as error:
                    errors.append(error)
                    export = task.child("export", **destination.properties, isFull=True)
                    await failed(export, error)
            if wanted and not targets:
                raise none_left(errors)
            yield targets


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
