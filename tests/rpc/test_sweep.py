"""``backup.sweep`` over HTTP: what it takes, what it answers, what it refuses."""

from __future__ import annotations

import json
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


@pytest.fixture
async def proxy(tmp_path: Path) -> AsyncIterator[Server]:
    """A server with the real services."""
    config = Config(
        remotes=RemotesConfig(disable_file_remotes=False), resource_cache_delay=Seconds(0)
    )
    async with running(tmp_path) as server:
        stub = server.services
        async with open_services(lambda: config, stub.tasks, stub.nursery) as services:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(stub, "start_sweep", services.start_sweep)
                yield server
                with trio.CancelScope(shield=True), trio.fail_after(10):
                    await services.wait_idle()


async def test_it_answers_the_task_or_streams_its_log(proxy: Server, tmp_path: Path) -> None:
    (tmp_path / "remote1").mkdir()
    params: dict[str, Any] = {"remotes": {"r1": {"url": f"file://{tmp_path / 'remote1'}"}}}
    _, *log = (await proxy.call("backup.sweep", {**params, "streamLogs": True})).lines()
    assert log[0]["properties"] == {"name": "sweep", "dryRun": False}
    assert log[1]["properties"] == {"name": "sweep remote", "id": "r1", "type": "remote"}
    empty: dict[str, Any] = {"swept": [], "left": []}
    assert log[-1]["result"] == {"dryRun": False, "pools": {}, "remotes": {"r1": empty}}
    task = (await proxy.call("backup.sweep", {**params, "dryRun": True})).json()["result"]
    assert json.loads(bytes(await proxy.services.tasks.get(task)))["data"]["dryRun"] is True


async def test_what_cannot_be_opened_fails_alone_and_tells_no_secret(
    proxy: Server, tmp_path: Path
) -> None:
    pool = SimulatedPool.small()
    async with trio.open_nursery() as nursery:
        await nursery.start(serve, pool)
        spec = {"url": pool.url, "allowUnauthorized": True}
        good = {"username": "root", "password": "simulated"}
        bad = {"username": "root", "password": "hidden-secret"}
        params = {
            "xapis": {"p1": {**spec, "credentials": good}, "p2": {**spec, "credentials": bad}},
            "remotes": {"gone": {"url": f"file://{tmp_path / 'gone'}"}},
            "streamLogs": True,
        }
        _, *log = (await proxy.call("backup.sweep", params)).lines()
        nursery.cancel_scope.cancel()
    assert log[-1]["status"] == "success", "the other parts are worth their result"
    result = log[-1]["result"]
    assert "error" not in result["pools"]["p1"]
    assert "error" in result["pools"]["p2"]
    assert "ENOENT" in result["remotes"]["gone"]["error"]
    assert not (tmp_path / "gone").exists()
    ends = {r["id"]: r["status"] for r in log if r["type"] == "end"}
    assert sorted(ends.values()) == ["failure", "failure", "success", "success"]
    assert "hidden-secret" not in json.dumps(log)


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"xapis": {}, "remotes": {}},
        {"xapis": []},
        {"remotes": {"r": "file:///x"}},
        {"remotes": {}, "dryRun": 1},
        {"remotes": {}, "dry": True},
    ],
)
async def test_bad_input_is_refused(proxy: Server, params: dict[str, Any]) -> None:
    error = (await proxy.call("backup.sweep", params)).json()["error"]
    assert error["data"].get("code") == "EINVAL" or error["code"] == 10
    assert "neither" in error["message"] or error["code"] == 10
