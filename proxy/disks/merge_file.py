"""A VHD file that blocks are merged into, in place.

Layouts keep any order: blocks stand where the table says, and the table where the header
says.  So nothing is ever moved: new blocks go behind the last one, and a table that has
become too small for a grown disk is written anew there.  The footer at the end is
overwritten by the first of them and written again at the end of the merge; meanwhile
the state of the merge tells readers not to look for it.
"""

from __future__ import annotations

import contextlib
import struct
from array import array
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import trio

from proxy.disks.merge_blocks import become
from proxy.disks.vhd_places import leave_out_misplaced
from proxy.errors import Corrupt, Refused
from proxy.formats import vhd

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Sequence

    from proxy.disks.merge_blocks import Moving
    from proxy.formats.vhd import Footer, Header
    from proxy.remotes.interface import FileEditor, Remote

_HEADER_AT: Final = vhd.FOOTER_SIZE
_SECTORS: Final = vhd.STORED_BLOCK // vhd.SECTOR
_HIGHEST: Final = vhd.UNUSED - 1 - _SECTORS


class FileTarget:
    """See :class:`proxy.disks.merge_blocks.Target`."""

    def __init__(
        self, path: str, editor: FileEditor, footer: Footer, header: Header, table: array[int]
    ) -> None:
        self._path = path
        self._editor = editor
        self._footer = footer
        self._header = header
        self._table = table
        # An interrupted merge may have told of blocks that then did not get there.
        self._misplaced = leave_out_misplaced(table, header, footer.current_size, editor.size)
        self._free = _first_free_sector(header, table)
        self._writing = trio.Lock()
        self.uuid = footer.uuid
        self.entries = header.max_entries
        self.present = sum(sector != vhd.UNUSED for sector in table)

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, remote: Remote, path: str) -> AsyncIterator[FileTarget]:
        """The table is read whole: a header that has grown already knows more blocks than
        the footer."""
        async with remote.edit(path) as editor:
            head = await _read(editor, 0, vhd.FOOTER_SIZE + vhd.HEADER_SIZE)
            footer = vhd.Footer.parse(head[: vhd.FOOTER_SIZE])
            header = vhd.Header.parse(head[vhd.FOOTER_SIZE :])
            vhd.check(footer, header)
            raw = await _read(editor, header.table_offset, 4 * header.max_entries)
            yield cls(path, editor, footer, header, vhd.parse_table(raw, header.max_entries))

    def renames(self, moving: Moving, indexes: Sequence[int]) -> bool:
        del moving, indexes
        return False

    async def prepare(self, entries: int, indexes: Iterable[int]) -> None:
        coming = frozenset(indexes)
        if lost := self._misplaced - coming:
            raise Corrupt(
                f"the place of block {min(lost)} in '{self._path}' is impossible",
                data={"what": "block place", "path": self._path},
            )
        known = len(self._table)
        self.present += sum(index >= known or self._table[index] == vhd.UNUSED for index in coming)
        if entries <= self.entries:
            return
        self._table.extend(vhd.empty_table(entries - known))
        packed = vhd.pack_table(self._table)
        offset = self._header.table_offset
        if len(packed) > vhd.table_size(self.entries):
            offset = self._free * vhd.SECTOR
            self._free += len(packed) // vhd.SECTOR
        # In its old place too it only gains entries of blocks that are not there.
        await self._editor.write_at(offset, packed)
        await self._editor.sync()
        self._header = replace(self._header, max_entries=entries, table_offset=offset)
        await self._write_header()
        self.entries = entries

    async def _write_header(self) -> None:
        """In one sector, so that it is never half written; the rest stays byte for byte."""
        raw = bytearray(await _read(self._editor, _HEADER_AT, vhd.HEADER_SIZE))
        struct.pack_into(">Q", raw, 16, self._header.table_offset)
        struct.pack_into(">I", raw, 28, self._header.max_entries)
        struct.pack_into(">I", raw, 36, vhd.checksum(bytes(raw), 36))
        await self._editor.write_at(_HEADER_AT, bytes(raw[:40]))
        await self._editor.sync()

    async def take(self, moving: Moving, indexes: Sequence[int]) -> int:
        """One sync: of this data, and of the entries of the data before."""
        new = [index for index in indexes if self._table[index] == vhd.UNUSED]
        for index in new:
            if self._free > _HIGHEST:
                raise Refused(
                    f"'{self._path}' would grow over 2 TiB, which a VHD file cannot",
                    code="EFBIG",
                    data={"path": self._path},
                )
            self._table[index] = self._free
            self._free += _SECTORS

        async def store(index: int, stored: memoryview) -> None:
            async with self._writing:
                await self._editor.write_at(self._table[index] * vhd.SECTOR, stored)

        await moving.copy(indexes, store)
        await self._editor.sync()
        if new:
            await self._save_entries(new[0], new[-1])
        return indexes[0]

    async def _save_entries(self, first: int, last: int) -> None:
        entries = array("I", self._table[first : last + 1])
        packed = vhd.pack_table(entries)[: 4 * len(entries)]
        await self._editor.write_at(self._header.table_offset + 4 * first, packed)

    async def finish(self, newest: Footer) -> None:
        """The footer at the end first: the one at the start makes the disk the new one."""
        footer = become(self._footer, newest).pack()
        end = self._free * vhd.SECTOR
        await self._editor.write_at(end, footer)
        await self._editor.truncate(end + len(footer))
        await self._editor.sync()
        await self._editor.write_at(0, footer)
        await self._editor.sync()


async def _read(editor: FileEditor, offset: int, length: int) -> bytes:
    """``length`` bytes, or fewer at the end of the file."""
    data = bytearray(length)
    return bytes(data[: await editor.read_into(offset, memoryview(data))])


def _first_free_sector(header: Header, table: array[int]) -> int:
    """Behind the table, all blocks, and the data of parent locators."""
    ends = [-(-(header.table_offset + vhd.table_size(header.max_entries)) // vhd.SECTOR)]
    ends += [sector + _SECTORS for sector in table if sector != vhd.UNUSED]
    for code, space, length, _, offset in struct.iter_unpack(">IIIIQ", header.locators):
        if code:
            ends.append(-(-(offset + max(length, space * vhd.SECTOR)) // vhd.SECTOR))
    return max(ends)
