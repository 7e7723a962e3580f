"""Blocking file operations below one directory, which no path and no symbolic link leaves.

Every operation starts from an open descriptor of the root and follows no symbolic link
(``ELOOP``), by the kernel's word where it has one for that, else one name at a time: whoever can
write on the remote cannot point us at the appliance's own files, not even by swapping a
directory for a link while we work.  The root itself may be a link or lie behind one: it is the
operator's configuration.

The descriptor also pins the directory: should a mount disappear, nothing is written into
the empty directory under it, and a removed root is an error and not an empty remote.

Everything here blocks; :mod:`proxy.remotes.local` calls it in worker threads.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from proxy.errors import Corrupt, ProxyError, Refused, Unreachable, from_os_error
from proxy.remotes import paths
from proxy.remotes.interface import Entry, FileStat, RemoteInfo
from proxy.remotes.syscalls import UNSUPPORTED, open_beneath
from proxy.runtime.threads import stop_if_abandoned

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Root:
    """The open root of a remote.  Thread-safe; after :meth:`close` everything is refused."""

    def __init__(
        self,
        path: str,
        *,
        directory_mode: int = 0o700,
        check: Callable[[int], None] | None = None,
    ) -> None:
        self._path = path
        self._check = check
        self._mode = directory_mode
        self._mutex = threading.Lock()
        self._descriptor: int | None = None
        self._closed = False

    def open(self) -> None:
        """Make the directory and its parents when missing, and check that it can be used.

        An impossible path fails at once with its own errno (``ENOTDIR``, ``EACCES``).
        """
        with translated("mkdir", self._path):
            Path(self._path).mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                if self._check is not None:
                    self._check(descriptor)
                # What is mounted read-only can still be restored from; writing it is EROFS.
                read_only = os.fstatvfs(descriptor).f_flag & os.ST_RDONLY
                wanted = os.R_OK | os.X_OK | (0 if read_only else os.W_OK)
                if not os.access(self._path, wanted):
                    raise OSError(errno.EACCES, "permission denied")
                with os.scandir(descriptor) as names:
                    next(names, None)
            except BaseException:
                os.close(descriptor)
                raise
        with self._mutex:
            if not self._closed:
                self._descriptor = descriptor
                return
        os.close(descriptor)  # whoever waited for us gave up

    def close(self) -> None:
        """Idempotent.  Operations under way keep their own descriptors and finish."""
        with self._mutex:
            descriptor, self._descriptor, self._closed = self._descriptor, None, True
        if descriptor is not None:
            os.close(descriptor)

    def check_in_place(self) -> None:
        """Raise ``Unreachable`` (``ESTALE``) when the path now shows another directory.

        Happens when a file system was mounted over it or unmounted since.
        """
        with self.translated("stat", ""), self.directory("") as here:
            pinned, seen = os.fstat(here), os.stat(self._path)  # noqa: PTH116 (follows the root)
            if (pinned.st_dev, pinned.st_ino) != (seen.st_dev, seen.st_ino):
                raise self._replaced()

    @staticmethod
    def _replaced() -> Unreachable:
        return Unreachable(
            "ESTALE: the remote's directory was removed or replaced since it was opened; "
            "check the mount and open the remote again",
            code="ESTALE",
        )

    @contextlib.contextmanager
    def translated(self, doing: str, path: str) -> Iterator[None]:
        """Turn ``OSError`` into the house's errors; a vanished root is no ``NotFound``."""
        with translated(doing, path):
            try:
                yield
            except FileNotFoundError:
                gone = False
                with contextlib.suppress(Refused), self._pinned() as root:
                    gone = os.fstat(root).st_nlink == 0
                if gone:
                    raise self._replaced() from None
                raise

    @contextlib.contextmanager
    def directory(self, path: str, *, create: bool = False) -> Iterator[int]:
        """An open descriptor of the directory ``path``; raises ``OSError``.

        With ``create`` missing levels are made, each durable before the next.
        """
        here = self._walk(paths.normalise(path), create=create)
        try:
            yield here
        finally:
            os.close(here)

    @contextlib.contextmanager
    def _pinned(self) -> Iterator[int]:
        """The root, open until the block ends; nothing that may hang is done under the mutex."""
        with self._mutex:
            if self._descriptor is None:
                raise Refused("EBADF: the remote was closed", code="EBADF")  # nothing to retry
            root = os.dup(self._descriptor)
        try:
            yield root
        finally:
            os.close(root)

    def _walk(self, path: str, *, create: bool) -> int:
        with self._pinned() as root:
            found = open_beneath(root, path) if path else None
            if found is not None:
                return found
            here = os.open(".", _DIRECTORY, dir_fd=root)
        try:
            for name in paths.segments(path):
                below = self._enter(here, name, create=create)
                os.close(here)
                here = below
        except BaseException:
            os.close(here)
            raise
        return here

    def _enter(self, here: int, name: str, *, create: bool) -> int:
        try:
            return os.open(name, _DIRECTORY, dir_fd=here)
        except FileNotFoundError:
            if not create:
                raise
        except NotADirectoryError:
            if stat.S_ISLNK(os.lstat(name, dir_fd=here).st_mode):
                raise _link() from None
            raise
        with contextlib.suppress(FileExistsError):  # another task made it
            os.mkdir(name, self._mode, dir_fd=here)
        sync_directory(here)
        return os.open(name, _DIRECTORY, dir_fd=here)

    @contextlib.contextmanager
    def parent(self, path: str, *, create: bool = False) -> Iterator[tuple[int, str]]:
        """The open directory that holds ``path``, and its name there; raises ``OSError``."""
        above, name = split(path)
        with self.directory(above, create=create) as here:
            yield here, name

    # -- reading

    def open_file(self, path: str, access: int = os.O_RDONLY) -> tuple[int, int]:
        """A descriptor for ``access`` and the size.  ``Conflict`` (``EISDIR``) for anything but
        a regular file: a device or a pipe that somebody placed there is never read."""
        with self.translated("open", path), self.parent(path) as (here, name):
            # without O_NONBLOCK opening a pipe waits for its writer
            flags = access | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
            try:
                descriptor = os.open(name, flags, dir_fd=here)
            except OSError as error:
                if error.errno == errno.ELOOP:
                    raise _link() from None
                raise
            try:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode):
                    raise IsADirectoryError(errno.EISDIR, "not a regular file")
            except BaseException:
                os.close(descriptor)
                raise
            return descriptor, status.st_size

    def read_file(self, path: str, limit: int) -> bytes:
        descriptor, size = self.open_file(path)
        try:
            with self.translated("read", path):
                content = read_at(descriptor, 0, min(size, limit) + 1)
                while size < len(content) <= limit:  # it grew while it was read
                    more = read_at(descriptor, len(content), limit + 1 - len(content))
                    if not more:
                        break
                    content += more
        finally:
            os.close(descriptor)
        if len(content) > limit:
            raise Corrupt(
                f"'{path}' is larger than the {limit} bytes that are read at once",
                data={"path": path, "limit": limit},
            )
        return content

    def entries(self, path: str) -> list[Entry]:
        with (
            self.translated("scandir", path),
            self.directory(path) as here,
            os.scandir(here) as found,
        ):
            items = [Entry(item.name, item.is_dir(follow_symlinks=False)) for item in found]
        return sorted(items, key=_by_name)

    def list_with_stat(self, path: str) -> list[tuple[str, FileStat]]:
        """What ``path`` holds, sorted; a name that vanishes meanwhile is left out."""
        found: list[tuple[str, FileStat]] = []
        with self.translated("scandir", path), self.directory(path) as here:
            for name in sorted(os.listdir(here)):  # noqa: PTH208 (of a descriptor)
                with contextlib.suppress(FileNotFoundError):
                    found.append((name, _file_stat(os.lstat(name, dir_fd=here))))
        return found

    def stat(self, path: str) -> FileStat:
        """Of a symbolic link: the link's own."""
        with self.translated("stat", path):
            if not paths.normalise(path):
                with self.directory("") as here:
                    return _file_stat(os.fstat(here))
            with self.parent(path) as (here, name):
                return _file_stat(os.lstat(name, dir_fd=here))

    def info(self) -> RemoteInfo:
        """As ``df``: ``available`` leaves out what is reserved for root."""
        self.check_in_place()
        with self.translated("statvfs", ""), self.directory("") as here:
            space = os.fstatvfs(here)
        return RemoteInfo(
            size=space.f_blocks * space.f_frsize,
            used=(space.f_blocks - space.f_bfree) * space.f_frsize,
            available=space.f_bavail * space.f_frsize,
        )

    # -- changing

    def rename(self, old: str, new: str) -> None:
        with self.translated("rename", old), self.parent(old) as (source, old_name):
            os.lstat(old_name, dir_fd=source)  # a missing source makes no directories
            with self.parent(new, create=True) as (target, new_name):
                stop_if_abandoned()
                os.rename(old_name, new_name, src_dir_fd=source, dst_dir_fd=target)
                # the new name first: after a crash both may exist, never neither
                sync_directory(target)
                if not os.path.samestat(os.fstat(source), os.fstat(target)):
                    sync_directory(source)

    def unlink(self, path: str) -> None:
        """Durable on return: what was removed does not come back after a crash, when what
        it refers to may be gone."""
        with self.translated("unlink", path), self.parent(path) as (here, name):
            stop_if_abandoned()
            os.unlink(name, dir_fd=here)
            sync_directory(here)

    def mktree(self, path: str) -> None:
        with self.translated("mkdir", path), self.directory(path, create=True):
            pass

    def rmdir(self, path: str) -> None:
        with self.translated("rmdir", path), self.parent(path) as (here, name):
            stop_if_abandoned()
            os.rmdir(name, dir_fd=here)
            sync_directory(here)

    def clear(self, path: str) -> list[str]:
        """Unlink all files right in ``path``; the paths of its directories."""
        below: list[str] = []
        with self.translated("unlink", path), self.directory(path) as here:
            with os.scandir(here) as found:
                entries = [(item.name, item.is_dir(follow_symlinks=False)) for item in found]
            for name, is_dir in entries:
                stop_if_abandoned()
                if is_dir:
                    below.append(paths.join(path, name))
                else:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(name, dir_fd=here)
        return below


def split(path: str) -> tuple[str, str]:
    """The directory that holds ``path``, and its name there; ``Refused`` for the root."""
    above, _, name = paths.normalise(path).rpartition("/")
    if not name:
        raise Refused(
            "EBUSY: the root of a remote cannot be changed", code="EBUSY", data={"path": "/"}
        )
    return above, name


@contextlib.contextmanager
def translated(doing: str, path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _with_way_out(from_os_error(error, doing, path)) from error


def _with_way_out(error: ProxyError) -> ProxyError:
    way_out = {
        "ENOSPC": "free space on the remote or lower the retention",
        "EDQUOT": "the quota of this remote is used up: raise it or lower the retention",
        "EROFS": "the remote is mounted read-only: look for errors in its file system's log",
    }.get(error.code)
    if way_out is None:
        return error
    return type(error)(f"{error.message}: {way_out}", code=error.code, data=error.data)


def _link() -> OSError:
    return OSError(errno.ELOOP, "a symbolic link, which is never followed inside a remote")


def _by_name(entry: Entry) -> str:
    return entry.name


def _file_stat(status: os.stat_result) -> FileStat:
    return FileStat(status.st_size, status.st_mtime, stat.S_ISDIR(status.st_mode))


def read_at(descriptor: int, offset: int, length: int) -> bytes:
    """``length`` bytes; fewer only at the end of the file."""
    first = os.pread(descriptor, length, offset)
    if len(first) == length or not first:
        return first
    parts, missing = [first], length - len(first)
    while missing > 0:
        part = os.pread(descriptor, missing, offset + length - missing)
        if not part:
            break
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def read_into(descriptor: int, offset: int, buffer: memoryview) -> int:
    """Fill ``buffer``; fewer bytes only at the end of the file."""
    filled = 0
    while filled < len(buffer):
        count = os.preadv(descriptor, [buffer[filled:]], offset + filled)
        if count == 0:
            break
        filled += count
    return filled


def sync_directory(descriptor: int) -> None:
    """Make the directory's names durable.  File systems without the notion refuse fsync."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
