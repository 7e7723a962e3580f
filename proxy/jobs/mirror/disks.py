"""The disks of one incremental backup on the source, and what a remote needs of each.

A remote that has an ancestor of a disk needs only what came after it: mostly the disk itself, or,
where retention left out some in between, these merged into one difference.  A remote that has
none needs the whole disk.  Disks are the same when their uuids are, on whatever remote and in
whatever form: each names one state of one disk, and keeps it through merges.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from proxy.disks.chain import Chain
from proxy.disks.merging import ChainDisk, Merging
from proxy.disks.opening import open_chain
from proxy.disks.vhd_directory import VhdDirectory
from proxy.errors import Corrupt
from proxy.formats import vhd_directory
from proxy.remotes import paths
from proxy.repository.checksums import Unknown, read_checksums
from proxy.repository.lineage import read_lineage
from proxy.repository.parents import NoParent, Parent, find_parent
from proxy.repository.paths import disk_directory, disk_path
from proxy.runtime.threads import Work, in_thread

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AsyncExitStack

    from proxy.formats.checksums import BlockSums
    from proxy.jobs.mirror.target import MirrorTarget
    from proxy.remotes import Remote
    from proxy.repository import BackupRecord
    from proxy.repository.damage import Damage


@dataclass(frozen=True, slots=True)
class SourceDisk:
    """One disk of a backup, open with its ancestors."""

    ref: str
    """Of its VDI, by which the metadata knows it."""
    uuid: str
    """Names its directory: that of the live disk."""
    is_memory: bool
    disks: Sequence[ChainDisk]
    """Oldest first; the last one is the backup's own."""
    names: Sequence[str]
    """The path of each: its file, or its alias."""

    def files(self, first: int) -> list[str]:
        """The files by which it shows that the disks from ``first`` on were changed."""
        found: list[str] = []
        for disk in self.disks[first:]:
            if isinstance(disk, VhdDirectory):
                parts = (vhd_directory.TABLE, vhd_directory.FOOTER)
                found += [paths.join(disk.path, part) for part in parts]
            elif not isinstance(disk, Merging):
                found.append(disk.path)
        return found

    def content(self, first: int) -> Chain:
        """What the disks from ``first`` on have, as one disk."""
        return Chain(self.disks[first:])


async def open_disks(
    stack: AsyncExitStack, remote: Remote, record: BackupRecord
) -> list[SourceDisk]:
    """Every disk of the backup; they are open as long as ``stack``.

    ``Corrupt`` and ``NotFound`` when one or an ancestor of it is damaged or missing: then the
    backup cannot be restored either.
    """
    backup = record.backup
    if backup.vhds is None or not isinstance(backup.vhds, dict):
        raise Corrupt(
            f"the metadata of {backup.id} does not say which disk is which",
            data={"path": backup.id},
        )
    memory = None if backup.vm_snapshot is None else backup.vm_snapshot.suspend_VDI
    found: list[SourceDisk] = []
    for ref, relative in backup.vhds.items():
        path = disk_path(backup.id, relative)
        if path is None:
            raise Corrupt(
                f"the metadata of {backup.id} names {relative[:120]!r}, which is no disk of its VM",
                data={"path": backup.id},
            )
        chain = await stack.enter_async_context(open_chain(remote, path))
        disks = [each for each in chain.disks if isinstance(each, ChainDisk)]
        found.append(
            SourceDisk(
                ref=ref,
                uuid=paths.name(paths.parent(path)),
                is_memory=ref == memory,
                disks=disks,
                names=_names(path, disks),
            )
        )
    return found


def _names(path: str, disks: Sequence[ChainDisk]) -> list[str]:
    """Oldest first, as each disk's header names its parent."""
    folder = paths.parent(path)
    return [*(paths.join(folder, disk.header.parent_name) for disk in disks[1:]), path]


@dataclass(frozen=True, slots=True)
class Need:
    """What one remote needs of one disk: ``disks[first:]``, chained on ``parent``."""

    first: int
    parent: Parent | None
    why_whole: NoParent | None = None
    """Why a disk that is a difference on the source is copied whole."""


async def need_of(
    target: MirrorTarget, job_id: str, disk: SourceDisk, damaged: Mapping[str, Damage]
) -> Need:
    """Look for the youngest ancestor of ``disk`` that ``target`` has.

    It must be the last one of a chain there that opens, in the form that the remote keeps disks
    in now; otherwise the disk is needed whole.
    """
    if len(disk.disks) == 1:
        return Need(0, None)
    known = target.disks.get(disk.uuid)
    if known is None:
        folder = disk_directory(target.vm_uuid, job_id, disk.uuid)
        lineage = await read_lineage(target.remote, folder)
        known = {each.uuid for each in lineage.disks.values()}
        target.disks[disk.uuid] = known
    for position in range(len(disk.disks) - 2, -1, -1):
        uuid = disk.disks[position].uuid
        if uuid not in known:
            continue
        parent = await find_parent(
            target.remote,
            target.vm_uuid,
            job_id,
            disk.uuid,
            str(uuid),
            damaged=damaged,
            suspects_qcow2=False,  # whole, it would be the same data
        )
        if isinstance(parent, Parent):
            return Need(position + 1, parent)
        return Need(0, None, parent)
    return Need(
        0, None, NoParent("NO_BACKUP", "the remote has none of the disks that this one stands on")
    )


async def known_sums(remote: Remote, disk: SourceDisk, first: int) -> list[BlockSums | None]:
    """The stored checksums of the disks from ``first`` on, ``None`` where there are none."""
    found: list[BlockSums | None] = []
    for each, name in zip(disk.disks[first:], disk.names[first:], strict=True):
        sums = None
        if not isinstance(each, Merging):
            known = await read_checksums(remote, name, each)
            sums = None if isinstance(known, Unknown) else known.sums
        found.append(sums)
    return found


async def refuse_strange_blocks(
    disk: SourceDisk, content: Chain, known: Sequence[BlockSums | None], seen: BlockSums
) -> None:
    """``Corrupt`` when a block that was read is not the one that was once stored."""
    if any(sums is not None for sums in known):
        wrong = await in_thread(Work.CPU, _first_strange, content, known, seen)
        if wrong is not None:
            raise Corrupt(
                f"the data of block {wrong} of '{disk.names[-1]}' is not what was written",
                data={"what": "checksum", "path": disk.names[-1], "block": wrong},
            )


def _first_strange(
    content: Chain, known: Sequence[BlockSums | None], seen: BlockSums
) -> int | None:
    of_disk = {id(each): sums for each, sums in zip(content.disks, known, strict=True)}
    for index in seen:
        sums = of_disk[id(content.owner(index))]
        expected = None if sums is None else sums.get(index)
        if expected is not None and expected != seen.get(index):
            return index
    return None
