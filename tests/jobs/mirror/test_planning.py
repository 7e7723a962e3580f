"""What a remote is to get, against what retention would keep of everything."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from proxy.jobs.mirror.planning import Retention, plan
from proxy.repository import Backup, old_entries
from proxy.repository.metadata import VmSummary

HOUR = 3_600_000
START = int(datetime(2026, 11, 20, tzinfo=UTC).timestamp() * 1000)


def backup(hour: int, *, schedule: str = "mirror", mode: str = "delta", where: str = "t") -> Backup:
    return Backup(
        id=f"/{where}/{schedule}/{mode}/{hour}",
        mode=mode,
        schedule_id=schedule,
        timestamp=START + hour * HOUR,
        vm=VmSummary(uuid="vm"),
    )


def of_source(*hours: int, mode: str = "delta") -> list[Backup]:
    return [backup(hour, schedule="nightly", mode=mode, where="s") for hour in hours]


def hours(backups: list[Backup]) -> list[int]:
    return [int(each.timestamp - START) // HOUR for each in backups]


def keeping(count: int, long_term: dict[str, Any] | None = None, **more: Any) -> Retention:
    return Retention("mirror", "delta", count, long_term or {}, "UTC", **more)


def test_weakness_11_what_the_destination_would_drop_is_not_copied() -> None:
    assert hours(plan(of_source(1, 2, 3, 4, 5), [], keeping(2)).missing) == [4, 5]


def test_what_is_there_is_not_copied_again() -> None:
    present = [backup(4), backup(5)]
    planned = plan(of_source(1, 2, 3, 4, 5), present, keeping(2))
    assert (planned.missing, planned.expiring) == ([], [])


def test_a_new_backup_makes_the_oldest_too_old() -> None:
    planned = plan(of_source(4, 5, 6), [backup(4), backup(5)], keeping(2))
    assert (hours(planned.missing), hours(planned.expiring)) == ([6], [4])


def test_a_gap_is_filled() -> None:
    assert hours(plan(of_source(1, 2, 3), [backup(1), backup(3)], keeping(9)).missing) == [2]


def test_long_term_retention_chooses_among_all() -> None:
    """The first of each day and the newest."""
    daily: dict[str, Any] = {"daily": {"retention": 3, "settings": {}}}
    source = of_source(1, 13, 25, 37, 49, 61)
    assert hours(plan(source, [], keeping(1, daily)).missing) == [1, 25, 49, 61]


def test_the_backup_of_another_job_is_there_and_is_not_ours_to_remove() -> None:
    others = [backup(5, schedule="other"), backup(6, schedule="other")]
    planned = plan(of_source(4, 5, 6), [*others, backup(1), backup(2)], keeping(2))
    assert (planned.missing, planned.expiring) == ([], [])
    assert keeping(2).expired([*others, backup(1), backup(2)]) == []


def test_the_other_mode_does_not_count() -> None:
    present = [backup(hour, mode="full") for hour in (1, 2, 3)]
    planned = plan(of_source(3) + of_source(4, mode="full"), present, keeping(1))
    assert (hours(planned.missing), planned.expiring) == ([3], [])


def test_with_nothing_to_remove_everything_is_wanted() -> None:
    planned = plan(of_source(1, 2, 3), [backup(2)], keeping(1, keeps_all=True))
    assert (hours(planned.missing), planned.expiring) == ([1, 3], [])
    assert keeping(0, keeps_all=True).expired([backup(1)]) == []


LONG_TERM: st.SearchStrategy[dict[str, Any]] = st.dictionaries(
    st.sampled_from(["daily", "weekly", "monthly"]),
    st.fixed_dictionaries({"retention": st.integers(1, 3)}),
    max_size=2,
)
HOURS = st.sets(st.integers(0, 40 * 24), max_size=14)


@given(HOURS, HOURS, st.integers(0, 5), LONG_TERM)
def test_the_mirrored_set_is_what_retention_keeps(
    source: set[int], present: set[int], count: int, long_term: dict[str, Any]
) -> None:
    """Copied one by one, each followed by its retention, as a run does it: what is left is what
    retention keeps of the union, and nothing is copied to be removed, nor removed that stays."""
    retention = keeping(count, long_term)
    everything = [backup(hour) for hour in sorted(source | present)]
    old = {each.timestamp for each in old_entries(count, everything, long_term or None, "UTC")}
    kept = {each.timestamp for each in everything} - old
    there = {each.timestamp: each for each in (backup(hour) for hour in sorted(present))}
    planned = plan(of_source(*sorted(source)), list(there.values()), retention)
    assert [each.timestamp for each in planned.missing] == sorted(
        kept - {each.timestamp for each in there.values()}
    )
    assert {each.timestamp for each in planned.expiring} == set(there) - kept
    for missing in planned.missing:
        there[missing.timestamp] = backup(int(missing.timestamp - START) // HOUR)
        expired = retention.expired(list(there.values()))
        assert not {each.timestamp for each in expired} & kept
        for each in expired:
            del there[each.timestamp]
    if planned.missing:
        assert set(there) == kept
    again = plan(of_source(*sorted(source)), list(there.values()), retention)
    assert again.missing == []
