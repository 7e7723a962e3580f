"""A remote around a remote: what all wrappers share.

Every operation passes through :meth:`Wrapper.around`, which a wrapper overrides once
instead of overriding twenty methods.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from proxy.errors import ProxyError
    from proxy.remotes.interface import (
        Batch,
        Entry,
        FileEditor,
        FileReader,
        FileStat,
        FileWriter,
        Lock,
        OpenUpload,
        Remote,
        RemoteInfo,
    )

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Operation:
    """One call on a remote, or on a file or lock that it opened.

    ``verb`` is the method's name, or one of ``create.open create.write create.commit
    create.close read.open read.read_into read.read_at read.read_into_at edit.open
    edit.read_into edit.write_at edit.truncate edit.sync batch.open batch.write batch.commit
    lock.acquire lock.held lock.check lock.release``; ``create.close`` and ``lock.release`` come
    before the undo or release.
    ``path`` is as the caller gave it.
    """

    verb: str
    path: str
    target: str | None = None
    """``rename``: the new name; ``create.*``: the temporary path, once it is known."""
    size: int = 0
    """Bytes that are written, or asked for."""
    data: bytes | memoryview | None = None
    """What is written; valid only during the call."""
    exclusive: bool = False
    offset: int = 0
    """``edit.*``: where in the file; ``edit.truncate``: its new size."""
    batch: object = None
    """``batch.*``: which one, the same object for all its operations."""
    pairs: Sequence[tuple[str, str]] = ()
    """``rename_all``: old and new names."""
    partially: Callable[[int], Awaitable[None]] | None = None
    """Of writes: do it with the first so many bytes alone."""


async def capabilities_of(remote: Remote) -> Mapping[str, Any]:
    """What a remote says of itself beyond the interface, as JSON values; empty when nothing.

    Object stores have ``async def capabilities()``: it asks the store and may fail as any
    operation does.
    """
    asked = getattr(remote, "capabilities", None)
    return {} if asked is None else await asked()


def requests_of(remote: Remote) -> Mapping[str, int]:
    """How many requests a remote has sent since it was opened, by its protocol's verb.

    Empty for remotes that are no network protocol of ours.
    """
    asked = getattr(remote, "requests", None)
    return {} if asked is None else asked()


def innermost(remote: Remote) -> Remote:
    """What is left of ``remote`` without wrappers."""
    while isinstance(remote, Wrapper):
        remote = remote.inner
    return remote


def tries_again(remote: Remote) -> bool:
    """Whether the storage itself repeats what fails for a reason that passes: one try inside
    another would multiply the waits."""
    return getattr(innermost(remote), "tries_again", False)


def bounds_itself(remote: Remote) -> bool:
    """Whether the storage itself ends what hangs, step by step: a second deadline around it
    would take its own from it."""
    return getattr(innermost(remote), "bounds_itself", False)


def writers_wait(remote: Remote) -> bool:
    """Whether a write to one file may wait for what writers of others give back, which these do
    only when they can go on: it must hold nothing that they need."""
    return getattr(innermost(remote), "writers_wait", False)


def may_write_later(remote: Remote) -> bool:
    """Whether a write that failed may still be going on, with the memory that it was given.

    Then what was written again in its place may be overwritten by what stands in that memory: so
    nobody may put other bytes there.  Of a storage that says nothing it is so.
    """
    return getattr(innermost(remote), "may_write_later", True)


async def protected_of(remote: Remote, files: Sequence[str]) -> Sequence[bool]:
    """Of each file, whether the storage refuses to change it *now*: tried, and without effect.

    For files that somebody else protects (``chattr +i``, a read-only export).  A remote that
    cannot tell, and a file that cannot be looked at, give ``False``: nobody may believe that they
    are safe.  Remotes that can tell have ``async def protected(files)``.
    """
    asked = getattr(remote, "protected", None)
    return [False] * len(files) if asked is None else await asked(files)


async def open_uploads_of(remote: Remote, path: str) -> Sequence[OpenUpload]:
    """What somebody began to send below the directory ``path`` and has not completed.

    All of it or an error, but for what this process itself has under way, and for stores that
    tell nothing of it: file systems, Azure (which forgets them after a week), and MinIO (it
    tells those of whole names alone; it forgets them after a day).  ``Unauthorized`` without the
    permission ``s3:ListBucketMultipartUploads``, ``Refused`` (``ENOTSUP``) by a server that does
    not know the call.

    **Their writers may be alive**, in another proxy or in Xen Orchestra, which takes no lock in
    an object store: hold the lock of the directory, and leave alone what may still be growing.
    """
    asked = getattr(remote, "open_uploads", None)
    return () if asked is None else await asked(path)


async def abort_upload_of(remote: Remote, upload: OpenUpload) -> None:
    """Give up what :func:`open_uploads_of` told of: its writer can no longer complete it.

    No error when it is gone.  On cancel it is given up or not.
    """
    asked = getattr(remote, "abort_upload", None)
    if asked is not None:
        await asked(upload)


class Wrapper:
    """Passes everything to ``inner``; see :class:`proxy.remotes.interface.Remote`."""

    def __init__(self, inner: Remote) -> None:
        self.inner = inner
        self.url = inner.url
        self.is_encrypted = inner.is_encrypted
        self.is_immutable = inner.is_immutable
        self.use_vhd_directory = inner.use_vhd_directory

    async def capabilities(self) -> Mapping[str, Any]:
        """See :func:`capabilities_of`."""
        return await self.around(Operation("capabilities", ""), lambda: capabilities_of(self.inner))

    def requests(self) -> Mapping[str, int]:
        """See :func:`requests_of`."""
        return requests_of(self.inner)

    async def protected(self, files: Sequence[str]) -> Sequence[bool]:
        """See :func:`protected_of`."""
        return await self.around(
            Operation("protected", files[0] if files else ""),
            lambda: protected_of(self.inner, files),
        )

    async def open_uploads(self, path: str) -> Sequence[OpenUpload]:
        """See :func:`open_uploads_of`."""
        return await self.around(
            Operation("open_uploads", path), lambda: open_uploads_of(self.inner, path)
        )

    async def abort_upload(self, upload: OpenUpload) -> None:
        """See :func:`abort_upload_of`."""
        await self.around(
            Operation("abort_upload", upload.path), lambda: abort_upload_of(self.inner, upload)
        )

    async def around(self, operation: Operation, run: Callable[[], Awaitable[T]]) -> T:
        """Do ``operation`` by awaiting ``run()`` and return its result."""
        del operation
        return await run()

    async def read_file(self, path: str, *, limit: int = 64 * 1024 * 1024) -> bytes:
        return await self.around(
            Operation("read_file", path), lambda: self.inner.read_file(path, limit=limit)
        )

    async def read_files(
        self, paths: Sequence[str], *, limit: int = 16 * 1024 * 1024
    ) -> Sequence[bytes | ProxyError]:
        return await self.around(
            Operation("read_files", paths[0] if paths else ""),
            lambda: self.inner.read_files(paths, limit=limit),
        )

    async def write_file(self, path: str, data: bytes, *, exclusive: bool = False) -> None:
        await self.around(
            Operation(
                "write_file",
                path,
                size=len(data),
                data=data,
                exclusive=exclusive,
                partially=lambda size: self.inner.write_file(
                    path, data[:size], exclusive=exclusive
                ),
            ),
            lambda: self.inner.write_file(path, data, exclusive=exclusive),
        )

    def create(
        self, path: str, *, exclusive: bool = False
    ) -> AbstractAsyncContextManager[FileWriter]:
        return self._create(path, exclusive=exclusive)

    @contextlib.asynccontextmanager
    async def _create(self, path: str, *, exclusive: bool) -> AsyncIterator[FileWriter]:
        async with contextlib.AsyncExitStack() as stack:
            file = await self.around(
                Operation("create.open", path, exclusive=exclusive),
                lambda: stack.enter_async_context(self.inner.create(path, exclusive=exclusive)),
            )
            end = Operation("create.close", path, file.temporary_path)
            # on the stack, a fault in it never skips the inner file's own end
            stack.push_async_callback(self.around, end, _nothing)
            yield _Writer(self, path, file, exclusive=exclusive)

    def edit(self, path: str) -> AbstractAsyncContextManager[FileEditor]:
        return self._edit(path)

    @contextlib.asynccontextmanager
    async def _edit(self, path: str) -> AsyncIterator[FileEditor]:
        async with contextlib.AsyncExitStack() as stack:
            file = await self.around(
                Operation("edit.open", path),
                lambda: stack.enter_async_context(self.inner.edit(path)),
            )
            yield _Editor(self, path, file)

    def batch(self) -> AbstractAsyncContextManager[Batch]:
        return self._batch()

    @contextlib.asynccontextmanager
    async def _batch(self) -> AsyncIterator[Batch]:
        async with contextlib.AsyncExitStack() as stack:
            inner = await self.around(
                Operation("batch.open", ""),
                lambda: stack.enter_async_context(self.inner.batch()),
            )
            yield _Batch(self, inner)

    async def rename_all(self, pairs: Sequence[tuple[str, str]]) -> Sequence[int]:
        first = pairs[0][0] if pairs else ""
        return await self.around(
            Operation("rename_all", first, pairs=pairs), lambda: self.inner.rename_all(pairs)
        )

    def open_read(self, path: str) -> AbstractAsyncContextManager[FileReader]:
        return self._open_read(path)

    @contextlib.asynccontextmanager
    async def _open_read(self, path: str) -> AsyncIterator[FileReader]:
        async with contextlib.AsyncExitStack() as stack:
            file = await self.around(
                Operation("read.open", path),
                lambda: stack.enter_async_context(self.inner.open_read(path)),
            )
            yield _Reader(self, path, file)

    async def list(self, path: str) -> list[Entry]:
        return await self.around(Operation("list", path), lambda: self.inner.list(path))

    async def stat(self, path: str) -> FileStat:
        return await self.around(Operation("stat", path), lambda: self.inner.stat(path))

    async def rename(self, old: str, new: str) -> None:
        await self.around(Operation("rename", old, target=new), lambda: self.inner.rename(old, new))

    async def unlink(self, path: str, *, missing_ok: bool = True) -> None:
        await self.around(
            Operation("unlink", path), lambda: self.inner.unlink(path, missing_ok=missing_ok)
        )

    async def mktree(self, path: str) -> None:
        await self.around(Operation("mktree", path), lambda: self.inner.mktree(path))

    async def rmdir(self, path: str, *, missing_ok: bool = True) -> None:
        await self.around(
            Operation("rmdir", path), lambda: self.inner.rmdir(path, missing_ok=missing_ok)
        )

    async def rmtree(self, path: str) -> None:
        await self.around(Operation("rmtree", path), lambda: self.inner.rmtree(path))

    def lock(self, path: str, *, owner: str, wait: float = 0) -> AbstractAsyncContextManager[Lock]:
        return self._lock(path, owner=owner, wait=wait)

    @contextlib.asynccontextmanager
    async def _lock(self, path: str, *, owner: str, wait: float) -> AsyncIterator[Lock]:
        await self.around(Operation("lock.acquire", path), _nothing)
        async with contextlib.AsyncExitStack() as stack:
            lock = await stack.enter_async_context(self.inner.lock(path, owner=owner, wait=wait))
            stack.push_async_callback(self.around, Operation("lock.release", path), _nothing)
            await self.around(Operation("lock.held", path), _nothing)
            yield _Lock(self, path, lock)

    async def info(self) -> RemoteInfo:
        return await self.around(Operation("info", ""), self.inner.info)

    async def aclose(self) -> None:
        await self.around(Operation("aclose", ""), self.inner.aclose)

    async def walk(self, path: str) -> AsyncIterator[tuple[str, FileStat]]:
        await self.around(Operation("walk", path), _nothing)
        async for item in self.inner.walk(path):
            yield item


async def _nothing() -> None:
    return None


class _Writer:
    def __init__(self, owner: Wrapper, path: str, inner: FileWriter, *, exclusive: bool) -> None:
        self.temporary_path = inner.temporary_path
        self._owner = owner
        self._path = path
        self._inner = inner
        self._exclusive = exclusive

    async def write(self, data: bytes | memoryview) -> None:
        await self._owner.around(
            Operation(
                "create.write",
                self._path,
                self.temporary_path,
                size=len(data),
                data=data,
                partially=lambda size: self._inner.write(memoryview(data)[:size]),
            ),
            lambda: self._inner.write(data),
        )

    async def commit(self) -> None:
        await self._owner.around(
            Operation("create.commit", self._path, self.temporary_path, exclusive=self._exclusive),
            self._inner.commit,
        )


class _Reader:
    def __init__(self, owner: Wrapper, path: str, inner: FileReader) -> None:
        self.size = inner.size
        self._owner = owner
        self._path = path
        self._inner = inner

    async def read_into(self, buffer: memoryview) -> int:
        return await self._owner.around(
            Operation("read.read_into", self._path, size=len(buffer)),
            lambda: self._inner.read_into(buffer),
        )

    async def read_at(self, offset: int, length: int) -> bytes:
        return await self._owner.around(
            Operation("read.read_at", self._path, size=length),
            lambda: self._inner.read_at(offset, length),
        )

    async def read_into_at(self, offset: int, buffer: memoryview) -> int:
        return await self._owner.around(
            Operation("read.read_into_at", self._path, size=len(buffer)),
            lambda: self._inner.read_into_at(offset, buffer),
        )


class _Editor:
    def __init__(self, owner: Wrapper, path: str, inner: FileEditor) -> None:
        self._owner = owner
        self._path = path
        self._inner = inner

    @property
    def size(self) -> int:
        return self._inner.size

    async def read_into(self, offset: int, buffer: memoryview) -> int:
        return await self._owner.around(
            Operation("edit.read_into", self._path, size=len(buffer), offset=offset),
            lambda: self._inner.read_into(offset, buffer),
        )

    async def write_at(self, offset: int, data: bytes | memoryview) -> None:
        await self._owner.around(
            Operation(
                "edit.write_at",
                self._path,
                size=len(data),
                data=data,
                offset=offset,
                partially=lambda size: self._inner.write_at(offset, memoryview(data)[:size]),
            ),
            lambda: self._inner.write_at(offset, data),
        )

    async def truncate(self, size: int) -> None:
        await self._owner.around(
            Operation("edit.truncate", self._path, offset=size),
            lambda: self._inner.truncate(size),
        )

    async def sync(self) -> None:
        await self._owner.around(Operation("edit.sync", self._path), self._inner.sync)


class _Batch:
    def __init__(self, owner: Wrapper, inner: Batch) -> None:
        self._owner = owner
        self._inner = inner

    async def write(self, path: str, data: bytes | memoryview) -> None:
        await self._owner.around(
            Operation(
                "batch.write",
                path,
                size=len(data),
                data=data,
                batch=self,
                partially=lambda size: self._inner.write(path, memoryview(data)[:size]),
            ),
            lambda: self._inner.write(path, data),
        )

    async def commit(self) -> None:
        await self._owner.around(Operation("batch.commit", "", batch=self), self._inner.commit)


class _Lock:
    def __init__(self, owner: Wrapper, path: str, inner: Lock) -> None:
        self._owner = owner
        self._path = path
        self._inner = inner

    async def check(self) -> None:
        await self._owner.around(Operation("lock.check", self._path), self._inner.check)
