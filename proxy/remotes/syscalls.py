"""What Linux has for files and Python's ``os`` does not.  All of it blocks, without the GIL."""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Final

_libc = ctypes.CDLL(None, use_errno=True)
_RENAME_NOREPLACE: Final = 1
_OPENAT2: Final = ctypes.c_long(437)  # on every architecture
_HOW_SIZE: Final = ctypes.c_size_t(24)
_RESOLVE_BENEATH_WITHOUT_LINKS: Final = 0x08 | 0x04
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC

SYNC_START: Final = 2
"""Start writing back what is dirty; wait for nothing."""
SYNC_AND_WAIT: Final = 7

UNSUPPORTED: Final = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})
"""How a file system says that it has no such operation."""

_TELLING: Final = frozenset(
    {
        0xEF53,  # ext2, ext3, ext4
        0x58465342,  # xfs
        0x9123683E,  # btrfs
        0x01021994,  # tmpfs
        0x6969,  # nfs
    }
)


def sync_range(descriptor: int, offset: int, length: int, flags: int) -> bool:
    """``sync_file_range``; a length of 0 means up to the end.  False when this file system
    has no such thing.

    Errors of a call that waits are final: having been told once, fsync does not report them
    again.
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
    if number in UNSUPPORTED or number == errno.ESPIPE:
        return False
    raise OSError(number, os.strerror(number))


def sync_file_system(descriptor: int) -> None:
    """``syncfs``: all files of the file system that ``descriptor`` lies on.

    Raises also for pages lost since ``descriptor`` was opened, each loss once, where
    :func:`tells_lost_writes`; of any file there, also another program's.
    """
    if _libc.syncfs(ctypes.c_int(descriptor)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def tells_lost_writes(descriptor: int) -> bool:
    """Whether :func:`sync_file_system` makes everything durable and reports what got lost.

    Since Linux 5.8, on the file systems that are known for it.  Not on overlayfs, whose upper
    file system keeps the errors to itself, and not on SMB and FUSE, which send the pages
    but never ask the server to make them durable.
    """
    release = os.uname().release.split(".")
    try:
        version = int(release[0]), int(release[1].partition("-")[0])
    except (ValueError, IndexError):
        return False
    return version >= (5, 8) and _kind(descriptor) in _TELLING


def _kind(descriptor: int) -> int | None:
    status = (ctypes.c_long * 32)()  # struct statfs begins with the type, a long
    if _libc.fstatfs(ctypes.c_int(descriptor), status) != 0:
        return None
    return int(status[0]) & 0xFFFFFFFF


def open_beneath(directory: int, path: str) -> int | None:
    """The directory ``path`` below ``directory``, with no symbolic link on the way, in one step.

    ``None`` for every reason for which it cannot be: go step by step to learn which.  ``path``
    is normalised and not empty.
    """
    how = (ctypes.c_uint64 * 3)(_DIRECTORY, 0, _RESOLVE_BENEATH_WITHOUT_LINKS)
    descriptor: int = _libc.syscall(
        _OPENAT2, ctypes.c_int(directory), ctypes.c_char_p(os.fsencode(path)), how, _HOW_SIZE
    )
    return descriptor if descriptor >= 0 else None


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
    if number in UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number))
