"""A chain of differencing disks, read as the one disk that it stands for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from proxy.disks.disk import Blocks, RandomAccess, block_count

if TYPE_CHECKING:
    from collections.abc import Sequence

    from proxy.disks.disk import RandomDisk


class Chain(RandomAccess):
    """``disks``, oldest first; the newest that holds a block gives it.

    Size of the newest, differencing if the oldest is.  A newer disk may be larger than an
    older one: what lies behind the end of the older one is nobody's until a newer disk holds it.
    The disks stay those of whoever opened them.  For concurrent use.
    """

    def __init__(self, disks: Sequence[RandomDisk]) -> None:
        """Raises ``ValueError`` when there is no disk."""
        if not disks:
            raise ValueError("a chain of no disks")
        self.disks = tuple(disks)
        self.virtual_size = disks[-1].virtual_size
        self.is_differencing = disks[0].is_differencing
        held, self._owners = _owners(disks, block_count(self.virtual_size))
        self.blocks = Blocks(held)

    def owner(self, index: int) -> RandomDisk | None:
        """The disk that gives block ``index``, ``None`` when none of them has it."""
        if index not in self.blocks:
            return None
        number = sum(table[index] << 8 * plane for plane, table in enumerate(self._owners))
        return self.disks[number - 1]

    async def read_block(self, index: int, into: memoryview) -> None:
        """See :meth:`proxy.disks.disk.RandomDisk.read_block`."""
        owner = self.owner(index)
        if owner is None:
            raise ValueError(f"no disk of the chain has block {index}")
        await owner.read_block(index, into)


def _owners(disks: Sequence[RandomDisk], count: int) -> tuple[bytes, list[bytes]]:
    """Which blocks any disk has; and of each block the position, plus 1, of its owner: a
    table of the low bytes, for long chains another of the high bytes.

    By arithmetic on whole tables: a disk with a million blocks takes a millisecond or two.
    """
    union = 0
    tables = [0] * ((len(disks).bit_length() + 7) // 8)
    for number, disk in enumerate(disks, 1):
        held = int.from_bytes(disk.blocks.resized(count).flags, "little")
        union |= held
        # each byte of ``held`` is 0 or 1: no product carries into the next byte
        mask = held * 0xFF
        for plane, table in enumerate(tables):
            digit = number >> 8 * plane & 0xFF
            tables[plane] = table ^ (table & mask) | held * digit
    return union.to_bytes(count, "little"), [table.to_bytes(count, "little") for table in tables]
