"""What every remote can do, whatever it is made of.

Paths are POSIX, relative to the remote's root; a leading ``/`` is accepted and means the
same.  They are normalised before use and can never leave the root.  All methods raise the
classes of :mod:`proxy.errors`: ``NotFound`` (``ENOENT``), ``Conflict`` (``EEXIST``,
``ENOTEMPTY``), ``Refused`` (``ENOSPC``, ``EROFS``, ``EACCES``, ``EPERM``; ``ELOOP`` for a
symbolic link, ``EBUSY`` for the root itself, ``EBADF`` once closed), ``Unreachable``.
``NotFound`` with ``ENOTDIR`` means that a file stands where a directory should: ``missing_ok``
does not cover it.

Object stores have no directories of their own: one is there while something is in it.  There
``mktree`` makes nothing, the ``list`` of what holds nothing is ``NotFound`` (but for the root,
which is empty then), a name can be a file and a directory at once (so nothing is refused with
``EISDIR`` or ``ENOTDIR`` when it is written or renamed), and removing a file may remove its
directories.

On cancel every method ends with no partial effect that its contract rules out: an atomic
write either happened or did not, and leaves no temporary file.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from proxy.errors import ProxyError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from contextlib import AbstractAsyncContextManager


@dataclass(frozen=True, slots=True)
class RemoteInfo:
    """Space on the remote in bytes; ``None`` where the remote has no such notion."""

    size: int | None = None
    used: int | None = None
    available: int | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """One name in a directory."""

    name: str
    is_dir: bool


@dataclass(frozen=True, slots=True)
class FileStat:
    """``mtime`` is seconds since the epoch."""

    size: int
    mtime: float
    is_dir: bool


@dataclass(frozen=True, slots=True)
class OpenUpload:
    """A file that somebody began to send to an object store and has neither completed nor given
    up: no listing shows it, but its parts are paid for.

    ``initiated`` is seconds since the epoch by the store's clock.
    """

    path: str
    upload_id: str
    initiated: float


class FileWriter(Protocol):
    """A file being written under a temporary name; see :meth:`Remote.create`."""

    temporary_path: str
    """Where the bytes are until commit, for validation before it.

    The final name on immutable remotes and object stores; on these they cannot be read before
    the commit, and are validated between it and what makes the file count.
    """

    async def write(self, data: bytes | memoryview) -> None:
        """Append.  The buffer may be reused when this returns.  Not for concurrent use.

        What went wrong with it may be raised by a later call only, :meth:`commit` at the latest.
        """
        ...

    async def commit(self) -> None:
        """Make the bytes durable (fsync) and give the file its final name.

        Raises ``Conflict`` when the name is taken and the writer was opened exclusive.
        Without a call to this, leaving the ``async with`` removes every byte written.
        """
        ...


class FileReader(Protocol):
    size: int

    async def read_into(self, buffer: memoryview) -> int:
        """Fill ``buffer`` from the current position; fewer bytes only at the end, then 0.

        The position moves only when this returns: after an error it can be called again.
        """
        ...

    async def read_at(self, offset: int, length: int) -> bytes:
        """``length`` bytes at ``offset``; fewer only past the end."""
        ...

    async def read_into_at(self, offset: int, buffer: memoryview) -> int:
        """Fill ``buffer`` from ``offset``; fewer bytes only past the end.  Moves no position.

        Several at once are fine.  On an error or a cancel the content of ``buffer`` is undefined,
        but nothing writes to it any more.
        """
        ...


class FileEditor(Protocol):
    """An existing file, changed in place; see :meth:`Remote.edit`.  For one task at a time."""

    @property
    def size(self) -> int:
        """Bytes of the file now; grows with what is written behind its end."""
        ...

    async def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fill ``buffer`` from ``offset``; fewer bytes only at the end of the file."""
        ...

    async def write_at(self, offset: int, data: bytes | memoryview) -> None:
        """Write all of ``data``, with zeros between the file's end and ``offset``.

        Not durable until :meth:`sync`: a crash may leave any part of it, and of several
        writes any of them without those before.  An error leaves any part of it too.
        """
        ...

    async def truncate(self, size: int) -> None:
        """Cut the file or fill it up with zeros; durable with the next :meth:`sync`."""
        ...

    async def sync(self) -> None:
        """Everything written so far is durable when this returns.

        Fails for good: after an error the bytes since the last sync may be lost, and every
        later call raises too.
        """
        ...


class Batch(Protocol):
    """Many files whose bytes become durable together; see :meth:`Remote.batch`."""

    async def write(self, path: str, data: bytes | memoryview) -> None:
        """Create or replace a file, making parent directories.  Several at once are fine.

        Until :meth:`commit` a crash may leave it missing, cut or with other bytes, as an
        error or a cancel of this call does.  ``Conflict``: ``EISDIR`` when ``path`` is a
        directory, ``EEXIST`` when it exists on an immutable remote.
        """
        ...

    async def commit(self) -> None:
        """What calls of :meth:`write` that returned have written is durable when this returns,
        bytes and names.  More may be written and committed after it.

        Raises when the storage lost anything since the batch was opened, be it another
        writer's; then every later call raises too.
        """
        ...


class Lock(Protocol):
    async def check(self) -> None:
        """Raise ``Busy`` if the lock was lost; call right before each destructive step."""
        ...


class Remote(Protocol):
    """One backup repository's storage.  Safe for concurrent use by many tasks."""

    url: str
    """As given, without credentials: for messages."""
    is_encrypted: bool
    is_immutable: bool
    """Files cannot be renamed or replaced once written: no temporary names, no cache."""
    use_vhd_directory: bool

    async def read_file(self, path: str, *, limit: int = 64 * 1024 * 1024) -> bytes:
        """The whole content.  ``Corrupt`` when it is larger than ``limit`` bytes."""
        ...

    async def read_files(
        self, paths: Sequence[str], *, limit: int = 16 * 1024 * 1024
    ) -> Sequence[bytes | ProxyError]:
        """The content of many small files, in the order of ``paths``.

        A file that cannot be read gives its error in its place, so that one bad file does
        not hide the others.  Remotes whose calls are expensive do it in one go.
        """
        contents: deque[bytes | ProxyError] = deque()  # ``list`` is the method here
        for path in paths:
            try:
                contents.append(await self.read_file(path, limit=limit))
            except ProxyError as error:
                contents.append(error)
        return tuple(contents)

    async def write_file(self, path: str, data: bytes, *, exclusive: bool = False) -> None:
        """Replace or create the file atomically and durably, making parent directories.

        ``exclusive`` raises ``Conflict`` (``EEXIST``) when it exists.
        """
        ...

    def create(
        self, path: str, *, exclusive: bool = False
    ) -> AbstractAsyncContextManager[FileWriter]:
        """Write a large file: bytes go to ``.<ms>.<name>.tmp`` beside it until ``commit``.

        On an immutable remote they go to the final name at once, which must be free; on an
        object store to an upload that nothing shows, which the commit completes.  A
        name already taken is told on entering when ``exclusive``, and decided by ``commit``.
        """
        ...

    def edit(self, path: str) -> AbstractAsyncContextManager[FileEditor]:
        """Change an existing regular file in place.  Leaving does not sync.

        ``Refused`` (``ENOTSUP``) where the remote cannot, ``Refused`` (``EPERM``) on an immutable
        one, ``Conflict`` (``EISDIR``) for anything but a regular file.
        """
        ...

    def batch(self) -> AbstractAsyncContextManager[Batch]:
        """Write many files fast: none has a temporary name, all are made durable at once.

        For directories that nothing refers to yet.  Leaving without ``commit`` removes
        nothing: the caller removes the directory.
        """
        ...

    async def rename_all(self, pairs: Sequence[tuple[str, str]]) -> Sequence[int]:
        """Replace each ``new`` by its ``old``, in order; returns the positions whose ``old`` is
        missing.

        Parent directories of ``new`` are made, but not for a missing ``old``.  Durable together
        on return; a crash, an error or a cancel may leave any of them done, each whole: a crash
        may show both names, never neither.  Other errors end it at once, with those before done
        and durable; on an object store some of those behind may be done too.
        """
        ...

    def open_read(self, path: str) -> AbstractAsyncContextManager[FileReader]: ...

    async def list(self, path: str) -> list[Entry]:
        """Sorted by name.  ``NotFound`` when the directory is missing; never a partial list."""
        ...

    async def stat(self, path: str) -> FileStat: ...

    async def rename(self, old: str, new: str) -> None:
        """Replace ``new`` by ``old``, durably."""
        ...

    async def unlink(self, path: str, *, missing_ok: bool = True) -> None: ...

    async def mktree(self, path: str) -> None: ...

    async def rmdir(self, path: str, *, missing_ok: bool = True) -> None: ...

    async def rmtree(self, path: str) -> None: ...

    def lock(self, path: str, *, owner: str, wait: float = 0) -> AbstractAsyncContextManager[Lock]:
        """Hold ``<path>.lock`` (upstream's lock directory).

        Waits up to ``wait`` seconds, then raises ``Busy`` naming the holder when known.
        ``owner`` says who we are (the run's task id) in the other side's message.  Released
        on leaving, also on cancel.  When it is lost the block is cancelled and ``Busy`` raised.
        Deciding that an apparently abandoned lock is stale may take 10 s beyond ``wait``, 30 s
        on an object store.
        """
        ...

    async def info(self) -> RemoteInfo: ...

    # Object stores have more, for ``remote.test`` and statistics: ``async capabilities() ->
    # Mapping[str, Any]``, ``requests() -> Mapping[str, int]``; and for what dead writers left
    # behind: ``async open_uploads(path) -> Sequence[OpenUpload]``, ``async abort_upload(upload)``.
    # ``proxy.remotes.wrapper`` has functions that ask any remote for them.

    async def aclose(self) -> None: ...

    def walk(self, path: str) -> AsyncIterator[tuple[str, FileStat]]:
        """Every file below ``path`` with its full path."""
        ...
