"""A VHD directory that blocks are merged into."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING, TypeGuard

from proxy.disks.disk import Blocks
from proxy.disks.merge_blocks import become, block_missing
from proxy.disks.vhd_directory import BlockFiles, VhdDirectory
from proxy.errors import NotFound
from proxy.formats import vhd_directory
from proxy.remotes import paths
from proxy.runtime.threads import Work, in_thread

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from proxy.disks.disk import RandomDisk
    from proxy.disks.merge_blocks import Moving
    from proxy.formats.vhd import Footer
    from proxy.remotes.interface import Remote


class DirectoryTarget:
    """See :class:`proxy.disks.merge_blocks.Target`.

    Blocks of directories with the same codec come by renaming, over the old one; the
    others are coded anew.  The table lists all from the beginning, so that no block is ever
    where nobody would look for it.
    """

    def __init__(self, remote: Remote, disk: VhdDirectory) -> None:
        self._remote = remote
        self._disk = disk
        self.uuid = disk.uuid
        self.entries = disk.header.max_entries
        self.present = len(disk.blocks)

    def renames(self, moving: Moving, indexes: Sequence[int]) -> bool:
        return all(self._is_renamed(moving.owner(index)) for index in indexes)

    def _is_renamed(self, owner: RandomDisk) -> TypeGuard[VhdDirectory]:
        return isinstance(owner, VhdDirectory) and owner.compression is self._disk.compression

    def _source(self, moving: Moving, index: int) -> str | None:
        """The file to rename, ``None`` when the block must be coded anew."""
        owner = moving.owner(index)
        return _block_of(owner, index) if self._is_renamed(owner) else None

    async def prepare(self, entries: int, indexes: Iterable[int]) -> None:
        """The header first: a table may be shorter than it says, not longer."""
        if entries > self.entries:
            self.entries = entries
            header = replace(self._disk.header, max_entries=entries)
            await self._write(vhd_directory.HEADER, header.pack())
        blocks = self._disk.blocks | Blocks.of(indexes, self.entries)
        self.present = len(blocks)
        table = await in_thread(Work.CPU, vhd_directory.pack_table, blocks.flags, self.entries)
        await self._write(vhd_directory.TABLE, table)

    async def _write(self, name: str, data: bytes) -> None:
        packed = await in_thread(Work.CPU, vhd_directory.compress, self._disk.compression, data)
        await self._remote.write_file(paths.join(self._disk.path, name), packed)

    async def take(self, moving: Moving, indexes: Sequence[int]) -> int:
        sources = {index: self._source(moving, index) for index in indexes}
        pairs = [
            (source, _block_of(self._disk, index))
            for index, source in sources.items()
            if source is not None
        ]
        for position in await self._remote.rename_all(pairs):
            await self._check_moved(moving, *pairs[position])
        copied = [index for index, source in sources.items() if source is None]
        if copied:
            await self._copy(moving, copied)
        return indexes[-1] + 1

    async def _check_moved(self, moving: Moving, source: str, path: str) -> None:
        """A block that is missing has been moved already, or the disk was damaged."""
        if moving.is_resumed:
            with contextlib.suppress(NotFound):
                if (await self._remote.stat(path)).size > 0:
                    return
        raise block_missing(source)

    async def _copy(self, moving: Moving, indexes: Sequence[int]) -> None:
        async with self._remote.batch() as batch:
            files = BlockFiles(self._remote, batch, self._disk.compression)

            async def store(index: int, stored: memoryview) -> None:
                await files.write(self._disk.path, index, stored)

            await moving.copy(indexes, store)
            await batch.commit()

    async def finish(self, newest: Footer) -> None:
        await self._write(vhd_directory.FOOTER, become(self._disk.footer, newest).pack())


def _block_of(disk: VhdDirectory, index: int) -> str:
    return f"{disk.path}/{vhd_directory.block_path(index)}"
