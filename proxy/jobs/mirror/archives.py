"""Copying one full backup: its archive is read once for all remotes that want it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from proxy.errors import Corrupt
from proxy.formats.xva_check import Validator
from proxy.jobs.copying import Check, FanOut
from proxy.jobs.mirror.source import Unchanged, carried
from proxy.repository import list_vm_backups, open_full_backup
from proxy.repository.paths import date_name, xva_name
from proxy.repository.verify_xva import stored_md5
from proxy.runtime.buffers import BufferPool

if TYPE_CHECKING:
    from collections.abc import Sequence

    from proxy.jobs.copying import Consumer
    from proxy.jobs.mirror.mirror_job import MirrorJob
    from proxy.jobs.mirror.source import Source
    from proxy.jobs.mirror.target import MirrorTarget
    from proxy.jobs.rate_limit import RateLimit
    from proxy.remotes import FileReader
    from proxy.repository import Backup, BackupRecord
    from proxy.tasks import Task

_BUFFERS = 6
"""Of 2 MiB, per VM."""


class _ArchiveCheck(Check):
    """The whole archive, and the one that was stored: the MD5 beside it is compared."""

    def __init__(self, path: str, expected: str | None) -> None:
        super().__init__(Validator())
        self._path = path
        self._expected = expected

    def finish(self) -> None:
        super().finish()
        if self._expected not in (None, self.digest().hex()):
            raise Corrupt(
                f"the MD5 of '{self._path}' is not the stored one: the archive is damaged",
                data={"what": "checksum", "path": self._path},
            )


class _Archive:
    """An open file as the source of a stream; see :class:`proxy.jobs.copying.Source`."""

    peer_lossy = False

    def __init__(self, file: FileReader, path: str, size: int, unchanged: Unchanged) -> None:
        self._file = file
        self._path = path
        self._size = size
        self._unchanged = unchanged
        self._read = 0

    async def read_into(self, view: memoryview) -> int:
        count = await self._file.read_into(view)
        self._read += count
        return count

    async def finish(self) -> None:
        refuse_cut(self._path, self._read, self._size)
        await self._unchanged.confirm()


def refuse_cut(path: str, size: int, expected: int) -> None:
    if size != expected:
        raise Corrupt(
            f"'{path}' has {size} bytes where its metadata says {expected}: it is not complete",
            data={"what": "size", "path": path, "size": size, "expected": expected},
        )


async def copy_archive(
    task: Task,
    job: MirrorJob,
    source: Source,
    record: BackupRecord,
    targets: Sequence[MirrorTarget],
    rate: RateLimit,
) -> None:
    """Copy the backup ``record`` to ``targets``, each with an ``export`` task of its own.

    Raises what is wrong with the source: no remote then has anything of this backup, and every
    export that was begun has failed with it.  A remote's own failure is noted in it, and the
    others go on.
    """
    backup = record.backup
    name = xva_name(record.metadata)
    if name is None:
        raise Corrupt(
            f"the metadata of {backup.id} names no archive beside it", data={"path": backup.id}
        )
    path = f"{backup.id.rpartition('/')[0]}/{name}"
    unchanged = Unchanged(source, record, [path])
    await unchanged.begin()
    md5 = await stored_md5(source.remote, path)
    async with source.remote.open_read(path) as file:
        size = file.size if backup.size is None else int(backup.size)
        refuse_cut(path, file.size, size)
        check = _ArchiveCheck(path, md5 if isinstance(md5, str) else None)
        fan_out = FanOut(_Archive(file, path, size, unchanged), BufferPool(_BUFFERS), check, rate)
        copy = _Copy(task, job, record, size, check, fan_out)
        broken = await fan_out.feed([partial(copy.to, target) for target in targets])
    if broken is not None:
        raise broken


class _Copy:
    """One archive on its way to several remotes."""

    def __init__(
        self,
        task: Task,
        job: MirrorJob,
        record: BackupRecord,
        size: int,
        check: Check,
        fan_out: FanOut,
    ) -> None:
        self._task = task
        self._job = job
        self._record = record
        self._size = size
        self._check = check
        self._fan_out = fan_out

    async def to(self, target: MirrorTarget, consumer: Consumer) -> None:
        try:
            async with target.target.export(self._task, is_full=True) as export:
                copied = await self._store(export, target, consumer)
                await target.got(export, self._record.backup, copied)
        except Exception as error:  # noqa: BLE001  in the log of the export; other targets go on
            target.errors.append(error)

    async def _store(self, export: Task, target: MirrorTarget, consumer: Consumer) -> Backup:
        backup = self._record.backup
        timestamp = int(backup.timestamp)
        async with open_full_backup(
            target.remote,
            target.vm_uuid,
            timestamp,
            # what a crash left under that name is replaced, where it can be
            exclusive=target.remote.is_immutable or await _is_taken(target, timestamp),
        ) as writer:
            async with export.child("transfer") as transfer:
                transfer.progress(0, self._size)
                await consumer.pour(
                    writer.write,
                    lambda: transfer.progress(
                        writer.size, self._size, bottleneck=self._fan_out.bottleneck()
                    ),
                )
                transfer.complete_progress()
                transfer.result = {"size": writer.size}
            await target.target.lock.check()
            return await writer.commit(
                {
                    **carried(self._record),
                    "jobId": self._job.id,
                    "scheduleId": self._job.schedule_id,
                    "timestamp": backup.timestamp,
                    "tags": await target.tags(backup.timestamp),
                },
                self._check.digest(),
            )


async def _is_taken(target: MirrorTarget, timestamp: int) -> bool:
    """Whether a backup of another job has the name already."""
    name = f"/{date_name(timestamp)}.json"
    present = await list_vm_backups(target.remote, target.vm_uuid)
    return any(backup.id.endswith(name) for backup in present)
