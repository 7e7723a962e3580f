"""Blocking file operations below one directory, which no path and no symbolic link leaves.

Every operation walks from an open descriptor of the root, one name at a time, and follows
no symbolic link (``ELOOP``): whoever can write on the remote cannot point us at the
appliance's own files, not even by swapping a directory for a link while we work.  The root
itself may be a link or lie behind one: it is the operator's configuration.

The descriptor also pins the directory: should a mount disappear, nothing is written into
the empty directory under it, and a removed root is an error and not an empty remote.

Everything here blocks; :mod:`proxy.remotes.local` calls it in worker threads.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from proxy.errors import Corrupt, ProxyError, Refused, Unreachable, from_os_error
from proxy.remotes import paths
from proxy.remotes.interface import Entry, FileStat, RemoteInfo

if TYPE_CHECKING:
    from collections.abc import Iterator

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE_MODE = 0o644
_WINDOW = 16 * 1024 * 1024
"""Bytes between two starts of write-back; at most two windows are dirty at any time."""

_libc = ctypes.CDLL(None, use_errno=True)
_RENAME_NOREPLACE = 1
_SYNC_START, _SYNC_AND_WAIT = 2, 7
_UNSUPPORTED = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})


class Root:
    """The open root of a remote.  Thread-safe; after :meth:`close` everything is refused."""

    def __init__(self, path: str, *, directory_mode: int = 0o700) -> None:
        self._path = path
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
                if not os.access(self._path, os.R_OK | os.W_OK | os.X_OK):
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

    def _start(self) -> int:
        with self._mutex:
            if self._descriptor is None:
                raise Unreachable("ENOTCONN: the remote is closed", code="ENOTCONN")
            return os.open(".", _DIRECTORY, dir_fd=self._descriptor)

    @contextlib.contextmanager
    def translated(self, doing: str, path: str) -> Iterator[None]:
        """Turn ``OSError`` into the house's errors; a vanished root is no ``NotFound``."""
        with translated(doing, path):
            try:
                yield
            except FileNotFoundError:
                with self._mutex:
                    pinned = self._descriptor
                    gone = pinned is not None and os.fstat(pinned).st_nlink == 0
                if gone:
                    raise self._replaced() from None
                raise

    @contextlib.contextmanager
    def directory(self, path: str, *, create: bool = False) -> Iterator[int]:
        """An open descriptor of the directory ``path``; raises ``OSError``.

        With ``create`` missing levels are made, each durable before the next.
        """
        here = self._start()
        try:
            for name in paths.segments(path):
                below = self._enter(here, name, create=create)
                os.close(here)
                here = below
            yield here
        finally:
            os.close(here)

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
        name = paths.name(path)
        if not name:
            raise Refused(
                "EBUSY: the root of a remote cannot be changed", code="EBUSY", data={"path": "/"}
            )
        with self.directory(paths.parent(path), create=create) as here:
            yield here, name

    # -- reading

    def open_file(self, path: str) -> tuple[int, int]:
        """A descriptor for reading and the size.  ``Conflict`` (``EISDIR``) for anything but
        a regular file: a device or a pipe that somebody placed there is never read."""
        with self.translated("open", path), self.parent(path) as (here, name):
            # without O_NONBLOCK opening a pipe waits for its writer
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
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

    def write_file(
        self, path: str, data: bytes | memoryview, *, exclusive: bool, in_place: bool
    ) -> None:
        """The whole life of a :class:`NewFile`, with nothing left of it on failure."""
        file = NewFile(self, path, exclusive=exclusive, in_place=in_place)
        try:
            file.open()
            file.write(data)
            file.sync()
            file.publish()
        finally:
            file.discard()

    def rename(self, old: str, new: str) -> None:
        with self.translated("rename", old), self.parent(old) as (source, old_name):
            os.lstat(old_name, dir_fd=source)  # a missing source makes no directories
            with self.parent(new, create=True) as (target, new_name):
                os.rename(old_name, new_name, src_dir_fd=source, dst_dir_fd=target)
                # the new name first: after a crash both may exist, never neither
                sync_directory(target)
                if not os.path.samestat(os.fstat(source), os.fstat(target)):
                    sync_directory(source)

    def unlink(self, path: str) -> None:
        """Durable on return: what was removed does not come back after a crash, when what
        it refers to may be gone."""
        with self.translated("unlink", path), self.parent(path) as (here, name):
            os.unlink(name, dir_fd=here)
            sync_directory(here)

    def mktree(self, path: str) -> None:
        with self.translated("mkdir", path), self.directory(path, create=True):
            pass

    def rmdir(self, path: str) -> None:
        with self.translated("rmdir", path), self.parent(path) as (here, name):
            os.rmdir(name, dir_fd=here)
            sync_directory(here)

    def clear(self, path: str) -> list[str]:
        """Unlink all files right in ``path``; the paths of its directories."""
        below: list[str] = []
        with self.translated("unlink", path), self.directory(path) as here:
            with os.scandir(here) as found:
                entries = [(item.name, item.is_dir(follow_symlinks=False)) for item in found]
            for name, is_dir in entries:
                if is_dir:
                    below.append(paths.join(path, name))
                else:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(name, dir_fd=here)
        return below


class NewFile:
    """A file from its first byte to its final name.  For one thread at a time.

    ``in_place`` is for remotes whose files cannot be renamed: the bytes go to the final name
    at once, which must be free.  :meth:`discard` may be called at any time, more than once.
    """

    def __init__(self, root: Root, path: str, *, exclusive: bool, in_place: bool) -> None:
        self.path = paths.normalise(path)
        self.temporary_path = self.path
        self._root = root
        self._exclusive = exclusive
        self._in_place = in_place
        self._stack = contextlib.ExitStack()
        self._directory: int | None = None
        self._name = paths.name(path)
        self._written_name = self._name
        self._descriptor: int | None = None
        self._size = 0
        self._started = 0
        self._settled = 0
        self._early_writeback = True
        self._exists = False
        self._synced = False

    def open(self) -> None:
        with self._root.translated("open", self.path):
            here, _ = self._stack.enter_context(self._root.parent(self.path, create=True))
            self._directory = here
            if self._in_place:
                self._create(here, self._name)
                return
            if self._exclusive:  # said early, before a day of transfer; publish() is what decides
                self._refuse_taken(here)
            milliseconds = time.time_ns() // 1_000_000
            while True:
                try:
                    self._create(here, paths.temporary_name(self._name, milliseconds))
                except FileExistsError:
                    milliseconds += 1
                else:
                    return

    def _refuse_taken(self, here: int) -> None:
        try:
            os.lstat(self._name, dir_fd=here)
        except FileNotFoundError:
            return
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))

    def _create(self, here: int, name: str) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._descriptor = os.open(name, flags, _FILE_MODE, dir_fd=here)
        self._written_name, self._exists = name, True
        self.temporary_path = paths.join(paths.parent(self.path), name)

    def write(self, data: bytes | memoryview) -> None:
        """Append all of ``data``.

        Write-back starts early and the cache is given back behind it: measured twice as
        fast as leaving it all to the last fsync, which then takes no time, and a backup
        larger than the memory does not push everything else out of it.
        """
        assert self._descriptor is not None, "not open"
        self._synced = False
        with self._root.translated("write", self.path):
            rest = memoryview(data).cast("B")
            while rest:
                written = os.write(self._descriptor, rest)
                self._size += written
                rest = rest[written:]
            if self._early_writeback and self._size - self._started >= _WINDOW:
                self._write_back(self._descriptor)

    def _write_back(self, descriptor: int) -> None:
        start, self._started = self._started, self._size
        if not _sync_range(descriptor, start, self._size - start, _SYNC_START):
            self._early_writeback = False
            return
        settled, self._settled = self._settled, start
        if start > settled:
            _sync_range(descriptor, settled, start - settled, _SYNC_AND_WAIT)
            os.posix_fadvise(descriptor, settled, start - settled, os.POSIX_FADV_DONTNEED)

    def sync(self) -> None:
        """Make the bytes durable and check that the file has them all.

        After a failed fsync the kernel calls the lost pages clean and a second one succeeds:
        the file is closed for good, and :meth:`publish` refuses.
        """
        assert self._descriptor is not None, "not open"
        descriptor = self._descriptor
        with self._root.translated("fsync", self.path):
            try:
                os.fsync(descriptor)
                size = os.fstat(descriptor).st_size
            finally:
                self._descriptor = None
                os.close(descriptor)  # NFS reports the last write errors here
        if size != self._size:
            raise Corrupt(
                f"'{self.path}' has {size} bytes after {self._size} were written",
                data={"path": self.path, "size": size, "expected": self._size},
            )
        self._synced = True

    def publish(self) -> None:
        """Give the file its final name, durably; only after :meth:`sync`."""
        assert self._synced, "published before its bytes are durable"
        assert self._directory is not None, "not open"
        with self._root.translated("rename", self.path):
            if not self._in_place:
                if self._exclusive:
                    _rename_to_free_name(self._directory, self._written_name, self._name)
                else:
                    os.rename(
                        self._written_name,
                        self._name,
                        src_dir_fd=self._directory,
                        dst_dir_fd=self._directory,
                    )
            self._exists = False  # no longer ours to remove
            sync_directory(self._directory)

    def discard(self) -> None:
        """Close, and unlink what was not published."""
        try:
            if self._descriptor is not None:
                descriptor, self._descriptor = self._descriptor, None
                with contextlib.suppress(OSError):  # its bytes are thrown away
                    os.close(descriptor)
            if self._exists and self._directory is not None:
                with self._root.translated("unlink", self.temporary_path):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(self._written_name, dir_fd=self._directory)
                    self._exists = False
        finally:
            self._directory = None
            self._stack.close()


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
        if error.errno not in _UNSUPPORTED:
            raise


def _sync_range(descriptor: int, offset: int, length: int, flags: int) -> bool:
    """``sync_file_range``; false when this file system has no such thing.

    Its errors are final: having been told once, fsync does not report them again.
    """
    done = _libc.sync_file_range(
        ctypes.c_int(descriptor),
        ctypes.c_int64(offset),
        ctypes.c_int64(length),
        ctypes.c_uint(flags),
    )
    if done == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNSUPPORTED or number == errno.ESPIPE:
        return False
    raise OSError(number, os.strerror(number))


def rename_no_replace(directory: int, old: str, new: str) -> bool:
    """Rename unless ``new`` exists (``FileExistsError``); false when not supported here."""
    done = _libc.renameat2(
        ctypes.c_int(directory),
        ctypes.c_char_p(os.fsencode(old)),
        ctypes.c_int(directory),
        ctypes.c_char_p(os.fsencode(new)),
        ctypes.c_uint(_RENAME_NOREPLACE),
    )
    if done == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number))


def _rename_to_free_name(directory: int, old: str, new: str) -> None:
    """NFS has no such rename but hard links, CIFS and FAT the reverse."""
    if rename_no_replace(directory, old, new):
        return
    os.link(old, new, src_dir_fd=directory, dst_dir_fd=directory, follow_symlinks=False)
    os.unlink(old, dir_fd=directory)


__all__ = ["NewFile", "Root", "read_at", "read_into", "rename_no_replace", "translated"]
