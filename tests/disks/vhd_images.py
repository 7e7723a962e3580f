"""VHD files as the specification lays them out, by nothing that is under test but the codec of
footer and header."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import trio

from proxy.formats import vhd
from tests.disks.directories import identity

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

SECTOR = 512
MIB = 1024 * 1024
BLOCK = 2 * MIB
FULL = b"\xff" * 512


def image(
    size: int,
    blocks: Mapping[int, bytes],
    *,
    differencing: bool = False,
    bitmaps: Mapping[int, bytes] | None = None,
    gap: bytes = b"",
    before_table: bytes = b"",
    blank: int = 0,
    padding: bytes | None = None,
    spare_entries: int = 0,
) -> bytes:
    """A disk of ``size`` bytes with ``blocks`` in their order.

    ``gap`` lies before every block, ``before_table`` between header and table, ``blank`` zeros
    before the footer at the end.  The last block of the disk is filled up with ``padding``
    (zeros), and cut where the disk ends when that is empty.
    """
    entries = -(-size // BLOCK) + spare_entries
    table_offset = 1536 + len(before_table)
    disk_type = vhd.DiskType.DIFFERENCING if differencing else vhd.DiskType.DYNAMIC
    footer = vhd.Footer.make(size, disk_type, identity(1), timestamp=1_700_000_000).pack()
    parent = identity(2) if differencing else vhd.NO_UUID
    header = vhd.Header(max_entries=entries, table_offset=table_offset, parent_uuid=parent).pack()
    table = [0xFFFFFFFF] * entries
    table_bytes = max(1, -(-4 * entries // SECTOR)) * SECTOR
    body = bytearray()
    for index, data in blocks.items():
        body += gap
        table[index] = (table_offset + table_bytes + len(body)) // SECTOR
        own = data[: size - index * BLOCK]
        body += (bitmaps or {}).get(index, FULL) + own
        missing = BLOCK - len(own)
        if missing and padding is None:
            body += bytes(missing)
        elif missing and padding:
            body += (padding * (missing // len(padding) + 1))[:missing]
    packed = struct.pack(f">{entries}I", *table).ljust(table_bytes, b"\xff")
    return footer + header + before_table + packed + bytes(body) + bytes(blank) + footer


def flat(blocks: Mapping[int, bytes], size: int, under: bytes = b"") -> bytes:
    """The disk's content, over what was there."""
    raw = bytearray(under.ljust(size, b"\0"))
    for index, data in blocks.items():
        start = index * BLOCK
        own = data[: size - start]
        raw[start : start + len(own)] = own
    return bytes(raw)


async def qemu_reads(path: Path) -> bytes:
    """The disk as qemu has it.

    It believes the geometry of most tools, which rounds a disk up, and refuses a table that
    does not cover that: so it is told to believe the size.
    """
    options = f"driver=vpc,force_size_calc=current_size,file.driver=file,file.filename={path}"
    raw = path.with_suffix(".raw")
    await trio.run_process(["qemu-img", "convert", "--image-opts", options, "-O", "raw", str(raw)])
    return raw.read_bytes()
