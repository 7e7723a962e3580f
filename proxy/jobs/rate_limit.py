"""``maxExportRate``: one budget of bytes per second for a whole run."""

from __future__ import annotations

import trio


class RateLimit:
    """A token bucket of one second, shared by every transfer of a run.

    ``rate`` in bytes per second; 0 is no limit.
    """

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._free_at = -float("inf")

    async def spend(self, count: int) -> float:
        """Account for ``count`` bytes, waiting while the budget is overdrawn.

        Returns the seconds waited.  On cancel the bytes stay accounted for: they were moved.
        """
        if self._rate <= 0:
            return 0.0
        now = trio.current_time()
        self._free_at = max(self._free_at, now - 1) + count / self._rate
        pause = self._free_at - now
        if pause > 0:
            await trio.sleep(pause)
            return pause
        await trio.lowlevel.checkpoint()
        return 0.0
