"""What every writer of a disk is given and does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from proxy.formats.vhd import NO_UUID

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
    parent_uuid: UUID = NO_UUID
    parent_name: str = ""
    """Of the parent's file or alias, relative to the folder of this disk."""


class DiskWriter(Protocol):
    """Takes the blocks of one disk; made by an ``async with``.

    Leaving without :meth:`commit` leaves nothing behind, also on a cancel.
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
        """Make everything durable, then give the disk its name."""
        ...
