"""Settings: levels, types, contradictions."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import Refused
from proxy.jobs.settings import SettingLevels, refuse_contradictions

VALUES = st.none() | st.integers(0, 9)


def levels(job: dict[str, Any], *defaults: dict[str, Any]) -> SettingLevels:
    return SettingLevels(job, "S", defaults)


@given(config=VALUES, everywhere=VALUES, schedule=VALUES, vm=VALUES, target=VALUES)
def test_later_levels_win_and_null_is_no_value(
    config: int | None,
    everywhere: int | None,
    schedule: int | None,
    vm: int | None,
    target: int | None,
) -> None:
    key = "exportRetention"
    found = levels(
        {"": {key: everywhere}, "S": {key: schedule}, "VM": {key: vm}, "R": {key: target}},
        {key: config},
    )

    def last(*values: int | None) -> int:
        return next((value for value in reversed(values) if value is not None), 0)

    assert found.run.export_retention == last(config, everywhere, schedule)
    assert found.vm("VM").export_retention == last(config, everywhere, schedule, vm)
    assert found.target("VM", "R").export_retention == last(
        config, everywhere, schedule, vm, target
    )


def test_two_tags_force_their_setting() -> None:
    found = levels({"VM": {"checkpointSnapshot": False}})
    assert found.vm("VM", ["xo-memory-backup"]).checkpoint_snapshot
    assert found.vm("VM", ["xo-offline-backup"]).offline_snapshot
    assert not found.vm("VM", ["backup"]).offline_snapshot


def test_upstream_weakness_7_the_jobs_own_level_counts_for_snapshots() -> None:
    found = levels({"": {"snapshotRetention": 3}, "S2": {"snapshotRetention": 5}})
    assert found.snapshot_retention("S", "VM") == 3
    assert found.snapshot_retention("S2", "VM") == 5
    assert (
        levels({"": {"snapshotRetention": 3}, "VM": {"snapshotRetention": 1}}).snapshot_retention(
            "S", "VM"
        )
        == 1
    )


def test_a_wrong_type_is_told_with_its_place() -> None:
    with pytest.raises(Refused, match="concurrency") as caught:
        levels({"": {"concurrency": "two"}})
    assert caught.value.code == "EINVAL"
    assert caught.value.rpc_code != 10, "on that number XO would repeat the run without its log"
    with pytest.raises(Refused, match="settings of VM"):
        levels({"VM": ["no object"]}).vm("VM")


def test_unknown_keys_are_named_and_known_ones_are_not() -> None:
    found = levels({"": {"exportRetentoin": 1, "reportWhen": "failure", "preferNbd": True}})
    assert found.without_effect() == [
        "the setting 'exportRetentoin' is not known and has no effect"
    ]


def test_upstream_weakness_1_what_nobody_reads_is_told_with_its_reason() -> None:
    told = levels({"": {"useNbd": True}, "VM": {"validateVhdStreams": True}}).without_effect()
    assert [sentence.split(":")[0] for sentence in told] == [
        "the setting 'useNbd' has no effect",
        "the setting 'validateVhdStreams' has no effect",
    ]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"exportRetention": -1}, "exportRetention"),
        ({"exportRetention": float("inf")}, "exportRetention"),
        ({"nRetriesVmBackupFailures": -1}, "nRetriesVmBackupFailures"),
        ({"longTermRetention": {"daily": {"retention": 2}}}, "time zone"),
        ({"longTermRetention": {"hourly": {"retention": 2}}, "timezone": "UTC"}, "hourly"),
        ({"longTermRetention": {"daily": {"retention": 0}}, "timezone": "UTC"}, "daily"),
        ({"maxExportRateWindows": [{"from": "8:00", "to": "18:00", "maxExportRate": 1}]}, "from"),
        ({"maxExportRateWindows": [{"from": "08:00", "to": "18:00"}]}, "maxExportRate"),
    ],
)
def test_what_could_only_fail_later_is_refused_before_anything_is_touched(
    wrong: dict[str, Any], told: str
) -> None:
    with pytest.raises(Refused, match=rf"settings of the job .*{told}"):
        levels({"": wrong}).refuse_wrong([])
    for place in ("VM", "R"):
        with pytest.raises(Refused, match=rf"settings of {place} .*{told}"):
            levels({place: wrong}).refuse_wrong([place])
    levels({"VM": wrong}).refuse_wrong(["R"])


def test_contradictions_are_refused_with_upstreams_message() -> None:
    wrong = levels({"": {"offlineBackup": True, "snapshotRetention": 1}}).run
    with pytest.raises(Refused, match=r"^offlineBackup is not compatible with snapshotRetention$"):
        refuse_contradictions(wrong)
    refuse_contradictions(levels({"": {"offlineBackup": True}}).run)


@pytest.mark.parametrize(
    ("given_value", "seconds"),
    [("10m", 600), ("90s", 90), ("1.5 h", 5400), (".5m", 30), (1500, 1.5), ("1500", 1.5)],
)
def test_the_timeout_of_health_checks_is_as_npms_ms_reads_it(
    given_value: Any, seconds: float
) -> None:
    found = levels({"": {"healthCheckTimeout": given_value}}).run
    assert found.health_check_seconds == pytest.approx(seconds)
    assert levels({}).run.health_check_seconds == 600


@given(
    st.text(max_size=30)
    | st.floats(allow_nan=False)
    | st.integers()
    | st.from_regex(r"-?\d{0,400}\.?\d{1,9} ?(ms|s|m|hours?|y)?", fullmatch=True)
)
def test_a_timeout_of_health_checks_is_positive_and_finite_or_refused(value: Any) -> None:
    refused: Refused | None = None
    try:
        found = levels({"S": {"healthCheckTimeout": value}})
        found.refuse_wrong([])
    except Refused as error:
        refused = error
    if refused is None:
        assert 0 < found.run.health_check_seconds < float("inf")
    else:
        assert "healthCheckTimeout" in refused.message
        assert refused.code == "EINVAL"
