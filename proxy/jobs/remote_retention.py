"""Which backups on a remote a new one makes too old, and their removal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from proxy.errors import Many, ProxyError
from proxy.repository import delete_backups, list_vm_backups, old_entries, period_tags
from proxy.repository.immutability import is_protection

if TYPE_CHECKING:
    from collections.abc import Sequence

    from proxy.jobs.remote_target import RemoteTarget
    from proxy.repository import Backup
    from proxy.tasks import Task


async def plan_retention(
    target: RemoteTarget, schedule_id: str, timestamp: int, *, mode: str
) -> tuple[list[Backup], list[str]]:
    """Which backups of this schedule the new one makes too old, and the periods it opens.

    Only backups of the same ``mode`` count for retention; a period belongs to its first
    backup, whatever that is.
    """
    settings = target.settings
    backups = await list_vm_backups(target.remote, target.vm_uuid)
    entries = [backup for backup in backups if backup.schedule_id == schedule_id]
    long_term = settings.long_term_retention or None
    old: list[Backup] = []
    if not settings.skip_delete_old_entries:
        same_mode = [backup for backup in entries if backup.mode == mode]
        count = max(0, int(settings.export_retention) - 1)
        old = old_entries(count, same_mode, long_term, settings.timezone)
    return old, period_tags(entries, timestamp, long_term, settings.timezone)


async def delete_old(task: Task, target: RemoteTarget, old: Sequence[Backup]) -> None:
    """Remove what retention found, under the lock that the target holds.

    What the storage protects stays with a warning: the next run finds it again.
    """
    if not old:
        return
    try:
        await delete_backups(
            target.remote, [backup.id for backup in old], locks={target.vm_uuid: target.lock}
        )
    except ProxyError as error:
        if not is_protection(error):
            raise
        errors = error.errors if isinstance(error, Many) else [error]
        task.warning(
            "old backups are protected and are removed by a later run",
            {"backups": [str(each) for each in errors]},
        )
