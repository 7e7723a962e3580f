"""An SR, of any pool, as the target of VM backups: it gets replicas."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from proxy.errors import ProxyError
from proxy.jobs.health_check import wanted
from proxy.jobs.job_snapshots import key_date, keys_of
from proxy.jobs.remote_retention import tell_uncounted
from proxy.jobs.replication.bases import ReplicaBase, ReplicaBases
from proxy.jobs.replication.full_replica import write_full_replica
from proxy.jobs.replication.incremental_replica import IncrementalReplica
from proxy.jobs.replication.replicas import list_replicas, time_behind
from proxy.repository import old_entries
from proxy.xapi import ownership

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from proxy.disks.disk import RandomDisk
    from proxy.jobs.copying import Consumer
    from proxy.jobs.disk_snapshots import DiskSnapshot
    from proxy.jobs.replication.replicas import Replica
    from proxy.jobs.settings import Settings
    from proxy.jobs.target import FullCopy, IncrementalCopy, Refusal, Target
    from proxy.jobs.vm_backup import VmBackup
    from proxy.tasks import Task
    from proxy.xapi import Xapi


class SrDestination:
    """An SR with a session on its pool, open for a run."""

    def __init__(self, sr_id: str, xapi: Xapi, ref: str, record: Mapping[str, Any]) -> None:
        self.id = sr_id
        self.xapi = xapi
        self.ref = ref
        self.name_label = str(record.get("name_label", ""))

    @property
    def properties(self) -> Mapping[str, Any]:
        return {"id": self.id, "name_label": self.name_label, "type": "SR"}

    @property
    def export_ids(self) -> Collection[str]:
        return (self.id,)

    def retention(self, settings: Settings) -> float:
        return settings.copy_retention

    @contextlib.asynccontextmanager
    async def target(
        self, task: Task, backup: VmBackup, settings: Settings
    ) -> AsyncIterator[SrTarget]:
        """Nothing is locked on an SR: a job runs once at a time, and its replicas are its own."""
        yield SrTarget(self, task, backup, settings)


class SrTarget:
    """An SR with one VM in one attempt."""

    def __init__(
        self, destination: SrDestination, task: Task, backup: VmBackup, settings: Settings
    ) -> None:
        self.id = destination.id
        self.sr_uuid = destination.id
        self.xapi = destination.xapi
        self.sr_ref = destination.ref
        self.settings = settings
        self.backup = backup
        self.bases: dict[str, ReplicaBase] = {}
        """By the uuid of the live disk."""
        self.replica = ""
        """Reference of the VM, once the target is among those stored."""
        self._destination = destination
        self._neighbours: list[SrTarget] = []
        self._counted: list[Replica] = []
        self._task = task
        prefer, default = settings.prefer_nbd, backup.defaults.prefer_nbd
        self._finder = ReplicaBases(
            self.xapi,
            self.sr_ref,
            job_id=backup.job.id,
            vm_uuid=backup.uuid,
            checks_qcow2=default if prefer is None else prefer,
        )

    @property
    def marks(self) -> dict[str, str]:
        """On all that is unfinished."""
        return self.backup.marks

    @property
    def unmarked(self) -> dict[str, None]:
        """Takes them off, the one by which :data:`marks` are known last."""
        return {ownership.RUN: None, ownership.PROXY: None}

    def keys(self, timestamp: float) -> dict[str, str]:
        """On each part of a replica: whose, of which job, and when."""
        job = self.backup.job
        return {
            ownership.SR: self.sr_uuid,
            ownership.DATETIME: key_date(timestamp),
            ownership.JOB: job.id,
            ownership.SCHEDULE: job.schedule_id,
            ownership.VM: self.backup.uuid,
        }

    @property
    def encodes(self) -> bool:
        return False

    @property
    def stores_md5(self) -> bool:
        return False

    async def space(self) -> int | None:
        sr = await self.xapi.record("SR", self.sr_ref)
        return int(sr["physical_size"]) - int(sr["physical_utilisation"])

    def count_with(self, others: Sequence[Target]) -> None:
        self._neighbours = [other for other in others if isinstance(other, SrTarget)]

    @contextlib.asynccontextmanager
    async def export(self, task: Task, *, is_full: bool) -> AsyncIterator[Task]:
        properties = self._destination.properties
        async with task.child("export", **properties, isFull=is_full) as export:
            yield export

    async def clean(self, parent: Task, *, merge: bool) -> None:
        """What is left unfinished on a pool is swept at the first contact; SRs merge alone."""

    async def check_health(self, parent: Task, backup: VmBackup, **properties: Any) -> None:
        check = wanted(self.settings, backup.tags)
        if check is not None and self.replica:
            await backup.checks.of_replica(parent, check, self.xapi, self.replica, **properties)

    async def write_full(self, export: Task, copy: FullCopy, consumer: Consumer) -> None:
        await write_full_replica(self, export, copy, consumer)

    @property
    def knows_content(self) -> bool:
        return True

    async def find_bases(
        self, snapshots: Mapping[str, DiskSnapshot], *, by_content: bool = False
    ) -> Mapping[str, Refusal]:
        refused: dict[str, Refusal] = {}
        for disk, snapshot in snapshots.items():
            self.bases.pop(disk, None)
            found = await self._finder.find(self._task, snapshot, by_content=by_content)
            if isinstance(found, ReplicaBase):
                self.bases[disk] = found
            else:
                refused[disk] = found
        return refused

    def sorts_behind(self, disks: Collection[str]) -> str:
        return ""

    def open_base(self, disk: str) -> AbstractAsyncContextManager[RandomDisk] | None:
        """A replica's disk is on a host: reading it there would be another whole transfer."""
        return None

    def incremental(self, copy: IncrementalCopy) -> IncrementalReplica:
        return IncrementalReplica(self, copy)

    async def replicas(self, export: Task) -> tuple[list[Replica], list[Replica]]:
        """All that the job keeps here, oldest first; and those of its schedule that are one too
        many, counted with the neighbours'."""
        job, settings = self.backup.job, self.settings
        found = [await self._list(export, each) for each in (self, *self._neighbours)]
        self._counted = [one for some in found for one in some]
        for replica in found[0]:
            await self._tidy(export, replica)
        old: list[Replica] = []
        if not settings.skip_delete_old_entries:
            count = max(0, int(settings.copy_retention) - 1)
            ours = [one for one in self._counted if one.schedule_id == job.schedule_id]
            old = old_entries(count, ours)
            old.sort(key=lambda replica: replica.timestamp)
        return found[0], old

    async def _list(self, export: Task, on: SrTarget) -> list[Replica]:
        job = self.backup.job
        try:
            return await list_replicas(
                on.xapi, on.sr_uuid, self.backup.uuid, job.id, job.schedule_id
            )
        except ProxyError as error:
            if on is self:
                raise
            tell_uncounted(export, on.sr_uuid, error)
            return []

    def time_behind(self, timestamp: int) -> int:
        """When a new replica is from: behind all that were counted, the neighbours' too.  Of two
        of one second retention would take one for a copy of the other."""
        return time_behind(self._counted, timestamp)

    async def _tidy(self, export: Task, replica: Replica) -> None:
        """A run that broke off when its replica was complete left its marks on it."""
        keys = keys_of(replica.record)
        ours = keys.get(ownership.PROXY) == self.backup.installation
        if not ours or self.backup.is_live_run(keys.get(ownership.RUN, "")):
            return
        try:
            await ownership.set_keys(self.xapi, replica.ref, self.unmarked)
        except ProxyError as error:  # the replica is good all the same
            export.warning(
                "a replica keeps the marks of the run that made it",
                {"vm": replica.uuid, "error": error.message},
            )
