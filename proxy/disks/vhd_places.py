"""Where a table says that blocks lie, and whether they can lie there."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from proxy.disks.disk import Blocks, length_of
from proxy.errors import Corrupt
from proxy.formats import vhd

if TYPE_CHECKING:
    from array import array
    from collections.abc import Iterator

    from proxy.formats.vhd import Header


def check_table(
    table: array[int], header: Header, virtual_size: int, end: int | None
) -> tuple[int, ...]:
    """The present blocks in the order of their places.

    ``Corrupt`` unless every block has a place of its own, behind the header, apart from the
    table, and before byte ``end``, where that is known.  Takes a second for 2 TiB of blocks.
    """
    order = _by_place(table, header)
    for _, error in _misplaced(order, table, header, virtual_size, end):
        raise error
    return tuple(order)


def leave_out_misplaced(
    table: array[int], header: Header, virtual_size: int, end: int
) -> frozenset[int]:
    """Make unused, and return, the entries for which :func:`check_table` would raise.

    Of two blocks that lie over one another, both.
    """
    order = _by_place(table, header)
    found = frozenset(index for index, _ in _misplaced(order, table, header, virtual_size, end))
    for index in found:
        table[index] = vhd.UNUSED
    return found


@contextlib.contextmanager
def about_block(index: int, offset: int) -> Iterator[None]:
    """Say of what is corrupt in the block of code which block of the disk it is about."""
    try:
        yield
    except Corrupt as error:
        data = {**error.data, "block": index, "offset": offset}
        raise Corrupt(f"block {index}: {error.message}", data=data) from error


def _by_place(table: array[int], header: Header) -> list[int]:
    blocks = Blocks(vhd.present_flags(table))
    if len(blocks) > vhd.MAX_BLOCKS:  # said before anything is made of each of them
        raise _corrupt(f"{len(blocks)} blocks cannot lie in one file", header.table_offset)
    return sorted(blocks, key=table.__getitem__)


def _misplaced(
    order: list[int], table: array[int], header: Header, virtual_size: int, end: int | None
) -> Iterator[tuple[int, Corrupt]]:
    """Each impossible block with what is wrong with it; of two over one another, both."""
    table_end = header.table_offset + 4 * header.max_entries
    free = vhd.TABLE_OFFSET
    below = -1
    for index in order:
        start = table[index] * vhd.SECTOR
        # A last block may end where the disk does.
        block_end = start + vhd.BITMAP_SIZE + length_of(index, virtual_size)
        problem = None
        if start < free:
            problem = "lies over what is before it"
        elif start < table_end and block_end > header.table_offset:
            problem = "lies over the table"
        elif end is not None and block_end > end:
            problem = "lies behind the end of the file"
        if problem is not None:
            error = _corrupt(f"block {index} {problem}", start)
            yield index, error
            if start < free and below >= 0:
                yield below, error
        free, below = max(free, block_end), index


def _corrupt(message: str, offset: int) -> Corrupt:
    return Corrupt(f"corrupt VHD: {message}", data={"what": "block place", "offset": offset})
