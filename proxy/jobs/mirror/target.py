"""One remote that a mirror writes one VM's backups to."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from proxy.errors import ProxyError
from proxy.formats.vhd import BLOCK_SIZE
from proxy.jobs.settings import Settings
from proxy.jobs.targets import RemoteTarget, delete_old
from proxy.jobs.traffic import told
from proxy.repository import Backup, clean_vm, list_vm_backups, period_tags

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from uuid import UUID

    from proxy.jobs.mirror.mirror_job import MirrorSettings
    from proxy.jobs.mirror.planning import Retention
    from proxy.remotes import Lock, Remote
    from proxy.tasks import Task


@dataclass(slots=True)
class MirrorTarget:
    """A remote with this VM's settings on it, and the lock of the VM's directory."""

    id: str
    remote: Remote
    lock: Lock
    vm_uuid: str
    settings: MirrorSettings
    retention: Retention
    wanted: list[Backup] = field(default_factory=list[Backup])
    """Of the source, what it does not have yet, oldest first."""
    errors: list[Exception] = field(default_factory=list[Exception])
    """Why something that it was to get is not there."""
    is_lost: bool = False
    """It failed by itself: nothing more is written to it in this attempt."""
    newest: Backup | None = None
    """The last backup that it got in this run."""
    disks: dict[str, set[UUID]] = field(default_factory=dict[str, "set[UUID]"])
    """Of each disk's directory that was looked at, the disks by uuid."""
    removed: int = 0

    @property
    def as_remote_target(self) -> RemoteTarget:
        """For what writes backups of VMs; retention is not its business here, as the backup that
        it writes need not be the youngest."""
        settings = Settings(
            export_retention=self.settings.export_retention,
            long_term_retention=self.settings.long_term_retention,
            timezone=self.settings.timezone,
            skip_delete_old_entries=True,
        )
        return RemoteTarget(self.id, self.remote, settings, self.lock)

    async def tags(self, backup: Backup) -> list[str]:
        """The periods that ``backup`` opens among those of its schedule here.

        Without long-term retention those of the source.
        """
        if not self.settings.long_term_retention:
            return list(backup.tags)
        present = await list_vm_backups(self.remote, self.vm_uuid)
        entries = [each for each in present if each.schedule_id == self.retention.schedule_id]
        return period_tags(
            entries,
            backup.timestamp,
            self.settings.long_term_retention,
            self.settings.timezone,
        )

    async def remove(self, task: Task, old: Sequence[Backup]) -> None:
        """Remove what is too old, and of deltas no more than one run may.

        The oldest few, and of these the youngest first: whatever is left stays a chain.
        """
        most = self.settings.max_merged_deltas_per_run
        if most is not None and self.retention.mode == "delta":
            old = old[: max(0, int(most) - self.removed)]
        await delete_old(task, self.as_remote_target, self.vm_uuid, list(reversed(old)))
        self.removed += len(old)

    async def retire(self, task: Task) -> None:
        """Remove what is too old now that a backup was added."""
        if self.settings.delete_first or self.retention.keeps_all:
            return
        present = await list_vm_backups(self.remote, self.vm_uuid)
        await self.remove(task, self.retention.expired(present))

    async def clean(self, parent: Task, *, merge: bool) -> None:
        """Remove, and ``merge``, what no backup needs.

        Its failure stands in the log and stops nothing.
        """
        with contextlib.suppress(ProxyError):
            async with parent.child("clean-vm") as clean:

                @contextlib.asynccontextmanager
                async def merging(
                    chain: Sequence[str],
                ) -> AsyncIterator[Callable[[int, int], None]]:
                    del chain
                    async with clean.child("merge") as task:

                        def moved(done: int, total: int) -> None:
                            task.progress(done * BLOCK_SIZE, total * BLOCK_SIZE)

                        with told(task, self.remote):
                            yield moved
                        task.complete_progress()

                with told(clean, self.remote):
                    clean.result = await clean_vm(
                        self.remote,
                        self.vm_uuid,
                        lock=self.lock,
                        warn=clean.warning,
                        min_age=0,  # we hold the directory: who wrote an unfinished file is dead
                        merge=merge,
                        progress=merging,
                    )
