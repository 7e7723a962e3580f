"""A run that copies backups from one remote to others."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any

import trio

from proxy.errors import NotFound, ProxyError, Refused
from proxy.formats.vhd_directory import Compression
from proxy.jobs.health_check import HealthChecks
from proxy.jobs.mirror.deltas import CopyOptions
from proxy.jobs.mirror.source import look
from proxy.jobs.mirror.vm_mirror import VmMirror
from proxy.jobs.opening import failed, open_remotes
from proxy.jobs.run_limits import RunLimits
from proxy.repository import list_vms
from proxy.runtime.deadlines import deadline, time_limit

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from proxy.jobs.mirror.mirror_job import MirrorJob
    from proxy.jobs.services import Services
    from proxy.remotes import Remote
    from proxy.tasks import Task


async def run_mirror_job(services: Services, job: MirrorJob, root: Task) -> None:
    """The work of a job's root task.  What fails inside a VM fails that VM's task only.

    A source that cannot be opened or listed fails the root; a remote that cannot be opened is a
    failed task, and the others get what they lack.
    """
    if job.mode not in ("full", "delta"):
        raise Refused(f"Job mode {job.mode} not implemented for mirror backup", code="ENOTSUP")
    for key in job.without_effect:
        root.warning(f"the setting '{key}' has no effect on a mirror")
    checks = HealthChecks(services, job.request, root)
    await checks.find_srs(job.health_check_srs())
    async with contextlib.AsyncExitStack() as stack:
        source = await _open_source(services, job, root, stack)
        remotes = await open_remotes(
            services,
            job.request,
            job.remote_ids,
            root,
            stack,
            seconds=job.run.get_remote_timeout / 1000,
        )
        for remote_id in [key for key, each in remotes.items() if each.url == source.url]:
            del remotes[remote_id]
            error = Refused(
                "this remote is the source under another id: nothing is copied to it",
                code="EINVAL",
                data={"id": remote_id},
            )
            await failed(root.child("get remote adapter", id=remote_id, type="remote"), error)
        if not remotes:
            return
        vms = await list_vms(source)
        if not vms:
            root.warning("the source remote has no backups of VMs", {"id": job.source_id})
        root.info("vms", {"vms": vms})
        run = _MirrorRun(services, job, root, source, remotes, vms=len(vms), checks=checks)
        async with trio.open_nursery() as nursery:
            for vm_uuid in vms:
                nursery.start_soon(run.one_vm, vm_uuid)


async def _open_source(
    services: Services, job: MirrorJob, root: Task, stack: contextlib.AsyncExitStack
) -> Remote:
    """Raises when it does not open, or is not there: a mirror makes no source."""
    source_id = job.source_id
    try:
        spec = job.request.remotes.get(source_id)
        if spec is None:
            raise NotFound(f"the call names no remote {source_id}", data={"id": source_id})
        with deadline(f"opening remote {source_id}", job.run.get_remote_timeout / 1000):
            source = await stack.enter_async_context(services.remote(spec, create=False))
        await services.sweeper.contact_remote(root, source)
    except ProxyError as error:
        await failed(root.child("get remote adapter", id=source_id, type="remote"), error)
        raise ProxyError(
            f"the source remote {source_id} cannot be opened: {error.message}",
            code=error.code,
            data={**error.data, "id": source_id},
        ) from error
    return source


class _MirrorRun:
    """The VMs of one run."""

    def __init__(
        self,
        services: Services,
        job: MirrorJob,
        root: Task,
        source: Remote,
        remotes: dict[str, Remote],
        *,
        vms: int,
        checks: HealthChecks,
    ) -> None:
        self._job = job
        self._root = root
        self._source = source
        self._remotes = remotes
        self._vms = vms
        self._ended = 0
        self._checks = checks
        settings = job.run
        self._limits = RunLimits(
            root,
            parts=vms,
            concurrency=settings.concurrency,
            rate=settings.export_rate(),
            timeout=settings.timeout,
        )
        self._options = CopyOptions(
            rate=self._limits.rate,
            disks_at_once=int(settings.disk_per_vm_concurrency),
            codec=Compression(services.config.backups.vhd_directory_compression),
            damage=services.damage,
        )

    async def one_vm(self, vm_uuid: str) -> None:
        """Wait for a slot, then mirror one VM; every end of it stands in the log."""
        await self._limits.in_slot(
            ("id", vm_uuid), partial(self._vm_task, vm_uuid), partial(self._mirror, vm_uuid)
        )

    def _vm_task(self, vm_uuid: str) -> AbstractAsyncContextManager[Task]:
        properties: dict[str, Any] = {"id": vm_uuid, "type": "VM"}
        return self._root.child("backup VM", **properties)

    async def _mirror(self, vm_uuid: str) -> None:
        try:
            await self._in_slot(vm_uuid)
        finally:
            self._ended += 1
            self._root.set_property("progress", self._ended * 100 // self._vms)

    async def _in_slot(self, vm_uuid: str) -> None:
        """A VM without backups of the job's mode has no task; one that the filter leaves out
        costs no more than the look that tells."""
        job = self._job
        try:
            found = await look(self._source, vm_uuid, job.mode, job.filter)
        except Exception as error:  # noqa: BLE001  a VM without task would pass for a success
            await failed(self._vm_task(vm_uuid), error)
            return
        if not found.backups and not found.unreadable:
            return
        async with self._vm_task(vm_uuid) as task:
            mirror = VmMirror(
                task,
                job,
                vm_uuid,
                self._source,
                self._remotes,
                run_id=self._root.id,
                options=self._options,
                checks=self._checks,
            )
            mirror.tell_unreadable(found)
            if not found.matching:
                task.info("This VM is excluded by the job filter")
                return
            with (
                self._limits.time_limit(),
                time_limit("the VM's timeout", job.vm(vm_uuid).vm_timeout / 1000),
            ):
                await mirror.run()
