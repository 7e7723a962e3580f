"""VHD directories: a disk as many small files, one for each block, compressed by itself.

What every object store holds, and every remote with ``useVhdDirectory``.  The directory is
``data/<name>.vhd`` beside an alias file (:mod:`proxy.disks.alias`), by whose name the disk is
known; the alias is written last and makes the disk exist.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NoReturn

import trio

from proxy.disks.alias import LONGEST, data_path, is_alias, parse_alias, read_alias, write_alias
from proxy.disks.bitmap import settle_bitmap
from proxy.disks.disk import Blocks, RandomAccess, block_count, length_of, naming
from proxy.errors import Conflict, Corrupt, NotFound, ProxyError
from proxy.formats import vhd, vhd_directory
from proxy.formats.vhd_directory import Compression
from proxy.remotes import paths
from proxy.remotes.encryption import sealer_of
from proxy.remotes.wrapper import may_write_later
from proxy.runtime.background import background
from proxy.runtime.deadlines import undo_within
from proxy.runtime.threads import Work, in_thread
from proxy.runtime.trouble import tell_trouble

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from uuid import UUID

    from proxy.disks.disk import Block
    from proxy.disks.writing import DiskWriter, Shape
    from proxy.formats.vhd import Footer, Header
    from proxy.remotes.encrypting import Sealer
    from proxy.remotes.interface import Batch, Remote

_CONCURRENCY: Final = 4
"""Blocks that are compressed or stored at once: two cores, each with one more to go on with
while another waits for the storage."""
_NAMING_SECONDS: Final = 120
_UNDO_SECONDS: Final = 300
"""A disk of 2 TiB is a million files to remove."""


class VhdDirectory(RandomAccess):
    """A VHD directory that is there; holds nothing open.  For concurrent use.

    ``path`` is that of the directory, not of an alias.
    """

    def __init__(self, head: DirectoryHead, blocks: Blocks) -> None:
        self.head = head
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

    async def read_block(self, index: int, into: memoryview) -> None:
        """See :meth:`proxy.disks.disk.RandomDisk.read_block`.

        A block that ``bat`` lists and that has no file is ``Corrupt`` as well; ``NotFound``
        means that the whole directory is gone.
        """
        name = vhd_directory.block_path(index)
        path = paths.join(self.path, name)
        try:
            data = await self._remote.read_file(path, limit=vhd_directory.LONGEST_BLOCK)
        except NotFound as error:
            await _raise_lacking(self._remote, self.path, name, error)
        with naming(path):
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
            with naming(paths.join(path, names[0])):
                compression = vhd_directory.parse_filters(_content(filters))
        for name, content in zip(names[1:], (header, footer), strict=True):
            if isinstance(content, NotFound) and content.code == "ENOENT":
                await _raise_lacking(remote, path, name, content)
        with naming(paths.join(path, names[1])):
            raw = vhd_directory.decompress(compression, _content(header), longest=vhd.HEADER_SIZE)
            parsed_header = vhd.Header.parse(raw, offset=0)
        with naming(paths.join(path, names[2])):
            raw = vhd_directory.decompress(compression, _content(footer), longest=vhd.FOOTER_SIZE)
            parsed_footer = vhd.Footer.parse(raw)
        with naming(path):
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
            await _raise_lacking(self.remote, self.path, vhd_directory.TABLE, error)
        with naming(path):
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


@contextlib.asynccontextmanager
async def create_vhd_directory(
    remote: Remote,
    alias_path: str,
    shape: Shape,
    *,
    compression: Compression = Compression.BROTLI,
    concurrency: int = _CONCURRENCY,
) -> AsyncIterator[DiskWriter]:
    """Write a disk that will be known as ``alias_path``; its data goes where
    :func:`~proxy.disks.alias.data_path` says.  The caller holds the lock of the VM directory.

    The order, and what a crash right after each step leaves:

    1. the blocks, then header, footer, filters and ``bat``: data that no alias names, which
       the next attempt under this name and the clean remove.
    2. all of it is made durable at once: the same.
    3. the alias, atomic, exclusive, durable: *from here on it is a disk*.

    Leaving without ``commit``, an error and a cancel before step 3 ends remove everything.
    From step 3 on a cancel waits for the outcome; it then strikes at the caller's next
    checkpoint.

    ``Conflict`` when the alias is taken, or when the data directory is there and claimed by
    any other alias; ``Corrupt`` when an alias beside it cannot be read, so that this is not
    known.  ``Refused`` (``EINVAL``) for a name or a parent's name that cannot be written.

    Blocks are compressed and stored ``concurrency`` at once; how many wait for it is bounded
    by the pool that they are from.
    """
    directory = data_path(alias_path)
    flags = Blocks.of(shape.order, block_count(shape.virtual_size)).flags
    chunks = _chunks(shape, flags, compression)
    await _make_room(remote, alias_path, directory)
    writer: _Writer | None = None
    try:
        async with remote.batch() as batch:
            writer = _Writer(remote, batch, alias_path, chunks, flags, compression)
            async with background() as nursery:
                for _ in range(concurrency):
                    nursery.start_soon(writer.work)
                yield writer
    finally:
        if writer is not None:
            writer.close()
        if writer is not None and not writer.complete:
            await _undo(remote, alias_path, directory, named=writer.naming)


class BlockFiles:
    """Writes blocks by a batch of ``remote``: compressed, and encrypted where that is done, by one
    thread, which has them in its cache then.  For concurrent use."""

    def __init__(self, remote: Remote, batch: Batch, compression: Compression) -> None:
        self._batch = batch
        self._compression = compression
        self._sealer = sealer_of(remote, vhd_directory.LONGEST_BLOCK)
        self._copies = may_write_later(remote)

    async def write(self, directory: str, index: int, stored: memoryview) -> None:
        """The block ``index`` of the disk in ``directory``."""
        path = paths.join(directory, vhd_directory.block_path(index))
        if self._sealer is None:
            await self._batch.write(path, await in_thread(Work.CPU, self._compress, stored))
        else:
            sealed = await in_thread(Work.CPU, self._seal, self._sealer, stored)
            await self._batch.write(path, sealed)
            self._sealer.give_back(sealed)

    def _compress(self, stored: memoryview) -> bytes | memoryview:
        data = vhd_directory.compress_block(self._compression, stored)
        return bytes(data) if data is stored and self._copies else data

    def _seal(self, sealer: Sealer, stored: memoryview) -> memoryview:
        return sealer.seal(vhd_directory.block_pieces(self._compression, stored))


class _Writer:
    """See :class:`proxy.disks.writing.DiskWriter`.  One task calls it."""

    def __init__(
        self,
        remote: Remote,
        batch: Batch,
        alias_path: str,
        chunks: dict[str, bytes],
        flags: bytes,
        compression: Compression,
    ) -> None:
        self.size = vhd.stream_size(len(flags), flags.count(1))
        self.naming = False
        """The alias may exist from now on."""
        self.complete = False
        self._remote = remote
        self._batch = batch
        self._alias = alias_path
        self._directory = data_path(alias_path)
        self._chunks = chunks
        self._blocks = BlockFiles(remote, batch, compression)
        self._missing = bytearray(flags)
        self._send, self._receive = trio.open_memory_channel["Block"](math.inf)
        self._under_way = 0
        self._drained = trio.Event()
        self._error: Exception | None = None

    async def write(self, block: Block) -> None:
        """Takes the block over, whatever is raised.  ``ValueError`` for a block that the
        shape does not have or that came before."""
        try:
            if self._error is not None:
                raise self._error
            if not (0 <= block.index < len(self._missing) and self._missing[block.index]):
                raise ValueError(f"block {block.index} was not announced, or comes twice")
        except BaseException:
            block.release()
            raise
        self._missing[block.index] = 0
        self._under_way += 1
        self._send.send_nowait(block)
        await trio.lowlevel.checkpoint()

    async def work(self) -> None:
        """Store blocks as they come, until cancelled; several run at once."""
        async for block in self._receive:
            try:
                if self._error is None:
                    await self._store(block)
            except Exception as error:  # noqa: BLE001 (told by the next call)
                self._error = self._error or error
            finally:
                block.release()
                self._under_way -= 1
                if self._under_way == 0:
                    self._drained.set()

    async def _store(self, block: Block) -> None:
        await self._blocks.write(self._directory, block.index, block.stored)

    async def commit(self) -> None:
        """``Corrupt`` when announced blocks did not come: the disk would have holes."""
        self._drained = trio.Event()
        if self._under_way:
            await self._drained.wait()
        if self._error is not None:
            raise self._error
        if missing := self._missing.count(1):
            raise Corrupt(
                f"the disk ended {missing} blocks before its end",
                data={"what": "blocks missing", "path": self._directory, "missing": missing},
            )
        for name, data in self._chunks.items():
            await self._batch.write(paths.join(self._directory, name), data)
        await self._batch.commit()
        await trio.lowlevel.checkpoint_if_cancelled()
        self.naming = True
        with undo_within(f"writing '{self._alias}'", _NAMING_SECONDS):
            await self._name()
        self.complete = True

    async def _name(self) -> None:
        try:
            await write_alias(self._remote, self._alias, self._directory, exclusive=True)
        except Conflict:
            # a repeated call whose first answer was lost finds its own alias
            if await read_alias(self._remote, self._alias) != self._directory:
                raise

    def close(self) -> None:
        """Give back the blocks that nobody will store; the workers have ended."""
        with contextlib.suppress(trio.WouldBlock):
            while True:
                self._receive.receive_nowait().release()


def _chunks(shape: Shape, flags: bytes, compression: Compression) -> dict[str, bytes]:
    """Everything of the directory but its blocks, as stored, by name."""
    table = vhd_directory.pack_table(flags, len(flags))
    chunks = {"header": shape.pack_header(), "footer": shape.pack_footer(), "bat": table}
    stored = {name: vhd_directory.compress(compression, data) for name, data in chunks.items()}
    filters = vhd_directory.pack_filters(compression)
    return stored if filters is None else {**stored, vhd_directory.FILTERS: filters}


async def _make_room(remote: Remote, alias_path: str, directory: str) -> None:
    """Remove what a dead attempt left at ``directory``, once it is known to be nobody's."""
    folder = paths.parent(alias_path)
    names = await _names(remote, folder)
    if paths.name(alias_path) in names:
        raise _taken(alias_path, alias_path)
    if paths.name(directory) not in await _names(remote, paths.parent(directory)):
        return
    aliases = [paths.join(folder, name) for name in names if is_alias(name)]
    # after merges an alias of any name may claim it
    for alias, content in zip(
        aliases, await remote.read_files(aliases, limit=LONGEST), strict=True
    ):
        if parse_alias(alias, _content(content)) == directory:
            raise _taken(directory, alias)
    await remote.rmtree(directory)


async def _names(remote: Remote, path: str) -> list[str]:
    try:
        return [entry.name for entry in await remote.list(path)]
    except NotFound as error:
        if error.code != "ENOENT":
            raise
        return []


def _taken(path: str, by: str) -> Conflict:
    return Conflict(
        f"EEXIST: '{path}' is there already, claimed by the disk '{by}'",
        data={"path": path, "alias": by},
    )


async def _undo(remote: Remote, alias_path: str, directory: str, *, named: bool) -> None:
    """Remove an unfinished disk: first its name, if it may have one, then its data.

    When it cannot be told whether it has a name, the data stays.
    """
    try:
        with undo_within(f"removing '{directory}'", _UNDO_SECONDS):
            if named:
                with contextlib.suppress(NotFound):
                    if await read_alias(remote, alias_path) == directory:
                        await remote.unlink(alias_path)
            await remote.rmtree(directory)
    except ProxyError as error:
        # What brought us here is the news; the next attempt or the clean removes what is left.
        tell_trouble("an unfinished disk is left", error, path=directory)


def _content(result: bytes | ProxyError) -> bytes:
    if isinstance(result, ProxyError):
        raise result
    return result


async def _raise_lacking(remote: Remote, path: str, name: str, error: NotFound) -> NoReturn:
    """Raise ``Corrupt`` for a directory without its ``name``, ``error`` when all of it is gone."""
    with contextlib.suppress(NotFound):
        if await remote.list(path):
            raise Corrupt(
                f"the disk '{path}' lacks its '{name}'",
                data={"what": f"{name} missing", "path": path},
            ) from error
    raise error
