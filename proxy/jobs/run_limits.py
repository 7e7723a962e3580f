"""What bounds the parts of one run together: how many at once, how fast, how long."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from proxy.jobs.rate_limit import RateLimit
from proxy.runtime.deadlines import time_limit

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextlib import AbstractAsyncContextManager, AbstractContextManager

    from proxy.tasks import Task


class RunLimits:
    """Of one run, from its beginning; shared by all its parts (VMs, pools).

    ``concurrency`` parts are worked on at once (0: all), together at ``rate`` (bytes per second
    now, 0: no limit), and for ``timeout`` milliseconds (0: no limit).
    """

    def __init__(
        self,
        root: Task,
        *,
        parts: int,
        concurrency: float,
        rate: Callable[[], float],
        timeout: float,
    ) -> None:
        self._root = root
        self.rate = RateLimit(rate)
        self._slots = trio.Semaphore(int(concurrency) if concurrency >= 1 else max(1, parts))
        self._timeout = timeout / 1000
        self._ends_at = trio.current_time() + self._timeout if timeout else float("inf")

    async def in_slot(
        self,
        about: tuple[str, str],
        begin: Callable[[], AbstractAsyncContextManager[Task]],
        work: Callable[[], Awaitable[None]],
    ) -> None:
        """Wait for a slot, then work.  Errors stay in the log; only a cancel gets out.

        A part that a cancel meets before it has its task gets one all the same from ``begin``.
        ``about`` is the property, name and value, by which that task is known.
        """
        name, value = about
        try:
            try:
                async with self._slots:
                    await work()
            except trio.Cancelled:
                if not any(child.properties.get(name) == value for child in self._root.children):
                    async with begin():
                        await trio.lowlevel.checkpoint()
                raise
        except Exception:  # noqa: BLE001, S110  in the log of the part's task
            pass

    def time_limit(self) -> AbstractContextManager[object]:
        """Bounds the block by what is left of the run's time."""
        left = self._ends_at - trio.current_time()
        return time_limit("the job's timeout", self._timeout, left=left)
