"""VHD directories: a disk as many small files, one for each block, compressed by itself.

What every object store holds, and every remote with ``useVhdDirectory``.  The directory is
``data/<name>.vhd`` beside an alias file (:mod:`proxy.disks.alias`), by whose name the disk is
known; the alias is written last and makes the disk exist.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from proxy.disks.bitmap import settle_bitmap
from proxy.disks.disk import Blocks, block_count, length_of, read_in_order
from proxy.errors import Corrupt, NotFound, ProxyError, Refused
from proxy.formats import vhd, vhd_directory
from proxy.remotes import paths
from proxy.runtime.threads import Work, in_thread

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from contextlib import AbstractAsyncContextManager
    from uuid import UUID

    from proxy.disks.disk import BlockReader
    from proxy.formats.vhd import Footer, Header
    from proxy.formats.vhd_directory import Compression
    from proxy.remotes.interface import Remote
    from proxy.runtime.buffers import BufferPool


class VhdDirectory:
    """A VHD directory that is there; holds nothing open.  For concurrent use.

    ``path`` is that of the directory, not of an alias.
    """

    def __init__(self, head: DirectoryHead, blocks: Blocks) -> None:
        self._remote = head.remote
        self.path = head.path
        self.compression = head.compression
        self.header = head.header
        self.footer = head.footer
        self.virtual_size = head.footer.current_size
        self.is_differencing = head.footer.is_differencing
        self.blocks = blocks

    @property
    def uuid(self) -> UUID:
        return self.footer.uuid

    def read(self, pool: BufferPool) -> AbstractAsyncContextManager[BlockReader]:
        return read_in_order(self, pool)

    async def read_block(self, index: int, into: memoryview) -> None:
        """See :meth:`proxy.disks.disk.RandomDisk.read_block`.

        A block that ``bat`` lists and that has no file is ``Corrupt`` as well.
        """
        path = paths.join(self.path, vhd_directory.block_path(index))
        try:
            data = await self._remote.read_file(path, limit=vhd_directory.LONGEST_BLOCK)
        except NotFound as error:
            raise Corrupt(
                f"the disk '{self.path}' lacks the file of its block {index}",
                data={"what": "block missing", "path": path},
            ) from error
        with _naming(path):
            await in_thread(Work.CPU, self._unpack, index, data, into)

    def _unpack(self, index: int, data: bytes, into: memoryview) -> None:
        stored = vhd_directory.decompress(self.compression, data, longest=vhd.STORED_BLOCK)
        if len(stored) != vhd.STORED_BLOCK:
            raise Corrupt(
                f"the block has {len(stored)} of {vhd.STORED_BLOCK} bytes",
                data={"what": "block size"},
            )
        into[:] = stored
        settle_bitmap(
            into, length_of(index, self.virtual_size), is_differencing=self.is_differencing
        )


@dataclass(frozen=True, slots=True)
class DirectoryHead:
    """What a VHD directory is, without which blocks it has: enough to find its parent."""

    remote: Remote
    path: str
    compression: Compression
    header: Header
    footer: Footer

    @classmethod
    async def read(cls, remote: Remote, path: str) -> DirectoryHead:
        """``NotFound`` when there is no directory; ``Corrupt``; ``Refused`` (``ENOTSUP``) for
        a compression that is not known."""
        names = (vhd_directory.FILTERS, vhd_directory.HEADER, vhd_directory.FOOTER)
        contents = await remote.read_files(
            [paths.join(path, name) for name in names], limit=vhd_directory.SMALL_CHUNK
        )
        filters, header, footer = contents
        if isinstance(filters, NotFound) and filters.code == "ENOENT":
            compression = vhd_directory.parse_filters(None)
        else:
            with _naming(paths.join(path, names[0])):
                compression = vhd_directory.parse_filters(_content(filters))
        for name, content in zip(names[1:], (header, footer), strict=True):
            if isinstance(content, NotFound) and content.code == "ENOENT":
                raise await _lacks(remote, path, name, content)
        with _naming(paths.join(path, names[1])):
            raw = vhd_directory.decompress(compression, _content(header), longest=vhd.HEADER_SIZE)
            parsed_header = vhd.Header.parse(raw, offset=0)
        with _naming(paths.join(path, names[2])):
            raw = vhd_directory.decompress(compression, _content(footer), longest=vhd.FOOTER_SIZE)
            parsed_footer = vhd.Footer.parse(raw)
        with _naming(path):
            vhd.check(parsed_footer, parsed_header)
        return cls(remote, path, compression, parsed_header, parsed_footer)

    async def open(self) -> VhdDirectory:
        """Read which blocks there are."""
        path = paths.join(self.path, vhd_directory.TABLE)
        try:
            # as stored it is no longer than what it holds, but for the frame of a codec
            data = await self.remote.read_file(
                path, limit=vhd.MAX_ENTRIES + vhd_directory.SMALL_CHUNK
            )
        except NotFound as error:
            raise await _lacks(self.remote, self.path, vhd_directory.TABLE, error) from error
        with _naming(path):
            flags = await in_thread(Work.CPU, self._unpack_table, data)
        return VhdDirectory(self, Blocks(flags))

    def _unpack_table(self, data: bytes) -> bytes:
        table = vhd_directory.decompress(self.compression, data, longest=vhd.MAX_ENTRIES)
        return vhd_directory.parse_table(table, block_count(self.footer.current_size))


@contextlib.asynccontextmanager
async def open_vhd_directory(remote: Remote, path: str) -> AsyncIterator[VhdDirectory]:
    """Read the disk in the directory ``path`` (not an alias).

    ``NotFound`` when there is none; ``Corrupt`` when parts of it are missing or wrong;
    ``Refused`` (``ENOTSUP``) for a compression that is not known.
    """
    yield await (await DirectoryHead.read(remote, paths.normalise(path))).open()


def _content(result: bytes | ProxyError) -> bytes:
    if isinstance(result, ProxyError):
        raise result
    return result


async def _lacks(remote: Remote, path: str, name: str, error: NotFound) -> ProxyError:
    """The error of a directory without its ``name``: is the directory there at all?"""
    try:
        there = bool(await remote.list(path))
    except NotFound:
        there = False
    if not there:
        return error
    return Corrupt(
        f"the disk '{path}' lacks its '{name}'", data={"what": f"{name} missing", "path": path}
    )


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
    """Say which file is corrupt."""
    try:
        yield
    except (Corrupt, Refused) as error:
        if "path" in error.data:
            raise
        raise type(error)(
            f"'{path}': {error.message}", code=error.code, data={**error.data, "path": path}
        ) from error
