"""Export rates by the time of the week."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import Refused
from proxy.jobs.rate_windows import RateWindow, rate_now

MINUTES = st.integers(0, 24 * 60 - 1)


def windows(*given: dict[str, Any]) -> list[RateWindow]:
    return msgspec.convert(list(given), list[RateWindow])


def rate_at(moment: str, *given: dict[str, Any], zone: str | None = None) -> float:
    at = datetime.fromisoformat(moment)
    return rate_now(7, windows(*given), zone, now=at.astimezone)()


WORK = {"from": "08:00", "to": "18:00", "days": [1, 2, 3, 4, 5], "maxExportRate": 1}
NIGHT = {"from": "22:00", "to": "06:00", "days": [5], "maxExportRate": 0}


@pytest.mark.parametrize(
    ("moment", "expected"),
    [
        ("2026-11-24T08:00Z", 1),  # a Tuesday
        ("2026-11-24T17:59Z", 1),
        ("2026-11-24T18:00Z", 7),
        ("2026-11-22T12:00Z", 7),  # a Sunday
        ("2026-11-27T22:00Z", 0),  # a Friday
        ("2026-11-28T05:59Z", 0),  # the night of that Friday
        ("2026-11-28T22:00Z", 7),
        ("2026-11-27T05:00Z", 7),  # the night of a Thursday
    ],
)
def test_windows_open_and_close(moment: str, expected: float) -> None:
    assert rate_at(moment, WORK, NIGHT) == expected


def test_the_time_zone_is_the_jobs() -> None:
    assert rate_at("2026-11-24T07:30Z", WORK, zone="Europe/Paris") == 1
    assert rate_at("2026-11-24T17:30Z", WORK, zone="Europe/Paris") == 7


def test_the_first_that_fits_counts() -> None:
    assert rate_at("2026-11-24T12:00Z", {**WORK, "maxExportRate": 2}, WORK) == 2


def test_a_zone_that_is_not_known_is_refused() -> None:
    with pytest.raises(Refused, match="Mars/Olympus"):
        rate_now(7, windows(WORK), "Mars/Olympus")


@given(begin=MINUTES, end=MINUTES, at=MINUTES, day=st.integers(0, 6))
def test_a_window_of_all_days_is_open_as_long_as_it_says(
    begin: int, end: int, at: int, day: int
) -> None:
    def clock(minute: int) -> str:
        return f"{minute // 60:02}:{minute % 60:02}"

    window = {"from": clock(begin), "to": clock(end), "maxExportRate": 1}
    moment = datetime(2026, 11, 22 + day, at // 60, at % 60, tzinfo=ZoneInfo("UTC"))
    length = (end - begin) % 1440 or 1440
    assert (rate_now(0, windows(window), None, now=moment.astimezone)() == 1) == (
        (at - begin) % 1440 < length
    )
