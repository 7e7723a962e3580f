"""Whether what a remote holds can be restored: asked before somebody needs it.

``structure`` looks at everything but the data: metadata, chains, headers, tables, which files
there are and how large they are.  ``read`` reads the data too, or a sample of it, and compares
it with the checksums from when it was written, where they are known.

A verify changes nothing on the remote and takes no lock.  What a merge or a deletion changes
meanwhile is looked at again and never called damaged.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final, cast

import trio

from proxy.disks.disk import block_pool
from proxy.errors import NotFound, ProxyError, Refused
from proxy.remotes import paths
from proxy.repository.cache import read_directory
from proxy.repository.listing import list_vms
from proxy.repository.metadata import read_backup
from proxy.repository.paths import (
    backup_path,
    disk_path,
    split_backup_path,
    vm_directory,
    xva_name,
)
from proxy.repository.sampling import Sample
from proxy.repository.verify_chains import Chain, Chains
from proxy.repository.verify_disk import Found, Reading
from proxy.repository.verify_notes import forget_gone, note_damage
from proxy.repository.verify_reports import (
    MOST_PROBLEMS,
    BackupReport,
    Level,
    Problem,
    Report,
    Status,
    worst,
)
from proxy.repository.verify_xva import FoundArchive, look_at_archive

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from proxy.remotes.interface import Remote
    from proxy.repository.cache import Directory
    from proxy.repository.damage import DamageNotes
    from proxy.repository.metadata import Backup

_BUFFERS: Final = 10
"""Of 2 MiB: four disks' blocks on their way, and some more decompressed."""
_CHAINS_AT_ONCE: Final = 3

_NEEDED: Final = {
    "full": ("vm", "xva"),
    "delta": ("vbds", "vdis", "vhds", "vifs", "vm", "vmSnapshot"),
}
"""Fields of the metadata without which a backup does not restore, by its mode."""


async def verify(
    remote: Remote,
    *,
    vm_uuid: str | None = None,
    filename: str | None = None,
    level: Level = "structure",
    sample: float | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    damage: DamageNotes | None = None,
    now: Callable[[], float] = time.time,
) -> AsyncIterator[Report]:
    """Look at all backups of the remote, or of one VM, or at the backup ``filename`` alone.

    Gives a report of each disk, once however many backups stand on it, and then of the backup.
    ``sample`` is the share of the blocks of each disk, and of the archives, that ``read``
    reads (see :class:`Sample`).  ``on_progress`` hears how many bytes of backups are done, and
    of all.  ``damage`` gets what is found and loses what has healed.

    Raises only what concerns the whole: ``Refused`` for a wrong name or sample, ``NotFound``
    for a ``filename`` that does not exist, the storage's error when it cannot be listed at all.
    Close it when you leave before its end; a cancel leaves nothing.
    """
    share = sample_of(level, sample, now=now())
    only = None if filename is None else backup_path(filename)
    vms = await _vms(remote, vm_uuid, only)
    progress = _Progress(on_progress, 1.0 if share is None else share.share)
    found = [(vm, await _listed(remote, vm, only)) for vm in vms]
    if only is not None and not any(
        isinstance(listed, ProxyError) or listed.backups or listed.unreadable for _, listed in found
    ):
        raise NotFound(f"there is no backup '{only}'", data={"path": only})
    progress.expect(found)
    reading = None
    if level == "read":
        reading = Reading(block_pool(_BUFFERS), share, progress.moved)
    for vm, listed in found:
        if isinstance(listed, ProxyError):
            path = vm_directory(vm)
            problem = Problem.of(listed, path=path)
            yield BackupReport(id=path, vm=vm, status=problem.status, problems=[problem])
            continue
        looking = _Vm(remote, vm, reading)
        for name, error in listed.unreadable.items():
            path = f"{vm_directory(vm)}/{name}"
            yield await looking.confirmed(_metadata_report(path, vm, error))
        for backup in listed.backups:
            reports = await looking.backup(backup)
            progress.finished(backup)
            if damage is not None:
                await note_damage(damage, looking.disks.take_new(), int(now()))
            for report in reports:
                yield report
        if damage is not None and only is None:
            await forget_gone(remote, vm, damage, looking.disks.found)


def sample_of(level: Level, sample: float | None, *, now: float) -> Sample | None:
    """The sample that a call means; ``Refused`` when it means none."""
    if sample is None:
        return None
    if level != "read":
        raise Refused("a sample is a share of what is read: ask for level 'read'", code="EINVAL")
    return Sample(sample, now=now)


async def _vms(remote: Remote, vm_uuid: str | None, only: str | None) -> list[str]:
    if only is not None:
        vm, _ = split_backup_path(only)
        if vm_uuid not in (None, vm):
            raise Refused(f"'{only}' is no backup of the VM {vm_uuid}", code="EINVAL")
        return [vm]
    if vm_uuid is not None:
        vm_directory(vm_uuid)  # refuses what is no id
        return [vm_uuid]
    return await list_vms(remote)


async def _listed(remote: Remote, vm: str, only: str | None) -> Directory | ProxyError:
    try:
        listed = await read_directory(remote, vm, use_cache=False)
    except ProxyError as error:
        return error
    if only is not None:
        name = only.rpartition("/")[2]
        listed.backups = [backup for backup in listed.backups if backup.id == only]
        listed.unreadable = {
            each: error for each, error in listed.unreadable.items() if each == name
        }
    return listed


def _metadata_report(path: str, vm: str, error: ProxyError) -> BackupReport:
    problem = Problem.of(error, path=path)
    if problem.status is Status.DAMAGED:
        problem = Problem(
            status=problem.status, what="metadata", message=problem.message, path=path
        )
    return BackupReport(id=path, vm=vm, status=problem.status, problems=[problem])


class _Progress:
    """In bytes of backups; what is not sampled counts as done with the rest."""

    def __init__(self, tell: Callable[[int, int], None] | None, share: float) -> None:
        self._tell = tell
        self._share = share
        self._total = 0
        self._before = 0
        self._inside = 0.0

    def expect(self, found: list[tuple[str, Directory | ProxyError]]) -> None:
        self._total = sum(
            int(backup.size or 0)
            for _, listed in found
            if not isinstance(listed, ProxyError)
            for backup in listed.backups
        )
        self._say()

    def moved(self, size: int) -> None:
        self._inside += size / self._share
        self._say()

    def finished(self, backup: Backup) -> None:
        self._before += int(backup.size or 0)
        self._inside = 0
        self._say()

    def _say(self) -> None:
        if self._tell is not None:
            self._tell(min(self._total, self._before + int(self._inside)), self._total)


class _Vm:
    """The backups of one VM; each of their disks is looked at once."""

    def __init__(self, remote: Remote, vm_uuid: str, reading: Reading | None) -> None:
        self._remote = remote
        self._vm = vm_uuid
        self._reading = reading
        self.disks = Chains(remote, reading)
        self._reported: set[str] = set()

    async def confirmed(self, report: BackupReport) -> BackupReport:
        """``report``, unless its backup was deleted meanwhile: then nothing is known."""
        if report.status is Status.OK:
            return report
        try:
            await self._remote.stat(report.id)
        except NotFound:
            gone = Problem(
                status=Status.UNKNOWN,
                what="deleted",
                message="it was deleted while it was looked at",
                path=report.id,
            )
            return BackupReport(
                id=report.id,
                vm=report.vm,
                mode=report.mode,
                timestamp=report.timestamp,
                status=Status.UNKNOWN,
                problems=[gone],
            )
        except ProxyError:
            pass  # its problems say enough
        return report

    async def backup(self, backup: Backup) -> list[Report]:
        """The reports of its disks that had none yet, then its own."""
        problems = await self._metadata(backup)
        chains: list[Chain] = []
        archive: FoundArchive | None = None
        if backup.mode == "full":
            archive = await self._archive(backup, problems)
        elif backup.mode == "delta":
            chains = await self._chains(backup, problems)
        else:
            message = f"a backup of the unknown kind {str(backup.mode)[:40]!r}"
            problems.append(
                Problem(status=Status.UNKNOWN, what="kind", message=message, path=backup.id)
            )
        disks: list[Found] = []
        for chain in chains:
            disks += [each for each in chain.disks if each not in disks]
            problems += chain.problems
        reports: list[Report] = []
        for disk in disks:
            problems += disk.problems
            if disk.path not in self._reported:
                self._reported.add(disk.path)
                reports.append(disk.report())
        report = BackupReport(
            id=backup.id,
            vm=self._vm,
            name_label=backup.vm.name_label,
            mode=backup.mode,
            timestamp=int(backup.timestamp),
            status=worst(problem.status for problem in problems),
            disks=[disk.path for disk in disks],
            read=0 if archive is None else archive.read,
            checksum=None if archive is None else archive.checksum,
            problems=problems[:MOST_PROBLEMS],
        )
        return [*reports, await self.confirmed(report)]

    async def _metadata(self, backup: Backup) -> list[Problem]:
        try:
            record = (await read_backup(self._remote, backup.id)).metadata
        except ProxyError as error:
            return [Problem.of(error, path=backup.id)]
        missing = [name for name in _NEEDED.get(str(backup.mode), ()) if not record.get(name)]
        problems = [
            _metadata_problem(backup, f"its metadata has no '{name}'")
            for name in missing
            # a VM may have no devices of a kind
            if not (name in ("vbds", "vdis", "vhds", "vifs") and isinstance(record.get(name), dict))
        ]
        if backup.mode == "delta":
            problems += _unknown_disks(backup, record)
        return problems

    async def _archive(self, backup: Backup, problems: list[Problem]) -> FoundArchive:
        name = xva_name(backup.xva)
        if name is None:
            problems.append(_metadata_problem(backup, "its metadata names no archive"))
            return FoundArchive()
        path = f"{vm_directory(self._vm)}/{name}"
        size = None if backup.size is None else int(backup.size)
        archive = await look_at_archive(self._remote, path, size, self._reading)
        problems += archive.problems
        return archive

    # -- disks -------------------------------------------------------------------------------

    async def _chains(self, backup: Backup, problems: list[Problem]) -> list[Chain]:
        """The chains of all disks, several at once, in the order of the metadata."""
        vhds = backup.vhds or {}
        tips: list[str] = []
        for relative in vhds.values() if isinstance(vhds, dict) else vhds:
            path = disk_path(backup.id, relative)
            if path is None:
                problems.append(
                    _metadata_problem(backup, f"it names {relative[:120]!r}, which is no disk")
                )
            elif path not in tips:
                tips.append(path)
        # those of one directory may share disks: one after the other
        by_folder: dict[str, list[str]] = {}
        for tip in tips:
            by_folder.setdefault(paths.parent(tip), []).append(tip)
        chains: dict[str, Chain] = {}
        limit = trio.CapacityLimiter(_CHAINS_AT_ONCE)

        async def one(folder_tips: list[str]) -> None:
            async with limit:
                for tip in folder_tips:
                    chains[tip] = await self.disks.chain(tip)

        async with trio.open_nursery() as nursery:
            for folder_tips in by_folder.values():
                nursery.start_soon(one, folder_tips)
        return [chains[tip] for tip in tips]


def _metadata_problem(backup: Backup, message: str) -> Problem:
    return Problem(status=Status.DAMAGED, what="metadata", message=message, path=backup.id)


def _unknown_disks(backup: Backup, record: dict[str, Any]) -> list[Problem]:
    vhds, vdis = record.get("vhds"), record.get("vdis")
    if not isinstance(vhds, dict) or not isinstance(vdis, dict):
        return []
    unknown = set(map(str, cast("dict[str, Any]", vhds))) - set(cast("dict[str, Any]", vdis))
    return [
        _metadata_problem(backup, f"its metadata does not say which disk {reference!r} is")
        for reference in sorted(unknown)
    ]
