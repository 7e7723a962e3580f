"""VHD as the pool streams and takes it.

Out: footer, header, a sector for the parent's locator, table, blocks in ascending order with
bitmaps of ones, footer.  In: blocks wherever the table has them, written over what the disk
holds, so that a differencing stream changes only what it carries.
"""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import TYPE_CHECKING

from proxy.errors import Corrupt
from proxy.formats import vhd
from proxy.simulator.disks import UNIT, ZEROS, DiskContent
from proxy.simulator.receiving import SteppedReceiver

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from proxy.simulator.images import Base, Sending
    from proxy.simulator.receiving import Wanted

_TABLE_OFFSET = vhd.TABLE_OFFSET + vhd.SECTOR
"""Behind the header is a sector for the parent's locator, in every stream and empty."""
_LOCATOR = struct.Struct(">4sIIIQ")
_LOCATORS_SIZE = 192
_UNIT_BITMAP = UNIT // vhd.SECTOR // 8


# Out


def vhd_pieces(sending: Sending) -> tuple[Iterator[memoryview], int]:
    """The pieces of a stream and its length in bytes."""
    content = sending.content
    blocks = sending.blocks()
    header = vhd.Header(max_entries=content.blocks, table_offset=_TABLE_OFFSET)
    disk_type = vhd.DiskType.DYNAMIC
    if sending.base is not None:
        disk_type = vhd.DiskType.DIFFERENCING
        header = _under(header, sending.base)
    footer = replace(
        vhd.Footer.make(content.size, disk_type, sending.uuid, timestamp=0),
        creator_application=b"caml",
        creator_version=1,
        creator_host_os=bytes(4),
        geometry=_geometry(content.size),
    ).pack()
    table = vhd.empty_table(content.blocks)
    start = (_TABLE_OFFSET + vhd.table_size(content.blocks)) // vhd.SECTOR
    for place, block in enumerate(blocks):
        table[block] = start + place * (vhd.STORED_BLOCK // vhd.SECTOR)
    front = footer + header.pack() + bytes(vhd.SECTOR) + vhd.pack_table(table)
    back = b"" if sending.damage == "no footer" else footer
    size = len(front) + len(blocks) * vhd.STORED_BLOCK + len(back)
    return _pieces(sending, blocks, front, back), size


def _geometry(size: int) -> tuple[int, int, int]:
    """Cylinders, heads and sectors as the format's appendix counts them: at most ``size``."""
    total = min(size // vhd.SECTOR, 65535 * 16 * 255)
    if total > 65535 * 16 * 63:
        return total // 255 // 16, 16, 255
    heads = max(-(-(total // 17) // 1024), 4)
    if total // 17 < heads * 1024 and heads <= 16:
        return total // 17 // heads, heads, 17
    sectors = 31 if total // 31 < 16 * 1024 else 63
    return total // sectors // 16, 16, sectors


def _under(header: vhd.Header, base: Base) -> vhd.Header:
    uri = f"file://{base.path}"
    locator = _LOCATOR.pack(b"MacX", 1, len(uri), 0, vhd.TABLE_OFFSET)
    return replace(
        header,
        parent_uuid=base.uuid,
        parent_name=base.path,
        parent_timestamp=base.timestamp,
        locators=locator.ljust(_LOCATORS_SIZE, b"\0"),
    )


def _pieces(sending: Sending, blocks: list[int], front: bytes, back: bytes) -> Iterator[memoryview]:
    content = sending.content
    bitmap = memoryview(vhd.FULL_BITMAP)
    yield memoryview(front)
    for block in blocks:
        if sending.damage == "partial bitmap" and block == blocks[0]:
            yield memoryview(vhd.FULL_BITMAP[:-1] + b"\xfe")
        else:
            yield bitmap
        for number in (2 * block, 2 * block + 1):
            yield from content.unit(number)
            missing = UNIT - content.visible(number)
            if missing:
                yield ZEROS[:missing]
    if back:
        yield memoryview(back)


# In


class VhdReceiver(SteppedReceiver):
    """Writes a stream's blocks into ``content`` as they come.

    ``length`` is the announced size of the body: the last whole sector of it is the footer.
    """

    def __init__(self, content: DiskContent, length: int) -> None:
        self._content = content
        self._end = (length - 1) // vhd.SECTOR * vhd.SECTOR
        super().__init__()

    def steps(self) -> Generator[Wanted]:
        small = memoryview(bytearray(vhd.HEADER_SIZE))
        yield small[: vhd.FOOTER_SIZE]
        footer = vhd.Footer.parse(small[: vhd.FOOTER_SIZE])
        yield small
        header = vhd.Header.parse(small)
        vhd.check(footer, header)
        if vhd.blocks_of(footer.current_size) > self._content.blocks:
            raise Corrupt(f"{footer.current_size} bytes into a disk of {self._content.size}")
        yield self.gap(header.table_offset)
        raw = memoryview(bytearray(4 * header.max_entries))
        yield raw
        table = vhd.parse_table(raw, header.max_entries)
        places = sorted(
            (sector, block) for block, sector in enumerate(table) if sector != vhd.UNUSED
        )
        bitmap = memoryview(bytearray(vhd.BITMAP_SIZE))
        unit = memoryview(bytearray(UNIT))
        for sector, block in places:
            if block >= self._content.blocks:
                raise Corrupt(f"block {block} of a disk of {self._content.blocks} blocks")
            yield self.gap(sector * vhd.SECTOR)
            yield bitmap
            for half in (0, 1):
                yield unit
                part = bitmap[half * _UNIT_BITMAP : (half + 1) * _UNIT_BITMAP]
                self._store(2 * block + half, unit, bytes(part))
        yield self.gap(self._end)
        yield small[: vhd.FOOTER_SIZE]
        vhd.Footer.parse(small[: vhd.FOOTER_SIZE], offset=self._end)

    def _store(self, number: int, unit: memoryview, bitmap: bytes) -> None:
        visible = self._content.visible(number)
        for start, end in _spans(bitmap):
            inside = min(end, max(start, visible))
            if bytes(unit[inside:end]).strip(b"\0"):
                raise Corrupt(f"data beyond the end of the disk, in MiB {number}")
            if inside > start:
                self._content.write(number * UNIT + start, unit[start:inside])


def _spans(bitmap: bytes) -> list[tuple[int, int]]:
    """The bytes that a bitmap says are there, as (start, end)."""
    if bitmap == vhd.FULL_BITMAP[: len(bitmap)]:
        return [(0, UNIT)]
    spans: list[tuple[int, int]] = []
    for sector in range(8 * len(bitmap)):
        if bitmap[sector // 8] & 0x80 >> sector % 8:
            at = sector * vhd.SECTOR
            if spans and spans[-1][1] == at:
                spans[-1] = (spans[-1][0], at + vhd.SECTOR)
            else:
                spans.append((at, at + vhd.SECTOR))
    return spans
