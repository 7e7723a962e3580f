"""The remote on an SMB share that no kernel has mounted."""

from __future__ import annotations

import contextlib
import re
from collections import deque
from typing import TYPE_CHECKING, Any, Final, TypeVar

import trio

from proxy.errors import NotFound, ProxyError, Refused, Unreachable
from proxy.remotes.holding import held
from proxy.remotes.smb.connection import NO_SHARE, Login
from proxy.remotes.smb.files import (
    EditedFile,
    Files,
    NewFile,
    OpenedFile,
    Renames,
    write_whole,
)
from proxy.remotes.smb.lock import ShareLock
from proxy.remotes.smb.names import Place
from proxy.remotes.smb.options import parse_options
from proxy.remotes.smb.share import Call, Share
from proxy.remotes.tree import (
    UNDO_SECONDS,
    TreeRemote,
    Writer,
    WrittenTogether,
    immutable,
    refuses_change,
)
from proxy.runtime.deadlines import deadline, undo_within
from proxy.runtime.threads import Work, in_thread

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from proxy.remotes.interface import (
        Batch,
        FileEditor,
        FileReader,
        FileWriter,
        Lock,
        Remote,
    )
    from proxy.remotes.url import SmbUrl

T = TypeVar("T")

GRACE_SECONDS = 5.0
"""After a cancel a call that is under way may end well; then its connection is ended."""
_LOCK_GRACE_SECONDS: Final = 0.5
_ABORTED_SECONDS: Final = 1.0
"""A call whose connection was ended returns at once, unless it is still connecting."""


async def open_smb_client(url: SmbUrl, merged: Mapping[str, Any], *, seconds: float = 30) -> Remote:
    r"""Log in to the share of ``url`` and make the remote's directory there when it is missing.

    ``merged`` is XO's record of the remote under the URL's own options; of it ``options``,
    ``immutable`` and ``useVhdDirectory`` are read.  Raises ``Refused`` for options that cannot be
    honoured, before anything is sent; ``Unauthorized``, ``NotFound`` naming the share,
    ``Unreachable``.  On cancel nothing stays open.
    """
    text = merged.get("options")
    if text is not None and not isinstance(text, str):
        raise Refused("SMB options: not a text", code="EINVAL", data={"option": "options"})
    options = parse_options(text)
    server, share, below = _target(url)
    login = Login(
        server=server,
        share=share,
        username=options.username or url.username,
        password=url.password if options.password is None else options.password,
        domain=options.domain or url.domain,
        options=options,
    )
    place = Place(f"{below}/{url.path}")
    # Two connections: what is small never queues behind a backup's data, and no server lets a
    # file be replaced that the same connection reads.
    control = Share(login, place)
    remote = SmbRemote(
        control,
        Share(login, place, names=control),
        url=url.public,
        is_immutable=merged.get("immutable") is True,
        use_vhd_directory=bool(merged.get("useVhdDirectory")),
    )
    try:
        with deadline("opening the SMB remote", seconds):
            await remote.check()
    except BaseException as error:
        with trio.CancelScope(shield=True):
            await remote.aclose()
        if isinstance(error, Unreachable) and error.code == NO_SHARE:
            raise NotFound(error.message, data=error.data) from error
        raise
    return remote


def _target(url: SmbUrl) -> tuple[str, str, str]:
    parts = [part for part in re.split(r"[\\/]", url.host) if part]
    if len(parts) < 2:
        raise Refused(
            r"remote URL: host must be server\share", code="EINVAL", data={"part": "host"}
        )
    return parts[0].strip("[]"), parts[1], "/".join(parts[2:])


class SmbRemote(TreeRemote):
    """See :class:`proxy.remotes.interface.Remote` for the contract.

    A cancelled call is waited for while the server answers, then its connection is ended, so that
    nothing of it happens later; whoever else had files open on that connection is told so.
    """

    is_encrypted = False
    bounds_itself = True
    """See :func:`proxy.remotes.wrapper.bounds_itself`."""
    files_per_hop = 16
    renames_per_hop = 64

    def __init__(
        self,
        control: Share,
        bulk: Share,
        *,
        url: str,
        is_immutable: bool = False,
        use_vhd_directory: bool = False,
    ) -> None:
        super().__init__(
            control, url=url, is_immutable=is_immutable, use_vhd_directory=use_vhd_directory
        )
        self._control = control
        self._bulk = bulk
        self._closed = False

    async def _run(
        self,
        share: Share,
        function: Callable[..., T],
        *args: object,
        work: Work = Work.SHARE,
        grace: float | None = None,
    ) -> T:
        """Call ``function`` in a thread; see the class for what a cancel does.

        The thread is always waited for, as it may still write into the caller's buffer; only
        those of locks, which have none, may be left behind while they connect.
        """
        call = Call()
        ended = trio.Event()
        outcome: list[T] = []
        failure: Exception | None = None
        waiting = trio.CancelScope(shield=True)

        async def end_on_cancel() -> None:
            try:
                await ended.wait()
            finally:
                if not ended.is_set():
                    with trio.CancelScope(shield=True):
                        with trio.move_on_after(GRACE_SECONDS if grace is None else grace):
                            await ended.wait()
                        if not ended.is_set():
                            call.is_given_up = True
                            share.abort()
                            with trio.move_on_after(_ABORTED_SECONDS):
                                await ended.wait()
                            if work is Work.LOCK:
                                waiting.cancel()

        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(end_on_cancel)
                try:
                    with waiting:
                        outcome.append(
                            await in_thread(work, call.run, function, *args, abandon=True)
                        )
                except Exception as error:  # noqa: BLE001 (raised below, out of the nursery's group)
                    failure = error
                finally:
                    ended.set()
        except trio.Cancelled:
            if not outcome:
                raise
            # what was opened has an owner; the cancel is heard at the next checkpoint
        if failure is not None:
            raise failure
        return outcome[0]

    async def check(self) -> None:
        """Make the remote's directory when it is missing, and see that it can be listed."""

        def check() -> None:
            if not self._control.is_read_only:
                self._control.make_root()
            self._control.stat("")
            self._control.items("")

        await self._run(self._control, check)

    async def read_file(self, path: str, *, limit: int = 64 * 1024 * 1024) -> bytes:
        return await self._run(self._bulk, self._bulk.read_file, path, limit)

    async def read_files(
        self, paths: Sequence[str], *, limit: int = 16 * 1024 * 1024
    ) -> Sequence[bytes | ProxyError]:
        """Many files per thread hop, all of them asked for before the first is taken."""
        contents: deque[bytes | ProxyError] = deque()
        for first in range(0, len(paths), self.files_per_hop):
            some = paths[first : first + self.files_per_hop]
            contents.extend(await self._run(self._bulk, self._read_some, some, limit))
        return tuple(contents)

    def _read_some(self, paths: Sequence[str], limit: int) -> Sequence[bytes | ProxyError]:
        started: deque[Any] = deque()
        for path in paths:
            try:
                started.append(self._bulk.start_read(path, limit))
            except ProxyError as error:
                started.append(error)
        contents: deque[bytes | ProxyError] = deque()
        for path, start in zip(paths, started, strict=True):
            if isinstance(start, ProxyError):
                contents.append(start)
                continue
            try:
                contents.append(self._bulk.finish_read(path, limit, start))
            except ProxyError as error:
                contents.append(error)
        return tuple(contents)

    async def write_file(self, path: str, data: bytes, *, exclusive: bool = False) -> None:
        def write() -> None:
            write_whole(self._bulk, path, data, exclusive=exclusive, in_place=self.is_immutable)

        await self._run(self._bulk, write)

    def create(
        self, path: str, *, exclusive: bool = False
    ) -> AbstractAsyncContextManager[FileWriter]:
        return self._create(path, exclusive=exclusive)

    @contextlib.asynccontextmanager
    async def _create(self, path: str, *, exclusive: bool) -> AsyncIterator[FileWriter]:
        file = NewFile(self._bulk, path, exclusive=exclusive, in_place=self.is_immutable)
        async with self.ended(
            f"removing the temporary file of '{file.path}'",
            file.discard,
            note="its temporary file is left behind",
        ):
            await self._run(self._bulk, file.open)
            yield Writer(self.on_bulk, file)

    def edit(self, path: str) -> AbstractAsyncContextManager[FileEditor]:
        return self._edit(path)

    @contextlib.asynccontextmanager
    async def _edit(self, path: str) -> AsyncIterator[FileEditor]:
        if self.is_immutable:
            raise immutable("changed", path)
        file = await self._run(self._bulk, EditedFile, self._bulk, path)
        async with self.ended(f"closing '{file.path}'", file.close, note="it is not closed"):
            yield _Editor(self, file)

    def batch(self) -> AbstractAsyncContextManager[Batch]:
        return self._batch()

    @contextlib.asynccontextmanager
    async def _batch(self) -> AsyncIterator[Batch]:
        await trio.lowlevel.checkpoint()
        files = Files(self._bulk, exclusive=self.is_immutable)
        try:
            yield WrittenTogether(self.on_bulk, files)
        finally:
            files.close()

    def new_renames(self) -> Renames:
        return Renames(self._control)

    def open_read(self, path: str) -> AbstractAsyncContextManager[FileReader]:
        return self._open_read(path)

    @contextlib.asynccontextmanager
    async def _open_read(self, path: str) -> AsyncIterator[FileReader]:
        file = await self._run(self._bulk, OpenedFile, self._bulk, path)
        async with self.ended(f"closing '{file.path}'", file.close, note="it is not closed"):
            yield _Reader(self, file)

    async def step(self, function: Callable[..., T], *args: object, looks: bool = False) -> T:
        del looks  # every call is waited for
        return await self._run(self._control, function, *args)

    async def end(self, function: Callable[[], None]) -> None:
        await self._run(self._bulk, function)

    def lock(self, path: str, *, owner: str, wait: float = 0) -> AbstractAsyncContextManager[Lock]:
        async def run(function: Callable[[], object]) -> object:
            return await self._run(
                self._control, function, work=Work.LOCK, grace=_LOCK_GRACE_SECONDS
            )

        return held(ShareLock(self._control, path, owner, run), wait)

    def is_protected(self, path: str) -> bool:
        return refuses_change(lambda: EditedFile(self._control, path).close())

    async def aclose(self) -> None:
        """Idempotent; ends the connections and waits for their threads.  Operations under way are
        told that their connection is lost, later ones are ``Refused`` (``EBADF``)."""
        if self._closed:
            await trio.lowlevel.checkpoint()
            return
        self._closed = True
        with undo_within("closing the SMB remote", UNDO_SECONDS):
            for share in (self._control, self._bulk):
                await in_thread(Work.SHARE, share.close, abandon=True)

    async def on_bulk(self, function: Callable[..., T], *args: object) -> T:
        """For the files that are open here."""
        return await self._run(self._bulk, function, *args)


class _Reader:
    def __init__(self, remote: SmbRemote, file: OpenedFile) -> None:
        self.size = file.size
        self._remote = remote
        self._file = file
        self._position = 0

    async def read_into(self, buffer: memoryview) -> int:
        count = await self._remote.on_bulk(self._file.read_on, self._position, buffer)
        self._position += count
        return count

    async def read_at(self, offset: int, length: int) -> bytes:
        def read() -> bytes:
            buffer = bytearray(max(0, min(length, self.size - offset)))
            return bytes(buffer[: self._file.read_at(offset, memoryview(buffer))])

        return await self._remote.on_bulk(read)

    async def read_into_at(self, offset: int, buffer: memoryview) -> int:
        return await self._remote.on_bulk(self._file.read_at, offset, buffer)


class _Editor:
    def __init__(self, remote: SmbRemote, file: EditedFile) -> None:
        self._remote = remote
        self._file = file

    @property
    def size(self) -> int:
        return self._file.size

    async def read_into(self, offset: int, buffer: memoryview) -> int:
        return await self._remote.on_bulk(self._file.read_into, offset, buffer)

    async def write_at(self, offset: int, data: bytes | memoryview) -> None:
        await self._remote.on_bulk(self._file.write_at, offset, data)

    async def truncate(self, size: int) -> None:
        await self._remote.on_bulk(self._file.truncate, size)

    async def sync(self) -> None:
        await self._remote.on_bulk(self._file.sync)
