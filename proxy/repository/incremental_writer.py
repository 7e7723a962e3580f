"""Writing an incremental backup: its disks, then the metadata that makes them count."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from proxy.disks.alias import data_path, is_alias
from proxy.disks.vhd_directory import create_vhd_directory
from proxy.disks.vhd_file import create_vhd_file
from proxy.errors import ProxyError
from proxy.repository.chains import DATA
from proxy.repository.checksums import remove_checksums, write_checksums
from proxy.repository.completion import Completion, free_date, names_in
from proxy.repository.metadata import encode_delta
from proxy.repository.paths import disk_directory, vm_directory
from proxy.runtime.trouble import tell_trouble

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Iterable, Mapping
    from uuid import UUID

    from proxy.disks.disk import Block
    from proxy.disks.writing import DiskWriter, Shape
    from proxy.formats.checksums import BlockSums
    from proxy.formats.vhd_directory import Compression
    from proxy.remotes.interface import Remote
    from proxy.repository.metadata import Backup


class IncrementalBackupWriter:
    """One incremental backup being written; made by :func:`open_incremental_backup`.

    Its disks may be written at the same time.
    """

    def __init__(self, remote: Remote, vm_uuid: str, date: str) -> None:
        self._remote = remote
        self._vm_uuid = vm_uuid
        self._directory = vm_directory(vm_uuid)
        self._completion = Completion(remote, self._directory, date)
        self.date = date
        self.size = 0
        """Bytes of the committed disks, as VHD streams."""
        self._vhds: dict[str, str] = {}
        self._named: list[str] = []

    @property
    def id(self) -> str:
        """The id of the backup to be, with a leading slash."""
        return self._completion.id

    @contextlib.asynccontextmanager
    async def disk(
        self,
        vdi_ref: str,
        job_id: str,
        disk_uuid: str,
        shape: Shape,
        *,
        compression: Compression,
        sums: BlockSums | None = None,
    ) -> AsyncIterator[DiskWriter]:
        """Write one disk; the metadata will name it under ``vdi_ref`` once it is committed.

        ``disk_uuid`` is that of the live disk.  A VHD directory behind an alias where the
        remote wants it, with its blocks compressed by ``compression``, else a VHD file.
        ``sums``, complete when the disk is committed, are stored beside it; that they cannot
        be is told and no failure.
        """
        folder = disk_directory(self._vm_uuid, job_id, disk_uuid)
        ending = ".alias.vhd" if self._remote.use_vhd_directory else ".vhd"
        path = f"{folder}/{self.date}{ending}"
        made = (
            create_vhd_directory(self._remote, path, shape, compression=compression)
            if self._remote.use_vhd_directory
            else create_vhd_file(self._remote, path, shape)
        )
        async with made as inner:
            yield _Recorded(self, vdi_ref, path, inner, shape.uuid, sums)

    def naming(self, path: str) -> None:
        """From now on ``path`` may exist under its final name."""
        self._named.append(path)

    async def store_sums(self, path: str, uuid: UUID, sums: BlockSums) -> None:
        try:
            await write_checksums(self._remote, path, uuid, sums, is_directory=is_alias(path))
        except ProxyError as error:
            tell_trouble("the checksums of a disk were not stored", error, path=path)

    def stored(self, vdi_ref: str, path: str, size: int) -> None:
        """A disk is complete and durable."""
        self._vhds[vdi_ref] = path.removeprefix(f"{self._directory}/")
        self.size += size

    async def commit(self, metadata: Mapping[str, Any]) -> Backup:
        """Make it a backup; returns it as a listing would.

        ``metadata``: see ``metadata.encode_delta``; ``vhds`` and ``size`` are filled in here.
        All disks must have been committed.  As for a full backup, a cancel or an error leaves
        either nothing or, once the metadata exists, everything.
        """
        content = encode_delta(metadata, vhds=self._vhds, size=self.size)
        return await self._completion.write(content)

    async def undo(self) -> None:
        """Remove the disks that carry their names, unless metadata says they are a backup."""
        if self._named:
            await self._completion.undo(self._named[0], self._remove_disks)

    async def _remove_disks(self) -> None:
        for path in self._named:
            await self._remote.unlink(path)
            if is_alias(path):
                await self._remote.rmtree(data_path(path))
            await remove_checksums(self._remote, path)


class _Recorded:
    """Tells the backup what became of its disk."""

    def __init__(
        self,
        backup: IncrementalBackupWriter,
        vdi_ref: str,
        path: str,
        inner: DiskWriter,
        uuid: UUID,
        sums: BlockSums | None,
    ) -> None:
        self._backup = backup
        self._vdi_ref = vdi_ref
        self._path = path
        self._inner = inner
        self._uuid = uuid
        self._sums = sums

    @property
    def size(self) -> int:
        return self._inner.size

    async def write(self, block: Block) -> None:
        await self._inner.write(block)

    async def commit(self) -> None:
        self._backup.naming(self._path)  # before the call: it may have an effect and still fail
        await self._inner.commit()
        if self._sums is not None:
            await self._backup.store_sums(self._path, self._uuid, self._sums)
        self._backup.stored(self._vdi_ref, self._path, self._inner.size)


@contextlib.asynccontextmanager
async def open_incremental_backup(
    remote: Remote,
    vm_uuid: str,
    timestamp_ms: float,
    *,
    after: str = "",
    others: Collection[str] = (),
) -> AsyncIterator[IncrementalBackupWriter]:
    """Write an incremental backup of ``vm_uuid``; the caller holds the lock of its directory.

    The first free second from ``timestamp_ms`` on names the files, and the name sorts behind
    ``after``, the youngest of the parents' names: Xen Orchestra refuses a child that does not.
    Nor is it in one of the names ``others``: see :func:`names_of_data`.

    The order, and what a crash right after each step leaves:

    1. each disk under a temporary name or without an alias: the clean removes it;
    2. each disk under its name, durable: a disk without metadata, the clean removes it; right
       after it its checksums;
    3. ``<TS>.json``, atomic, exclusive, durable: *from here on it is a backup*;
    4. the listing cache: the next listing heals it.

    Leaving without :meth:`IncrementalBackupWriter.commit`, an error and a cancel before step
    3 ends remove everything written.
    """
    directory = vm_directory(vm_uuid)
    await remote.mktree(directory)
    date = await free_date(remote, directory, timestamp_ms, after=after, others=others)
    writer = IncrementalBackupWriter(remote, vm_uuid, date)
    try:
        yield writer
    finally:
        await writer.undo()


async def names_of_data(
    remote: Remote, vm_uuid: str, job_id: str, disk_uuids: Iterable[str]
) -> list[str]:
    """The names that the data of these disks has where they are directories.

    That of an old one stays when it is merged into a newer one.  So a backup of that time, which
    a mirror may bring again, needs another name: the data is named as the backup is.
    """
    found: list[str] = []
    if remote.use_vhd_directory:
        for disk_uuid in disk_uuids:
            found += await names_in(remote, f"{disk_directory(vm_uuid, job_id, disk_uuid)}/{DATA}")
    return found
