"""What a mirror job may ask for, told before anything is touched."""

from __future__ import annotations

from typing import Any

import pytest

from proxy.errors import Refused
from proxy.jobs import BackupRequest
from proxy.jobs.mirror.mirror_job import MirrorJob, understand_mirror

SCHEDULE = "S"


def request(settings: dict[str, Any] | None = None, /, **job: Any) -> BackupRequest:
    return BackupRequest(
        job={
            "id": "J",
            "type": "mirrorBackup",
            "mode": "delta",
            "sourceRemote": "R0",
            "remotes": {"id": {"__or": ["R1", "R2"]}},
            "settings": {SCHEDULE: {"exportRetention": 3}, **(settings or {})},
            **job,
        },
        schedule={"id": SCHEDULE},
        remotes={},
        xapis={},
        record_to_xapi={},
    )


def understood(settings: dict[str, Any] | None = None, /, **job: Any) -> MirrorJob:
    return understand_mirror(request(settings, **job), [])


def refusal(settings: dict[str, Any] | None = None, /, **job: Any) -> Refused:
    with pytest.raises(Refused) as caught:
        understood(settings, **job)
    return caught.value


def test_later_levels_win() -> None:
    levels = {
        "": {"exportRetention": 1, "timezone": "UTC", "concurrency": 5},
        "vm": {"exportRetention": 4},
        "R2": {"exportRetention": 5, "deleteFirst": True},
    }
    job = understand_mirror(request(levels), [{"concurrency": 7, "preferNbd": True}, {}])
    assert (job.run.export_retention, job.run.concurrency) == (3, 5)
    assert job.vm("vm").export_retention == 4
    first, second = job.target("vm", "R1"), job.target("vm", "R2")
    assert first is not None
    assert second is not None
    assert (first.export_retention, first.delete_first) == (4, False)
    assert (second.export_retention, second.delete_first) == (5, True)
    assert job.without_effect == []  # of the configuration, which is for all kinds of jobs


def test_a_null_is_no_value() -> None:
    assert understood({"": {"concurrency": None}}).run.concurrency == 2


def test_a_remote_that_keeps_nothing_gets_nothing() -> None:
    job = understood({"R2": {"exportRetention": 0}})
    assert job.target("vm", "R1") is not None
    assert job.target("vm", "R2") is None


def test_the_source_is_no_target_of_its_own() -> None:
    assert understood(remotes={"id": {"__or": ["R0", "R1"]}}).remote_ids == ["R1"]


def test_xen_orchestras_own_settings_are_taken() -> None:
    own = {"reportWhen": "always", "hideSuccessfulItems": True, "mergeBackupsSynchronously": True}
    assert understood({"": own}).without_effect == []


def test_settings_without_effect_are_named() -> None:
    job = understood({"": {"preferNbd": True, "offlineBackup": False}, "R1": {"copyRetention": 1}})
    assert job.without_effect == ["copyRetention", "preferNbd"]


@pytest.mark.parametrize("filtered", [None, {"vm": {"uuid": "A"}}])
def test_a_filter_may_be_missing(filtered: Any) -> None:
    assert (understood(filter=filtered).filter is None) is (filtered is None)


@pytest.mark.parametrize(
    ("given", "part", "named"),
    [
        ({"sourceRemote": None}, "job.sourceRemote", "sourceRemote"),
        ({"sourceRemote": {"id": "R0"}}, "job.sourceRemote", "sourceRemote"),
        ({"remotes": {"id": {"__not": "x"}}}, "job.remotes", "invalid pattern"),
        ({"remotes": {"id": "R0"}}, "job.remotes", "others than its source"),
        ({"remotes": None}, "job.remotes", "others than its source"),
        ({"vms": {"id": "x"}}, "job.vms", "no use for vms"),
        ({"srs": {"id": "x"}}, "job.srs", "no use for srs"),
        ({"filter": {"__or": "x"}}, "job.filter", "the filter is wrong"),
        ({"settings": {SCHEDULE: {}}}, "job.settings", "exportRetention"),
        ({"mode": "full", "settings": {SCHEDULE: []}}, "job.settings", "must be object"),
    ],
)
def test_a_wrong_part_is_named(given: dict[str, Any], part: str, named: str) -> None:
    error = refusal(**given)
    assert (error.code, error.data["part"]) == ("EINVAL", part)
    assert named in error.message


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"": {"exportRetention": -1}}, "exportRetention"),
        ({"": {"timeout": "long"}}, "timeout"),
        ({"R1": {"deleteFirst": 1}}, "deleteFirst"),
        ({"": {"whatIsThis": 1}}, "whatIsThis"),
        ({"": {"healthCheckTimeout": "soon"}}, "healthCheckTimeout"),
        ({"R2": {"whatIsThis": 1}}, "whatIsThis of R2"),
        ({"": {"longTermRetention": {"hourly": {"retention": 1}}, "timezone": "UTC"}}, "hourly"),
        ({"": {"longTermRetention": {"daily": {"retention": 1}}}}, "time zone"),
        ({"R1": {"maxExportRateWindows": [{"from": "8"}]}}, "the settings of R1"),
        ({"": {"longTermRetention": {"daily": 1}, "timezone": "UTC"}}, "longTermRetention"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, Any], named: str) -> None:
    settings[""] = {**settings.get("", {})}
    error = refusal(
        {**settings, SCHEDULE: {"exportRetention": settings[""].pop("exportRetention", 3)}}
    )
    assert error.code == "EINVAL"
    assert named in error.message


def test_the_settings_of_another_schedule_are_its_own() -> None:
    assert understood({"other schedule": {"healthCheckSr": "sr", "exportRetention": "?"}})


def test_a_wrong_setting_of_a_vm_fails_that_vm() -> None:
    job = understood({"vm": {"whatIsThis": 1}})
    with pytest.raises(Refused, match="whatIsThis of vm"):
        job.vm("vm")
    assert job.vm("other").export_retention == 3


def test_health_checks_are_asked_for_at_the_job_and_its_remotes() -> None:
    job = understood({"": {"healthCheckSr": "a"}, "R2": {"healthCheckSr": "b"}})
    assert job.health_check_srs() == {"a", "b"}
    assert understood().health_check_srs() == set()
