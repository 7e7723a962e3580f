"""The lock of a VM directory."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from proxy.repository.paths import vm_directory

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from proxy.remotes.interface import Lock, Remote


@contextlib.asynccontextmanager
async def lock_vm(
    remote: Remote, vm_uuid: str, *, owner: str, wait: float = 0
) -> AsyncIterator[Lock]:
    """Hold the directory of ``vm_uuid``: the same lock that Xen Orchestra takes.

    Held for a whole VM backup, and by everything that removes something from the
    directory.  Reading and listing take no lock.  Creates the directory, because the lock
    of a missing one cannot be taken by everybody.  ``Busy`` after ``wait`` seconds.
    """
    directory = vm_directory(vm_uuid)
    await remote.mktree(directory)
    async with remote.lock(directory, owner=owner, wait=wait) as lock:
        yield lock
