"""The remote that is a directory: of this machine, or where NFS or SMB is mounted."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from typing import TYPE_CHECKING, TypeVar

import trio

from proxy.errors import ProxyError
from proxy.remotes import paths, posix
from proxy.remotes.deferred import EditedFile, Files, Renames
from proxy.remotes.lock import hold
from proxy.remotes.new_file import NewFile, write_whole
from proxy.remotes.tree import (
    UNDO_SECONDS,
    TreeRemote,
    Writer,
    WrittenTogether,
    immutable,
    refuses_change,
)
from proxy.runtime.deadlines import deadline, undo_within
from proxy.runtime.threads import SHARED, Threads, Work

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from contextlib import AbstractAsyncContextManager

    from proxy.remotes.interface import (
        Batch,
        FileEditor,
        FileReader,
        FileWriter,
        Lock,
    )

T = TypeVar("T")


class LocalRemote(TreeRemote):
    """See :class:`proxy.remotes.interface.Remote` for the contract.

    Made by :meth:`open`.  New directories get ``directory_mode``, files 0644 less the umask.
    Symbolic links below the root are never followed (:mod:`proxy.remotes.posix`).

    A cancel or a time limit lets go at once of what only looks (``read_file``, ``list``,
    ``stat``, ``info``, ``walk``), whatever the file system does; a change, and bytes that go
    into somebody's buffer, are waited for.
    """

    is_encrypted = False
    files_per_hop = 32
    renames_per_hop = 256

    def __init__(
        self,
        root: posix.Root,
        *,
        url: str,
        is_immutable: bool = False,
        use_vhd_directory: bool = False,
        threads: Threads = SHARED,
    ) -> None:
        super().__init__(
            root, url=url, is_immutable=is_immutable, use_vhd_directory=use_vhd_directory
        )
        self._root = root
        self._threads = threads
        self.bounds_itself = threads.abandons
        self.may_write_later = threads.abandons
        """See :func:`proxy.remotes.wrapper.may_write_later`."""

    @classmethod
    async def open(
        cls,
        directory: str,
        *,
        url: str,
        is_immutable: bool = False,
        use_vhd_directory: bool = False,
        directory_mode: int = 0o700,
        seconds: float = 30,
        threads: Threads = SHARED,
        check: Callable[[int], None] | None = None,
    ) -> LocalRemote:
        """Make ``directory`` when missing and check it; a bad one is an error at once.

        ``check`` gets the open descriptor of the directory and raises when it is not the one
        that was meant.  A file system that does not answer is ``Unreachable`` (``ETIMEDOUT``)
        after ``seconds``.  On cancel nothing stays open.
        """
        root = posix.Root(directory, directory_mode=directory_mode, check=check)
        try:
            with deadline("opening the remote", seconds):
                # abandoned, it closes what it opened: see Root.open
                await threads.run(Work.DISK, root.open, abandon=True)
        except BaseException:
            root.close()
            raise
        return cls(
            root,
            url=url,
            is_immutable=is_immutable,
            use_vhd_directory=use_vhd_directory,
            threads=threads,
        )

    async def read_file(self, path: str, *, limit: int = 64 * 1024 * 1024) -> bytes:
        return await self._threads.run(Work.DISK, self._root.read_file, path, limit, abandon=True)

    async def read_files(
        self, paths: Sequence[str], *, limit: int = 16 * 1024 * 1024
    ) -> Sequence[bytes | ProxyError]:
        """Many files per thread hop, which costs more than reading a small file."""
        contents: deque[bytes | ProxyError] = deque()
        for first in range(0, len(paths), self.files_per_hop):
            batch = paths[first : first + self.files_per_hop]
            read = self._threads.run(Work.DISK, self._read_batch, batch, limit, abandon=True)
            contents.extend(await read)
        return tuple(contents)

    def _read_batch(self, paths: Sequence[str], limit: int) -> Sequence[bytes | ProxyError]:
        contents: deque[bytes | ProxyError] = deque()  # ``list`` is a method here
        for path in paths:
            try:
                contents.append(self._root.read_file(path, limit))
            except ProxyError as error:
                contents.append(error)
        return tuple(contents)

    async def write_file(self, path: str, data: bytes, *, exclusive: bool = False) -> None:
        def write() -> None:
            write_whole(self._root, path, data, exclusive=exclusive, in_place=self.is_immutable)

        await self.step(write)

    def create(
        self, path: str, *, exclusive: bool = False
    ) -> AbstractAsyncContextManager[FileWriter]:
        return self._create(path, exclusive=exclusive)

    @contextlib.asynccontextmanager
    async def _create(self, path: str, *, exclusive: bool) -> AsyncIterator[FileWriter]:
        file = NewFile(self._root, path, exclusive=exclusive, in_place=self.is_immutable)
        async with self.ended(
            f"removing the temporary file of '{file.path}'",
            file.discard,
            note="its temporary file is left behind",
        ):
            await self.step(file.open)
            yield Writer(self.step, file)

    def edit(self, path: str) -> AbstractAsyncContextManager[FileEditor]:
        return self._edit(path)

    @contextlib.asynccontextmanager
    async def _edit(self, path: str) -> AsyncIterator[FileEditor]:
        if self.is_immutable:
            raise immutable("changed", path)
        file = await self._threads.run(
            Work.DISK, EditedFile, self._root, path, dispose=EditedFile.close
        )
        async with self.ended(f"closing '{file.path}'", file.close, note="it is not closed"):
            yield _Editor(self._threads, file)

    def batch(self) -> AbstractAsyncContextManager[Batch]:
        return self._batch()

    @contextlib.asynccontextmanager
    async def _batch(self) -> AsyncIterator[Batch]:
        files = await self._threads.run(
            Work.DISK,
            lambda: Files(self._root, exclusive=self.is_immutable),
            dispose=Files.close,
        )
        try:
            yield WrittenTogether(self.step, files)
        finally:
            if self._threads.abandons:  # NFS sends what was not committed
                with contextlib.suppress(ProxyError), undo_within("closing files", UNDO_SECONDS):
                    await self._threads.end(files.close)
            else:
                files.close()

    def new_renames(self) -> Renames:
        return Renames(self._root)

    def open_read(self, path: str) -> AbstractAsyncContextManager[FileReader]:
        return self._open_read(path)

    @contextlib.asynccontextmanager
    async def _open_read(self, path: str) -> AsyncIterator[FileReader]:
        descriptor, size = await self._threads.run(
            Work.DISK, self._root.open_file, path, dispose=lambda opened: os.close(opened[0])
        )
        try:
            yield _Reader(self._threads, self._root, paths.normalise(path), descriptor, size)
        finally:
            self._threads.close(descriptor)  # opened for reading: nothing to wait for

    async def step(self, function: Callable[..., T], *args: object, looks: bool = False) -> T:
        return await self._threads.run(Work.DISK, function, *args, abandon=looks)

    async def end(self, function: Callable[[], None]) -> None:
        """Abandoned on a remote that hangs: it touches only what nobody else knows."""
        await self._threads.end(function)

    def lock(self, path: str, *, owner: str, wait: float = 0) -> AbstractAsyncContextManager[Lock]:
        return hold(self._root, path, owner=owner, wait=wait, threads=self._threads)

    def is_protected(self, path: str) -> bool:
        return refuses_change(lambda: os.close(self._root.open_file(path, os.O_RDWR)[0]))

    async def aclose(self) -> None:
        """Idempotent.  Operations under way finish; later ones are ``Refused`` (``EBADF``)."""
        if self._threads.abandons:
            await self._threads.end(self._root.close)  # a close may wait for the server
        else:
            self._root.close()
            await trio.lowlevel.checkpoint()


class _Reader:
    def __init__(
        self, threads: Threads, root: posix.Root, path: str, descriptor: int, size: int
    ) -> None:
        self.size = size
        self._threads = threads
        self._root = root
        self._path = path
        self._descriptor = descriptor
        self._position = 0

    async def read_into(self, buffer: memoryview) -> int:
        count = await self.read_into_at(self._position, buffer)
        self._position += count
        return count

    async def read_at(self, offset: int, length: int) -> bytes:
        def read() -> bytes:
            with self._root.translated("read", self._path):
                return posix.read_at(self._descriptor, offset, length)

        return await self._threads.run(Work.DISK, read)

    async def read_into_at(self, offset: int, buffer: memoryview) -> int:
        if self._threads.abandons:
            return _fill(buffer, await self.read_at(offset, len(buffer)))

        def read() -> int:
            with self._root.translated("read", self._path):
                return posix.read_into(self._descriptor, offset, buffer)

        return await self._threads.run(Work.DISK, read)


def _fill(buffer: memoryview, content: bytes | memoryview) -> int:
    """The caller's memory, filled by the caller's task: a read that was abandoned would fill it
    when it belongs to somebody else."""
    buffer[: len(content)] = content
    return len(content)


class _Editor:
    def __init__(self, threads: Threads, file: EditedFile) -> None:
        self._threads = threads
        self._file = file

    @property
    def size(self) -> int:
        return self._file.size

    async def read_into(self, offset: int, buffer: memoryview) -> int:
        if not self._threads.abandons:
            return await self._threads.run(Work.DISK, self._file.read_into, offset, buffer)
        content = memoryview(bytearray(len(buffer)))
        count = await self._threads.run(Work.DISK, self._file.read_into, offset, content)
        return _fill(buffer, content[:count])

    async def write_at(self, offset: int, data: bytes | memoryview) -> None:
        if self._threads.abandons:  # the caller's memory may hold other bytes when it is written
            data = bytes(data)
        await self._threads.run(Work.DISK, self._file.write_at, offset, data)

    async def truncate(self, size: int) -> None:
        await self._threads.run(Work.DISK, self._file.truncate, size)

    async def sync(self) -> None:
        await self._threads.run(Work.DISK, self._file.sync)
