"""Upstream's lock of a directory: ``<path>.lock``, made by ``mkdir``, kept fresh by its mtime.

Xen Orchestra (npm proper-lockfile 4 with its defaults) refreshes the mtime every 5 s, takes a
lock over whose mtime is 10 s old, and releases by ``rmdir``.  So nothing may be put *into* the
directory.  Who holds it stands beside it, in ``.<name>.lock-holder``: upstream's listings skip
names that start with a dot, and extended attributes do not exist on most NFS servers.  The
record counts only while its mtime is that of the directory, so what a crash left of it never
names the wrong holder.

What upstream does not have:

- A lock is *ours* by the identity of the directory, through a descriptor that stays open:
  we can neither refresh nor remove anybody else's.
- A lock that looks old is taken over only when its mtime does not move for 10 s *of our own
  watching*, or when its record names a dead process of this machine: clocks of two hosts
  that differ cannot make a live lock look stale.
- The takeover renames the stale directory away and looks again at what it got.
- Losing the lock stops the body at once.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
import time
from typing import TYPE_CHECKING

from proxy.errors import Unreachable
from proxy.remotes import paths
from proxy.remotes.holding import held, parse_record
from proxy.remotes.locking import LONGEST_RECORD, MTIME_TOLERANCE, RACES, KeptLock, Seen
from proxy.remotes.syscalls import rename_no_replace
from proxy.runtime.threads import SHARED

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from proxy.remotes.holding import Holder
    from proxy.remotes.interface import Lock
    from proxy.remotes.posix import Root
    from proxy.runtime.threads import Threads


@contextlib.asynccontextmanager
async def hold(
    root: Root, path: str, *, owner: str, wait: float = 0, threads: Threads = SHARED
) -> AsyncIterator[Lock]:
    """Hold the lock of ``path`` for the block; see :func:`proxy.remotes.holding.held`."""
    async with held(DirectoryLock(root, path, owner, threads), wait) as lock:
        yield lock


class DirectoryLock(KeptLock):
    """The steps of a lock in a directory of this machine; every method blocks."""

    def __init__(self, root: Root, path: str, owner: str, threads: Threads = SHARED) -> None:
        super().__init__(path, owner, threads)
        self._root = root
        self._mutex = threading.Lock()
        """A descriptor is never closed under a step that hangs."""
        self._descriptor: int | None = None
        self._mtime_ns = 0

    def _try(self) -> Seen | None:
        """``None`` when the lock is ours now, else what stands in the way."""
        with (
            self._mutex,
            self._root.translated("lock", self.path),
            self._root.directory(self._directory, create=True) as here,
        ):
            for _ in range(RACES):
                with contextlib.suppress(FileExistsError):
                    os.mkdir(self._name, 0o755, dir_fd=here)
                    self._own(here)
                    return None
                with contextlib.suppress(FileNotFoundError):  # released this moment
                    return self._look(here)
        raise self.many_want_it()

    def _own(self, here: int) -> None:
        try:
            self._descriptor = os.open(
                self._name,
                os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC,
                dir_fd=here,
            )
            self._touch(here)
            self._write_record(here)
        except BaseException:
            if self._descriptor is None:  # else release() removes it
                os.rmdir(self._name, dir_fd=here)
            raise

    def _look(self, here: int) -> Seen:
        status = os.lstat(self._name, dir_fd=here)
        if not stat.S_ISDIR(status.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, "the lock is not a directory")
        age = self._clock_of_file_system(here) - status.st_mtime
        return Seen(_identity(status), age, self._read_record(here, status))

    def _clock_of_file_system(self, here: int) -> float:
        name = paths.temporary_name(self._name, time.time_ns() // 1_000_000)
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(name, flags, 0o600, dir_fd=here)
        try:
            os.utime(descriptor)
            return os.fstat(descriptor).st_mtime
        finally:
            os.close(descriptor)
            with contextlib.suppress(FileNotFoundError):  # two of us in one millisecond
                os.unlink(name, dir_fd=here)

    def _take_over(self, stale: tuple[int, int, int]) -> bool:
        """Remove the lock if it is still the one that was found ``stale``.

        Between the last look and the removal somebody else may have taken it over: the
        rename gets one definite directory, which is then looked at and given back if it is
        another.
        """
        aside = paths.temporary_name(self._name, time.time_ns() // 1_000_000)
        with (
            self._root.translated("lock", self.path),
            self._root.directory(self._directory) as here,
        ):
            try:
                if _identity(os.lstat(self._name, dir_fd=here)) != stale:
                    return False
                os.rename(self._name, aside, src_dir_fd=here, dst_dir_fd=here)
            except FileNotFoundError:
                return True
            try:
                if _identity(os.lstat(aside, dir_fd=here)) == stale:
                    os.rmdir(aside, dir_fd=here)
                    return True
            except OSError as error:
                self._give_back(here, aside)
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                    raise self.not_a_lock() from error
                raise
            self._give_back(here, aside)
            return False

    def _give_back(self, here: int, aside: str) -> None:
        try:
            if not rename_no_replace(here, aside, self._name):
                os.rename(aside, self._name, src_dir_fd=here, dst_dir_fd=here)
        except FileExistsError:  # a third one was quicker; the owner of this one will notice
            os.rmdir(aside, dir_fd=here)

    # -- keeping

    def _refresh_now(self) -> str | None:
        """Why the lock is no longer ours, ``None`` while it is."""
        try:
            with (
                self._mutex,
                self._root.translated("lock", self.path),
                self._root.directory(self._directory) as here,
            ):
                reason = self._not_ours(here)
                if reason is None:
                    self._touch(here)
                return reason
        except Unreachable as error:
            if error.code == "ESTALE":
                return "its directory is gone"
            raise

    def _not_ours(self, here: int) -> str | None:
        assert self._descriptor is not None, "not held"
        ours = os.fstat(self._descriptor)
        try:
            there = os.lstat(self._name, dir_fd=here)
        except FileNotFoundError:
            return "its directory is gone"
        if not os.path.samestat(ours, there):
            return "somebody else took it over"
        if abs(ours.st_mtime_ns - self._mtime_ns) > MTIME_TOLERANCE * 1e9:
            return "somebody else refreshes it"
        return None

    def _touch(self, here: int) -> None:
        """Set the directory's mtime to the file system's own now, and its record's to the same."""
        assert self._descriptor is not None, "not held"
        os.utime(self._descriptor)
        self.identity = _identity(os.fstat(self._descriptor))
        self._mtime_ns = self.identity[2]
        with contextlib.suppress(OSError):  # only information
            os.utime(
                self._record_name,
                ns=(self._mtime_ns, self._mtime_ns),
                dir_fd=here,
                follow_symlinks=False,
            )

    def release(self) -> None:
        """Remove the lock if it is ours.  Idempotent."""
        with self._mutex:
            if self._descriptor is None:
                return
            try:
                with (
                    self._root.translated("unlock", self.path),
                    self._root.directory(self._directory) as here,
                ):
                    if self._not_ours(here) in (None, "somebody else refreshes it"):
                        with contextlib.suppress(OSError):
                            os.unlink(self._record_name, dir_fd=here)
                        with contextlib.suppress(FileNotFoundError):
                            os.rmdir(self._name, dir_fd=here)
            finally:
                descriptor, self._descriptor = self._descriptor, None
                os.close(descriptor)

    # -- the record of the holder

    def _write_record(self, here: int) -> None:
        with contextlib.suppress(OSError):  # only information: no reason to fail a backup
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._record_name, dir_fd=here)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(self._record_name, flags, 0o644, dir_fd=here)
            try:
                os.write(descriptor, self.record(self._mtime_ns / 1e9))
                os.utime(descriptor, ns=(self._mtime_ns, self._mtime_ns))
            finally:
                os.close(descriptor)

    def _read_record(self, here: int, lock: os.stat_result) -> Holder | None:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            descriptor = os.open(self._record_name, flags, dir_fd=here)
        except OSError:
            return None
        try:
            status = os.fstat(descriptor)
            if abs(status.st_mtime_ns - lock.st_mtime_ns) > MTIME_TOLERANCE * 1e9:
                return None
            return parse_record(os.read(descriptor, LONGEST_RECORD))
        except OSError:
            return None
        finally:
            os.close(descriptor)


def _identity(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_dev, status.st_ino, status.st_mtime_ns
