"""Small files of the daemon itself that must survive a crash and stay private."""

from __future__ import annotations

import contextlib
import os
import secrets
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def replace_file(path: Path, content: bytes, mode: int) -> None:
    """Atomic and durable; missing directories are made with 0700.  Raises ``OSError``.

    The mode holds from the first byte on, so nobody else reads it at any moment.  A failure
    leaves the old file and no other.
    """
    make_private_directory(path.parent)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    _sync(path.parent)


def make_private_directory(path: Path) -> None:
    """``mkdir -p`` where every level that is made gets 0700."""
    for level in reversed([path, *path.parents]):
        if not level.exists():
            level.mkdir(mode=0o700, exist_ok=True)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
