"""VHD files: one file a disk, as Xen Orchestra and every other tool knows them."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final

from proxy.disks.bitmap import settle_bitmap
from proxy.disks.disk import Blocks, RandomAccess, block_count, length_of, naming
from proxy.errors import Corrupt
from proxy.formats import vhd

if TYPE_CHECKING:
    from array import array
    from collections.abc import AsyncIterator, Iterator
    from uuid import UUID

    from proxy.disks.disk import Block
    from proxy.disks.writing import DiskWriter, Shape
    from proxy.formats.vhd import Footer, Header
    from proxy.remotes.interface import FileReader, FileWriter, Remote

_HEAD: Final = vhd.FOOTER_SIZE + vhd.HEADER_SIZE


class VhdFile(RandomAccess):
    """An open VHD file.  For concurrent use while it is open."""

    misplaced: frozenset[int] = frozenset()
    """Blocks left out because their place is impossible: only of files opened as unfinished."""

    def __init__(
        self, path: str, file: FileReader, footer: Footer, header: Header, table: array[int]
    ) -> None:
        self.path = path
        self.footer = footer
        self.header = header
        self.table = table
        """Sector of each block's bitmap, or ``vhd.UNUSED``."""
        self.virtual_size = footer.current_size
        self.is_differencing = footer.is_differencing
        self.blocks = Blocks.of(
            (index for index, sector in enumerate(table) if sector != vhd.UNUSED), len(table)
        )
        self._file = file

    @property
    def uuid(self) -> UUID:
        return self.footer.uuid

    async def read_block(self, index: int, into: memoryview) -> None:
        """See :meth:`proxy.disks.disk.RandomDisk.read_block`."""
        offset = self.table[index] * vhd.SECTOR
        # a truncated last block is tolerated up to what belongs to the disk
        length = length_of(index, self.virtual_size)
        data = await self._file.read_at(offset, vhd.BITMAP_SIZE + length)
        if len(data) < vhd.BITMAP_SIZE + length:
            raise self._corrupt("block cut", f"block {index} is cut", offset)
        into[: len(data)] = data
        with naming(self.path):
            settle_bitmap(into, length, is_differencing=self.is_differencing)

    def _corrupt(self, what: str, message: str, offset: int) -> Corrupt:
        return Corrupt(
            f"corrupt VHD '{self.path}': {message}",
            data={"what": what, "offset": offset, "path": self.path},
        )


@contextlib.asynccontextmanager
async def open_vhd_file(
    remote: Remote, path: str, *, check_end: bool = True
) -> AsyncIterator[VhdFile]:
    """Open a VHD file for reading.

    Tolerant of the order and place of table, locators and blocks, and of gaps.  ``Corrupt``,
    with ``what`` and ``offset``, for wrong checksums, blocks that lie outside of the file or
    over one another, and an end footer that differs from the first.

    ``check_end=False`` is for a file that blocks are merged into: it has no end footer
    meanwhile, and after a crash its table may speak of blocks that did not get there, which are
    left out and told by :attr:`VhdFile.misplaced`.  The disk merged into it has them still.
    """
    async with remote.open_read(path) as file:
        with naming(path):
            disk = await _read(file, path, is_unfinished=not check_end)
        yield disk


async def _read(file: FileReader, path: str, *, is_unfinished: bool) -> VhdFile:
    head = await file.read_at(0, _HEAD)
    footer = vhd.Footer.parse(head[: vhd.FOOTER_SIZE])
    header = vhd.Header.parse(head[vhd.FOOTER_SIZE :])
    vhd.check(footer, header)
    if not is_unfinished:
        at = file.size - vhd.FOOTER_SIZE
        if await file.read_at(at, vhd.FOOTER_SIZE) != head[: vhd.FOOTER_SIZE]:
            raise _corrupt("end footer", "the footer at its end is not the one at its start", at)
    count = block_count(footer.current_size)
    raw = await file.read_at(header.table_offset, 4 * count)
    table = vhd.parse_table(raw, count)
    misplaced = frozenset[int]()
    if is_unfinished:
        misplaced = leave_out_misplaced(table, header, footer.current_size, file.size)
    else:
        check_table(table, header, footer.current_size, file.size)
    disk = VhdFile(path, file, footer, header, table)
    disk.misplaced = misplaced
    return disk


def check_table(table: array[int], header: Header, virtual_size: int, size: int | None) -> None:
    """Raise ``Corrupt`` unless every block has a place of its own behind the table.

    ``size`` is that of the file, where it is known.
    """
    for _, error in _misplaced(table, header, virtual_size, size):
        raise error


def leave_out_misplaced(
    table: array[int], header: Header, virtual_size: int, size: int
) -> frozenset[int]:
    """Make unused, and return, the entries for which :func:`check_table` would raise."""
    found = frozenset(index for index, _ in _misplaced(table, header, virtual_size, size))
    for index in found:
        table[index] = vhd.UNUSED
    return found


def _misplaced(
    table: array[int], header: Header, virtual_size: int, size: int | None
) -> Iterator[tuple[int, Corrupt]]:
    """Of two blocks over one another both are told."""
    used = sorted((sector, index) for index, sector in enumerate(table) if sector != vhd.UNUSED)
    table_end = header.table_offset + 4 * header.max_entries
    block = vhd.STORED_BLOCK // vhd.SECTOR
    before, above = -(-vhd.TABLE_OFFSET // vhd.SECTOR), -1
    for sector, index in used:
        start = sector * vhd.SECTOR
        end = start + vhd.BITMAP_SIZE + length_of(index, virtual_size)
        problem = None
        if sector < before:
            problem = "lies over what is before it"
        elif start < table_end and start + vhd.STORED_BLOCK > header.table_offset:
            problem = "lies over the table"
        elif size is not None and end > size:
            problem = "lies behind the end of the file"
        if problem is not None:
            error = _corrupt("block place", f"block {index} {problem}", start)
            yield index, error
            if sector < before and above >= 0:
                yield above, error
        before, above = sector + block, index


@contextlib.asynccontextmanager
async def create_vhd_file(remote: Remote, path: str, shape: Shape) -> AsyncIterator[DiskWriter]:
    """Write a VHD file: under a temporary name until ``commit``, which makes it durable.

    Blocks must come exactly in the order of the shape: their places stand in front of them.
    Leaving without ``commit`` leaves nothing, also after a cancel.  ``Conflict`` when the
    name is taken.
    """
    count = block_count(shape.virtual_size)
    table = vhd.empty_table(count)
    first = (vhd.TABLE_OFFSET + vhd.table_size(count)) // vhd.SECTOR
    for position, index in enumerate(shape.order):
        table[index] = first + position * (vhd.STORED_BLOCK // vhd.SECTOR)
    disk_type = vhd.DiskType.DIFFERENCING if shape.is_differencing else vhd.DiskType.DYNAMIC
    footer = vhd.Footer.make(
        shape.virtual_size, disk_type, shape.uuid, timestamp=shape.timestamp
    ).pack()
    header = vhd.Header(
        max_entries=count, parent_uuid=shape.parent_uuid, parent_name=shape.parent_name
    )
    async with remote.create(path, exclusive=True) as file:
        await file.write(footer + header.pack() + vhd.pack_table(table))
        yield _Writer(file, shape, footer, vhd.stream_size(count, len(shape.order)))


class _Writer:
    """See :class:`proxy.disks.writing.DiskWriter`.  One task calls it."""

    def __init__(self, file: FileWriter, shape: Shape, footer: bytes, size: int) -> None:
        self.size = size
        self._file = file
        self._footer = footer
        self._order = iter(shape.order)

    async def write(self, block: Block) -> None:
        try:
            if block.index != next(self._order, None):
                raise ValueError(f"block {block.index} is not the one announced")
            await self._file.write(block.stored)
        finally:
            block.buffer.release()

    async def commit(self) -> None:
        """``Corrupt`` when announced blocks did not come: the disk would have holes."""
        if (missing := next(self._order, None)) is not None:
            raise _corrupt("blocks missing", f"it ended before its block {missing}", 0)
        await self._file.write(self._footer)
        await self._file.commit()


def _corrupt(what: str, message: str, offset: int) -> Corrupt:
    return Corrupt(f"corrupt VHD: {message}", data={"what": what, "offset": offset})
