"""Which entries are too old, and which periods a new one opens.

Used for backups on a remote, for replicas and for snapshots.  Pure: entries in, entries out.

Long-term retention keeps one entry for each of the last N days, weeks, months or years that
have any.  Periods are those of moment.js in locale ``en``, which names them in the files:
weeks start on Sunday and the week of January 1st is the first of its year.

``long_term`` is ``{"daily" | "weekly" | "monthly" | "yearly": {"retention": n, "settings"?}}``
as jobs bring it; ``settings`` move the start of the period: ``firstHourOfTheDay``,
``firstDayOfWeek``, ``firstDayOfMonth``, ``firstDayOfYear``, each 0 by default.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast
from zoneinfo import ZoneInfo

from proxy.errors import Refused

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


class Dated(Protocol):
    """Anything with a time in milliseconds since the epoch."""

    @property
    def timestamp(self) -> float: ...


EntryT = TypeVar("EntryT", bound=Dated)

_LARGEST_SHIFT = 400
_UTC = ZoneInfo("UTC")


def _week(moment: datetime) -> str:
    saturday = moment + timedelta(days=(5 - moment.weekday()) % 7)
    return f"{saturday.year:04}-{(saturday.timetuple().tm_yday - 1) // 7 + 1:02}"


# Name of the period, the setting that moves its start, the unit of that setting.
_PERIODS: dict[str, tuple[Callable[[datetime], str], str, str]] = {
    "daily": (lambda day: f"{day.year:04}-{day:%m-%d}", "firstHourOfTheDay", "hours"),
    "weekly": (_week, "firstDayOfWeek", "days"),
    "monthly": (lambda day: f"{day.year:04}-{day:%m}", "firstDayOfMonth", "days"),
    "yearly": (lambda day: f"{day.year:04}", "firstDayOfYear", "days"),
}


def old_entries(
    count: int,
    entries: Sequence[EntryT],
    long_term: Mapping[str, Mapping[str, Any]] | None = None,
    timezone: str | None = None,
) -> list[EntryT]:
    """The entries to remove, in the order given.

    Kept are the ``count`` youngest and, for each period of ``long_term``, the *oldest*
    entry of each of its last N non-empty periods.  The entries need no order: they are
    sorted here.  Those of one time are copies of one state, in several places where retention
    counts over all of them: they count once, and stay or go together.  ``Refused`` (``EINVAL``)
    for a negative count, an unknown period or a wrong time zone: then nothing is removed.
    """
    if count < 0:
        raise Refused(f"a retention of {count} is not possible", code="EINVAL")
    ordered = sorted({entry.timestamp for entry in entries})
    kept = set(ordered[len(ordered) - min(count, len(ordered)) :])
    for buckets in _all_buckets(ordered, long_term, timezone):
        kept.update(ordered[position] for position in buckets[1].values())
    if long_term:
        # No period can be told for them, so none can be said to have enough.
        kept.update(time for time in ordered if _local(time, _UTC) is None)
    return [entry for entry in entries if entry.timestamp not in kept]


def period_tags(
    entries: Sequence[Dated],
    timestamp: float,
    long_term: Mapping[str, Mapping[str, Any]] | None = None,
    timezone: str | None = None,
) -> list[str]:
    """``["daily=2026-11-24", …]``: the periods that a new backup at ``timestamp`` opens.

    A period belongs to its first entry, so the list is empty for every later one.
    ``entries`` are the present ones of the same schedule.
    """
    times = [(entry.timestamp, 0) for entry in entries]
    times.append((timestamp, 1))
    times.sort()
    mine = times.index((timestamp, 1))
    return [
        f"{name}={key}"
        for name, buckets in _all_buckets([time for time, _ in times], long_term, timezone)
        for key, position in buckets.items()
        if position == mine
    ]


def _all_buckets(
    times: Sequence[float],
    long_term: Mapping[str, Mapping[str, Any]] | None,
    timezone: str | None,
) -> list[tuple[str, dict[str, int]]]:
    """For each period its retained buckets: key and the position of the oldest entry."""
    if not long_term:
        return []
    zone = _zone(timezone)
    return [(name, _buckets(times, zone, name, retention)) for name, retention in long_term.items()]


def _buckets(
    times: Sequence[float], zone: ZoneInfo, name: str, retention: Mapping[str, Any]
) -> dict[str, int]:
    if name not in _PERIODS:
        raise Refused(
            f"unknown retention period {name!r}: use {', '.join(_PERIODS)}", code="EINVAL"
        )
    key_of, setting, unit = _PERIODS[name]
    remaining = retention.get("retention")
    if isinstance(remaining, bool) or not isinstance(remaining, int) or remaining <= 0:
        raise Refused(f"the {name} retention must be a number above 0", code="EINVAL")
    settings = cast("Mapping[str, Any]", retention.get("settings") or {})
    amount = settings.get(setting) or 0
    if not isinstance(amount, int) or not -_LARGEST_SHIFT <= amount <= _LARGEST_SHIFT:
        raise Refused(f"{setting} must be a small whole number", code="EINVAL")
    shift = timedelta(**{unit: amount})
    buckets: dict[str, int] = {}
    for position in range(len(times) - 1, -1, -1):
        local = _local(times[position], zone)
        if local is None:
            continue
        key = key_of(local - shift)
        if key not in buckets:
            if remaining == 0:
                continue
            remaining -= 1
        buckets[key] = position
    return buckets


def _local(timestamp: float, zone: ZoneInfo) -> datetime | None:
    """The wall clock in ``zone``, ``None`` for what is no time of these millennia.

    Without zone on purpose: shifts are then arithmetic of the wall clock, also over a
    change to summer time.
    """
    try:
        local = datetime.fromtimestamp(timestamp / 1000, zone).replace(tzinfo=None)
    except (OverflowError, ValueError, OSError):
        return None
    return local if 1900 < local.year < 9900 else None


def _zone(timezone: str | None) -> ZoneInfo:
    if not timezone:
        raise Refused("long-term retention needs a time zone", code="EINVAL")
    try:
        return ZoneInfo(timezone)
    except (OSError, ValueError, LookupError) as error:
        raise Refused(f"unknown time zone {timezone[:100]!r}", code="EINVAL") from error
