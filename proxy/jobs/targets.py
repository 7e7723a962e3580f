"""One remote as the target of one VM's backup, and a full backup on it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from proxy.errors import Canceled, Many, ProxyError
from proxy.repository import (
    delete_backups,
    list_vm_backups,
    old_entries,
    open_full_backup,
    period_tags,
)
from proxy.repository.immutability import is_protection

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

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
    settings = target.settings
    old, tags = await plan_retention(
        target, copy.vm_uuid, copy.schedule_id, copy.timestamp, mode="full"
    )
    if settings.delete_first:
        await delete_old(task, target, copy.vm_uuid, old)
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
        await delete_old(task, target, copy.vm_uuid, old)
    return backup


async def plan_retention(
    target: RemoteTarget, vm_uuid: str, schedule_id: str, timestamp: int, *, mode: str
) -> tuple[list[Backup], list[str]]:
    """Which backups of this schedule the new one makes too old, and the periods it opens.

    Only backups of the same ``mode`` count for retention; a period belongs to its first
    backup, whatever that is.
    """
    settings = target.settings
    backups = await list_vm_backups(target.remote, vm_uuid)
    entries = [backup for backup in backups if backup.schedule_id == schedule_id]
    long_term = settings.long_term_retention or None
    old: list[Backup] = []
    if not settings.skip_delete_old_entries:
        same_mode = [backup for backup in entries if backup.mode == mode]
        count = max(0, int(settings.export_retention) - 1)
        old = old_entries(count, same_mode, long_term, settings.timezone)
    return old, period_tags(entries, timestamp, long_term, settings.timezone)


async def delete_old(task: Task, target: RemoteTarget, vm_uuid: str, old: Sequence[Backup]) -> None:
    """Remove what retention found, under the lock that the target holds.

    What the storage protects stays with a warning: the next run finds it again.
    """
    if not old:
        return
    try:
        await delete_backups(
            target.remote, [backup.id for backup in old], locks={vm_uuid: target.lock}
        )
    except ProxyError as error:
        if not is_protection(error):
            raise
        errors = error.errors if isinstance(error, Many) else [error]
        task.warning(
            "old backups are protected and are removed by a later run",
            {"backups": [str(each) for each in errors]},
        )


def to_try_again(
    errors: Mapping[str, Exception], stored: Collection[str], targets: int, *, step: str
) -> list[str]:
    """The ids of the targets that failed and are worth another attempt.

    That is those without backup, but not one that somebody cancelled.  Raises when all of the
    ``targets`` failed, if only after they had their backup: the only one's error, ``Canceled``
    when each was cancelled, else ``Many`` with upstream's name of the ``step``.
    """
    if len(errors) < targets:
        return [
            target_id
            for target_id, error in errors.items()
            if target_id not in stored and not isinstance(error, Canceled)
        ]
    if targets == 1:
        raise next(iter(errors.values()))
    if all(isinstance(error, Canceled) for error in errors.values()):
        raise Canceled("every target was canceled")
    raise Many.all_targets(step, list(errors.values()))


def now_ms() -> int:
    return time.time_ns() // 1_000_000
