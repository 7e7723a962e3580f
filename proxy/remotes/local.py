"""The remote that is a directory: of this machine, or where NFS or SMB is mounted."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from typing import TYPE_CHECKING

import trio

from proxy.errors import Conflict, NotFound, ProxyError, Refused
from proxy.remotes import paths, posix
from proxy.remotes.deferred import EditedFile, Files, Renames
from proxy.remotes.lock import hold
from proxy.remotes.new_file import NewFile, write_whole
from proxy.runtime.deadlines import deadline, undo_within
from proxy.runtime.threads import SHARED, Threads, Work

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from contextlib import AbstractAsyncContextManager

    from proxy.remotes.interface import (
        Batch,
        Entry,
        FileEditor,
        FileReader,
        FileStat,
        FileWriter,
        Lock,
        RemoteInfo,
    )

_UNDO_SECONDS = 30
_FILES_PER_HOP = 32
_RENAMES_PER_HOP = 256
_CLEAR_ROUNDS = 3
"""How often a directory is emptied again when somebody fills it while it is removed."""


class LocalRemote:
    """See :class:`proxy.remotes.interface.Remote` for the contract.

    Made by :meth:`open`.  New directories get ``directory_mode``, files 0644 less the umask.
    Symbolic links below the root are never followed (:mod:`proxy.remotes.posix`).

    A cancel or a time limit lets go at once of what only looks (``read_file``, ``list``,
    ``stat``, ``info``, ``walk``), whatever the file system does; a change, and bytes that go
    into somebody's buffer, are waited for.
    """

    is_encrypted = False

    def __init__(
        self,
        root: posix.Root,
        *,
        url: str,
        is_immutable: bool = False,
        use_vhd_directory: bool = False,
        threads: Threads = SHARED,
    ) -> None:
        self._root = root
        self._threads = threads
        self.url = url
        self.is_immutable = is_immutable
        self.use_vhd_directory = use_vhd_directory
        self.bounds_itself = threads.abandons

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
        for first in range(0, len(paths), _FILES_PER_HOP):
            batch = paths[first : first + _FILES_PER_HOP]
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

        await self._threads.run(Work.DISK, write)

    def create(
        self, path: str, *, exclusive: bool = False
    ) -> AbstractAsyncContextManager[FileWriter]:
        return self._create(path, exclusive=exclusive)

    @contextlib.asynccontextmanager
    async def _create(self, path: str, *, exclusive: bool) -> AsyncIterator[FileWriter]:
        file = NewFile(self._root, path, exclusive=exclusive, in_place=self.is_immutable)
        async with _ended(
            self._threads,
            f"removing the temporary file of '{file.path}'",
            file.discard,
            note="its temporary file is left behind",
        ):
            await self._threads.run(Work.DISK, file.open)
            yield _Writer(self._threads, file)

    def edit(self, path: str) -> AbstractAsyncContextManager[FileEditor]:
        return self._edit(path)

    @contextlib.asynccontextmanager
    async def _edit(self, path: str) -> AsyncIterator[FileEditor]:
        if self.is_immutable:
            raise _immutable("changed", path)
        file = await self._threads.run(
            Work.DISK, EditedFile, self._root, path, dispose=EditedFile.close
        )
        async with _ended(
            self._threads, f"closing '{file.path}'", file.close, note="it is not closed"
        ):
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
            yield _Batch(self._threads, files)
        finally:
            if self._threads.abandons:  # NFS sends what was not committed
                with contextlib.suppress(ProxyError), undo_within("closing files", _UNDO_SECONDS):
                    await self._threads.end(files.close)
            else:
                files.close()

    async def rename_all(self, pairs: Sequence[tuple[str, str]]) -> Sequence[int]:
        if self.is_immutable and pairs:
            raise _immutable("renamed", pairs[0][0])
        renames = Renames(self._root)
        async with _ended(
            self._threads,
            "making renames durable",
            renames.sync,
            note="a crash may undo what was renamed",
        ):
            for first in range(0, len(pairs), _RENAMES_PER_HOP):
                some = pairs[first : first + _RENAMES_PER_HOP]
                await self._threads.run(Work.DISK, renames.run, some, first)
            await self._threads.run(Work.DISK, renames.sync)
        return tuple(renames.missing)

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

    async def list(self, path: str) -> list[Entry]:
        return await self._threads.run(Work.DISK, self._root.entries, path, abandon=True)

    async def stat(self, path: str) -> FileStat:
        return await self._threads.run(Work.DISK, self._root.stat, path, abandon=True)

    async def rename(self, old: str, new: str) -> None:
        if self.is_immutable:
            raise _immutable("renamed", old)
        await self._threads.run(Work.DISK, self._root.rename, old, new)

    async def unlink(self, path: str, *, missing_ok: bool = True) -> None:
        try:
            await self._threads.run(Work.DISK, self._root.unlink, path)
        except NotFound as error:
            if not (missing_ok and error.code == "ENOENT"):
                raise

    async def mktree(self, path: str) -> None:
        await self._threads.run(Work.DISK, self._root.mktree, path)

    async def rmdir(self, path: str, *, missing_ok: bool = True) -> None:
        try:
            await self._threads.run(Work.DISK, self._root.rmdir, path)
        except NotFound as error:
            if not (missing_ok and error.code == "ENOENT"):
                raise

    async def rmtree(self, path: str) -> None:
        """One directory per step, so that a cancel takes effect between two."""
        if not paths.normalise(path):
            raise Refused(
                "EBUSY: the root of a remote cannot be removed", code="EBUSY", data={"path": "/"}
            )
        try:
            if not (await self.stat(path)).is_dir:
                raise Conflict(
                    f"ENOTDIR: not a directory, rmtree '{path}'",
                    code="ENOTDIR",
                    data={"path": path},
                )
            await self._remove(paths.normalise(path))
        except NotFound as error:
            if error.code != "ENOENT":
                raise

    async def _remove(self, top: str) -> None:
        # (directory, times it was emptied); depth first without recursion: a hostile
        # remote may nest deeper than the interpreter's stack
        pending = [(top, 0)]
        while pending:
            directory, rounds = pending.pop()
            try:
                if rounds:
                    await self._threads.run(Work.DISK, self._root.rmdir, directory)
                    continue
            except Conflict:
                if rounds > _CLEAR_ROUNDS:
                    raise
            except NotFound as error:
                if error.code != "ENOENT":
                    raise
                continue
            try:
                below = await self._threads.run(Work.DISK, self._root.clear, directory)
            except NotFound as error:
                if error.code != "ENOENT":
                    raise
                continue
            pending.append((directory, rounds + 1))
            pending.extend((name, 0) for name in below)

    def lock(self, path: str, *, owner: str, wait: float = 0) -> AbstractAsyncContextManager[Lock]:
        return hold(self._root, path, owner=owner, wait=wait, threads=self._threads)

    async def protected(self, files: Sequence[str]) -> Sequence[bool]:
        """See :func:`proxy.remotes.wrapper.protected_of`; opened for writing, not written."""
        found: deque[bool] = deque()
        for first in range(0, len(files), _FILES_PER_HOP):
            some = files[first : first + _FILES_PER_HOP]
            found.extend(await self._threads.run(Work.DISK, self._protected, some))
        return tuple(found)

    def _protected(self, files: Sequence[str]) -> Sequence[bool]:
        return tuple(map(self._is_protected, files))

    def _is_protected(self, path: str) -> bool:
        try:
            descriptor, _ = self._root.open_file(path, os.O_RDWR)
        except Refused as error:
            return error.code in ("EPERM", "EACCES")
        except ProxyError:
            return False
        os.close(descriptor)
        return False

    async def info(self) -> RemoteInfo:
        return await self._threads.run(Work.DISK, self._root.info, abandon=True)

    async def aclose(self) -> None:
        """Idempotent.  Operations under way finish; later ones are ``Refused`` (``EBADF``)."""
        if self._threads.abandons:
            await self._threads.end(self._root.close)  # a close may wait for the server
        else:
            self._root.close()
            await trio.lowlevel.checkpoint()

    async def walk(self, path: str) -> AsyncIterator[tuple[str, FileStat]]:
        """Files only, each directory in one step.  What appears or vanishes below ``path``
        meanwhile may or may not be seen; any other failure is raised, never skipped."""
        top = paths.normalise(path)
        pending = [top]
        while pending:
            directory = pending.pop()
            try:
                found = await self._threads.run(
                    Work.DISK, self._root.list_with_stat, directory, abandon=True
                )
            except NotFound as error:
                if directory == top or error.code != "ENOENT":
                    raise
                continue
            below: list[str] = []
            for name, status in found:
                full = paths.join(directory, name)
                if status.is_dir:
                    below.append(full)
                else:
                    yield full, status
            pending.extend(reversed(below))


def _immutable(what: str, path: str) -> Refused:
    return Refused(
        f"EPERM: '{path}' cannot be {what} on an immutable remote",
        code="EPERM",
        data={"path": path},
    )


@contextlib.asynccontextmanager
async def _ended(
    threads: Threads, name: str, end: Callable[[], None], *, note: str
) -> AsyncIterator[None]:
    """Call ``end`` behind the block, whatever happens; ``note`` is what its failure means.

    The block's own error is the one to tell: a failure of ``end`` is then added to it.
    """
    try:
        yield
    except BaseException as error:
        try:
            await _end(threads, name, end)
        except Exception as undo:  # noqa: BLE001 (the first failure is the one to tell)
            error.add_note(f"and {note}: {undo}")
        raise
    else:
        await _end(threads, name, end)


async def _end(threads: Threads, name: str, end: Callable[[], None]) -> None:
    with undo_within(name, _UNDO_SECONDS):
        # abandoned on a remote that hangs: it touches only what nobody else knows
        await threads.end(end)


class _Writer:
    def __init__(self, threads: Threads, file: NewFile) -> None:
        self._threads = threads
        self._file = file
        self.temporary_path = file.temporary_path

    async def write(self, data: bytes | memoryview) -> None:
        await self._threads.run(Work.DISK, self._file.write, data)

    async def commit(self) -> None:
        await self._threads.run(Work.DISK, self._file.sync)
        # a cancel that came during the fsync, which may be long, is heard here
        await self._threads.run(Work.DISK, self._file.publish)


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


class _Batch:
    def __init__(self, threads: Threads, files: Files) -> None:
        self._threads = threads
        self._files = files

    async def write(self, path: str, data: bytes | memoryview) -> None:
        await self._threads.run(Work.DISK, self._files.write, path, data)

    async def commit(self) -> None:
        await self._threads.run(Work.DISK, self._files.sync)
