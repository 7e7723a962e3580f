"""VHD directories made by hand from the specification, and what tests of disks share."""

from __future__ import annotations

import contextlib
import gzip
import json
from typing import TYPE_CHECKING
from uuid import UUID

import brotli
import trio

from proxy.disks.disk import Block, Blocks, RandomAccess, block_count
from proxy.disks.writing import Shape
from proxy.formats import vhd
from proxy.remotes.faults import Faults
from proxy.remotes.local import LocalRemote

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping
    from pathlib import Path

    from proxy.disks.disk import Disk
    from proxy.disks.writing import DiskWriter
    from proxy.runtime.buffers import BufferPool

MIB = 1024 * 1024
PACK: dict[str, Callable[[bytes], bytes]] = {
    "brotli": lambda data: brotli.compress(data, quality=0),
    "gzip": lambda data: gzip.compress(data, 1),
    "none": lambda data: data,
}
UNPACK: dict[str, Callable[[bytes], bytes]] = {
    "brotli": brotli.decompress,
    "gzip": gzip.decompress,
    "none": lambda data: data,
}


@contextlib.asynccontextmanager
async def opened(root: Path) -> AsyncIterator[Faults]:
    remote = await LocalRemote.open(str(root), url=f"file://{root}", use_vhd_directory=True)
    try:
        yield Faults(remote)
    finally:
        await remote.aclose()


def identity(number: int) -> UUID:
    return UUID(f"00000000-0000-4000-8000-{number:012}")


def content(tag: int) -> bytes:
    """2 MiB that only this ``tag`` has."""
    return (bytes((tag, *range(1, 128))) * 8 + bytes(1024)) * 1024


def shape(indexes: list[int], size: int = 8 * MIB, **more: object) -> Shape:
    options = {"uuid": identity(1), "timestamp": 1_700_000_000, **more}
    return Shape(virtual_size=size, order=indexes, **options)  # type: ignore[arg-type]


def place_directory(
    path: Path,
    blocks: Mapping[int, bytes],
    *,
    size: int = 8 * MIB,
    compression: str = "brotli",
    uuid: UUID | None = None,
    parent: tuple[str, UUID] | None = None,
    bitmap: bytes = vhd.FULL_BITMAP,
    table: bytes | None = None,
) -> None:
    """Write a VHD directory as its specification says, by nothing that is under test but
    the codec of footer and header."""
    pack = PACK[compression]
    path.mkdir(parents=True)
    if compression != "none":
        (path / "chunk-filters.json").write_text(json.dumps([compression]))
    disk_type = vhd.DiskType.DYNAMIC if parent is None else vhd.DiskType.DIFFERENCING
    footer = vhd.Footer.make(size, disk_type, uuid or identity(1), timestamp=1_700_000_000)
    name, parent_uuid = parent or ("", vhd.NO_UUID)
    entries = -(-size // vhd.BLOCK_SIZE)
    header = vhd.Header(max_entries=entries, parent_name=name, parent_uuid=parent_uuid)
    (path / "footer").write_bytes(pack(footer.pack()))
    (path / "header").write_bytes(pack(header.pack()))
    bits = bytearray(entries)
    for index, data in blocks.items():
        bits[index // 8] |= 0x80 >> index % 8
        folder = path / "blocks" / str(index // 1000)
        folder.mkdir(parents=True, exist_ok=True)
        stored = bitmap + data.ljust(vhd.BLOCK_SIZE, b"\0")
        (folder / str(index % 1000)).write_bytes(pack(stored))
    (path / "bat").write_bytes(pack(bytes(bits) if table is None else table))


def place_alias(path: Path, target: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(target)


async def everything(disk: Disk, pool: BufferPool) -> dict[int, bytes]:
    """Data by index, read in order; every bitmap is full and every buffer comes back."""
    found: dict[int, bytes] = {}
    async with disk.read(pool) as reader:
        while (block := await reader.next()) is not None:
            assert block.stored[: vhd.BITMAP_SIZE] == vhd.FULL_BITMAP
            found[block.index] = bytes(block.data)
            block.buffer.release()
    assert pool.in_use == 0
    return found


async def send(writer: DiskWriter, blocks: Mapping[int, bytes], pool: BufferPool) -> None:
    """Write ``blocks`` in their order, without commit."""
    for index, data in blocks.items():
        buffer = await pool.acquire()
        block = Block(index, buffer)
        block.data[: len(data)] = data
        block.data[len(data) :] = bytes(vhd.BLOCK_SIZE - len(data))
        buffer.length = vhd.STORED_BLOCK
        await writer.write(block)


def tree(root: Path) -> list[str]:
    """Every file below ``root``, hidden ones too."""
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


class MemoryDisk(RandomAccess):
    """A disk of small numbers: block ``i`` is filled with ``blocks[i]``."""

    def __init__(
        self, blocks: Mapping[int, int], count: int, *, is_differencing: bool = False
    ) -> None:
        self.virtual_size = count * vhd.BLOCK_SIZE
        self.is_differencing = is_differencing
        self.blocks = Blocks.of(blocks, count)
        self._content = blocks
        assert block_count(self.virtual_size) == count

    async def read_block(self, index: int, into: memoryview) -> None:
        await trio.lowlevel.checkpoint()
        data = len(into) - vhd.BITMAP_SIZE
        into[vhd.BITMAP_SIZE :] = bytes([self._content[index]]) * data
