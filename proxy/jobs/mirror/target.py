"""One remote that a mirror writes one VM's backups to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from proxy.jobs.remote_retention import Entry, delete_old
from proxy.repository import list_vm_backups, period_tags

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from proxy.jobs.mirror.mirror_job import MirrorSettings
    from proxy.jobs.mirror.planning import Retention
    from proxy.jobs.remote_target import RemoteTarget
    from proxy.remotes import Remote
    from proxy.repository import Backup
    from proxy.tasks import Task


@dataclass(slots=True)
class MirrorTarget:
    """A remote with one VM's settings on it, in one attempt."""

    target: RemoteTarget
    """Its own retention is off: what a mirror brings need not be the youngest."""
    settings: MirrorSettings
    retention: Retention
    wanted: list[Backup] = field(default_factory=list["Backup"])
    """Of the source, what it does not have yet, oldest first."""
    errors: list[Exception] = field(default_factory=list[Exception])
    """Why something that it was to get is not there."""
    is_lost: bool = False
    """It failed by itself: nothing more is written to it in this attempt."""
    newest: Backup | None = None
    """The last backup that it got in this attempt."""
    disks: dict[str, set[UUID]] = field(default_factory=dict[str, "set[UUID]"])
    """Of each disk that was looked for, its states that are here, by uuid."""
    removed: int = 0
    neighbours: Sequence[MirrorTarget] = ()
    """On which retention counts too."""

    @property
    def id(self) -> str:
        return self.target.id

    @property
    def remote(self) -> Remote:
        return self.target.remote

    @property
    def vm_uuid(self) -> str:
        return self.target.vm_uuid

    @property
    def is_changed(self) -> bool:
        """Whether this attempt may have left something to clean."""
        return bool(self.newest or self.removed or self.errors)

    def wants(self, backup: Backup) -> bool:
        return any(each.id == backup.id for each in self.wanted)

    async def present(self) -> list[Held]:
        """What is here and on the neighbours, of whatever job and mode."""
        return [
            Held(backup, each)
            for each in (self, *self.neighbours)
            for backup in await list_vm_backups(each.remote, each.vm_uuid)
        ]

    async def tags(self, timestamp: float) -> list[str]:
        """The periods of long-term retention that a backup opens among those of its schedule."""
        if not self.settings.long_term_retention:
            return []
        schedule = self.retention.schedule_id
        entries = [each.backup for each in await self.present()]
        return period_tags(
            [backup for backup in entries if backup.schedule_id == schedule],
            timestamp,
            self.settings.long_term_retention,
            self.settings.timezone,
        )

    async def got(self, export: Task, source: Backup, copy: Backup | None) -> None:
        """``copy`` is a backup here now: remove what is too old with it."""
        self.newest = copy
        self.wanted = [each for each in self.wanted if each.id != source.id]
        if not self.settings.delete_first and not self.retention.keeps_all:
            present = await self.present()
            expired = self.retention.expired([each.backup for each in present])
            await self.remove(export, expired, present)

    async def remove(self, task: Task, old: Sequence[Backup], present: Sequence[Held]) -> None:
        """Remove what is too old of ``present``, and of deltas no more than one run may.

        The oldest few, and of these the youngest first: whatever is left stays a chain.
        """
        most = self.settings.max_merged_deltas_per_run
        if most is not None and self.retention.mode == "delta":
            old = old[: max(0, int(most) - self.removed)]
        owner = {id(each.backup): each.owner for each in present}
        gone = [Entry(each, owner[id(each)].target) for each in reversed(old)]
        self.removed += len(gone)  # first: it may fail half-way
        await delete_old(task, gone)


@dataclass(frozen=True, slots=True)
class Held:
    """One backup, and the remote that has it."""

    backup: Backup
    owner: MirrorTarget
