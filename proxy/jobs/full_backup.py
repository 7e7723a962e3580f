"""A full backup of one VM: snapshot, export, copies on every target, retention, undo."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast

import trio

from proxy.errors import ProxyError
from proxy.formats.xva_check import Validator
from proxy.jobs.copying import Check, FanOut
from proxy.jobs.power import restarted, shut_down
from proxy.jobs.pruning import prune
from proxy.jobs.target import FullCopy, now_ms, to_try_again
from proxy.jobs.vm_backup import DESTROY_SECONDS, VmBackup, shuts_down, snapshot
from proxy.runtime.buffers import BufferPool
from proxy.runtime.deadlines import undo_within
from proxy.xapi import ownership, vms
from proxy.xapi.migration import block_migration
from proxy.xapi.snapshots import NO_BACKUP

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from proxy.jobs.copying import Consumer
    from proxy.jobs.target import Target
    from proxy.tasks import Task
    from proxy.xapi import Xapi

_BUFFERS = 6
"""Of 2 MiB, per VM: enough that network, hash and disk each have one in hand and one waiting."""
_MIB = 1024 * 1024


async def back_up(task: Task, backup: VmBackup, targets: Sequence[Target]) -> list[str]:
    """One attempt; the caller holds the targets' locks.  Returns the ids of targets that failed.

    Raises when the VM has no backup from this attempt at all.  After a failure or a cancel
    the pool is as before: no new snapshot, migration allowed, the VM running if it ran.
    """
    try:
        failed = await _with_the_vm_kept(task, backup, targets)
    except Exception:
        # Not after a cancel or a time limit: then nothing more is begun.
        if not task.cancel_requested:
            await _clean(task, targets)
        raise
    # A cancel that came when all was stored: nothing more is begun, and the task must say so.
    await trio.lowlevel.checkpoint()
    await _check(task, backup, targets)
    await _clean(task, targets)
    return failed


async def _with_the_vm_kept(task: Task, backup: VmBackup, targets: Sequence[Target]) -> list[str]:
    """The part of an attempt during which the VM must not move."""
    async with block_migration(backup.xapi, backup.vm_ref):
        await ownership.reset_keys(backup.xapi, backup.vm_ref)
        await prune(backup, include_unfinished=True)
        off = shuts_down(backup)
        async with restarted(task, backup, needed=off) as start_now:
            if off:
                await shut_down(backup)
            return await _snapshot_and_export(task, backup, targets, start_now)


async def _snapshot_and_export(
    task: Task,
    backup: VmBackup,
    targets: Sequence[Target],
    start_now: Callable[[], Awaitable[None]],
) -> list[str]:
    if not _needs_snapshot(backup, await vms.disks(backup.xapi, backup.vm)):
        return await _export(task, backup, backup.vm_ref, backup.vm, targets)
    async with snapshot(task, backup) as ref:
        if backup.settings.offline_snapshot:
            # No reason to lose the backup: the start is tried again at the end, and then told.
            with contextlib.suppress(ProxyError):
                await start_now()
        failed = await _export(task, backup, ref, await backup.xapi.record("VM", ref), targets)
    with undo_within("pruning the snapshots", DESTROY_SECONDS):
        await prune(backup)
    return failed


def _needs_snapshot(
    backup: VmBackup, disks: Sequence[tuple[dict[str, Any], str, dict[str, Any]]]
) -> bool:
    settings = backup.settings
    return (
        settings.unconditional_snapshot
        or (not settings.offline_backup and backup.vm.get("power_state") == "Running")
        or settings.snapshot_retention != 0
        or any(NO_BACKUP in vdi.get("name_label", "") for _, _, vdi in disks)
    )


# -- copies -------------------------------------------------------------------------------------


async def _export(
    task: Task,
    backup: VmBackup,
    ref: str,
    exported: dict[str, Any],
    targets: Sequence[Target],
) -> list[str]:
    """Read the export once into every target; the ids of those that are to be tried again.

    That is those that failed, but not a target that somebody cancelled.  Raises when all
    failed, with the source's error if it was that.
    """
    if not targets:
        return []
    xapi = backup.xapi
    compression = cast("Literal['none', 'native', 'zstd']", backup.job.compression)
    estimate = await _estimate(xapi, exported)
    errors: dict[str, Exception] = {}
    async with xapi.export_vm(ref, compression=compression) as download:
        check = Check(Validator(), md5=any(target.stores_md5 for target in targets))
        fan_out = FanOut(download, BufferPool(_BUFFERS), check, backup.rate)
        copy = FullCopy(
            vm_uuid=backup.uuid,
            job_id=backup.job.id,
            schedule_id=backup.job.schedule_id,
            timestamp=now_ms(),
            vm=backup.vm,
            exported=exported,
            estimate=estimate,
            stored=backup.stored,
            digest=check.digest,
            bottleneck=fan_out.bottleneck,
        )
        broken = await fan_out.feed(
            [partial(_one_target, task, target, copy, errors) for target in targets]
        )
    if broken is not None:
        raise broken
    return to_try_again(errors, backup.stored, len(targets), step="writer.run()")


async def _one_target(
    task: Task,
    target: Target,
    copy: FullCopy,
    errors: dict[str, Exception],
    consumer: Consumer,
) -> None:
    try:
        async with target.export(task, is_full=True) as export:
            await target.write_full(export, copy, consumer)
    except Exception as error:  # noqa: BLE001  in the log of the export; other targets go on
        errors[target.id] = error


async def _estimate(xapi: Xapi, exported: Mapping[str, Any]) -> int | None:
    """About how long the archive will be: what the disks use on their SR, in whole chunks.

    An upper bound when compressed.  XAPI tells no length.
    """
    total = _MIB
    for _, _, vdi in await vms.disks(xapi, dict(exported)):
        size = int(vdi.get("virtual_size") or 0)
        used = int(vdi.get("physical_utilisation") or 0) or size
        total += -(-min(used, size) // _MIB) * (_MIB + 1536)
    return total


async def _check(task: Task, backup: VmBackup, targets: Sequence[Target]) -> None:
    async with trio.open_nursery() as nursery:
        for target in targets:
            nursery.start_soon(partial(target.check_health, task, backup, id=target.id))


async def _clean(task: Task, targets: Sequence[Target]) -> None:
    for target in targets:
        await target.clean(task, merge=False)
