"""One remote as the target of one VM's full backup."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from proxy.repository import (
    delete_backups,
    list_vm_backups,
    old_entries,
    open_full_backup,
    period_tags,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from proxy.jobs.copying import Consumer
    from proxy.jobs.settings import Settings
    from proxy.remotes import Lock, Remote
    from proxy.repository import Backup
    from proxy.tasks import Task


@dataclass(slots=True)
class RemoteTarget:
    """A remote with this VM's settings on it, and the lock of the VM's directory."""

    id: str
    remote: Remote
    settings: Settings
    lock: Lock


@dataclass(frozen=True, slots=True)
class FullCopy:
    """What all targets of one full backup have in common."""

    vm_uuid: str
    job_id: str
    schedule_id: str
    timestamp: int
    """Milliseconds: when the export's stream was ready."""
    vm: Mapping[str, Any]
    exported: Mapping[str, Any]
    estimate: int | None
    stored: set[str]
    """Receives the id of each target that has its backup, even if its task fails later."""
    digest: Callable[[], bytes]
    """MD5 of the whole stream, once it has ended."""
    bottleneck: Callable[[], str]


async def write_full(
    task: Task, target: RemoteTarget, copy: FullCopy, consumer: Consumer
) -> Backup:
    """Store one full backup on one remote inside its ``export`` task.

    Old entries are counted before the new one and removed after it, or before it with
    ``deleteFirst``.  Until the metadata is written a failure or a cancel leaves nothing.
    """
    entries = await _of_schedule(target, copy)
    same_mode = [backup for backup in entries if backup.mode == "full"]
    settings = target.settings
    long_term = settings.long_term_retention or None
    old: list[Backup] = []
    if not settings.skip_delete_old_entries:
        old = old_entries(
            max(0, int(settings.export_retention) - 1), same_mode, long_term, settings.timezone
        )
    tags = period_tags(entries, copy.timestamp, long_term, settings.timezone)
    if settings.delete_first:
        await _delete(target, copy, old)
    async with open_full_backup(target.remote, copy.vm_uuid, copy.timestamp) as writer:
        async with task.child("transfer") as transfer:
            transfer.progress(0, copy.estimate, estimated=True)
            while (buffer := await consumer.next()) is not None:
                with consumer.using(buffer) as view:
                    await writer.write(view)
                total = None if copy.estimate is None else max(copy.estimate, writer.size)
                transfer.progress(writer.size, total, estimated=True, bottleneck=copy.bottleneck())
            transfer.complete_progress()
            transfer.result = {"size": writer.size}
        await target.lock.check()
        backup = await writer.commit(
            {
                "jobId": copy.job_id,
                "mode": "full",
                "scheduleId": copy.schedule_id,
                "timestamp": copy.timestamp,
                "version": "2.0.0",
                "vm": copy.vm,
                "vmSnapshot": copy.exported,
                "tags": tags,
            },
            copy.digest(),
        )
    copy.stored.add(target.id)
    if not settings.delete_first:
        await _delete(target, copy, old)
    return backup


async def _of_schedule(target: RemoteTarget, copy: FullCopy) -> list[Backup]:
    """Of every mode: a period belongs to its first backup, whatever that is."""
    backups = await list_vm_backups(target.remote, copy.vm_uuid)
    return [backup for backup in backups if backup.schedule_id == copy.schedule_id]


async def _delete(target: RemoteTarget, copy: FullCopy, old: list[Backup]) -> None:
    if old:
        await delete_backups(
            target.remote, [backup.id for backup in old], locks={copy.vm_uuid: target.lock}
        )


def now_ms() -> int:
    return time.time_ns() // 1_000_000
