"""How far a transfer is, how fast it goes, when it will end and what holds it back."""

from __future__ import annotations

from collections import deque
from typing import Any

_WINDOW = 10.0
"""Seconds over which the rate is averaged."""
_SAMPLE = 0.5


class Progress:
    """Bytes done out of a total, which may be unknown or an estimate.

    ``now`` is a monotonic clock in seconds, passed in by the caller.  The percentage never
    goes back, and is 100 only when the transfer says that it is complete.
    """

    def __init__(self, now: float) -> None:
        self._samples: deque[tuple[float, int]] = deque([(now, 0)])
        self._began = now
        self.done = 0
        self.total: int | None = None
        self.estimated = False
        self.bottleneck: str | None = None
        self.percent = 0
        self._complete = False

    def update(
        self,
        now: float,
        done: int,
        total: int | None,
        *,
        estimated: bool = False,
        bottleneck: str | None = None,
    ) -> None:
        self.done = done
        self.total = total
        self.estimated = estimated
        if bottleneck is not None:
            self.bottleneck = bottleneck
        if now - self._samples[-1][0] >= _SAMPLE:
            self._samples.append((now, done))
            while len(self._samples) > 2 and now - self._samples[0][0] > _WINDOW:
                self._samples.popleft()
        if total:
            self.percent = max(self.percent, min(99, done * 100 // total))

    def complete(self, now: float) -> None:
        """All bytes are where they belong; the total becomes what was done."""
        self.total = self.done
        self.estimated = False
        self.percent = 100
        self._complete = True
        self._samples.append((now, self.done))

    def rate(self) -> float | None:
        """Bytes per second: of the last seconds while it runs, of the whole when complete."""
        last_time, last_done = self._samples[-1]
        first_time, first_done = (self._began, 0) if self._complete else self._samples[0]
        if last_time <= first_time:
            return None
        return (last_done - first_done) / (last_time - first_time)

    def describe(self) -> dict[str, Any]:
        """For Task snapshots; ``rate`` in bytes/s, ``eta`` in seconds."""
        described: dict[str, Any] = {"done": self.done}
        if self.total is not None:
            described["total"] = self.total
        if self.estimated:
            described["estimated"] = True
        rate = self.rate()
        if rate is not None:
            described["rate"] = round(rate)
            if not self._complete and self.total and rate > 0:
                described["eta"] = round(max(0, self.total - self.done) / rate)
        if self.bottleneck is not None:
            described["bottleneck"] = self.bottleneck
        return described
