"""Chains of disks of any kind, made by hand, with a dictionary as the model of each point."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from proxy.disks.disk import block_pool
from proxy.disks.merge import merge_chain
from proxy.disks.merge_state import remove_state
from proxy.disks.opening import open_chain
from proxy.formats import vhd
from proxy.remotes import paths
from tests.disks.directories import content, everything, identity, place_alias, place_directory

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from uuid import UUID

    from proxy.remotes.interface import Remote

BLOCK = vhd.BLOCK_SIZE


class Held:
    """A lock that is ours."""

    checks = 0

    async def check(self) -> None:
        self.checks += 1


@dataclass
class Point:
    """A disk to be made: ``blocks`` by index are tags of :func:`content`."""

    blocks: Mapping[int, int]
    kind: str = "brotli"
    """``file``, a codec for a directory with an alias, or ``aliased`` for a file with one."""
    count: int = 4
    """Blocks of the disk; the last one is half."""

    @property
    def size(self) -> int:
        return self.count * BLOCK - BLOCK // 2


def name_of(position: int, point: Point) -> str:
    return f"2026010{position + 1}T000000Z{'' if point.kind == 'file' else '.alias'}.vhd"


def place_chain(root: Path, folder: str, points: Sequence[Point]) -> list[str]:
    """Make the disks; their paths from ``root``, oldest first."""
    names: list[str] = []
    for position, point in enumerate(points):
        parent = (names[-1], identity(position)) if names else None
        names.append(name_of(position, point))
        place_disk(root / folder, names[-1], point, identity(position + 1), parent)
    return [paths.join(folder, name) for name in names]


def place_disk(
    folder: Path, name: str, point: Point, uuid: UUID, parent: tuple[str, UUID] | None
) -> None:
    data = {index: block(tag, index, point) for index, tag in point.blocks.items()}
    path = folder / name
    if point.kind == "file":
        place_file(path, data, size=point.size, uuid=uuid, parent=parent)
        return
    stem = name.removesuffix(".alias.vhd")
    target = folder / "data" / f"{stem}.vhd"
    if point.kind == "aliased":
        place_file(target, data, size=point.size, uuid=uuid, parent=parent)
    else:
        place_directory(
            target, data, size=point.size, uuid=uuid, parent=parent, compression=point.kind
        )
    place_alias(path, f"data/{stem}.vhd")


def block(tag: int, index: int, point: Point) -> bytes:
    """What a writer stores: behind the end of the disk are zeros."""
    length = min(BLOCK, point.size - index * BLOCK)
    return content(tag)[:length].ljust(BLOCK, b"\0")


def place_file(
    path: Path,
    blocks: Mapping[int, bytes],
    *,
    size: int,
    uuid: UUID,
    parent: tuple[str, UUID] | None = None,
) -> None:
    """A VHD file laid out as the specification says, blocks in the order of ``blocks``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    disk_type = vhd.DiskType.DYNAMIC if parent is None else vhd.DiskType.DIFFERENCING
    footer = vhd.Footer.make(size, disk_type, uuid, timestamp=1_700_000_000).pack()
    name, parent_uuid = parent or ("", vhd.NO_UUID)
    entries = -(-size // BLOCK)
    header = vhd.Header(max_entries=entries, parent_name=name, parent_uuid=parent_uuid).pack()
    table = bytearray(b"\xff" * (-(-4 * entries // 512) * 512))
    first = (1536 + len(table)) // 512
    stored = bytearray()
    for place, (index, data) in enumerate(blocks.items()):
        table[4 * index : 4 * index + 4] = (first + 4097 * place).to_bytes(4, "big")
        stored += vhd.FULL_BITMAP + data
    path.write_bytes(footer + header + bytes(table) + bytes(stored) + footer)


def model(points: Sequence[Point]) -> dict[int, int]:
    """Which tag each block has for whoever reads the newest of ``points``."""
    union: dict[int, int] = {}
    for point in points:
        union |= point.blocks
    return union


async def tags(remote: Remote, path: str) -> dict[int, int]:
    """What the disk ``path`` reads as, as tags: each block compared byte for byte."""
    async with open_chain(remote, path) as chain:
        found = await everything(chain, block_pool(4))
        last = chain.blocks.count - 1
        length = chain.virtual_size - last * BLOCK
    result: dict[int, int] = {}
    for index, data in found.items():
        tag = data[0]
        expected = content(tag)
        if data != expected:
            size = length if index == last else next_half(data)
            assert data == expected[:size].ljust(BLOCK, b"\0"), f"block {index} is torn"
        result[index] = tag
    return result


def next_half(data: bytes) -> int:
    """The block that was the last one before the disk grew is half full."""
    assert not any(data[BLOCK // 2 :])
    return BLOCK // 2


async def merge(remote: Remote, chain: Sequence[str], **options: Any) -> None:
    """A whole merge, as a clean does it."""
    await merge_chain(remote, chain, lock=Held(), owned=chain, **options)
    await remove_state(remote, chain[0])


def files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
