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
import json
import os
import stat
import threading
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import trio

from proxy.errors import Busy, ProxyError, Refused, Unreachable
from proxy.remotes import paths
from proxy.remotes.holding import Holder, held, ourselves, parse_record
from proxy.remotes.syscalls import rename_no_replace
from proxy.runtime.deadlines import undo_within
from proxy.runtime.threads import SHARED, Threads, Work
from proxy.runtime.trouble import tell_trouble

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from proxy.remotes.interface import Lock
    from proxy.remotes.posix import Root

REFRESH_SECONDS = 5.0
STALE_SECONDS = 10.0
_RETRY_SECONDS = 1.0
_POLL_SECONDS = 0.5
_RELEASE_SECONDS = 10.0
_MTIME_TOLERANCE = 2.0
"""Seconds; FAT keeps even seconds only, and servers round what they are told."""
_LONGEST_RECORD = 4096
_RACES = 20
"""Rounds of 'taken' and then 'not there' before we give up."""


_left_behind: set[tuple[int, int, int]] = set()
"""The identities of locks of this process that nobody holds but that could not be removed."""


@contextlib.asynccontextmanager
async def hold(
    root: Root, path: str, *, owner: str, wait: float = 0, threads: Threads = SHARED
) -> AsyncIterator[Lock]:
    """Hold the lock of ``path`` for the block; see :meth:`Remote.lock`.

    When the lock is lost the block is cancelled and ``Busy`` raised in its place.  Deciding
    that an apparently abandoned lock is stale may take :data:`STALE_SECONDS` beyond ``wait``.
    """
    async with held(DirectoryLock(root, path, owner, threads), wait) as lock:
        yield lock


class DirectoryLock:
    """The steps of a lock; every method without ``async`` blocks, one at a time."""

    def __init__(self, root: Root, path: str, owner: str, threads: Threads = SHARED) -> None:
        self.path = paths.normalise(path)
        if not self.path:
            raise Refused("EBUSY: the root of a remote cannot be locked", code="EBUSY")
        self.lost: Busy | None = None
        self.threads = threads
        self._root = root
        self._mutex = threading.Lock()
        """A descriptor is never closed under a step that hangs."""
        self._owner = owner
        self._directory = paths.parent(self.path)
        name = paths.name(self.path)
        self._name = f"{name}.lock"
        self._record_name = f".{name}.lock-holder"
        self._descriptor: int | None = None
        self.identity = (0, 0, 0)
        self._mtime_ns = 0
        self._fresh_at = 0.0

    @property
    def held(self) -> bool:
        return self._descriptor is not None

    async def acquire(self, wait: float) -> None:
        """Make the lock ours or raise ``Busy``.  On cancel :meth:`release` undoes it."""
        until = trio.current_time() + wait
        watched: tuple[tuple[int, int, int], float] | None = None
        alive = False
        while True:
            seen = await self.threads.run(Work.LOCK, self._try, dispose=self._undo)
            if seen is None:
                self._fresh_at = trio.current_time()
                return
            now = trio.current_time()
            if watched is None or watched[0] != seen.identity:
                alive = watched is not None
                watched = (seen.identity, now)
            elif now - watched[1] >= STALE_SECONDS:
                if await self.threads.run(Work.LOCK, self._take_over, seen.identity):
                    continue
                watched = None
            dead = seen.holder is not None and seen.holder.is_dead()
            dead = dead or seen.identity in _left_behind
            if dead and await self.threads.run(Work.LOCK, self._take_over, seen.identity):
                _left_behind.discard(seen.identity)
                continue
            doubtful = not -_MTIME_TOLERANCE <= seen.age <= STALE_SECONDS
            if now >= until and (alive or not doubtful):
                raise self._busy(seen.holder)
            await trio.sleep(_POLL_SECONDS)

    def _busy(self, holder: Holder | None) -> Busy:
        known = f" by {holder}" if holder else ""
        way_out = "" if holder else ": another program is working there"
        data: dict[str, Any] = {"path": self.path}
        if holder is not None:
            data["holder"] = asdict(holder)
        return Busy(f"Lock file is already being held{known}{way_out}, '{self.path}'", data=data)

    def _undo(self, seen: _Seen | None) -> None:
        """Nobody waits any more for what :meth:`_try` found."""
        if seen is None:
            self.release()

    def _try(self) -> _Seen | None:
        """``None`` when the lock is ours now, else what stands in the way."""
        with (
            self._mutex,
            self._root.translated("lock", self.path),
            self._root.directory(self._directory, create=True) as here,
        ):
            for _ in range(_RACES):
                with contextlib.suppress(FileExistsError):
                    os.mkdir(self._name, 0o755, dir_fd=here)
                    self._own(here)
                    return None
                with contextlib.suppress(FileNotFoundError):  # released this moment
                    return self._look(here)
        raise Busy(
            f"Lock file is already being held: many want '{self.path}'", data={"path": self.path}
        )

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

    def _look(self, here: int) -> _Seen:
        status = os.lstat(self._name, dir_fd=here)
        if not stat.S_ISDIR(status.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, "the lock is not a directory")
        age = self._clock_of_file_system(here) - status.st_mtime
        return _Seen(_identity(status), age, self._read_record(here, status))

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
                    raise self._not_a_lock() from error
                raise
            self._give_back(here, aside)
            return False

    def _give_back(self, here: int, aside: str) -> None:
        try:
            if not rename_no_replace(here, aside, self._name):
                os.rename(aside, self._name, src_dir_fd=here, dst_dir_fd=here)
        except FileExistsError:  # a third one was quicker; the owner of this one will notice
            os.rmdir(aside, dir_fd=here)

    def _not_a_lock(self) -> Busy:
        return Busy(
            f"Lock file is already being held: '{self.path}.lock' is old but holds files, which "
            "no lock does; look at them and remove it by hand",
            data={"path": self.path},
        )

    # -- keeping

    async def end(self) -> None:
        """Remove the lock if it is ours; a failure is told, not raised."""
        try:
            with undo_within(f"releasing the lock of '{self.path}'", _RELEASE_SECONDS):
                # abandoned on a remote that hangs: it removes only what is ours
                await self.threads.end(self.release, Work.LOCK)
        except ProxyError as error:
            # what was done under it is done; the next run of ours need not wait until it is stale
            _left_behind.add(self.identity)
            tell_trouble("lock not released", error, path=self.path)

    async def keep_fresh(self, body: trio.CancelScope) -> None:
        """Refresh until cancelled; on loss remember why and cancel ``body``."""
        pause = REFRESH_SECONDS
        while True:
            await trio.sleep(pause)
            pause = REFRESH_SECONDS
            try:
                await self._refresh()
            except Busy:
                body.cancel()
                return
            except ProxyError as error:
                if trio.current_time() - self._fresh_at < STALE_SECONDS - _RETRY_SECONDS:
                    pause = _RETRY_SECONDS
                    continue
                self._lose(f"it could not be refreshed: {error.message}")
                body.cancel()
                return

    async def check(self) -> None:
        """Raise ``Busy`` if the lock was lost, else refresh it."""
        await self._refresh()

    async def _refresh(self) -> None:
        if self.lost is None:
            now = trio.current_time()
            reason = await self.threads.run(Work.LOCK, self._refresh_now)
            if reason is None:
                self._fresh_at = now
                return
            self._lose(reason)
        if self.lost is not None:
            raise self.lost

    def _lose(self, reason: str) -> None:
        self.lost = self.lost or Busy(
            f"the lock of '{self.path}' was lost: {reason}; what was being done was stopped",
            data={"path": self.path},
        )

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
        if abs(ours.st_mtime_ns - self._mtime_ns) > _MTIME_TOLERANCE * 1e9:
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
            record = Holder(**ourselves(), owner=self._owner, since=self._mtime_ns / 1e9)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._record_name, dir_fd=here)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(self._record_name, flags, 0o644, dir_fd=here)
            try:
                os.write(descriptor, json.dumps(asdict(record)).encode()[:_LONGEST_RECORD])
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
            if abs(status.st_mtime_ns - lock.st_mtime_ns) > _MTIME_TOLERANCE * 1e9:
                return None
            return parse_record(os.read(descriptor, _LONGEST_RECORD))
        except OSError:
            return None
        finally:
            os.close(descriptor)


@dataclass(frozen=True, slots=True)
class _Seen:
    identity: tuple[int, int, int]
    age: float
    """Seconds by the file system's clock; negative when the mtime lies in its future."""
    holder: Holder | None


def _identity(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_dev, status.st_ino, status.st_mtime_ns
