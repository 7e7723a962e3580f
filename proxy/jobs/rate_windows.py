"""``maxExportRateWindows``: another export rate at certain times of the week.

``[{"from": "08:00", "to": "18:00", "days": [1, 2, 3, 4, 5], "maxExportRate": 10485760}]``: in
the job's time zone, days from 0 (Sunday) to 6, all of them unless given.  A window whose end is
not behind its beginning lasts into the next day and belongs to the day on which it begins.  The
first that fits counts; at other times ``maxExportRate`` does.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Annotated
from zoneinfo import ZoneInfo

import msgspec

from proxy.errors import Refused

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_Clock = Annotated[str, msgspec.Meta(pattern="^([01][0-9]|2[0-3]):[0-5][0-9]$")]
_Day = Annotated[int, msgspec.Meta(ge=0, le=6)]


class RateWindow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One window; the rate is in bytes per second, 0 is no limit."""

    begin: _Clock = msgspec.field(name="from")
    end: _Clock = msgspec.field(name="to")
    days: tuple[_Day, ...] = (0, 1, 2, 3, 4, 5, 6)
    max_export_rate: Annotated[float, msgspec.Meta(ge=0)] = msgspec.field(name="maxExportRate")

    def covers(self, moment: datetime) -> bool:
        """Whether it is open at ``moment``, a wall clock."""
        clock, today = f"{moment:%H:%M}", (moment.weekday() + 1) % 7
        if self.begin < self.end:
            return today in self.days and self.begin <= clock < self.end
        yesterday = (moment - timedelta(days=1)).isoweekday() % 7
        return (today in self.days and clock >= self.begin) or (
            yesterday in self.days and clock < self.end
        )


def rate_now(
    rate: float,
    windows: Sequence[RateWindow],
    timezone: str | None,
    *,
    now: Callable[[ZoneInfo], datetime] = datetime.now,
) -> Callable[[], float]:
    """What says the rate that holds at the moment it is asked.

    Windows without ``timezone`` are in UTC.  Raises ``Refused`` (``EINVAL``) for one that is
    not known.
    """
    if not windows:
        return lambda: rate
    try:
        zone = ZoneInfo(timezone or "UTC")
    except (OSError, ValueError, LookupError) as error:
        raise Refused(f"unknown time zone {timezone!r:.100}", code="EINVAL") from error

    def found() -> float:
        moment = now(zone)
        open_now = (window.max_export_rate for window in windows if window.covers(moment))
        return next(open_now, rate)

    return found
