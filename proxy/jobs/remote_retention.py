"""Which backups on remotes a new one makes too old, and their removal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from proxy.errors import Many, ProxyError
from proxy.repository import delete_backups, list_vm_backups, old_entries, period_tags
from proxy.repository.immutability import is_protection

if TYPE_CHECKING:
    from collections.abc import Sequence

    from proxy.jobs.remote_target import RemoteTarget
    from proxy.repository import Backup
    from proxy.tasks import Task


@dataclass(frozen=True, slots=True)
class Entry:
    """One backup, and the target that has it."""

    backup: Backup
    target: RemoteTarget

    @property
    def timestamp(self) -> float:
        return self.backup.timestamp


async def plan_retention(
    task: Task, target: RemoteTarget, schedule_id: str, timestamp: int, *, mode: str
) -> tuple[list[Entry], list[str]]:
    """Which backups of this schedule the new one makes too old, and the periods it opens.

    Counted are those on ``target`` and on its neighbours; of a neighbour that cannot be listed
    all stay, with a warning of ``task``: it is no reason to make no backup elsewhere.  Only
    backups of the same ``mode`` count for retention; a period belongs to its first backup,
    whatever that is.
    """
    settings = target.settings
    entries = [
        Entry(backup, each)
        for each in (target, *target.neighbours)
        for backup in await _list(task, each, must=each is target)
        if backup.schedule_id == schedule_id
    ]
    long_term = settings.long_term_retention or None
    old: list[Entry] = []
    if not settings.skip_delete_old_entries:
        same_mode = [entry for entry in entries if entry.backup.mode == mode]
        count = max(0, int(settings.export_retention) - 1)
        old = old_entries(count, same_mode, long_term, settings.timezone)
        old.sort(key=lambda entry: entry.timestamp)
    return old, period_tags(entries, timestamp, long_term, settings.timezone)


async def _list(task: Task, target: RemoteTarget, *, must: bool) -> list[Backup]:
    try:
        return await list_vm_backups(target.remote, target.vm_uuid)
    except ProxyError as error:
        if must:
            raise
        tell_uncounted(task, target.remote_id, error)
        return []


def tell_uncounted(task: Task, target_id: str, error: ProxyError) -> None:
    """Say that retention knows nothing of a neighbour: more is kept than asked for."""
    task.warning(
        "what another target has cannot be counted: all of it is kept",
        {"id": target_id, "error": error.message},
    )


async def delete_old(task: Task, old: Sequence[Entry]) -> None:
    """Remove what retention found, in its order, under the locks that the targets hold.

    What the storage protects stays with a warning: the next run finds it again.
    """
    for target in dict.fromkeys(entry.target for entry in old):
        paths = [entry.backup.id for entry in old if entry.target is target]
        try:
            await delete_backups(target.remote, paths, locks={target.vm_uuid: target.lock})
        except ProxyError as error:
            if not is_protection(error):
                raise
            errors = error.errors if isinstance(error, Many) else [error]
            task.warning(
                "old backups are protected and are removed by a later run",
                {"backups": [str(each) for each in errors]},
            )
