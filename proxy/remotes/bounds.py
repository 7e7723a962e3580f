"""Bounds of a remote: how many operations at once, and how long one may be silent.

The time bounds the whole of an operation, what is tried again included: upstream's bounds each
try, and six tries of a dead server take two hours.  It applies to what is one step of the
storage.  Work of many steps (``rmtree``, ``rename_all``, making data durable) takes as long as
there is to do; the storages bound each step of it.

Opening a file is not bounded here but by the storages: what stays open when the operation is over
may have cancel scopes of its own, which must not begin inside ours.

Where the operating system does not let go of a thread (a change on a file system that hangs),
the time cannot be kept: to answer before the effect is decided would be a lie about it.

Locks wait for nobody: they must be refreshed while data queues.  Nor do writes where they may
wait for other writers (for memory): with all turns taken by those that wait, those that could
go on would never get one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import trio

from proxy.remotes.wrapper import Operation, Wrapper, writers_wait
from proxy.runtime.deadlines import deadline

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from proxy.remotes.interface import Remote

T = TypeVar("T")

_ENDLESS = frozenset(
    {
        *("rmtree", "rename_all", "walk", "create.commit", "batch.commit", "edit.sync", "aclose"),
        *("create.open", "read.open", "edit.open", "batch.open"),
    }
)
_UNLIMITED = frozenset(
    {"lock.acquire", "lock.held", "lock.check", "lock.release", "create.close", "aclose", "walk"}
)


class Bounded(Wrapper):
    """``at_once`` operations at a time, the others wait in order; ``seconds`` of 0: no limit.

    An operation that is over time raises ``Unreachable`` (``ETIMEDOUT``); the wait for a turn
    does not count.
    """

    def __init__(self, inner: Remote, *, at_once: int, seconds: float) -> None:
        super().__init__(inner)
        self._turns = trio.Semaphore(at_once)
        self._seconds = seconds
        self._unlimited = _UNLIMITED | ({"create.write"} if writers_wait(inner) else set[str]())

    async def around(self, operation: Operation, run: Callable[[], Awaitable[T]]) -> T:
        if operation.verb in self._unlimited:
            return await run()
        async with self._turns:
            if operation.verb in _ENDLESS or not self._seconds:
                return await run()
            return await self._in_time(operation, run)

    async def _in_time(self, operation: Operation, run: Callable[[], Awaitable[T]]) -> T:
        name = f"{operation.verb} of '{operation.path}' on the remote"
        with deadline(name, self._seconds):
            return await run()
        raise AssertionError(name)  # deadline() raises what ended the block
