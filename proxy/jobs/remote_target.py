"""A remote as the target of VM backups."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any

from proxy.disks.opening import open_chain
from proxy.errors import ProxyError
from proxy.formats.vhd import BLOCK_SIZE
from proxy.jobs.health_check import wanted
from proxy.jobs.incremental_target import IncrementalTarget
from proxy.jobs.remote_retention import delete_old, plan_retention
from proxy.jobs.target import FullCopy, IncrementalCopy, Refusal
from proxy.jobs.traffic import told
from proxy.jobs.vm_lock import hold_vm
from proxy.repository import (
    clean_vm,
    open_full_backup,
)
from proxy.repository.parents import NoParent, Parent, find_parent

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from proxy.disks.disk import RandomDisk
    from proxy.jobs.copying import Consumer
    from proxy.jobs.disk_snapshots import DiskSnapshot
    from proxy.jobs.settings import Settings
    from proxy.jobs.target import Target
    from proxy.jobs.vm_backup import VmBackup
    from proxy.remotes import Lock, Remote
    from proxy.repository.damage import DamageNotes
    from proxy.tasks import Task


class RemoteDestination:
    """A remote that is open for a run."""

    def __init__(self, remote_id: str, remote: Remote) -> None:
        self.id = remote_id
        self.remote = remote

    @property
    def properties(self) -> Mapping[str, Any]:
        return {"id": self.id, "type": "remote"}

    @property
    def export_ids(self) -> Collection[str]:
        return (self.id,)

    def retention(self, settings: Settings) -> float:
        return settings.export_retention

    @contextlib.asynccontextmanager
    async def target(
        self, task: Task, backup: VmBackup, settings: Settings
    ) -> AsyncIterator[RemoteTarget]:
        """With the lock of the VM's directory, for which it waits as long as for a remote."""
        async with hold_vm(
            self.remote,
            backup.uuid,
            task=task,
            remote_id=self.id,
            owner=backup.run_id,
            wait=settings.get_remote_timeout / 1000,
        ) as lock:
            yield RemoteTarget(
                self.id,
                self.remote,
                settings,
                lock,
                vm_uuid=backup.uuid,
                job_id=backup.job.id,
                damage=backup.damage(self.remote),
            )


class RemoteTarget:
    """A remote with one VM's settings on it, and the lock of the VM's directory."""

    def __init__(
        self,
        target_id: str,
        remote: Remote,
        settings: Settings,
        lock: Lock,
        *,
        vm_uuid: str,
        job_id: str,
        damage: DamageNotes,
    ) -> None:
        self.id = target_id
        self.remote = remote
        self.settings = settings
        self.lock = lock
        self.neighbours: list[RemoteTarget] = []
        """On which retention counts too."""
        self.remote_id = target_id
        """Stays when the target speaks for others too."""
        self.vm_uuid = vm_uuid
        self._job_id = job_id
        self._damage = damage
        self._parents: dict[str, Parent] = {}
        self.stored: str | None = None
        """Path of the metadata of the backup that was stored here."""

    @property
    def encodes(self) -> bool:
        return self.remote.use_vhd_directory

    @property
    def stores_md5(self) -> bool:
        """Not where it would be of other bytes than the stored ones, whose tag says more."""
        return not self.remote.is_encrypted

    async def space(self) -> int | None:
        return (await self.remote.info()).available

    def count_with(self, others: Sequence[Target]) -> None:
        self.neighbours = [other for other in others if isinstance(other, RemoteTarget)]

    @contextlib.asynccontextmanager
    async def export(self, task: Task, *, is_full: bool) -> AsyncIterator[Task]:
        async with task.child("export", id=self.remote_id, isFull=is_full, type="remote") as export:
            with told(export, self.remote):
                yield export

    async def clean(self, parent: Task, *, merge: bool) -> None:
        with contextlib.suppress(ProxyError):  # in the log of the clean
            async with parent.child("clean-vm") as clean:
                with told(clean, self.remote):
                    clean.result = await clean_vm(
                        self.remote,
                        self.vm_uuid,
                        lock=self.lock,
                        warn=clean.warning,
                        min_age=0,  # we hold the directory: who left an unfinished file is dead
                        merge=merge,
                        progress=partial(self._merging, clean),
                    )

    async def check_health(self, parent: Task, backup: VmBackup, **properties: Any) -> None:
        check = wanted(self.settings, backup.tags)
        if check is not None and self.stored is not None:
            await backup.checks.of_backup(parent, check, self.remote, self.stored, **properties)

    @contextlib.asynccontextmanager
    async def _merging(
        self, clean: Task, chain: Sequence[str]
    ) -> AsyncIterator[Callable[[int, int], None]]:
        del chain
        async with clean.child("merge") as merge:

            def moved(done: int, total: int) -> None:
                merge.progress(done * BLOCK_SIZE, total * BLOCK_SIZE)

            with told(merge, self.remote):
                yield moved
            merge.complete_progress()

    # -- full backups ------------------------------------------------------------------------

    async def write_full(self, export: Task, copy: FullCopy, consumer: Consumer) -> None:
        settings = self.settings
        old, tags = await plan_retention(
            export, self, copy.schedule_id, copy.timestamp, mode="full"
        )
        if settings.delete_first:
            await delete_old(export, old)
        async with open_full_backup(self.remote, copy.vm_uuid, copy.timestamp) as writer:
            async with export.child("transfer") as transfer:
                transfer.progress(0, copy.estimate, estimated=True)
                await consumer.pour(writer.write, lambda: copy.tell(transfer, writer.size))
                transfer.complete_progress()
                transfer.result = {"size": writer.size}
            await self.lock.check()
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
                copy.digest() if self.stores_md5 else b"",
            )
        self.stored = backup.id
        copy.stored.add(self.id)
        if not settings.delete_first:
            await delete_old(export, old)

    # -- incremental backups -----------------------------------------------------------------

    @property
    def knows_content(self) -> bool:
        return False

    async def find_bases(
        self, snapshots: Mapping[str, DiskSnapshot], *, by_content: bool = False
    ) -> Mapping[str, Refusal]:
        """An error of the storage is a refusal too, with the error as evidence: the full backup
        that follows will tell it.  So is what is known to be damaged."""
        damaged = await self._damage.all()
        refused: dict[str, Refusal] = {}
        for disk, snapshot in snapshots.items():
            parent = await find_parent(
                self.remote, self.vm_uuid, self._job_id, disk, snapshot.uuid, damaged=damaged
            )
            if isinstance(parent, NoParent):
                refused[disk] = Refusal(parent.reason, parent.message, parent.evidence)
            else:
                self._parents[disk] = parent
        return refused

    def sorts_behind(self, disks: Collection[str]) -> str:
        names = [parent.name for disk, parent in self._parents.items() if disk in disks]
        return max(names, default="").partition(".")[0]

    def open_base(self, disk: str) -> AbstractAsyncContextManager[RandomDisk] | None:
        return open_chain(self.remote, self._parents[disk].path)

    def incremental(self, copy: IncrementalCopy) -> IncrementalTarget:
        return IncrementalTarget(self, copy, self._parents)
