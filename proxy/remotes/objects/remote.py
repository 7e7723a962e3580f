"""The remote in an object store: keys below a prefix.

What is different from a file system, beside the speed of single calls:

- A directory exists only while it holds something: :meth:`ObjectRemote.mktree` makes nothing.
- One name can be a file and a directory: writing does not look for either.
- Nothing has a temporary name: an object is there whole or not at all.
- Renaming is copying and removing, and nothing can be changed in place.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, NoReturn

import trio

from proxy.errors import Conflict, NotFound, ProxyError, Refused
from proxy.remotes import paths
from proxy.remotes.holding import held
from proxy.remotes.interface import FileStat, OpenUpload, RemoteInfo
from proxy.remotes.objects.lease import Lease
from proxy.remotes.objects.listing import Keys, entries, first_below, missing, open_uploads, pages
from proxy.remotes.objects.moving import Mover
from proxy.remotes.objects.parts import Memory
from proxy.remotes.objects.reading import ObjectReader
from proxy.remotes.objects.removing import Remover
from proxy.remotes.objects.store import Condition
from proxy.remotes.objects.writing import ObjectWriter, has_conditions, refuse_existing
from proxy.remotes.tree import immutable
from proxy.runtime.background import background

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from proxy.remotes.interface import Batch, Entry, FileEditor, FileReader, FileWriter, Lock
    from proxy.remotes.objects.store import ObjectStore

_READS_AT_ONCE = 16
_WRITES_AT_ONCE = 32


class ObjectRemote:
    """See :class:`proxy.remotes.interface.Remote` for the contract.

    ``store`` tries again what fails for a reason that passes; it is closed with the remote.
    """

    is_encrypted = False
    use_vhd_directory = True
    """Whatever the URL says: nothing can be changed in place."""
    tries_again = True
    """See :func:`proxy.remotes.wrapper.tries_again`."""
    bounds_itself = True
    """See :func:`proxy.remotes.wrapper.bounds_itself`."""
    may_write_later = False
    """A failed request has ended; see :func:`proxy.remotes.wrapper.may_write_later`."""
    writers_wait = True
    """For the memory of parts; see :func:`proxy.remotes.wrapper.writers_wait`."""

    def __init__(
        self,
        store: ObjectStore,
        prefix: str,
        *,
        url: str,
        is_immutable: bool = False,
        memory: Memory | None = None,
    ) -> None:
        self.url = url
        self.is_immutable = is_immutable
        self._store = store
        self._keys = Keys(prefix)
        self._remover = Remover(store)
        self._mover = Mover(store, self._keys, self._remover)
        self._memory = memory or Memory()
        self._writes = trio.CapacityLimiter(_WRITES_AT_ONCE)
        self._closed = False

    # -- reading

    async def read_file(self, path: str, *, limit: int = 64 * 1024 * 1024) -> bytes:
        return await self._store.get(self._key(path, "read"), limit=limit)

    async def read_files(
        self, paths: Sequence[str], *, limit: int = 16 * 1024 * 1024
    ) -> Sequence[bytes | ProxyError]:
        contents: dict[int, bytes | ProxyError] = {}
        left = iter(enumerate(paths))

        async def work() -> None:
            for position, path in left:
                try:
                    contents[position] = await self.read_file(path, limit=limit)
                except ProxyError as error:
                    contents[position] = error

        async with trio.open_nursery() as nursery:
            for _ in range(min(_READS_AT_ONCE, len(paths))):
                nursery.start_soon(work)
        return tuple(contents[position] for position in range(len(paths)))

    def open_read(self, path: str) -> AbstractAsyncContextManager[FileReader]:
        return self._open_read(path)

    @contextlib.asynccontextmanager
    async def _open_read(self, path: str) -> AsyncIterator[FileReader]:
        key = self._key(path, "read")
        status = await self._store.head(key)
        async with background() as nursery:
            yield ObjectReader(self._store, key, status, nursery)

    async def list(self, path: str) -> list[Entry]:
        return await entries(self._store, self._keys, self._normal(path))

    async def stat(self, path: str) -> FileStat:
        """Of a directory: ``size`` 0 and the time of any object in it."""
        normal = self._normal(path)
        try:
            if normal:
                status = await self._store.head(self._keys.of(normal))
                return FileStat(status.size, status.mtime, is_dir=False)
        except NotFound as error:
            if error.code != "ENOENT":
                raise
        inside = await first_below(self._store, self._keys, normal)
        if inside is None and normal:
            raise missing("stat", path)
        return FileStat(0, inside.mtime if inside else 0.0, is_dir=True)

    async def walk(self, path: str) -> AsyncIterator[tuple[str, FileStat]]:
        """Page by page; what changes meanwhile may or may not be seen."""
        normal = self._normal(path)
        found = not normal
        async for page in pages(self._store, self._keys.below(normal), deep=True):
            found = found or bool(page.objects)
            for each in page.objects:
                inside = self._keys.path_of(each.key)
                if inside == paths.normalise(inside):  # no marker, no name that no path has
                    yield inside, FileStat(each.size, each.mtime, is_dir=False)
        if not found:
            raise missing("walk", path)

    # -- writing

    async def write_file(self, path: str, data: bytes, *, exclusive: bool = False) -> None:
        """One put.  ``exclusive``: decided by the store where it can; else one that is made a
        moment after the look is replaced."""
        await self.put(path, data, exclusive=exclusive)

    async def put(self, path: str, data: bytes | memoryview, *, exclusive: bool = False) -> None:
        """As :meth:`write_file`; when there are many, some wait for others."""
        key = self._key(path, "write")
        condition = None
        if exclusive or self.is_immutable:
            if await has_conditions(self._store):
                condition = Condition(absent=True)
            else:
                await refuse_existing(self._store, key, path)
        try:
            async with self._writes:
                await self._store.put(key, data, condition=condition)
        except Conflict as error:
            raise Conflict(
                f"EEXIST: file already exists, write '{path}'", code="EEXIST", data={"path": path}
            ) from error

    def create(
        self, path: str, *, exclusive: bool = False
    ) -> AbstractAsyncContextManager[FileWriter]:
        return self._create(path, exclusive=exclusive or self.is_immutable)

    @contextlib.asynccontextmanager
    async def _create(self, path: str, *, exclusive: bool) -> AsyncIterator[FileWriter]:
        key = self._key(path, "write")
        if exclusive:
            await refuse_existing(self._store, key, path)
        writer: ObjectWriter | None = None
        try:
            async with background() as nursery:
                writer = ObjectWriter(
                    self._store,
                    self._memory,
                    nursery,
                    key=key,
                    path=self._normal(path),
                    exclusive=exclusive,
                )
                yield writer
        finally:
            if writer is not None:
                await writer.discard()

    def edit(self, path: str) -> AbstractAsyncContextManager[FileEditor]:
        """Always refused, as the contract says for remotes that cannot."""
        return _NoEdit(lambda: self._refuse_edit(path))

    async def _refuse_edit(self, path: str) -> NoReturn:
        if self.is_immutable:
            raise immutable("changed", path)
        self._key(path, "edit")
        if (await self.stat(path)).is_dir:
            raise Conflict(f"EISDIR: is a directory, edit '{path}'", code="EISDIR")
        raise Refused(
            f"ENOTSUP: an object cannot be changed in place, edit '{path}'",
            code="ENOTSUP",
            data={"path": path},
        )

    def batch(self) -> AbstractAsyncContextManager[Batch]:
        return self._batch()

    @contextlib.asynccontextmanager
    async def _batch(self) -> AsyncIterator[Batch]:
        self._normal("")
        await trio.lowlevel.checkpoint()
        yield _Batch(self.put)

    # -- renaming and removing

    async def rename(self, old: str, new: str) -> None:
        self._refuse_root(old, new)
        await self._mover.rename(self._normal(old), self._normal(new))

    async def rename_all(self, pairs: Sequence[tuple[str, str]]) -> Sequence[int]:
        """Those whose names do not touch go together; when one of these fails, others of them
        may be done that come later."""
        wanted: list[tuple[str, str]] = []
        refusal: ProxyError | None = None
        for old, new in pairs:
            try:
                self._refuse_root(old, new)
                wanted.append((self._normal(old), self._normal(new)))
            except ProxyError as error:
                refusal = error
                break
        gone = await self._mover.rename_all(wanted)
        if refusal is not None:
            raise refusal
        return gone

    def _refuse_root(self, old: str, new: str) -> None:
        if self.is_immutable:
            raise immutable("renamed", old)
        self._key(old, "rename")
        self._key(new, "rename")

    async def unlink(self, path: str, *, missing_ok: bool = True) -> None:
        """Of a directory nothing is removed: it has no object of its own."""
        key = self._key(path, "unlink")
        if not missing_ok:
            await self._store.head(key)
        await self._store.delete(key)

    async def mktree(self, path: str) -> None:
        """Makes nothing: a directory is there as soon as something is in it."""
        self._normal(path)
        await trio.lowlevel.checkpoint()

    async def rmdir(self, path: str, *, missing_ok: bool = True) -> None:
        self._key(path, "rmdir")
        normal = self._normal(path)
        marker = self._keys.below(normal)
        found = False
        async for page in pages(self._store, marker, deep=True):
            found = found or bool(page.objects)
            if any(each.key != marker for each in page.objects):
                raise Conflict(
                    f"ENOTEMPTY: directory not empty, rmdir '{path}'",
                    code="ENOTEMPTY",
                    data={"path": path},
                )
        if found:
            await self._store.delete(marker)
        elif not missing_ok:
            raise missing("rmdir", path)

    async def rmtree(self, path: str) -> None:
        key = self._key(path, "rmtree")
        if not await self._remover.remove_tree(self._keys.below(self._normal(path))):
            try:
                await self._store.head(key)
            except NotFound as error:
                if error.code == "ENOENT":
                    return
                raise
            raise Conflict(
                f"ENOTDIR: not a directory, rmtree '{path}'", code="ENOTDIR", data={"path": path}
            )

    # -- what dead writers left

    async def open_uploads(self, path: str) -> Sequence[OpenUpload]:
        """See :func:`proxy.remotes.wrapper.open_uploads_of`."""
        uploads = await open_uploads(self._store, self._keys.below(self._normal(path)))
        found = (
            OpenUpload(self._keys.path_of(each.key), each.upload_id, each.initiated)
            for each in uploads
        )
        return tuple(each for each in found if each.path == paths.normalise(each.path))

    async def abort_upload(self, upload: OpenUpload) -> None:
        """See :func:`proxy.remotes.wrapper.abort_upload_of`."""
        key = self._key(upload.path, "give up")
        await self._store.abort_upload(key, upload.upload_id)

    # -- the whole

    def lock(self, path: str, *, owner: str, wait: float = 0) -> AbstractAsyncContextManager[Lock]:
        """See :mod:`proxy.remotes.objects.lease`: deciding that a lock is stale takes 30 s."""
        key = f"{self._key(path, 'lock')}.lock"
        return held(Lease(self._store, key, self._normal(path), owner), wait)

    async def info(self) -> RemoteInfo:
        """A store has no size that we could ask for."""
        await trio.lowlevel.checkpoint()
        return RemoteInfo()

    async def capabilities(self) -> Mapping[str, Any]:
        """What the store's endpoint can do; see :meth:`ObjectStore.capabilities`.

        ``lock`` says how safe locks are: ``conditional``, or ``write-then-verify`` with the window
        that :mod:`proxy.remotes.objects.lease` tells of.
        """
        found = await self._store.capabilities()
        lock = "conditional" if found.get("conditionalPut") else "write-then-verify"
        return {**found, "lock": lock}

    def requests(self) -> Mapping[str, int]:
        """Requests sent since it was opened, by verb."""
        return self._store.requests()

    async def aclose(self) -> None:
        """Idempotent.  Operations under way finish; later ones are ``Refused`` (``EBADF``)."""
        self._closed = True
        await self._store.aclose()

    def _normal(self, path: str) -> str:
        if self._closed:
            raise Refused("EBADF: the remote is closed", code="EBADF", data={"path": path})
        return paths.normalise(path)

    def _key(self, path: str, doing: str) -> str:
        normal = self._normal(path)
        if not normal:
            raise Refused(
                f"EBUSY: that is the root of the remote, {doing} '/'",
                code="EBUSY",
                data={"path": "/"},
            )
        return self._keys.of(normal)


class _NoEdit:
    def __init__(self, refuse: Callable[[], Awaitable[FileEditor]]) -> None:
        self._refuse = refuse

    async def __aenter__(self) -> FileEditor:
        return await self._refuse()

    async def __aexit__(self, *_: object) -> None:
        return None


class _Batch:
    """Each object is durable when its put returns, so a commit has nothing left to do."""

    def __init__(self, put: Callable[[str, bytes | memoryview], Awaitable[None]]) -> None:
        self._put = put

    async def write(self, path: str, data: bytes | memoryview) -> None:
        await self._put(path, data)

    async def commit(self) -> None:
        await trio.lowlevel.checkpoint()
