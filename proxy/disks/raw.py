"""Raw disk images: nothing but the content, from its first byte to its last."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from proxy.disks.disk import Blocks, RandomAccess, block_count, length_of
from proxy.errors import Corrupt
from proxy.formats.vhd import BITMAP_SIZE, BLOCK_SIZE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from proxy.remotes.interface import FileReader, Remote


class RawDisk(RandomAccess):
    """An open raw image, as large as its file; all blocks are present.  For concurrent use."""

    is_differencing = False

    def __init__(self, path: str, file: FileReader) -> None:
        self.path = path
        self.virtual_size = file.size
        self.blocks = Blocks.everything(block_count(file.size))
        self._file = file

    async def read_block(self, index: int, into: memoryview) -> None:
        """See :meth:`proxy.disks.disk.RandomDisk.read_block`.

        ``Corrupt`` when the file has become shorter than it was when it was opened.
        """
        if index not in self.blocks:
            raise ValueError(f"'{self.path}' has no block {index}")
        offset, length = index * BLOCK_SIZE, length_of(index, self.virtual_size)
        end = BITMAP_SIZE + length
        if await self._file.read_into_at(offset, into[BITMAP_SIZE:end]) < length:
            raise Corrupt(
                f"'{self.path}': block {index} is cut",
                data={"what": "block cut", "offset": offset, "path": self.path},
            )
        into[end:] = bytes(len(into) - end)


@contextlib.asynccontextmanager
async def open_raw(remote: Remote, path: str) -> AsyncIterator[RawDisk]:
    """Open the file ``path`` as a disk."""
    async with remote.open_read(path) as file:
        yield RawDisk(path, file)
