"""The one way to run blocking work: a worker thread, counted per kind of work.

A hop costs about 80 µs, so callers hand over units of at least 256 KiB.
"""

from __future__ import annotations

import contextlib
import enum
import os
import threading
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import trio

from proxy.errors import Canceled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

P = ParamSpec("P")
T = TypeVar("T")


class Work(enum.Enum):
    """A kind of blocking work; the value is how many threads it may use at once."""

    DISK = 16
    CPU = 4
    JOURNAL = 1
    NETWORK = 32
    """Bulk reads and writes of TLS sockets, and name look-ups."""
    SHARE = 12
    """Requests to file servers that no kernel has mounted: each waits for an answer, bounded by a
    deadline, and must not keep the disk's threads from local remotes meanwhile."""
    LOCK = 8
    """Refreshing the locks of remotes: must never queue behind data for their 10 seconds."""


_limiters: trio.lowlevel.RunVar[dict[Work, trio.CapacityLimiter]] = trio.lowlevel.RunVar("limiters")
_inline: trio.lowlevel.RunVar[bool] = trio.lowlevel.RunVar("inline", default=False)


def limiter(work: Work) -> trio.CapacityLimiter:
    """The limiter of ``work`` in this ``trio.run``; its ``statistics()`` show the load."""
    try:
        limiters = _limiters.get()
    except LookupError:
        limiters = dict[Work, trio.CapacityLimiter]()
        _limiters.set(limiters)
    if work not in limiters:
        limiters[work] = trio.CapacityLimiter(work.value)
    return limiters[work]


async def in_thread(
    work: Work, function: Callable[..., T], *args: object, abandon: bool = False
) -> T:
    """Run ``function(*args)`` in a worker thread and return what it returns.

    On cancel the call waits for the function to end, so that a half-done write is never
    left running behind its owner; with ``abandon=True`` it returns at once and the thread's
    result is dropped: only for reads without effects.
    """
    if _inline.get():
        await trio.lowlevel.checkpoint()
        return function(*args)
    return await trio.to_thread.run_sync(
        function, *args, abandon_on_cancel=abandon, limiter=limiter(work)
    )


@contextlib.contextmanager
def inline_threads() -> Iterator[None]:
    """Run blocking work in the calling task, for tests on a virtual clock.

    Trio's autojump clock sees a task that waits for a thread as idle and fires deadlines.
    """
    token = _inline.set(True)
    try:
        yield
    finally:
        _inline.reset(token)


def runs_inline() -> bool:
    """Whether :func:`inline_threads` is in force."""
    return _inline.get()


class Threads:
    """Where the blocking work of one remote runs: here in the threads that all share.

    Work on what may hang for good, a network mount, gets a :class:`proxy.remotes.lane.Lane` in
    its place.
    """

    abandons = False
    """Whether a call may end while its function still runs.  Then the function must not fill
    memory that its caller uses again."""

    async def run(
        self,
        work: Work,
        function: Callable[..., T],
        *args: object,
        abandon: bool = False,
        dispose: Callable[[T], object] | None = None,
    ) -> T:
        """As :func:`in_thread`.  ``dispose`` gets, in the thread, the result that nobody waits
        for any more."""
        del dispose  # such a result comes only from what has no effects
        return await in_thread(work, function, *args, abandon=abandon)

    async def end(self, function: Callable[[], None], work: Work = Work.DISK) -> None:
        """Run the end or the undo of something; on cancel and expiry it goes on alone."""
        await in_thread(work, function, abandon=True)

    def close(self, descriptor: int) -> None:
        """Close what was opened for reading, without a wait."""
        os.close(descriptor)


SHARED = Threads()

_thread = threading.local()


@contextlib.contextmanager
def abandonable(is_abandoned: Callable[[], bool]) -> Iterator[None]:
    """Let the functions that this thread runs in the block ask :func:`stop_if_abandoned`."""
    _thread.is_abandoned = is_abandoned
    try:
        yield
    finally:
        del _thread.is_abandoned


def stop_if_abandoned() -> None:
    """Raise ``Canceled`` when nobody waits any more for what this thread does.

    For the places between two effects of one function: what its caller was told has failed
    must not go on when the storage comes back.
    """
    is_abandoned: Callable[[], bool] | None = getattr(_thread, "is_abandoned", None)
    if is_abandoned is not None and is_abandoned():
        raise Canceled("nobody waits for this any more")
