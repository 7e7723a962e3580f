"""Changes that become durable together: files edited in place, many files at once, renames.

Blocking, as :mod:`proxy.remotes.posix`.  A sync for each of a thousand blocks would cost a
thousand flushes of the disk's cache; one for all of them costs one.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from typing import TYPE_CHECKING

from proxy.remotes import paths
from proxy.remotes.posix import UNSUPPORTED, read_into, sync_directory

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from proxy.remotes.posix import Root

_FILE_MODE = 0o644
_libc = ctypes.CDLL(None, use_errno=True)


class EditedFile:
    """An open file that is read and written at any place.  For one thread at a time."""

    def __init__(self, root: Root, path: str) -> None:
        self.path = paths.normalise(path)
        self._root = root
        self._descriptor, self.size = root.open_file(path, os.O_RDWR)

    def read_into(self, offset: int, buffer: memoryview) -> int:
        with self._root.translated("read", self.path):
            return read_into(self._descriptor, offset, buffer)

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        rest = memoryview(data).cast("B")
        with self._root.translated("write", self.path):
            while rest:
                written = os.pwrite(self._descriptor, rest, offset)
                offset += written
                rest = rest[written:]
                self.size = max(self.size, offset)

    def truncate(self, size: int) -> None:
        with self._root.translated("truncate", self.path):
            os.ftruncate(self._descriptor, size)
        self.size = size

    def sync(self) -> None:
        with self._root.translated("fsync", self.path):
            os.fsync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)


class Files:
    """Many new files on their way to be durable.  Thread-safe.

    The descriptor by which the file system is synced is opened before the first write: the
    kernel then reports through it every write-back error that happened since.
    """

    def __init__(self, root: Root) -> None:
        self._root = root
        with root.translated("open", ""), root.directory("") as here:
            self._descriptor = os.dup(here)
        self._directories: dict[str, int] = {}
        self._mutex = threading.Lock()

    def write(self, path: str, data: bytes | memoryview) -> None:
        """Create or replace ``path``; start writing it back, so that the sync waits less."""
        with self._root.translated("write", path), self._directory(paths.parent(path)) as here:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(paths.name(path), flags, _FILE_MODE, dir_fd=here)
            try:
                rest = memoryview(data).cast("B")
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
                _start_write_back(descriptor)
            finally:
                os.close(descriptor)  # NFS reports write errors here

    @contextlib.contextmanager
    def _directory(self, path: str) -> Iterator[int]:
        """The directory, kept open from its first use: a thousand files share it."""
        key = paths.normalise(path)
        with self._mutex:
            here = self._directories.get(key)
            if here is None:
                with self._root.directory(path, create=True) as found:
                    here = self._directories[key] = os.dup(found)
        yield here

    def sync(self) -> None:
        with self._root.translated("syncfs", ""):
            if _libc.syncfs(ctypes.c_int(self._descriptor)) == 0:
                return
            number = ctypes.get_errno()
            if number not in UNSUPPORTED:
                raise OSError(number, os.strerror(number))
            os.sync()

    def close(self) -> None:
        with self._mutex:
            for descriptor in self._directories.values():
                os.close(descriptor)
            self._directories.clear()
        os.close(self._descriptor)


def _start_write_back(descriptor: int) -> None:
    # whether it works is no matter: the sync waits for what is left and reports errors
    _libc.sync_file_range(
        ctypes.c_int(descriptor), ctypes.c_int64(0), ctypes.c_int64(0), ctypes.c_uint(2)
    )


def rename_all(root: Root, pairs: Sequence[tuple[str, str]]) -> list[int]:
    """Rename each; the positions of those whose old name does not exist.  Durable on return."""
    missing: list[int] = []
    with contextlib.ExitStack() as stack:
        opened: dict[tuple[str, bool], int] = {}

        def directory(path: str, *, create: bool) -> int:
            key = (paths.parent(path), create)
            if key not in opened:
                opened[key] = stack.enter_context(root.directory(key[0], create=create))
            return opened[key]

        try:
            for position, (old, new) in enumerate(pairs):
                with root.translated("rename", old):
                    try:
                        source = directory(old, create=False)
                        os.lstat(paths.name(old), dir_fd=source)
                    except FileNotFoundError:
                        missing.append(position)
                        continue
                    target = directory(new, create=True)
                    os.rename(
                        paths.name(old), paths.name(new), src_dir_fd=source, dst_dir_fd=target
                    )
        finally:
            # also after an error: what was renamed has happened and must not come back
            with root.translated("fsync", pairs[0][0] if pairs else ""):
                for descriptor in opened.values():
                    sync_directory(descriptor)
    return missing
