"""``maxExportRate``: one budget of bytes per second for a whole run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import Callable

_LONGEST_WAIT = 1.0
"""Seconds after which the rate is asked for again."""


class RateLimit:
    """A token bucket of one second, shared by every transfer of a run, first come first served.

    ``rate`` says what holds now, in bytes per second; 0 is no limit.  A change counts within a
    second.
    """

    def __init__(self, rate: Callable[[], float]) -> None:
        self._rate = rate
        self._asked = 0.0
        """Bytes that were accounted for, ever."""
        self._granted = 0.0
        """Of these and of those to come: how many may have moved by ``_granted_at``."""
        self._granted_at = -float("inf")

    async def spend(self, count: int) -> float:
        """Account for ``count`` bytes, waiting while the budget is overdrawn.

        Returns the seconds waited.  On cancel the bytes stay accounted for: they were moved.
        """
        self._grant()
        self._asked += count
        mine = self._asked
        began = trio.current_time()
        while (rate := self._grant()) and self._granted < mine:  # noqa: ASYNC110  time grants
            # a hair more, or the sum may stay a fraction of a byte below
            await trio.sleep(min((mine - self._granted) / rate + 1e-6, _LONGEST_WAIT))
        waited = trio.current_time() - began
        if not waited:
            await trio.lowlevel.checkpoint()
        return waited

    def _grant(self) -> float:
        """Count what time has granted since; the rate now."""
        now, rate = trio.current_time(), self._rate()
        if rate <= 0:
            self._granted = self._asked
        else:
            passed = now - self._granted_at
            self._granted = min(self._granted + rate * passed, self._asked + rate)
        self._granted_at = now
        return max(rate, 0.0)
