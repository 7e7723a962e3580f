"""What a mirror reads: one VM's backups on the source, and whether they stay what they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import msgspec

from proxy.errors import Conflict, NotFound, ProxyError
from proxy.repository import read_backup
from proxy.repository.cache import read_directory
from proxy.runtime.threads import Work, in_thread

if TYPE_CHECKING:
    from collections.abc import Sequence

    from proxy.jobs.mirror.mirror_job import Filter
    from proxy.remotes import Lock, Remote
    from proxy.remotes.interface import FileStat
    from proxy.repository import Backup, BackupRecord

_SUMMARY: Final = {
    ("id",),
    ("jobId",),
    ("mode",),
    ("scheduleId",),
    ("timestamp",),
    ("vm", "name_label"),
    ("vm", "uuid"),
}
"""Fields that a listing knows already."""


@dataclass(frozen=True, slots=True)
class Found:
    """What the source has of one VM."""

    backups: list[Backup]
    """Of the job's mode, oldest first."""
    matching: list[Backup]
    """Those that the job's filter takes."""
    unreadable: dict[str, ProxyError]
    """Metadata that cannot be read, by name: of these nothing is known."""


async def look(remote: Remote, vm_uuid: str, mode: str, wanted: Filter | None) -> Found:
    """List the VM's backups.  Takes no lock.

    An error of the directory is raised; of the metadata of one backup it is in the answer.
    """
    directory = await read_directory(remote, vm_uuid)
    backups = [backup for backup in directory.backups if backup.mode == mode]
    unreadable = dict(directory.unreadable)
    if wanted is None:
        return Found(backups, backups, unreadable)
    if wanted.fields <= _SUMMARY:
        known = await in_thread(Work.CPU, _matching, backups, wanted)
        return Found(backups, known, unreadable)
    matching: list[Backup] = []
    for backup in backups:
        try:
            record = await read_backup(remote, backup.id)
        except NotFound:
            continue  # removed since the directory was listed
        except ProxyError as error:
            unreadable[backup.id.rpartition("/")[2]] = error
            continue
        fields = {**record.metadata, "id": backup.id, "_filename": backup.id}
        if await in_thread(Work.CPU, wanted.matches, fields):
            matching.append(backup)
    return Found(backups, matching, unreadable)


def _matching(backups: Sequence[Backup], wanted: Filter) -> list[Backup]:
    """In a thread: a long filter takes its time, in which locks must be kept."""
    return [backup for backup in backups if wanted.matches(_summary(backup))]


def _summary(backup: Backup) -> dict[str, Any]:
    """As the metadata has it: what is not there is left out."""
    vm = {"uuid": backup.vm.uuid, "name_label": backup.vm.name_label}
    fields = {
        "id": backup.id,
        "jobId": backup.job_id,
        "mode": backup.mode,
        "scheduleId": backup.schedule_id,
        "timestamp": backup.timestamp,
        "vm": {name: value for name, value in vm.items() if value is not None},
    }
    return {name: value for name, value in fields.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Source:
    """The source remote, with the lock of the VM's directory."""

    id: str
    remote: Remote
    lock: Lock


class Unchanged:
    """Whether a backup of the source is still what it was when its reading began.

    The lock keeps everyone out who takes it; where a storage has none, or somebody does without,
    what was read may be of two times.
    """

    def __init__(self, source: Source, record: BackupRecord, files: Sequence[str]) -> None:
        self._source = source
        self._record = record
        self._files = list(files)
        self._before: list[FileStat] = []

    async def begin(self) -> None:
        """Right before the first byte is read."""
        self._before = [await self._source.remote.stat(file) for file in self._files]

    async def confirm(self) -> None:
        """Right after the last byte.  ``Conflict`` (``ECHANGED``) when something was changed,
        ``Busy`` when the lock was lost."""
        await self._source.lock.check()
        backup_id = self._record.backup.id
        try:
            after = [await self._source.remote.stat(file) for file in self._files]
            raw = (await read_backup(self._source.remote, backup_id)).raw
        except NotFound as error:
            raise self._changed(str(error.data.get("path", backup_id))) from error
        for file, before, now in zip(self._files, self._before, after, strict=True):
            if (before.size, before.mtime) != (now.size, now.mtime):
                raise self._changed(file)
        if raw != self._record.raw:
            raise self._changed(backup_id)

    def _changed(self, path: str) -> Conflict:
        return Conflict(
            f"'{path}' was changed on the source while it was copied: run the mirror again",
            code="ECHANGED",
            data={"path": path, "id": self._record.backup.id},
        )


_OURS: Final = ("jobId", "scheduleId", "mode", "version", "size", "tags", "onDisk", "xva", "vhds")


def carried(record: BackupRecord) -> dict[str, Any]:
    """The source's metadata as far as it is also the copy's.

    As stored: numeric booleans of old hosts stay what they are.
    """
    metadata: dict[str, Any] = msgspec.json.decode(record.raw)
    return {key: value for key, value in metadata.items() if key not in _OURS}
