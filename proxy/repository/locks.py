"""The lock of a VM directory."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from proxy.errors import Busy
from proxy.repository.paths import vm_directory

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from proxy.remotes.interface import Lock, Remote


@contextlib.asynccontextmanager
async def lock_vm(
    remote: Remote,
    vm_uuid: str,
    *,
    owner: str,
    wait: float = 0,
    waiting: Callable[[Busy], None] | None = None,
) -> AsyncIterator[Lock]:
    """Hold the directory of ``vm_uuid``: the same lock that Xen Orchestra takes.

    Held for a whole VM backup, and by everything that removes something from the
    directory.  Reading and listing take no lock.  Creates the directory, because the lock
    of a missing one cannot be taken by everybody.  ``Busy`` after ``wait`` seconds; when a wait
    begins ``waiting`` is told, once, who is in the way.
    """
    directory = vm_directory(vm_uuid)
    await remote.mktree(directory)
    async with contextlib.AsyncExitStack() as stack:
        try:
            lock = await stack.enter_async_context(remote.lock(directory, owner=owner))
        except Busy as busy:
            if wait <= 0:
                raise
            if waiting is not None:
                waiting(busy)
            lock = await stack.enter_async_context(remote.lock(directory, owner=owner, wait=wait))
        yield lock
