"""The way back from a disk to its ancestor: what to overwrite in the one to get the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from proxy.disks.disk import RandomAccess
from proxy.errors import Refused
from proxy.formats.vhd import BITMAP_SIZE, BLOCK_SIZE

if TYPE_CHECKING:
    from proxy.disks.disk import Disk, RandomDisk


class Negative(RandomAccess):
    """The blocks that ``child`` changed, with the content that they have in ``parent``.

    Written over a disk with the content of ``child``, it gives that of ``parent``: so a VM is
    put back by sending only what changed since.  A block that the parent lacks is zeros.
    ``child`` is only asked for its blocks: one differencing disk, or a chain of them.
    """

    is_differencing = True

    def __init__(self, parent: RandomDisk, child: Disk) -> None:
        """``Refused``: ``GEOMETRY_CHANGED`` when the disk was resized in between; ``EINVAL``
        when ``parent`` is differencing itself, as what it lacks is then not zeros."""
        if parent.virtual_size != child.virtual_size:
            raise Refused(
                f"the disk was resized from {parent.virtual_size} to {child.virtual_size} bytes "
                "since: restore it as a whole",
                code="GEOMETRY_CHANGED",
                data={"parent": parent.virtual_size, "child": child.virtual_size},
            )
        if parent.is_differencing:
            raise Refused("the chain of the parent does not reach a full disk", code="EINVAL")
        self._parent = parent
        self.virtual_size = parent.virtual_size
        self.blocks = child.blocks

    async def read_block(self, index: int, into: memoryview) -> None:
        """See :meth:`proxy.disks.disk.RandomDisk.read_block`."""
        if index in self._parent.blocks:
            await self._parent.read_block(index, into)
        else:
            into[BITMAP_SIZE:] = _ZEROS[: len(into) - BITMAP_SIZE]


_ZEROS = memoryview(bytes(BLOCK_SIZE))
