"""A file that is written: hidden until all its bytes are durable, then under its name.

Blocking, as :mod:`proxy.remotes.posix`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from typing import TYPE_CHECKING

from proxy.errors import Corrupt
from proxy.remotes import paths
from proxy.remotes.posix import sync_directory
from proxy.remotes.syscalls import SYNC_AND_WAIT, SYNC_START, rename_no_replace, sync_range
from proxy.runtime.threads import stop_if_abandoned

if TYPE_CHECKING:
    from proxy.remotes.posix import Root

_FILE_MODE = 0o644
_WINDOW = 16 * 1024 * 1024
"""Bytes between two starts of write-back; at most two windows are dirty at any time."""


def write_whole(
    root: Root, path: str, data: bytes | memoryview, *, exclusive: bool, in_place: bool
) -> None:
    """The whole life of a :class:`NewFile`, with nothing left of it on failure."""
    file = NewFile(root, path, exclusive=exclusive, in_place=in_place)
    try:
        file.open()
        file.write(data)
        file.sync()
        file.publish()
    finally:
        file.discard()


class NewFile:
    """A file from its first byte to its final name.  For one task at a time; threads that
    overlap wait for each other, so that :meth:`discard` never takes the descriptor from under
    one that hangs.

    ``in_place`` is for remotes whose files cannot be renamed: the bytes go to the final name
    at once, which must be free.  :meth:`discard` may be called at any time, more than once.
    """

    def __init__(self, root: Root, path: str, *, exclusive: bool, in_place: bool) -> None:
        self.path = paths.normalise(path)
        self.temporary_path = self.path
        self._root = root
        self._mutex = threading.Lock()
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
        self._torn = False
        """A write did not end well: what the file holds is not what its caller gave."""

    def open(self) -> None:
        with self._mutex, self._root.translated("open", self.path):
            here, _ = self._stack.enter_context(self._root.parent(self.path, create=True))
            self._directory = here
            stop_if_abandoned()
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
        with self._mutex, self._root.translated("write", self.path):
            assert self._descriptor is not None, "not open"
            self._synced = False
            was_torn, self._torn = self._torn, True
            rest = memoryview(data).cast("B")
            while rest:
                stop_if_abandoned()
                written = os.write(self._descriptor, rest)
                self._size += written
                rest = rest[written:]
            stop_if_abandoned()
            if self._early_writeback and self._size - self._started >= _WINDOW:
                self._write_back(self._descriptor)
            self._torn = was_torn

    def _write_back(self, descriptor: int) -> None:
        start, self._started = self._started, self._size
        if not sync_range(descriptor, start, self._size - start, SYNC_START):
            self._early_writeback = False
            return
        settled, self._settled = self._settled, start
        if start > settled:
            sync_range(descriptor, settled, start - settled, SYNC_AND_WAIT)
            os.posix_fadvise(descriptor, settled, start - settled, os.POSIX_FADV_DONTNEED)

    def sync(self) -> None:
        """Make the bytes durable and check that the file has them all.

        After a failed fsync the kernel calls the lost pages clean and a second one succeeds:
        the file is closed for good, and :meth:`publish` refuses.
        """
        with self._mutex, self._root.translated("fsync", self.path):
            stop_if_abandoned()
            assert self._descriptor is not None, "not open"
            if self._torn:
                raise Corrupt(
                    f"'{self.path}' is not whole: a write to it has failed",
                    data={"path": self.path},
                )
            descriptor = self._descriptor
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
        with self._mutex, self._root.translated("rename", self.path):
            stop_if_abandoned()
            assert self._synced, "published before its bytes are durable"
            assert self._directory is not None, "not open"
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
        with self._mutex:
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


def _rename_to_free_name(directory: int, old: str, new: str) -> None:
    """NFS has no such rename but hard links, CIFS and FAT the reverse."""
    if rename_no_replace(directory, old, new):
        return
    os.link(old, new, src_dir_fd=directory, dst_dir_fd=directory, follow_symlinks=False)
    os.unlink(old, dir_fd=directory)
