"""VHD files: one file a disk, as Xen Orchestra and every other tool knows them."""

from __future__ import annotations

import contextlib
from array import array
from typing import TYPE_CHECKING, Final

from proxy.disks.bitmap import settle_bitmap
from proxy.disks.disk import Blocks, RandomAccess, length_of, naming
from proxy.disks.vhd_places import about_block, check_table, leave_out_misplaced
from proxy.disks.writing import Announced
from proxy.errors import Corrupt
from proxy.formats import vhd
from proxy.runtime.threads import Work, in_thread

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from uuid import UUID

    from proxy.disks.disk import Block
    from proxy.disks.writing import DiskWriter, Shape
    from proxy.formats.vhd import Footer, Header
    from proxy.remotes.interface import FileReader, FileWriter, Remote

_HEAD: Final = vhd.FOOTER_SIZE + vhd.HEADER_SIZE
_ENTRIES_PER_READ: Final = 1 << 20


class VhdFile(RandomAccess):
    """An open VHD file.  For concurrent use while it is open."""

    def __init__(
        self,
        path: str,
        file: FileReader,
        footer: Footer,
        header: Header,
        table: array[int],
        misplaced: frozenset[int],
    ) -> None:
        self.path = path
        self.footer = footer
        self.header = header
        self.table = table
        """Sector of each block's bitmap, or ``vhd.UNUSED``."""
        self.misplaced = misplaced
        """Blocks left out because their place is impossible: only of files opened with
        ``check_end=False``."""
        self.virtual_size = footer.current_size
        self.is_differencing = footer.is_differencing
        self.blocks = Blocks(vhd.present_flags(table))
        self._file = file

    @property
    def uuid(self) -> UUID:
        return self.footer.uuid

    async def read_block(self, index: int, into: memoryview) -> None:
        """See :meth:`proxy.disks.disk.RandomDisk.read_block`."""
        if index not in self.blocks:
            raise ValueError(f"'{self.path}' has no block {index}")
        offset = self.table[index] * vhd.SECTOR
        # A last block that ends where the disk does is whole too.
        length = length_of(index, self.virtual_size)
        wanted = vhd.BITMAP_SIZE + length
        with naming(self.path), about_block(index, offset):
            if await self._file.read_into_at(offset, into[:wanted]) < wanted:
                raise _corrupt("block cut", "the file ends before it does", offset)
            settle_bitmap(into, length, is_differencing=self.is_differencing)


@contextlib.asynccontextmanager
async def open_vhd_file(
    remote: Remote, path: str, *, check_end: bool = True
) -> AsyncIterator[VhdFile]:
    """Open a VHD file for reading.

    Tolerant of the order and place of table, locators and blocks, and of gaps.  ``Corrupt``,
    with ``what`` and ``offset``, for wrong checksums, blocks that lie outside of the file or
    over something else, and an end footer that differs from the first.

    ``check_end=False`` is for a file that blocks are merged into: it has no end footer
    meanwhile, and after a crash its table may speak of blocks that did not get there, which are
    left out and told by :attr:`VhdFile.misplaced`.  The disk merged into it has them still.
    """
    async with remote.open_read(path) as file:
        with naming(path):
            disk = await _read(file, path, check_end=check_end)
        yield disk


async def _read(file: FileReader, path: str, *, check_end: bool) -> VhdFile:
    head = await file.read_at(0, _HEAD)
    footer = vhd.Footer.parse(head[: vhd.FOOTER_SIZE])
    header = vhd.Header.parse(head[vhd.FOOTER_SIZE :])
    vhd.check(footer, header)
    size, end = footer.current_size, file.size
    if check_end:
        end -= vhd.FOOTER_SIZE
        if end % vhd.SECTOR:  # bytes were lost, or came between
            raise _corrupt("file size", f"{file.size} bytes are no whole sectors", end)
        if await file.read_at(end, vhd.FOOTER_SIZE) != head[: vhd.FOOTER_SIZE]:
            raise _corrupt("end footer", "the footer at its end is not the one at its start", end)
    table = await _read_table(file, header, vhd.blocks_of(size))

    def complete() -> VhdFile:
        misplaced = frozenset[int]()
        if check_end:
            check_table(table, header, size, end)
        else:
            misplaced = leave_out_misplaced(table, header, size, end)
        return VhdFile(path, file, footer, header, table, misplaced)

    return await in_thread(Work.CPU, complete)


async def _read_table(file: FileReader, header: Header, count: int) -> array[int]:
    table = array("I")
    while (missing := count - len(table)) > 0:
        entries = min(missing, _ENTRIES_PER_READ)
        offset = header.table_offset + 4 * len(table)
        table.extend(vhd.parse_table(await file.read_at(offset, 4 * entries), entries))
    return table


@contextlib.asynccontextmanager
async def create_vhd_file(remote: Remote, path: str, shape: Shape) -> AsyncIterator[DiskWriter]:
    """Write a VHD file: under a temporary name until ``commit``, which makes it durable.

    Blocks must come in ``shape.order``, and all of them: their places are written first.
    ``Conflict`` when the name is taken, on entering and on commit; ``ValueError`` and
    ``Refused`` for a shape that no VHD file has (see :meth:`Shape.pack_start`).  Leaving
    without ``commit``, an error and a cancel leave nothing.
    """
    start = await in_thread(Work.CPU, shape.pack_start)
    async with remote.create(path, exclusive=True) as file:
        await file.write(start)
        yield _Writer(path, file, shape)


class _Writer:
    """See :class:`proxy.disks.writing.DiskWriter`.  Each block is one write of the file."""

    def __init__(self, path: str, file: FileWriter, shape: Shape) -> None:
        self.size = shape.stream_size
        self._path = path
        self._file = file
        self._footer = shape.pack_footer()
        self._announced = Announced(shape.order)
        self._is_whole = True

    async def write(self, block: Block) -> None:
        try:
            self._begin()
            self._announced.came(block.index)
            await self._file.write(block.stored)
            self._is_whole = True
        finally:
            block.release()

    async def commit(self) -> None:
        self._begin()
        with naming(self._path):
            self._announced.all_came()
        await self._file.write(self._footer)
        await self._file.commit()

    def _begin(self) -> None:
        """A write that failed or was cancelled may have left a part of its bytes."""
        if not self._is_whole:
            raise ValueError(f"nothing more can be written to '{self._path}'")
        self._is_whole = False


def _corrupt(what: str, message: str, offset: int) -> Corrupt:
    return Corrupt(f"corrupt VHD: {message}", data={"what": what, "offset": offset})
