"""Metadata backups over HTTP, against what upstream answered to the same calls."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio

from proxy.config import Config
from proxy.config.schema import RemotesConfig
from proxy.config.values import Seconds
from proxy.jobs import open_services
from proxy.simulator import SimulatedPool, serve

from .conftest import Server, running

RECORDED = Path(__file__).parent.parent / "fixtures" / "repository" / "metadata"
SCHEDULE = "22222222-2222-4222-8222-222222222222"
POOL = "1656a1c0-d499-45bd-9bd7-2e870992ce0f"


@pytest.fixture
async def proxy(tmp_path: Path) -> AsyncIterator[Server]:
    """A server with the real services, and the recorded remote."""
    config = Config(
        remotes=RemotesConfig(disable_file_remotes=False), resource_cache_delay=Seconds(0)
    )
    shutil.copytree(RECORDED / "remote", tmp_path / "remote1")
    async with running(tmp_path) as server:
        stub = server.services
        async with open_services(lambda: config, stub.tasks, stub.nursery) as services:
            with pytest.MonkeyPatch.context() as patch:
                for name in ("remote", "start_backup", "start_metadata_restore"):
                    patch.setattr(stub, name, getattr(services, name))
                yield server
                with trio.CancelScope(shield=True), trio.fail_after(10):
                    await services.wait_idle()


def remote(tmp_path: Path, name: str = "remote1") -> dict[str, Any]:
    return {"id": name, "name": name, "url": f"file://{tmp_path / name}"}


@pytest.mark.parametrize(
    ("method", "file"),
    [
        ("backup.listPoolMetadataBackups", "pools.json"),
        ("backup.listXoMetadataBackups", "configs.json"),
    ],
)
async def test_listings_are_the_recorded_ones(
    proxy: Server, tmp_path: Path, method: str, file: str
) -> None:
    expected = (RECORDED / file).read_text().splitlines()[0]
    answer = await proxy.call(method, {"remotes": {"remote1": remote(tmp_path)}})
    assert answer.body.decode() == expected
    # a remote that fails is absent and hides no other
    broken = {"url": "file:///dev/null/nowhere"}
    (tmp_path / "none").mkdir()
    remotes = {"broken": broken, "remote1": remote(tmp_path), "empty": remote(tmp_path, "none")}
    found = (await proxy.call(method, {"remotes": remotes})).json()["result"]
    nothing: Any = {} if "Pool" in method else []
    assert found == {**json.loads(expected)["result"], "empty": nothing}


async def test_a_deletion_answers_true_and_leaves_the_recorded_tree(
    proxy: Server, tmp_path: Path
) -> None:
    folder = f"xo-pool-metadata-backups/{SCHEDULE}/{POOL}/20261124T015535Z"
    params = {"backupId": folder, "remote": remote(tmp_path)}
    before = {path.relative_to(tmp_path) for path in (tmp_path / "remote1").rglob("*")}
    answer = (await proxy.call("backup.deleteMetadataBackup", params)).json()
    assert answer["result"] is True
    after = {path.relative_to(tmp_path) for path in (tmp_path / "remote1").rglob("*")}
    gone = Path("remote1") / folder
    assert before - after == {gone, gone / "data", gone / "metadata.json"}
    assert (await proxy.call("backup.deleteMetadataBackup", params)).json()["result"] is True


@pytest.mark.parametrize(
    "wrong",
    [
        "../../etc",
        f"xo-config-backups/{SCHEDULE}",
        f"xo-config-backups/{SCHEDULE}/20261124T015535Z/..",
        f"xo-pool-metadata-backups/{SCHEDULE}/../../remote1/20261124T015535Z",
        f"xo-vm-backups/{SCHEDULE}/20261124T015535Z",
    ],
)
async def test_an_id_that_leads_elsewhere_is_an_error(
    proxy: Server, tmp_path: Path, wrong: str
) -> None:
    before = sorted((tmp_path / "remote1").rglob("*"))
    for method in ("backup.deleteMetadataBackup", "backup.restoreMetadataBackup"):
        params = {"backupId": wrong, "remote": remote(tmp_path)}
        error = (await proxy.call(method, params)).json()["error"]
        assert error["message"] == f"The id ({wrong}) not correspond to a metadata folder"
        assert (error["code"], error["data"]["part"]) == (-32000, "backupId")
    assert sorted((tmp_path / "remote1").rglob("*")) == before
    assert len((await proxy.call("task.getAll")).lines()) == 1, "no task"


@pytest.mark.parametrize(
    ("method", "params", "part"),
    [
        ("backup.deleteMetadataBackup", {"backupId": 3, "remote": {}}, "backupId"),
        ("backup.deleteMetadataBackup", {"backupId": "x"}, "remote"),
        ("backup.listXoMetadataBackups", {"remotes": []}, "remotes"),
        ("backup.listPoolMetadataBackups", {"remotes": {"r": "file:///x"}}, "remotes"),
        ("backup.restoreMetadataBackup", {"backupId": "x", "remote": {}, "xapi": 1}, "xapi"),
        ("backup.restoreMetadataBackup", {"backupId": "x", "remote": {}, "dryRun": 1}, "dryRun"),
    ],
)
async def test_wrong_parameters_are_named(
    proxy: Server, method: str, params: dict[str, Any], part: str
) -> None:
    error = (await proxy.call(method, params)).json()["error"]
    assert error["code"] == 10
    assert part in json.dumps(error["data"]["errors"])


async def test_a_configuration_is_streamed_to_its_caller(proxy: Server, tmp_path: Path) -> None:
    params = {
        "backupId": f"xo-config-backups/{SCHEDULE}/20261124T015535Z",
        "remote": remote(tmp_path),
    }
    head, start, end = (await proxy.call("backup.restoreMetadataBackup", params)).lines()
    assert head["result"] == {"$responseType": "ndjson"}
    assert start["properties"]["name"] == "metadataRestore"
    assert (end["status"], end["result"]) == ("success", '{"users": [{"id": "u1"}]}')
    task = (await proxy.call("task.get", {"taskId": start["id"]})).json()["result"]
    assert task["status"] == "success"
    assert "result" not in task["data"], "whoever else looks gets no configuration"


async def test_a_run_and_a_dry_run(proxy: Server, tmp_path: Path, nursery: trio.Nursery) -> None:
    pool = SimulatedPool.small()
    await nursery.start(serve, pool)
    uuid = pool.store.get("pool", pool.ref)["uuid"]
    credentials = {"username": "root", "password": "simulated"}
    xapi = {"url": pool.url, "credentials": credentials, "allowUnauthorized": True}
    params: dict[str, Any] = {
        "job": {
            "id": "job",
            "name": "metadata",
            "type": "metadataBackup",
            "pools": {"id": uuid},
            "remotes": {"id": "remote1"},
            "settings": {SCHEDULE: {"retentionPoolMetadata": 1}},
        },
        "schedule": {"id": SCHEDULE, "name": "nightly"},
        "remotes": {"remote1": remote(tmp_path)},
        "xapis": {"x": xapi},
        "recordToXapi": {uuid: "x"},
        "streamLogs": True,
    }
    _, *log = (await proxy.call("backup.run", params)).lines()
    assert {record["status"] for record in log if record["type"] == "end"} == {"success"}
    listed = await proxy.call(
        "backup.listPoolMetadataBackups", {"remotes": {"remote1": remote(tmp_path)}}
    )
    (made,) = listed.json()["result"]["remote1"][uuid]
    restore = {"backupId": made["id"], "remote": remote(tmp_path), "xapi": xapi, "dryRun": True}
    _, *log = (await proxy.call("backup.restoreMetadataBackup", restore)).lines()
    assert log[-1]["result"] == {"accepted": True, "answer": ""}
    assert (pool.restored, pool.dry_runs) == ([], 1)
    wrong = {**params, "job": {**params["job"], "xoMetadata": True}}
    error = (await proxy.call("backup.run", wrong)).json()["error"]
    assert (error["code"], error["data"]["part"]) == (-32000, "job.xoMetadata")
