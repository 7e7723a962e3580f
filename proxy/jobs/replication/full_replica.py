"""Full replication: a new VM on the SR from the archive that is being exported."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from proxy.errors import Corrupt, ProxyError
from proxy.jobs.replication import keys
from proxy.jobs.replication.replicas import delete_replicas
from proxy.jobs.undo import UNDO_SECONDS, undone_on_failure
from proxy.repository import date_name
from proxy.runtime.background import background
from proxy.runtime.deadlines import undo_within
from proxy.xapi import ownership, vm_create, vms
from proxy.xapi.migration import forget_block

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from proxy.jobs.copying import Consumer
    from proxy.jobs.replication.sr_target import SrTarget
    from proxy.jobs.target import FullCopy
    from proxy.tasks import Task
    from proxy.xapi import Upload, Xapi

_LOOKS: Final = (0.02, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
"""Seconds before each look for the VM that an import makes: its records are the first that an
archive brings."""


async def write_full_replica(
    target: SrTarget, export: Task, copy: FullCopy, consumer: Consumer
) -> None:
    """See :meth:`proxy.jobs.target.Target.write_full`."""
    xapi, settings = target.xapi, target.settings
    _, old = await target.replicas(export)
    timestamp = target.time_behind(copy.timestamp)
    if settings.delete_first:
        await delete_replicas(export, old, marks=target.marks)
    async with undone_on_failure() as undo, export.child("transfer") as transfer:
        transfer.progress(0, copy.estimate, estimated=True)
        async with (
            xapi.import_vm(target.sr_ref, length=None) as upload,
            _marked_early(upload, xapi, target.marks),
        ):
            await consumer.pour(upload.write, lambda: copy.tell(transfer, upload.sent))
            made = [str(ref) for ref in await upload.finish()]
            for ref in made:
                undo.add(
                    "destroy the half-made replica",
                    partial(vms.destroy_vm, xapi, ref, bypass_blocked=True),
                )
        if not made:
            raise Corrupt("the archive holds no VM: nothing was replicated")
        name = await _mark(xapi, made[0], target.marks)
        await _dress(target, made[0], timestamp)
        # With its name it is a replica.
        await xapi.call(
            "VM.set_name_label",
            made[0],
            f"{name} - {target.backup.job.name} - ({date_name(timestamp)})",
        )
        target.replica = made[0]
        copy.stored.add(target.id)
        undo.keep()
        with undo_within("finishing the replica", UNDO_SECONDS):
            await ownership.set_keys(xapi, made[0], target.unmarked)
        transfer.complete_progress()
        transfer.result = {"size": upload.sent}
    if not settings.delete_first:
        await delete_replicas(export, old, marks=target.marks)


@contextlib.asynccontextmanager
async def _marked_early(upload: Upload, xapi: Xapi, marks: dict[str, str]) -> AsyncIterator[None]:
    """Mark the VM as unfinished as soon as the host has made it, beside the block.

    It is only a help for whoever comes after a crash; the VM is marked for good later.
    """

    async def look() -> None:
        with contextlib.suppress(ProxyError):
            for delay in _LOOKS:
                await trio.sleep(delay)
                found = await upload.being_imported()
                for ref in found:
                    await _mark(xapi, ref, marks)
                if found:
                    return

    async with background() as nursery:
        nursery.start_soon(look)
        yield


async def _mark(xapi: Xapi, vm_ref: str, marks: dict[str, str]) -> str:
    """Say by name and marks that a VM is unfinished; returns its own name."""
    vm = await xapi.record("VM", vm_ref)
    name = str(vm["name_label"])
    if not vm_create.is_importing(name):
        await xapi.call("VM.set_name_label", vm_ref, vm_create.importing(name))
    config: dict[str, str] = vm.get("other_config") or {}
    missing = {key: value for key, value in marks.items() if config.get(key) != value}
    await xapi.update_map("VM", vm_ref, "other_config", missing)
    return vm_create.own_name(name)


async def _dress(target: SrTarget, vm_ref: str, timestamp: int) -> None:
    xapi = target.xapi
    await xapi.update_map("VM", vm_ref, "blocked_operations", keys.BLOCKED_OPERATIONS)
    await forget_block(xapi, vm_ref)
    if not target.settings.warm_migration:
        await xapi.call("VM.add_tags", vm_ref, keys.FULL_TAG)
        vm = await xapi.record("VM", vm_ref)
        if vm.get("ha_restart_priority"):
            await xapi.call("VM.set_ha_restart_priority", vm_ref, "")
            await xapi.call("VM.add_tags", vm_ref, keys.HA_TAG)
    vm = await xapi.record("VM", vm_ref)
    # What was being done to the source itself, which an export without a snapshot is of.
    done = dict.fromkeys(key for key in vm["other_config"] if ownership.is_of_intervention(key))
    await ownership.set_keys(xapi, vm_ref, {**target.keys(timestamp), **done})
