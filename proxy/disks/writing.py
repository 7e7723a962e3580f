"""What every writer of a disk is given and does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from proxy.errors import Corrupt, Refused
from proxy.formats import vhd

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from proxy.disks.disk import Block


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A disk that is about to be written; ``timestamp`` in seconds since 1970."""

    virtual_size: int
    order: Sequence[int]
    """Every block that will come, in the order in which it will."""
    uuid: UUID
    timestamp: int
    is_differencing: bool = False
    parent_uuid: UUID = vhd.NO_UUID
    parent_name: str = ""
    """Of the parent's file or alias, relative to the folder of this disk."""

    @property
    def block_count(self) -> int:
        """Blocks of the disk, whether they will come or not."""
        return vhd.blocks_of(self.virtual_size)

    def pack_footer(self) -> bytes:
        """The footer, with which a file also begins."""
        disk_type = vhd.DiskType.DIFFERENCING if self.is_differencing else vhd.DiskType.DYNAMIC
        return vhd.Footer.make(
            self.virtual_size, disk_type, self.uuid, timestamp=self.timestamp
        ).pack()

    def pack_header(self) -> bytes:
        """``Refused`` (``EINVAL``) for a parent's name that cannot be written."""
        header = vhd.Header(
            max_entries=self.block_count,
            parent_uuid=self.parent_uuid,
            parent_name=self.parent_name,
        )
        try:
            return header.pack()
        except ValueError as error:
            raise Refused(str(error), code="EINVAL") from error

    def pack_start(self) -> bytes:
        """What comes before the first block in a file or a stream: footer, header, table.

        ``ValueError`` for a block that comes twice or lies behind the end of the disk;
        ``Refused``: ``EFBIG`` for more blocks than a table can place, ``EINVAL`` as above.
        """
        table = vhd.sequential_table(self.order, self.block_count)
        return self.pack_footer() + self.pack_header() + vhd.pack_table(table)

    @property
    def stream_size(self) -> int:
        """Bytes of the disk as a VHD stream."""
        return vhd.stream_size(self.block_count, len(self.order))


class DiskWriter(Protocol):
    """Takes the blocks of one disk; made by an ``async with``.  Used by one task.

    Leaving without :meth:`commit` leaves nothing behind, also on a cancel.  After an error or
    a cancel of any call nothing but leaving is left to do: :meth:`commit` refuses.
    """

    @property
    def size(self) -> int:
        """Bytes of the disk as a VHD stream."""
        ...

    async def write(self, block: Block) -> None:
        """Take ``block`` over: its buffer is released when it is stored, or at an error.

        May return before that; an error of an earlier block is raised by a later call.
        """
        ...

    async def commit(self) -> None:
        """Make everything durable, then give the disk its name.

        ``Corrupt`` when announced blocks did not come: the disk would have holes.
        """
        ...


class Announced:
    """Checks that the blocks of a disk come as they were announced, each once and in order."""

    def __init__(self, order: Sequence[int]) -> None:
        self._order = order
        self._position = 0

    def came(self, index: int) -> None:
        """``ValueError`` for any block but the next: its place would be another one's."""
        if self._position >= len(self._order) or self._order[self._position] != index:
            raise ValueError(f"block {index} is not the one announced")
        self._position += 1

    def all_came(self) -> None:
        """``Corrupt`` when some did not: the disk would have holes."""
        if missing := len(self._order) - self._position:
            raise Corrupt(
                f"the disk ended {missing} blocks before its end",
                data={"what": "blocks missing", "missing": missing},
            )
