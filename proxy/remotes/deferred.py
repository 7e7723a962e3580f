"""Changes that become durable together: files edited in place, many files at once, renames.

Blocking, as :mod:`proxy.remotes.posix`.  A sync for each of a thousand blocks would cost a
thousand flushes of the disk's cache; one for all of them costs one.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from typing import TYPE_CHECKING, Final

from proxy.errors import NotFound, ProxyError, Refused
from proxy.remotes import paths
from proxy.remotes.posix import read_into, split, sync_directory
from proxy.remotes.syscalls import (
    SYNC_AND_WAIT,
    SYNC_START,
    sync_file_system,
    sync_range,
    tells_lost_writes,
)
from proxy.runtime.threads import stop_if_abandoned

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from proxy.remotes.posix import Root

_FILE_MODE = 0o644
_BULK: Final = 256 * 1024
"""Bytes from which on a write is worth starting its write-back at once."""
_BEHIND: Final = 16
"""Large files whose write-back may be under way in one batch."""
_MOST_OPEN: Final = 64
"""Directories that :class:`Renames` holds open."""


class EditedFile:
    """An open file that is read and written at any place.

    For one task at a time; calls that overlap all the same wait for each other, so that
    :meth:`close` never takes the descriptor from under a thread that still writes.
    """

    def __init__(self, root: Root, path: str) -> None:
        self.path = paths.normalise(path)
        self._root = root
        self._mutex = threading.Lock()
        self._lost: ProxyError | None = None
        descriptor, self.size = root.open_file(path, os.O_RDWR)
        self._descriptor: int | None = descriptor

    @contextlib.contextmanager
    def _opened(self, doing: str) -> Iterator[int]:
        with self._mutex, self._root.translated(doing, self.path):
            if self._descriptor is None:
                raise _closed(self.path)
            yield self._descriptor

    def read_into(self, offset: int, buffer: memoryview) -> int:
        with self._opened("read") as descriptor:
            return read_into(descriptor, offset, buffer)

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        rest = memoryview(data).cast("B")
        start, length = offset, len(rest)
        with self._opened("write") as descriptor:
            while rest:
                written = os.pwrite(descriptor, rest, offset)
                offset += written
                rest = rest[written:]
                self.size = max(self.size, offset)
            if length >= _BULK:
                sync_range(descriptor, start, length, SYNC_START)

    def truncate(self, size: int) -> None:
        with self._opened("truncate") as descriptor:
            os.ftruncate(descriptor, size)
            self.size = size

    def sync(self) -> None:
        """Fails for good: after a failed sync the kernel calls the lost pages clean, and a
        second one would succeed."""
        with self._opened("fsync") as descriptor:
            if self._lost is not None:
                raise self._lost
            try:
                os.fdatasync(descriptor)
            except OSError:
                self._lost = Refused(
                    f"EIO: '{self.path}' lost bytes in an earlier sync: what it holds is not known",
                    code="EIO",
                    data={"path": self.path},
                )
                raise

    def close(self) -> None:
        """Idempotent.  May wait for the storage, as NFS sends here what was not synced."""
        with self._mutex:
            descriptor, self._descriptor = self._descriptor, None
            if descriptor is not None:
                with contextlib.suppress(OSError):  # of bytes that nobody was promised
                    os.close(descriptor)


class Files:
    """Many new files on their way to be durable.  Thread-safe.

    Where one sync of the whole file system tells of everything that it lost
    (:func:`~proxy.remotes.syscalls.tells_lost_writes`), that is the one.  The descriptor for
    it is opened before the first write, as the kernel reports what was lost since then.
    Elsewhere, and in what is mounted below the root, each file is synced when it is
    written and its directory by :meth:`sync`.

    Of large files the page cache is given back once they are written back.  That costs less
    than filling memory with them, where the kernel must find a new page for each: measured
    a third of its time for half as much again in throughput.
    """

    def __init__(self, root: Root, *, exclusive: bool = False) -> None:
        self._root = root
        self._exclusive = exclusive
        self._mutex = threading.Lock()
        self._directories: set[str] = set()
        self._written: deque[tuple[str, int]] = deque()
        """Large files, and their descriptors, whose write-back has begun."""
        self._lost: ProxyError | None = None
        self._is_closed = False
        with root.translated("open", ""), root.directory("") as here:
            self._device = os.fstat(here).st_dev
            self._syncs_together = tells_lost_writes(here)
            self._descriptor = os.dup(here)

    def write(self, path: str, data: bytes | memoryview) -> None:
        """Create or replace ``path``; start writing it back, so that the sync waits less."""
        if (descriptor := self._write(path, memoryview(data).cast("B"))) is not None:
            self._settle_behind(path, descriptor)

    def _write(self, path: str, rest: memoryview) -> int | None:
        """The file's descriptor when its write-back has begun; otherwise it is closed."""
        length = len(rest)
        is_large = False
        if self._is_closed:
            raise _closed(path)
        with (
            self._root.translated("write", path),
            self._root.parent(path, create=True) as (here, name),
        ):
            together = self._syncs_together and os.fstat(here).st_dev == self._device
            if not together:  # before the name is made: a sync meanwhile must not miss it
                with self._mutex:
                    self._directories.add(paths.parent(path))
            stop_if_abandoned()
            descriptor = self._create(here, name)
            try:
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
                if not together:
                    os.fsync(descriptor)
                elif length >= _BULK:
                    is_large = sync_range(descriptor, 0, 0, SYNC_START)
            finally:
                if not is_large:
                    os.close(descriptor)  # NFS reports write errors here
            return descriptor if is_large else None

    def _settle_behind(self, path: str, descriptor: int) -> None:
        with self._mutex:
            self._written.append((path, descriptor))
            most = 0 if self._is_closed else _BEHIND  # nobody would close it later
            behind = self._written.popleft() if len(self._written) > most else None
        if behind is not None:
            _settle(self._root, *behind)

    def _create(self, here: int, name: str) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        while True:
            try:
                return os.open(name, flags, _FILE_MODE, dir_fd=here)
            except FileExistsError:
                if self._exclusive:
                    raise
            # Never written into: it may be a link, a pipe, or known by another name too.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=here)

    def sync(self) -> None:
        """Make durable what was written by calls that have returned.

        Fails for good, as the kernel tells each loss only once.
        """
        with self._mutex:
            if self._is_closed:
                raise _closed("")
            if self._lost is not None:
                raise self._lost
            directories = sorted(self._directories)
            descriptor = os.dup(self._descriptor)  # stays open if we are closed meanwhile
        try:
            if self._syncs_together:
                with self._root.translated("syncfs", ""):
                    sync_file_system(descriptor)
                for path, written in self._taken():
                    _settle(self._root, path, written)
            for path in directories:
                with self._root.translated("fsync", path), self._root.directory(path) as here:
                    sync_directory(here)
        except ProxyError as error:
            self._lost = error
            raise
        finally:
            os.close(descriptor)

    def _taken(self) -> Iterator[tuple[str, int]]:
        while True:
            with self._mutex:
                if not self._written:
                    return
                taken = self._written.popleft()
            yield taken

    def close(self) -> None:
        """Idempotent; waits for nothing.  Writes under way finish, later ones are refused."""
        with self._mutex:
            if not self._is_closed:
                self._is_closed = True
                os.close(self._descriptor)
        for _, descriptor in self._taken():
            with contextlib.suppress(OSError):  # of bytes that nobody was promised
                os.close(descriptor)


def _settle(root: Root, path: str, descriptor: int) -> None:
    """Wait until a file is written back, give its page cache back, and close it."""
    with root.translated("write", path):
        try:
            sync_range(descriptor, 0, 0, SYNC_AND_WAIT)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)  # NFS reports write errors here


def _closed(path: str) -> Refused:
    return Refused(f"EBADF: closed already, '{path}'", code="EBADF", data={"path": path})


class Renames:
    """Renames, done in order, whose directories are synced together.

    Threads that overlap wait for each other.  Directories stay open from one rename to the
    next, at most :data:`_MOST_OPEN`.
    """

    def __init__(self, root: Root) -> None:
        self.missing: list[int] = []
        """Positions of those whose old name does not exist."""
        self._root = root
        self._mutex = threading.RLock()
        self._open: dict[str, int] = {}
        self._targets: set[str] = set()
        self._above: set[str] = set()
        """The open directories and all above them."""

    def run(self, pairs: Sequence[tuple[str, str]], first: int = 0) -> None:
        """Do ``pairs``, the first of which has position ``first``."""
        for position, (old, new) in enumerate(pairs, first):
            with self._mutex, self._root.translated("rename", old):
                stop_if_abandoned()
                if not self._rename(paths.normalise(old), paths.normalise(new)):
                    self.missing.append(position)

    def _rename(self, old: str, new: str) -> bool:
        source, old_name = split(old)
        target, new_name = split(new)
        # a missing source makes no directories
        if target not in self._open and not self._exists(old):
            return False
        if len(self._open) + 2 > _MOST_OPEN or old in self._above or new in self._above:
            self.sync()  # a directory that moves takes the open ones along
        for is_last in (False, True):
            try:
                os.rename(
                    old_name,
                    new_name,
                    src_dir_fd=self._directory(source),
                    dst_dir_fd=self._directory(target, create=True),
                )
            except FileNotFoundError:
                if not self._exists(old):
                    return False
                if is_last:
                    raise
                self.sync()  # somebody removed or replaced a directory that we hold open
            else:
                break
        return True

    def _exists(self, path: str) -> bool:
        try:
            self._root.stat(path)
        except NotFound as error:
            if error.code != "ENOENT":
                raise
            return False
        return True

    def _directory(self, path: str, *, create: bool = False) -> int:
        if create:
            self._targets.add(path)
        here = self._open.get(path)
        if here is None:
            with self._root.directory(path, create=create) as found:
                here = self._open[path] = os.dup(found)
            while path not in self._above:
                self._above.add(path)
                path = paths.parent(path)
        return here

    def sync(self) -> None:
        """Make durable what was renamed, and close what is open.

        The new names first: after a crash both may exist, never neither.
        """
        with self._mutex:
            opened, targets = self._open, self._targets
            self._open, self._targets, self._above = {}, set(), set()
            try:
                for path in sorted(opened, key=lambda path: path not in targets):
                    with self._root.translated("fsync", path):
                        sync_directory(opened[path])
            finally:
                for descriptor in opened.values():
                    os.close(descriptor)
