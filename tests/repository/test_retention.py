from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import Refused
from proxy.repository.retention import old_entries, period_tags

MANY = 1000


@dataclass(frozen=True)
class At:
    timestamp: float
    name: str = ""


def on(day: str, zone: str = "UTC") -> At:
    moment = datetime.fromisoformat(day).replace(tzinfo=ZoneInfo(zone))
    return At(moment.timestamp() * 1000, day)


def kept(
    count: int, entries: list[At], long_term: Any = None, zone: str | None = None
) -> list[str]:
    old = old_entries(count, entries, long_term, zone)
    return [entry.name for entry in entries if entry not in old]


NOONS = [
    on(f"{day}T12:00")
    for day in ("2024-12-29", "2024-12-30", "2025-01-01", "2025-01-04", "2025-01-05", "2025-01-06")
]


def oldest_of(duration: str, settings: dict[str, int] | None = None) -> list[str]:
    long_term = {duration: {"retention": MANY, "settings": settings or {}}}
    return [name[:10] for name in kept(0, NOONS, long_term, "UTC")]


def test_the_youngest_are_kept() -> None:
    entries = [At(n) for n in range(5)]
    assert old_entries(2, entries) == entries[:3]
    assert old_entries(0, entries) == entries
    assert old_entries(9, entries) == []
    assert old_entries(1, []) == []


def test_weeks_start_on_sunday() -> None:
    assert oldest_of("weekly") == ["2024-12-29", "2025-01-05"]


def test_weeks_can_start_on_monday() -> None:
    assert oldest_of("weekly", {"firstDayOfWeek": 1}) == ["2024-12-29", "2024-12-30", "2025-01-06"]


def test_months_can_start_later() -> None:
    assert oldest_of("monthly", {"firstDayOfMonth": 1}) == ["2024-12-29", "2025-01-04"]


def test_days_can_start_later() -> None:
    assert period_tags([], NOONS[0].timestamp, {"daily": {"retention": 1}}, "UTC") == [
        "daily=2024-12-29"
    ]
    later = {"daily": {"retention": 1, "settings": {"firstHourOfTheDay": 13}}}
    assert period_tags([], NOONS[0].timestamp, later, "UTC") == ["daily=2024-12-28"]


@pytest.mark.parametrize(
    ("day", "settings", "week"),
    [
        ("2024-12-29", {}, "2025-01"),
        ("2025-01-05", {}, "2025-02"),
        ("2024-12-29", {"firstDayOfWeek": 1}, "2024-52"),
        ("2024-12-30", {"firstDayOfWeek": 1}, "2025-01"),
        ("2025-01-06", {"firstDayOfWeek": 1}, "2025-02"),
        # the 1st is a Saturday, a Sunday, a Friday
        ("2022-01-01", {}, "2022-01"),
        ("2021-12-25", {}, "2021-52"),
        ("2023-01-01", {}, "2023-01"),
        ("2022-12-31", {}, "2022-53"),
        ("2020-12-31", {}, "2021-01"),
    ],
)
def test_names_of_weeks(day: str, settings: dict[str, int], week: str) -> None:
    long_term = {"weekly": {"retention": 1, "settings": settings}}
    assert period_tags([], on(f"{day}T12:00").timestamp, long_term, "UTC") == [f"weekly={week}"]


def test_count_days_and_weeks_together() -> None:
    days = [on(f"2025-03-0{n}T00:00") for n in range(1, 8)]
    long_term = {"daily": {"retention": 3}, "weekly": {"retention": 2}}
    old = old_entries(1, days, long_term, "UTC")
    assert [entry.name[:10] for entry in old] == ["2025-03-03", "2025-03-04"]


def test_empty_periods_take_no_slot() -> None:
    entries = [on("2020-05-01T10:00"), on("2022-05-01T10:00"), on("2025-05-01T10:00")]
    assert len(kept(0, entries, {"yearly": {"retention": 3}}, "UTC")) == 3


@pytest.mark.parametrize("zone", ["Europe/Paris", "Pacific/Auckland", "America/Los_Angeles"])
def test_days_are_those_of_the_time_zone(zone: str) -> None:
    entries = [on(f"2025-06-{day}T{hour}", zone) for day in (10, 11) for hour in ("00:10", "23:50")]
    assert kept(0, entries, {"daily": {"retention": 9}}, zone) == [
        "2025-06-10T00:10",
        "2025-06-11T00:10",
    ]


def test_the_shift_is_of_the_wall_clock_when_summer_time_begins() -> None:
    # 2025-03-30 has 23 hours in Paris: 01:30 minus 2 hours is the evening before, and
    # 03:30, two real hours... one wall-clock hour and a half later, is not.
    long_term = {"daily": {"retention": 9, "settings": {"firstHourOfTheDay": 3}}}
    tags = [
        period_tags(
            [], on(f"2025-03-30T{hour}", "Europe/Paris").timestamp, long_term, "Europe/Paris"
        )
        for hour in ("01:30", "03:30")
    ]
    assert tags == [["daily=2025-03-29"], ["daily=2025-03-30"]]


def test_a_tag_is_only_for_the_first_of_its_period() -> None:
    long_term = {"daily": {"retention": 3}, "monthly": {"retention": 3}}
    first = on("2025-01-06T10:00")
    assert period_tags([], first.timestamp, long_term, "UTC") == [
        "daily=2025-01-06",
        "monthly=2025-01",
    ]
    later = on("2025-01-06T11:00")
    assert period_tags([first], later.timestamp, long_term, "UTC") == []
    next_day = on("2025-01-07T11:00")
    assert period_tags([first, later], next_day.timestamp, long_term, "UTC") == ["daily=2025-01-07"]


def test_no_long_term_no_tags() -> None:
    assert period_tags([At(5)], 3) == []


def test_order_of_timestamps_does_not_fail_a_run() -> None:
    """Upstream asserts strictly increasing timestamps: a mirrored older backup fails it."""
    entries = [on("2025-01-07T10:00"), on("2025-01-05T11:00"), on("2025-01-05T10:00")]
    long_term = {"daily": {"retention": 5}}
    assert len(old_entries(0, entries, long_term, "UTC")) == 1
    mirrored = on("2025-01-06T10:00").timestamp
    assert period_tags(entries, mirrored, long_term, "UTC") == ["daily=2025-01-06"]


def test_what_has_no_date_is_never_too_old() -> None:
    entries = [At(1e30), At(-1e30), At(float("inf")), on("2025-01-05T10:00")]
    assert old_entries(0, entries, {"daily": {"retention": 1}}, "UTC") == []


@pytest.mark.parametrize(
    ("count", "long_term", "zone"),
    [
        (-1, None, None),
        (0, {"daily": {"retention": 1}}, None),
        (0, {"daily": {"retention": 1}}, "Mars/Olympus"),
        (0, {"daily": {"retention": 1}}, "../../etc/passwd"),
        (0, {"daily": {"retention": 0}}, "UTC"),
        (0, {"daily": {"retention": "3"}}, "UTC"),
        (0, {"daily": {"retention": True}}, "UTC"),
        (0, {"hourly": {"retention": 3}}, "UTC"),
        (0, {"daily": {"retention": 3, "settings": {"firstHourOfTheDay": "a"}}}, "UTC"),
        (0, {"daily": {"retention": 3, "settings": {"firstHourOfTheDay": 10**12}}}, "UTC"),
    ],
)
def test_wrong_settings_are_refused_and_remove_nothing(
    count: int, long_term: Any, zone: str | None
) -> None:
    with pytest.raises(Refused):
        old_entries(count, [At(1)], long_term, zone)


TIMES = st.lists(
    st.integers(0, 4_000_000_000_000).map(At), unique_by=lambda entry: entry.timestamp, max_size=30
)
PERIODS = st.dictionaries(
    st.sampled_from(["daily", "weekly", "monthly", "yearly"]),
    st.integers(1, 5).map(lambda n: {"retention": n}),
)


@given(TIMES, st.integers(0, 10), PERIODS, st.sampled_from(["UTC", "Europe/Paris", "Asia/Kolkata"]))
def test_properties_of_retention(entries: list[At], count: int, periods: Any, zone: str) -> None:
    old = old_entries(count, entries, periods, zone)
    assert old == [entry for entry in entries if entry in old], "the order given"
    youngest = sorted(entries, key=lambda entry: -entry.timestamp)[:count]
    assert not set(youngest) & set(old)
    slots = count + sum(period["retention"] for period in periods.values())
    assert len(entries) - len(old) <= slots
    rest = [entry for entry in entries if entry not in old]
    assert old_entries(count, rest, periods, zone) == [], "a second pass finds nothing more"


@given(TIMES, st.integers(1, 5))
def test_days_in_utc_agree_with_a_plain_count(entries: list[At], retention: int) -> None:
    rest = kept(
        0,
        [At(e.timestamp, str(i)) for i, e in enumerate(entries)],
        {"daily": {"retention": retention}},
        "UTC",
    )
    oldest: dict[Any, tuple[float, str]] = {}
    for index, entry in enumerate(entries):
        day = datetime.fromtimestamp(entry.timestamp / 1000, UTC).date()
        oldest[day] = min(oldest.get(day, (float("inf"), "")), (entry.timestamp, str(index)))
    wanted = {oldest[day][1] for day in sorted(oldest)[-retention:]}
    assert set(rest) == wanted


def test_entries_of_one_time_count_once() -> None:
    """Several places have the same backup: counted twice, it would push out another one."""
    entries = [At(time, place) for time in (1, 2, 3) for place in "ab"]
    assert old_entries(3, entries) == []
    assert old_entries(2, entries) == entries[:2]
    days = [At(on(f"2025-03-0{n}T00:00").timestamp, place) for n in (1, 2) for place in "ab"]
    assert old_entries(0, days, {"daily": {"retention": 2}}, "UTC") == []
