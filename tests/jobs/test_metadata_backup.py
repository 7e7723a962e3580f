"""Runs of metadata jobs: the recorded log and files, isolation, retention, bad input."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from proxy.config import Config
from proxy.config.schema import BackupsConfig, MetadataConfig, RemotesConfig
from proxy.config.values import Seconds
from proxy.errors import Busy, Refused, Unreachable
from proxy.jobs.requests import BackupRequest
from proxy.remotes.faults import Fail, Gate
from proxy.runtime import secrets
from proxy.simulator import SimulatedPool, serve
from proxy.simulator.pool import PASSWORD

from .conftest import JOB, SCHEDULE, House, Outcome, open_house, until
from .test_full_backup import recorded, shape
from .test_sweep import dead_run, exists, make_vm, marks, swept

FIXTURES = Path(__file__).parents[1] / "fixtures"
CONFIG = '{"users": [{"id": "u1"}]}'
RETENTION = {"retentionPoolMetadata": 2, "retentionXoMetadata": 2}


def pool_uuid(house: House) -> str:
    return str(house.pool.store.get("pool", house.pool.ref)["uuid"])


def request(
    house: House,
    *,
    pools: list[str] | None = None,
    remotes: tuple[str, ...] = ("remote1",),
    settings: dict[str, Any] | None = None,
    levels: dict[str, Any] | None = None,
    **job: Any,
) -> BackupRequest:
    """The recorded call, for this house's pool; ``settings`` are the schedule's."""
    uuids = pools if pools is not None else [pool_uuid(house)]
    return BackupRequest(
        job={
            "id": JOB,
            "name": "metadata job",
            "type": "metadataBackup",
            "pools": {"id": {"__or": uuids}},
            "xoMetadata": CONFIG,
            "remotes": {"id": {"__or": list(remotes)}},
            "settings": {SCHEDULE: {**RETENTION, **(settings or {})}, **(levels or {})},
            **job,
        },
        schedule={"id": SCHEDULE, "jobId": JOB, "name": "lab schedule"},
        remotes={name: house.remote_spec(name) for name in remotes},
        xapis={"xapi1": house.xapi_spec},
        record_to_xapi=dict.fromkeys(uuids, "xapi1"),
        job_data={"jobId": JOB, "jobName": "metadata job", "scheduleId": SCHEDULE},
    )


def tree(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


def backups(house: House, kind: str, remote: str = "remote1") -> list[Path]:
    """The dated directories, oldest first."""
    base = (
        house.folder(remote) / {"xo": "xo-config-backups", "pool": "xo-pool-metadata-backups"}[kind]
    )
    return sorted(path.parent for path in base.rglob("metadata.json"))


def only_whole(house: House, remote: str = "remote1") -> None:
    """Nothing on the remote but backups; nothing on the pool that was not there."""
    for path in house.folder(remote).rglob("*"):
        assert path.name in {"data", "data.json", "metadata.json"} or path.is_dir(), path
        assert not path.name.endswith(".lock")
        if path.name.endswith("Z"):
            assert len(list(path.iterdir())) == 2, path


async def clean(house: House) -> None:
    with trio.move_on_after(5):
        while house.pool.leftovers(connections=True):
            await trio.sleep(0.01)
    assert house.pool.leftovers(connections=True) == {}
    for remote in house.remotes:
        only_whole(house, remote)


def by_task(log: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Records of each task in their order; parts run beside each other in any order."""
    return sorted(shape(log), key=lambda record: str(record[0]))


def same_names(log: list[dict[str, Any]], pool: str) -> list[dict[str, Any]]:
    """The recorded pool's uuid, which stands in the names of tasks, as that of this house."""
    text = json.dumps(log).replace("1656a1c0-d499-45bd-9bd7-2e870992ce0f", pool)
    found: list[dict[str, Any]] = json.loads(text)
    for record in found:
        for name in ("pool", "poolMaster"):  # two simulations do not know the same fields
            if name in record.get("properties", {}):
                kept = {key: record["properties"][name][key] for key in ("uuid", "name_label")}
                record["properties"][name] = kept
    return found


# -- the log and the files ----------------------------------------------------------------------


async def test_log_and_files_are_the_recorded_ones(house: House) -> None:
    outcome = await house.run(request(house))
    assert outcome.status == "success"
    uuid = pool_uuid(house)
    ours = by_task(same_names(outcome.log, uuid))
    assert ours == by_task(same_names(recorded("metadata-run.ndjson"), uuid))
    root = outcome.log[0]["properties"]
    assert root == {
        "name": "backup run",
        "jobId": JOB,
        "jobName": "metadata job",
        "scheduleId": SCHEDULE,
    }
    theirs = FIXTURES / "repository" / "metadata" / "remote"
    names = {name.replace("20261124T015537Z", "<date>") for name in tree(theirs)}
    names = {name for name in names if "20261124T015535Z" not in name}
    names = {name.replace("1656a1c0-d499-45bd-9bd7-2e870992ce0f", uuid) for name in names}
    dates = {path.name for kind in ("xo", "pool") for path in backups(house, kind)}
    assert len(dates) <= 2
    found = set(tree(house.folder()))
    for date in dates:
        found = {name.replace(date, "<date>") for name in found}
    assert found == names
    for kind in ("xo", "pool"):
        (ours_at,) = backups(house, kind)
        metadata = json.loads((ours_at / "metadata.json").read_bytes())
        (recorded_at,) = (theirs / ours_at.relative_to(house.folder()).parts[0]).rglob("*37Z")
        expected = json.loads((recorded_at / "metadata.json").read_bytes())
        assert [key for key in metadata if key != "poolMaster"] == list(expected)
        same = ("data", "jobId", "jobName", "scheduleId", "scheduleName")
        assert {key: metadata.get(key) for key in same} == {key: expected.get(key) for key in same}
        indented = json.dumps(metadata, indent=2, ensure_ascii=False)
        assert (ours_at / "metadata.json").read_text() == indented
        assert abs(metadata["timestamp"] - outcome.snapshot["start"]) < 60_000
    assert (backups(house, "xo")[0] / "data.json").read_text() == CONFIG
    await clean(house)


async def test_weakness_18_the_pools_master_is_part_of_its_metadata(house: House) -> None:
    """Upstream reads it from a cache that does not hold it, and stores nothing."""
    await house.run(request(house))
    metadata = json.loads((backups(house, "pool")[0] / "metadata.json").read_bytes())
    assert metadata["poolMaster"]["name_label"] == "sim-host-1"
    assert metadata["pool"]["uuid"] == pool_uuid(house)
    assert list(metadata) == [
        "jobId",
        "jobName",
        "pool",
        "poolMaster",
        "scheduleId",
        "scheduleName",
        "timestamp",
    ]


async def test_the_database_is_the_one_that_the_host_sent(house: House) -> None:
    house.pool.database_filler = 3_000_000
    await house.run(request(house, remotes=("remote1", "remote2")))
    data = [backups(house, "pool", name)[0] / "data" for name in ("remote1", "remote2")]
    assert data[0].read_bytes() == data[1].read_bytes()
    (transfer,) = house.pool.transfer_log
    assert (transfer.path, transfer.sent) == ("/pool/xmldbdump", data[0].stat().st_size)
    tasks = [call.params[0] for call in house.pool.calls.log if call.method == "task.create"]
    assert tasks == ["[XO] Export pool metadata"], "the name by which people know it on the pool"


async def test_an_encrypted_configuration_comes_as_bytes(house: House) -> None:
    content = bytes(range(256))
    given = {"encoding": "base64", "data": base64.b64encode(content).decode()}
    outcome = await house.run(request(house, xoMetadata=given))
    assert outcome.status == "success"
    (folder,) = backups(house, "xo")
    assert (folder / "data").read_bytes() == content
    assert json.loads((folder / "metadata.json").read_bytes())["data"] == "./data"


async def test_weakness_17_progress_is_a_percentage(house: House) -> None:
    """Upstream's is 0 or 1, whatever was done."""
    outcome = await house.run(request(house, remotes=("remote1", "remote2")))
    root = [
        record["value"]
        for record in outcome.log
        if record["type"] == "property" and record["id"] == outcome.task.id
    ]
    assert root == [25, 50, 75, 100]
    name = f"Starting metadata backup for the pool ({pool_uuid(house)})"
    (child,) = outcome.of(f"{name} for the remote (remote1). ({JOB})")
    size = (backups(house, "pool")[0] / "data").stat().st_size
    assert child["data"]["progress"] == 100
    assert child["data"]["transfer"]["done"] == size


async def test_a_schedule_makes_what_it_keeps(house: House) -> None:
    await house.run(request(house, settings={"retentionPoolMetadata": 0}))
    assert (len(backups(house, "xo")), len(backups(house, "pool"))) == (1, 0)
    assert house.pool.calls.log == []
    await house.run(request(house, remotes=("r2",), settings={"retentionXoMetadata": 0}))
    assert (len(backups(house, "xo", "r2")), len(backups(house, "pool", "r2"))) == (0, 1)
    await house.run(request(house, remotes=("r3",), xoMetadata=False))
    assert (len(backups(house, "xo", "r3")), len(backups(house, "pool", "r3"))) == (0, 1)
    await house.run(request(house, remotes=("r4",), pools=[]))


async def test_a_run_sweeps_the_pool_first(house: House) -> None:
    left, disk = make_vm(house.pool, marks(house, await dead_run(house)))
    outcome = await house.run(request(house))
    assert (outcome.status, len(swept(outcome))) == ("success", 1)
    assert exists(house.pool, left, disk) == [False, False]


# -- retention ----------------------------------------------------------------------------------


async def test_retention_of_each_kind(house: House) -> None:
    for _ in range(4):
        outcome = await house.run(request(house, settings={"retentionXoMetadata": 3}))
        assert outcome.status == "success"
    assert (len(backups(house, "xo")), len(backups(house, "pool"))) == (3, 2)
    await clean(house)


async def test_weakness_17_two_runs_of_one_directory_wait_for_each_other(house: House) -> None:
    """Upstream takes no lock."""
    directory = f"xo-config-backups/{SCHEDULE}"
    async with house.services.remote(house.remote_spec("remote1")) as remote:
        await remote.mktree(directory)
        async with remote.lock(directory, owner="another run"):
            outcome = await house.run(request(house, levels={"": {"getRemoteTimeout": 100}}))
    assert (
        outcome.error(f"Starting XO metadata backup for the remote (remote1). ({JOB})")["code"]
        == Busy.default_code
    )
    assert (len(backups(house, "xo")), len(backups(house, "pool"))) == (0, 1)
    assert outcome.status == "failure"
    assert (await house.run(request(house))).status == "success"


async def test_what_retention_cannot_remove_is_a_failure_and_the_backup_stays(
    house: House,
) -> None:
    await house.run(request(house, pools=[], settings={"retentionXoMetadata": 1}))
    async with house.faulty() as faults:
        faults.add("unlink", Fail(Unreachable("gone")), path="*/metadata.json")
        outcome = await house.run(request(house, pools=[], settings={"retentionXoMetadata": 1}))
    assert outcome.status == "failure"
    assert len(backups(house, "xo")) == 2
    outcome = await house.run(request(house, pools=[], settings={"retentionXoMetadata": 1}))
    assert (outcome.status, len(backups(house, "xo"))) == ("success", 1)


# -- isolation and truth ------------------------------------------------------------------------


def statuses(outcome: Outcome) -> dict[str, str]:
    """Status by the id of each remote's task, or of what could not be begun."""
    found: dict[str, str] = {}

    def walk(task: dict[str, Any]) -> None:
        data = task["data"]
        if "for the remote" in data["name"] or data["name"].startswith("get "):
            kind = "pool" if "pool" in data["name"] else "xo"
            found[f"{kind} {data['id']}"] = task["status"]
        for child in task.get("tasks", []):
            walk(child)

    walk(outcome.snapshot)
    return found


@pytest.mark.parametrize(
    ("verb", "path"),
    [("create.write", "*/data*"), ("create.commit", "*"), ("write_file", "*/metadata.json")],
)
async def test_one_remote_fails_alone(house: House, verb: str, path: str) -> None:
    async with house.faulty("remote2") as faults:
        faults.add(verb, Fail(Refused("ENOSPC: no space left", code="ENOSPC")), path=path, times=2)
        outcome = await house.run(request(house, remotes=("remote1", "remote2", "remote3")))
    assert statuses(outcome) == {
        "xo remote1": "success",
        "xo remote2": "failure",
        "xo remote3": "success",
        "pool remote1": "success",
        "pool remote2": "failure",
        "pool remote3": "success",
    }
    assert outcome.status == "failure"
    assert outcome.log[-1]["status"] == "success", "Xen Orchestra derives the failure itself"
    for name, count in (("remote1", 1), ("remote2", 0), ("remote3", 1)):
        assert len(backups(house, "xo", name)) == len(backups(house, "pool", name)) == count
    await clean(house)


async def test_every_remote_of_a_pool_fails(house: House) -> None:
    async with house.faulty("remote1") as one, house.faulty("remote2") as two:
        for faults in (one, two):
            faults.add("create.write", Fail(Refused("ENOSPC", code="ENOSPC")), path="*/data")
        outcome = await house.run(request(house, remotes=("remote1", "remote2")))
    found = statuses(outcome)
    assert [found[f"pool remote{n}"] for n in (1, 2)] == ["failure", "failure"]
    assert [found[f"xo remote{n}"] for n in (1, 2)] == ["success", "success"]
    await clean(house)


async def test_a_stalled_remote_does_not_hold_up_the_others(house: House) -> None:
    house.pool.database_filler = 2_000_000
    async with house.faulty("remote2") as faults:
        gate = faults.add("create.write", Gate(), path="*/data")
        task = house.services.start_backup(request(house, remotes=("remote1", "remote2")))
        await gate.reached.wait()
        await until(lambda: len(backups(house, "pool")) == 1)
        assert task.pending
        gate.release.set()
        assert (await house.outcome(task)).status == "success"
    await clean(house)


async def test_a_remote_that_does_not_open_is_told_and_the_others_go_on(house: House) -> None:
    asked = request(house, remotes=("remote1", "remote2", "remote3"))
    broken = {**asked.remotes["remote2"], "url": "file:///dev/null/nowhere"}
    known = {"remote1": asked.remotes["remote1"], "remote2": broken}
    outcome = await house.run(replace(asked, remotes=known))
    assert statuses(outcome) == {
        "xo remote2": "failure",
        "xo remote3": "failure",
        "xo remote1": "success",
        "pool remote1": "success",
    }
    assert [task["data"]["type"] for task in outcome.of("get remote adapter")] == ["remote"] * 2
    assert outcome.status == "failure"
    outcome = await house.run(replace(asked, remotes={}))
    assert outcome.status == "failure"
    assert len(outcome.of("get remote adapter")) == 3


@asynccontextmanager
async def second_pool() -> AsyncIterator[SimulatedPool]:
    pool = SimulatedPool.small(seed=7)
    async with trio.open_nursery() as nursery:
        await nursery.start(serve, pool)
        yield pool
        nursery.cancel_scope.cancel()


async def test_several_pools_to_several_remotes_and_one_pool_fails_alone(house: House) -> None:
    async with second_pool() as other:
        uuids = [pool_uuid(house), str(other.store.get("pool", other.ref)["uuid"]), "unknown"]
        asked = request(house, pools=uuids, remotes=("remote1", "remote2"))
        xapis = {**asked.xapis, "xapi2": {**house.xapi_spec, "url": other.url}}
        asked = replace(asked, xapis=xapis, record_to_xapi={uuids[0]: "xapi1", uuids[1]: "xapi2"})
        outcome = await house.run(asked)
        assert outcome.error("get pool record")["message"] == "no XAPI associated to unknown"
        for uuid in uuids[:2]:
            (part,) = outcome.of(f"Starting metadata backup for the pool ({uuid}). ({JOB})")
            assert [child["status"] for child in part["tasks"]] == ["success", "success"]
        for name in ("remote1", "remote2"):
            stored = {path.parts[-2] for path in backups(house, "pool", name)}
            assert stored == {uuids[0], uuids[1]}
        other.fail("/pool/xmldbdump", error=("INTERNAL_ERROR", "no"), times=None)
        outcome = await house.run(asked)
        (failing,) = outcome.of(f"Starting metadata backup for the pool ({uuids[1]}). ({JOB})")
        assert failing["data"]["error"]["code"] == "INTERNAL_ERROR"
        assert {child["status"] for child in failing["tasks"]} == {"failure"}
        assert len(backups(house, "pool")) == 3
        asked = replace(asked, record_to_xapi={**asked.record_to_xapi, uuids[1]: "xapi1"})
        outcome = await house.run(asked)
        assert outcome.of("get pool record")[0]["data"]["error"]["message"]
    await clean(house)


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ({"error": ("INTERNAL_ERROR", "db lock")}, "INTERNAL_ERROR"),
        ({"cut": "reset", "after_bytes": 700}, "VDI_IO_ERROR"),
        ({"cut": "end", "after_bytes": 700}, "VDI_IO_ERROR"),
        ({"cut": "end", "after_bytes": 700, "task": "success"}, "ECORRUPT"),
        ({"cut": "http500", "after_bytes": 700, "task": "success"}, "ECORRUPT"),
        ({"cut": "end", "after_bytes": 0, "task": "success"}, "ECORRUPT"),
        ({"status": 500}, "EHTTP"),
    ],
    ids=lambda given: "-".join(map(str, given.values())) if isinstance(given, dict) else "",
)
async def test_weaknesses_4_and_5_a_database_counts_when_it_is_whole_and_confirmed(
    house: House, monkeypatch: pytest.MonkeyPatch, fault: dict[str, Any], code: str
) -> None:
    """Upstream takes any end of a body without length for its end, and never asks the task."""
    monkeypatch.setattr("proxy.xapi.transfer.EXPLAIN_SECONDS", 0.3)
    house.pool.fail("/pool/xmldbdump", **fault)
    outcome = await house.run(request(house))
    assert outcome.status == "failure"
    assert (
        outcome.error(f"Starting metadata backup for the pool ({pool_uuid(house)}). ({JOB})")[
            "code"
        ]
        == code
    )
    assert (len(backups(house, "xo")), len(backups(house, "pool"))) == (1, 0)
    await clean(house)
    assert (await house.run(request(house))).status == "success"


async def test_the_stub_of_a_pool_in_an_upgrade_is_no_backup(house: House) -> None:
    """The host's task succeeds; restoring that would empty the pool."""
    house.pool.is_upgrading = True
    outcome = await house.run(request(house))
    error = outcome.error(f"Starting metadata backup for the pool ({pool_uuid(house)}). ({JOB})")
    assert "being upgraded" in error["message"]
    assert backups(house, "pool") == []
    await clean(house)


async def test_a_time_limit_ends_the_run(house: House) -> None:
    house.pool.pause_at("/pool/xmldbdump")
    outcome = await house.run(request(house, levels={"": {"timeout": 1500}}))
    error = outcome.error(f"Starting metadata backup for the pool ({pool_uuid(house)}). ({JOB})")
    assert (error["code"], error["deadline"]) == ("ETIMEDOUT", "the job's timeout")
    assert len(backups(house, "xo")) == 1
    house.pool.gates.release_all()
    await clean(house)


@pytest.mark.parametrize(("concurrency", "at_once"), [(1, 1), (2, 2), (0, 2)])
async def test_concurrency_limits_the_parts(house: House, concurrency: int, at_once: int) -> None:
    async with house.faulty() as faults:
        of_pool = house.pool.pause_at("/pool/xmldbdump")
        of_xo = faults.add("create.write", Gate(), path="*/data.json")

        def reached() -> int:
            return of_pool.is_reached + of_xo.reached.is_set()

        levels = {"": {"concurrency": concurrency}}
        task = house.services.start_backup(request(house, levels=levels))
        await until(lambda: reached() == at_once)
        await trio.sleep(0.1)
        assert reached() == at_once
        of_pool.release()
        of_xo.release.set()
        assert (await house.outcome(task)).status == "success"


async def test_a_lost_lock_makes_no_backup(house: House) -> None:
    async with house.faulty() as faults:
        faults.add("lock.check", Fail(Busy("somebody else's")), path="*xo-config*")
        outcome = await house.run(request(house))
    assert statuses(outcome) == {"xo remote1": "failure", "pool remote1": "success"}
    assert backups(house, "xo") == []
    await clean(house)


async def test_a_remote_that_failed_keeps_no_memory_of_a_large_database(house: House) -> None:
    house.pool.database_filler = 20_000_000
    async with house.faulty("remote2") as faults:
        faults.add("create.write", Fail(Unreachable("gone")), path="*/data")
        outcome = await house.run(request(house, remotes=("remote1", "remote2")))
    assert statuses(outcome)["pool remote1"] == "success"
    assert (backups(house, "pool")[0] / "data").stat().st_size > 18_000_000
    await clean(house)


async def test_the_rate_of_the_run_is_limited(house: House) -> None:
    house.pool.database_filler = 1_500_000
    began = trio.current_time()
    await house.run(request(house, settings={"maxExportRate": 1_000_000}))
    assert trio.current_time() - began > 0.4


async def test_a_job_runs_once_at_a_time(house: House) -> None:
    gate = house.pool.pause_at("/pool/xmldbdump")
    task = house.services.start_backup(request(house))
    await gate.reached()
    with pytest.raises(Busy, match="job is already running"):
        house.services.start_backup(request(house))
    assert house.services.running_jobs() == [JOB]
    gate.release()
    await house.outcome(task)


async def test_no_secret_reaches_log_or_journal(house: House) -> None:
    secret = '{"remotes":[{"url":"smb://u:a-config-secret@h"}]}'
    secrets.remember("a-config-secret")
    outcome = await house.run(request(house, xoMetadata=secret))
    told = json.dumps([outcome.log, outcome.snapshot])
    assert PASSWORD not in told
    assert "a-config-secret" not in told
    assert (backups(house, "xo")[0] / "data.json").read_text() == secret, "stored as it came"


# -- settings -----------------------------------------------------------------------------------


async def test_a_call_that_cannot_be_run_touches_nothing(house: House) -> None:
    for wrong in ({"xoMetadata": True}, {"settings": {"": {"preferNbd": True}}}):
        asked = request(house)
        with pytest.raises(Refused):
            house.services.start_backup(replace(asked, job={**asked.job, **wrong}))
    assert not house.folder().exists()
    assert house.pool.calls.log == []
    assert house.services.running_jobs() == []


async def test_the_configuration_gives_defaults(tmp_path: Path) -> None:
    config = Config(
        remotes=RemotesConfig(disable_file_remotes=False),
        resource_cache_delay=Seconds(0),
        backups=BackupsConfig(
            default_settings={"retentionXoMetadata": 5, "preferNbd": True, "concurrency": None},
            metadata=MetadataConfig(default_settings={"retentionXoMetadata": 1}),
        ),
    )
    async with open_house(SimulatedPool.small(), tmp_path, config=config) as house:
        for _ in range(2):
            outcome = await house.run(request(house, pools=[], settings={}, levels={SCHEDULE: {}}))
            assert outcome.status == "success"
        assert len(backups(house, "xo")) == 1
    wrong = Config(
        remotes=RemotesConfig(disable_file_remotes=False),
        resource_cache_delay=Seconds(0),
        backups=BackupsConfig(metadata=MetadataConfig(default_settings={"preferNbd": True})),
    )
    (tmp_path / "2").mkdir()
    async with open_house(SimulatedPool.small(), tmp_path / "2", config=wrong) as house:
        with pytest.raises(Refused, match="preferNbd of the configuration"):
            house.services.start_backup(request(house))
