"""What a metadata job may ask for; everything else is refused by its name."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import ProxyError, Refused
from proxy.jobs.metadata_job import MetadataJob, understand_metadata
from proxy.jobs.requests import BackupRequest

SCHEDULE = "22222222-2222-4222-8222-222222222222"
POOL = "1656a1c0-d499-45bd-9bd7-2e870992ce0f"
RETENTION = {"retentionPoolMetadata": 2, "retentionXoMetadata": 3}


def understood(
    *, schedule: Any = SCHEDULE, common: Any = None, defaults: Any = None, **job: Any
) -> MetadataJob:
    request = BackupRequest(
        job={
            "id": "job",
            "name": "metadata job",
            "type": "metadataBackup",
            "pools": {"id": POOL},
            "xoMetadata": "{}",
            "remotes": {"id": "remote1"},
            "settings": {SCHEDULE: RETENTION},
            **job,
        },
        schedule={"id": schedule, "name": "nightly"},
        remotes={},
        xapis={},
        record_to_xapi={},
    )
    return understand_metadata(request, common or {}, defaults or {})


def test_what_xen_orchestra_sends_is_understood() -> None:
    job = understood(mode=None, userId="u", proxy="p")
    assert (job.pools, job.remote_ids, job.schedule_id) == ([POOL], ["remote1"], SCHEDULE)
    assert job.configuration is not None
    assert (job.configuration.name, job.configuration.content) == ("data.json", b"{}")
    assert job.settings.retention_pool_metadata == 2
    assert list(job.described().values()) == ["job", "metadata job", SCHEDULE, "nightly"]
    assert list(understood(name=None).described()) == ["jobId", "scheduleId", "scheduleName"]


def test_bytes_of_a_configuration_are_decoded() -> None:
    content = bytes(range(256))
    data = base64.b64encode(content).decode()
    job = understood(xoMetadata={"encoding": "base64", "data": data})
    assert job.configuration is not None
    assert (job.configuration.name, job.configuration.content) == ("data", content)


def test_a_schedule_without_retention_makes_none_of_a_kind() -> None:
    job = understood(settings={SCHEDULE: {"retentionPoolMetadata": 1}})
    assert (job.pools, job.configuration) == ([POOL], None)
    job = understood(settings={SCHEDULE: {"retentionXoMetadata": 1, "retentionPoolMetadata": 0}})
    assert (job.pools, job.configuration is None) == ([], False)


@pytest.mark.parametrize(
    ("job", "part", "message"),
    [
        ({"remotes": None}, "job.remotes", "metadata backup job cannot run without remotes"),
        ({"remotes": {"id": {"__or": []}}}, "job.remotes", "cannot run without remotes"),
        ({"remotes": {"tags": ["x"]}}, "job.remotes", "invalid pattern"),
        ({"pools": {"id": 3}}, "job.pools", "invalid pattern"),
        ({"pools": "x"}, "job.pools", "invalid pattern"),
        ({"pools": None, "xoMetadata": None}, "job.pools", "no metadata mode found"),
        ({"pools": None, "xoMetadata": False}, "job.pools", "no metadata mode found"),
        ({"xoMetadata": True}, "job.xoMetadata", "must be the exported configuration"),
        ({"xoMetadata": ""}, "job.xoMetadata", "is empty"),
        ({"xoMetadata": {"encoding": "hex", "data": "00"}}, "job.xoMetadata", "base64"),
        ({"xoMetadata": {"encoding": "base64", "data": 3}}, "job.xoMetadata", "base64"),
        ({"xoMetadata": {"encoding": "base64", "data": "***"}}, "job.xoMetadata", "no base64"),
        ({"xoMetadata": {"encoding": "base64", "data": "é"}}, "job.xoMetadata", "no base64"),
        ({"xoMetadata": {"encoding": "base64", "data": ""}}, "job.xoMetadata", "is empty"),
        ({"vms": {"id": "vm"}}, "job.vms", "has no use for vms"),
        ({"srs": {"id": "sr"}}, "job.srs", "has no use for srs"),
        ({"sourceRemote": "r"}, "job.sourceRemote", "has no use for sourceRemote"),
        ({"settings": []}, "job.settings", "must be object"),
        ({"settings": {"": 3}}, "job.settings", "must be object"),
        ({"settings": {"remote1": 3}}, "job.settings", "must be object"),
        ({"settings": {}}, "job.settings", "no retentions corresponding to the metadata modes"),
        ({"settings": None}, "job.settings", "no retentions corresponding to the metadata modes"),
        ({"settings": {SCHEDULE: {"retentionXoMetadata": -1}}}, "job.settings", ">= 0"),
        ({"settings": {SCHEDULE: {"retentionXoMetadata": 1.5}}}, "job.settings", "int"),
        ({"settings": {SCHEDULE: {"retentionXoMetadata": "7"}}}, "job.settings", "int"),
        ({"settings": {SCHEDULE: {"retentionXoMetadata": True}}}, "job.settings", "int"),
        ({"settings": {"": {"timeout": "1h"}}}, "job.settings", "timeout"),
        ({"settings": {"": {"concurrency": -1}}}, "job.settings", "concurrency"),
    ],
)
def test_what_cannot_be_run_is_refused_by_its_part(
    job: dict[str, Any], part: str, message: str
) -> None:
    with pytest.raises(Refused, match=message) as caught:
        understood(**job)
    assert caught.value.data["part"] == part
    assert caught.value.rpc_code != 10, "Xen Orchestra would repeat the call without its log"


@pytest.mark.parametrize("wrong", ["..", "../../x", "a/b", ".x", "", "x.lock", "a\n", "x" * 300])
def test_no_id_leads_out_of_the_folders(wrong: str) -> None:
    with pytest.raises(Refused, match="cannot be the id of a pool"):
        understood(pools={"id": wrong})
    with pytest.raises(Refused, match="cannot be the id of a schedule"):
        understood(schedule=wrong, settings={wrong: RETENTION})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("concurrency", 3),
        ("getRemoteTimeout", 1000),
        ("maxExportRate", 5),
        ("retentionPoolMetadata", 7),
        ("retentionXoMetadata", 7),
        ("timeout", 1000),
    ],
)
def test_each_setting_counts_at_its_levels(key: str, value: int) -> None:
    """Later levels win; a null is no value.  What each does is tested where it is done."""
    name = "".join(f"_{c.lower()}" if c.isupper() else c for c in key)
    other = "retentionXoMetadata" if key == "retentionPoolMetadata" else "retentionPoolMetadata"

    def read(*, of_job: Any = None, of_schedule: Any = None, **config: Any) -> Any:
        settings = {"": {key: of_job}, SCHEDULE: {other: 1, key: of_schedule}}
        return getattr(understood(settings=settings, **config).settings, name)

    assert read(common={key: value}) == value
    assert read(common={key: 9}, defaults={key: value}) == value
    assert read(defaults={key: 9}, of_job=value) == value
    assert read(of_job=9, of_schedule=value) == value


def levels_with(key: str, value: Any) -> list[dict[str, Any]]:
    """In each level that is of this run."""
    return [
        {SCHEDULE: RETENTION, "": {key: value}},
        {SCHEDULE: {**RETENTION, key: value}},
        {SCHEDULE: RETENTION, "remote1": {key: value}},
        {SCHEDULE: RETENTION, POOL: {key: value}},
    ]


@pytest.mark.parametrize(
    "key",
    [
        "exportRetention",
        "snapshotRetention",
        "preferNbd",
        "longTermRetention",
        "healthCheckSr",
        "?",
    ],
)
def test_a_setting_that_would_do_nothing_is_refused(key: str) -> None:
    for settings in levels_with(key, 3):
        with pytest.raises(Refused, match="no effect on a metadata backup") as caught:
            understood(settings=settings)
        assert caught.value.data["keys"] == [key]
    with pytest.raises(Refused, match="of the configuration have no effect"):
        understood(defaults={key: 3})
    # what asks for nothing says nothing; nor does what is another schedule's, or a VM job's default
    nothing: list[Any] = [None, False, 0, "", {}, []]
    for value in nothing:
        for settings in levels_with(key, value):
            understood(settings=settings)
    understood(settings={SCHEDULE: RETENTION, "another schedule": {key: 3}}, common={key: 3})


def test_settings_of_a_remote_that_count_elsewhere_are_refused_too() -> None:
    with pytest.raises(Refused, match="give them to the job or to its schedule"):
        understood(settings={SCHEDULE: RETENTION, "remote1": {"retentionPoolMetadata": 9}})


def test_what_xen_orchestra_reads_itself_is_its_own() -> None:
    its_own = {
        "reportWhen": "always",
        "backupReportTpl": "mjml",
        "hideSuccessfulItems": True,
        "reportRecipients": ["a@b"],
        "useBasicAuth": True,
        "timezone": "Europe/Paris",
    }
    understood(settings={"": its_own, SCHEDULE: RETENTION})


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=3) | st.just(SCHEDULE),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["", "id", "__or", SCHEDULE, "remote1"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)


@given(
    job=st.dictionaries(
        st.sampled_from(["pools", "remotes", "xoMetadata", "settings", "name", "id"]), _JSON
    )
)
def test_any_job_is_understood_or_refused(job: dict[str, Any]) -> None:
    try:
        understood(**job)
    except ProxyError as error:
        assert error.message  # noqa: PT017  either is fine, anything else is not
