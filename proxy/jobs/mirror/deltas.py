"""Copying one incremental backup: its disks are read once for all remotes that need the same."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import trio

from proxy.disks.disk import block_pool
from proxy.errors import ProxyError
from proxy.jobs.copying import NoConsumers
from proxy.jobs.disk_copying import DiskFanOut, bottleneck, read_together
from proxy.jobs.incremental_metadata import ExportedDisk
from proxy.jobs.incremental_target import IncrementalTarget
from proxy.jobs.mirror.disks import known_sums, need_of, open_disks, refuse_strange_blocks
from proxy.jobs.mirror.source import Unchanged, carried
from proxy.jobs.opening import failed
from proxy.jobs.target import DiskPart, IncrementalCopy, Progress
from proxy.repository import list_vm_backups
from proxy.repository.incremental_writer import names_of_data

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from proxy.formats.checksums import BlockSums
    from proxy.formats.vhd_directory import Compression
    from proxy.jobs.mirror.disks import Need, SourceDisk
    from proxy.jobs.mirror.mirror_job import MirrorJob
    from proxy.jobs.mirror.source import Source
    from proxy.jobs.mirror.target import MirrorTarget
    from proxy.jobs.rate_limit import RateLimit
    from proxy.remotes import Remote
    from proxy.repository import Backup, BackupRecord
    from proxy.repository.damage import DamageNotes
    from proxy.runtime.buffers import BufferPool
    from proxy.tasks import Task

_BUFFERS = 10
"""Of 2 MiB, per VM over all disks of a backup."""


@dataclass(frozen=True, slots=True)
class CopyOptions:
    """What all copies of a run have in common."""

    rate: RateLimit
    disks_at_once: int
    """0: all."""
    codec: Compression
    """For the blocks of whole disks, where a remote keeps directories."""
    damage: Callable[[Remote], DamageNotes]


async def copy_delta(
    task: Task,
    job: MirrorJob,
    source: Source,
    record: BackupRecord,
    targets: Sequence[MirrorTarget],
    options: CopyOptions,
) -> None:
    """Copy the backup ``record`` to ``targets``, each with an ``export`` task of its own.

    Raises what is wrong with the source: no remote then has anything of this backup that it
    did not have complete before, and every export that was begun has failed with it.  A remote's
    own failure is noted in it, and the others go on.
    """
    async with contextlib.AsyncExitStack() as stack:
        disks = await open_disks(stack, source.remote, record)
        for group in await _groups(task, job, record, disks, targets, options):
            await _Copy(task, job, source, record, disks, group, options).run()


@dataclass(frozen=True, slots=True)
class _Member:
    target: MirrorTarget
    needs: list[Need]
    """Of each disk."""
    others: list[str]
    """Names that the backup cannot have there."""


@dataclass(frozen=True, slots=True)
class _Group:
    """Remotes that need the same of every disk."""

    firsts: tuple[int, ...]
    """Of each disk, the first of its chain that they lack."""
    members: list[_Member]


async def _groups(
    task: Task,
    job: MirrorJob,
    record: BackupRecord,
    disks: Sequence[SourceDisk],
    targets: Sequence[MirrorTarget],
    options: CopyOptions,
) -> list[_Group]:
    """By what they need.  A remote that cannot say is a failed ``export`` and in none of them."""
    groups: dict[tuple[int, ...], _Group] = {}
    for target in targets:
        try:
            damaged = await options.damage(target.remote).all()
            needs = [await need_of(target, job.id, disk, damaged) for disk in disks]
            uuids = [disk.uuid for disk in disks]
            others = await names_of_data(target.remote, target.vm_uuid, job.id, uuids)
        except ProxyError as error:
            target.errors.append(error)
            export = task.child("export", id=target.id, isFull=False, type="remote")
            await failed(export, error)
            continue
        for disk, need in zip(disks, needs, strict=True):
            if need.why_whole is not None:
                why = need.why_whole
                task.info(
                    "a disk is copied whole",
                    {
                        "id": record.backup.id,
                        "disk": disk.uuid,
                        "remote": target.id,
                        "reason": why.reason,
                        "message": why.message,
                        "evidence": why.evidence,
                    },
                )
        firsts = tuple(need.first for need in needs)
        group = groups.setdefault(firsts, _Group(firsts, []))
        group.members.append(_Member(target, needs, others))
    return list(groups.values())


class _Copy:
    """One backup on its way to the remotes of one group."""

    def __init__(
        self,
        task: Task,
        job: MirrorJob,
        source: Source,
        record: BackupRecord,
        disks: Sequence[SourceDisk],
        group: _Group,
        options: CopyOptions,
    ) -> None:
        self._task = task
        self._source = source
        self._record = record
        self._disks = disks
        self._group = group
        self._options = options
        self._contents = [
            disk.content(first) for disk, first in zip(disks, group.firsts, strict=True)
        ]
        self._fan_outs: list[DiskFanOut] = []
        self._writers: list[IncrementalTarget] = []
        backup = record.backup
        parents = [
            need.parent.name
            for member in group.members
            for need in member.needs
            if need.parent is not None
        ]
        self._copy = IncrementalCopy(
            vm_uuid=group.members[0].target.vm_uuid,
            job_id=job.id,
            schedule_id=job.schedule_id,
            timestamp=int(backup.timestamp),
            newest_parent=max(parents, default="").partition(".")[0],
            stored=set(),
            codec=options.codec,
            progress=Progress(len(disks)),
            bottleneck=self._bottleneck,
        )
        for disk, content in zip(disks, self._contents, strict=True):
            self._copy.is_differencing[disk.ref] = content.is_differencing
            self._copy.progress.add(content)
        self._copy.metadata = {
            **carried(record),
            "isVhdDifferencing": self._copy.is_differencing,
            "jobId": job.id,
            "scheduleId": job.schedule_id,
            "timestamp": backup.timestamp,
        }

    @property
    def _is_full(self) -> bool:
        return not any(
            content.is_differencing
            for disk, content in zip(self._disks, self._contents, strict=True)
            if not disk.is_memory
        )

    async def run(self) -> None:
        """Read the disks once into every remote of the group, and wait for all of these."""
        broken: Exception | None = None
        async with trio.open_nursery() as nursery:
            try:
                for member in self._group.members:
                    parents = {
                        disk.uuid: need.parent
                        for disk, need in zip(self._disks, member.needs, strict=True)
                        if need.parent is not None
                    }
                    writer = IncrementalTarget(
                        member.target.target, self._copy, parents, others=member.others
                    )
                    self._writers.append(writer)
                    nursery.start_soon(self._one_target, member.target, writer)
                await self._read_disks()
                for writer in self._writers:
                    writer.end(complete=True)
            except NoConsumers:
                pass  # the targets' own errors tell why
            except ProxyError as error:
                broken = error  # raised below, when the targets have ended
            finally:
                for writer in self._writers:
                    writer.end(complete=False)
        if broken is not None:
            raise broken

    async def _one_target(self, target: MirrorTarget, writer: IncrementalTarget) -> None:
        try:
            async with target.target.export(self._task, is_full=self._is_full) as export:
                try:
                    await writer.run(export)
                finally:
                    writer.leave()
                for disk in self._disks:
                    target.disks.setdefault(disk.uuid, set()).add(disk.disks[-1].uuid)
                copied = await self._find_copy(target)
                await target.got(export, self._record.backup, copied)
        except Exception as error:  # noqa: BLE001  in the log of the export; other targets go on
            target.errors.append(error)

    async def _find_copy(self, target: MirrorTarget) -> Backup | None:
        present = target.retention.entries(await list_vm_backups(target.remote, target.vm_uuid))
        timestamp = self._record.backup.timestamp
        return next((each for each in present if each.timestamp == timestamp), None)

    async def _read_disks(self) -> None:
        """Every disk, several at once; the first error of the source ends it."""
        pool = block_pool(_BUFFERS)
        await read_together(
            [partial(self._read_disk, position, pool) for position in range(len(self._disks))],
            self._fan_outs,
            at_once=self._options.disks_at_once,
        )

    async def _read_disk(self, position: int, pool: BufferPool) -> None:
        disk, content = self._disks[position], self._contents[position]
        first = self._group.firsts[position]
        if all(writer.failed for writer in self._writers):
            raise NoConsumers
        unchanged = Unchanged(self._source, self._record, disk.files(first))
        known = await known_sums(self._source.remote, disk, first)
        await unchanged.begin()

        async def confirm(seen: BlockSums | None) -> None:
            if seen is not None:
                await refuse_strange_blocks(disk, content, known, seen)
            await unchanged.confirm()

        fan_out = DiskFanOut(content, pool.count, self._options.rate, confirm)
        self._fan_outs.append(fan_out)
        exported = _exported(disk)
        for writer in self._writers:
            if not writer.failed:
                writer.give(DiskPart(exported, content, fan_out.consumer()))
        await fan_out.run(pool)

    def _bottleneck(self) -> str:
        encodes = any(each.target.target.encodes for each in self._group.members)
        return bottleneck(self._fan_outs, encodes=encodes)


def _exported(disk: SourceDisk) -> ExportedDisk:
    """By the uuid that the disk has on the source, whatever its metadata says: its children
    name it so."""
    return ExportedDisk(disk.ref, {"uuid": str(disk.disks[-1].uuid)}, disk.uuid, disk.is_memory)
