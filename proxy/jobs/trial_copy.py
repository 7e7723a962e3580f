"""Copying a replica for its health check: within its pool, or to another one."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from proxy.disks.disk import block_pool
from proxy.errors import ProxyError, Unreachable, XapiError
from proxy.jobs.undo import undo_step
from proxy.xapi import ownership, vm_create, vms
from proxy.xapi.vdi_export import ExportOptions, export_vdi
from proxy.xapi.vdi_import import import_vdi

if TYPE_CHECKING:
    from proxy.jobs.trial_vm import TrialVm
    from proxy.runtime.buffers import BufferPool
    from proxy.tasks import Task
    from proxy.xapi import Xapi

_COPY_SECONDS: Final = 86400.0
"""A host forgets a task after a day."""
_SEARCH_SECONDS: Final = 600.0
_BUFFERS: Final = 10
"""Of 2 MiB."""


async def copy_in_pool(check: Task, trial: TrialVm, vm_ref: str, sr_ref: str) -> None:
    """Clone the VM when all its disks are on ``sr_ref`` (task ``cloning-vm``), else copy it there
    (``copying-vm``).  ``trial`` has the copy; after a failure or a cancel nothing of it is left.
    """
    xapi = trial.xapi
    vm = await xapi.record("VM", vm_ref)
    there = all(vdi["SR"] == sr_ref for _, _, vdi in await vms.disks(xapi, vm))
    method, args = ("VM.clone", ()) if there else ("VM.copy", (sr_ref,))
    marks = {**trial.marks, ownership.HEALTH_CHECK: check.id}

    async def discard(result: Any) -> None:
        await vms.destroy_vm(xapi, str(result), bypass_blocked=True)

    async with check.child("cloning-vm" if there else "copying-vm"):
        try:
            async with ownership.marked(xapi, vm_ref, marks):
                copy = await xapi.call_async(
                    method,
                    vm_ref,
                    vm_create.importing(vm["name_label"]),
                    *args,
                    on_late_success=discard,
                    timeout=_COPY_SECONDS,
                )
                trial.vm_ref = str(copy)
        except BaseException as error:
            if _is_lost(error):
                async with undo_step("search for a copy that was lost", _SEARCH_SECONDS):
                    await _destroy_lost(xapi, vm_ref, check.id)
            raise
        await trial.dress(trial.vm_ref, vm["name_label"])


def _is_lost(error: BaseException) -> bool:
    """Whether nobody can say if the host made the copy."""
    if isinstance(error, XapiError):
        return error.code == "TASK_DESTROYED"
    return isinstance(error, Unreachable) or not isinstance(error, ProxyError)


async def _destroy_lost(xapi: Xapi, source_ref: str, check_id: str) -> None:
    """Only this one copy carries the id of this one check, beside the VM it is a copy of."""
    records: dict[str, dict[str, Any]] = await xapi.call("VM.get_all_records")
    for ref, record in records.items():
        keys: dict[str, str] = record.get("other_config") or {}
        if (
            ref != source_ref
            and keys.get(ownership.HEALTH_CHECK) == check_id
            and not record.get("is_a_snapshot")
            and vm_create.is_importing(record.get("name_label"))
        ):
            await vms.destroy_vm(xapi, ref, bypass_blocked=True)


async def copy_to_pool(check: Task, source: Xapi, vm_ref: str, trial: TrialVm, sr_ref: str) -> None:
    """Make the VM anew on the pool of ``trial``, its disks on ``sr_ref``: task ``copying-vm``.

    Disks, VTPM and firmware come along; networks and the memory of a suspended VM do not.
    ``trial`` has all that was made, also after a failure or a cancel.
    """
    target = trial.xapi
    record = await source.record("VM", vm_ref)
    async with check.child("copying-vm") as task:
        disks = await vms.disks(source, record)
        made = await vm_create.create_vm(target, record, marks=trial.marks, new_mac_addresses=True)
        trial.vm_ref = made
        await vm_create.dress_vm(target, made, record)
        pool = block_pool(_BUFFERS)
        total = sum(int(vdi.get("physical_utilisation") or 0) for _, _, vdi in disks)
        progress = _Progress(task, total)
        for vbd, ref, vdi in disks:
            copy = await vm_create.create_vdi(target, vdi, sr_ref, marks=trial.marks)
            trial.vdi_refs.append(copy)
            await vm_create.create_vbd(target, vbd, made, copy)
            await _send(source, ref, vdi, target, copy, pool, progress)
            await target.call("VDI.set_name_label", copy, vdi["name_label"])
        contents: list[str | None] = [
            str(await source.call("VTPM.get_contents", vtpm))
            for vtpm in record.get("VTPMs", [])
            if vms.is_ref(vtpm)
        ]
        for lost in await vm_create.restore_vtpms(target, made, contents):
            task.warning(lost)
        task.complete_progress()
        task.result = {"size": progress.sent}
        await trial.dress(made, record["name_label"])


class _Progress:
    """Bytes of all disks, of about ``total``."""

    def __init__(self, task: Task, total: int) -> None:
        self._task = task
        self._total = total
        self.sent = 0

    def moved(self, size: int) -> None:
        self.sent += size
        self._task.progress(self.sent, max(self.sent, self._total), estimated=True)


async def _send(
    source: Xapi,
    ref: str,
    vdi: dict[str, Any],
    target: Xapi,
    copy: str,
    pool: BufferPool,
    progress: _Progress,
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        opened = await stack.enter_async_context(
            export_vdi(source, ref, vdi, None, ExportOptions())
        )
        await import_vdi(
            target, copy, opened.disk, pool, uuid=UUID(vdi["uuid"]), progress=progress.moved
        )
