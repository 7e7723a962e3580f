"""The methods of this room over real HTTP, on real tasks and a real remote."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, cast

import pytest
import trio
import trio.lowlevel

from proxy.errors import NotFound, Unreachable
from proxy.remotes.factory import RemoteOptions, opened_remote
from proxy.rpc.methods import appliance
from proxy.rpc.methods.appliance import _read_os_release

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path

    from proxy.remotes.interface import Remote
    from proxy.tasks import Task
    from tests.rpc.conftest import Server


async def error_of(server: Server, method: str, params: object = None) -> dict[str, Any]:
    error = (await server.call(method, params)).json()["error"]
    assert isinstance(error, dict)
    return error


async def result_of(server: Server, method: str, params: object = None) -> Any:
    return (await server.call(method, params)).json()["result"]


# -- system, test -------------------------------------------------------------------------


async def test_describe_is_an_openrpc_document_of_every_method(server: Server) -> None:
    document = await result_of(server, "system.describe")
    _, *names = (await server.call("system.listMethods")).lines()
    assert document["openrpc"] == "1.2.6"
    assert [method["name"] for method in document["methods"]] == names
    by_name = {method["name"]: method for method in document["methods"]}
    assert by_name["task.cancel"]["params"] == [
        {"name": "taskId", "required": True, "schema": {"type": "string"}}
    ]
    assert by_name["task.cancel"]["x-changes"] is True
    assert by_name["event.from"]["params"][0]["required"] is False


async def test_method_signature_takes_both_names(server: Server) -> None:
    """Weakness 13: the published document says ``name``, upstream wants ``method``."""
    by_method = await result_of(server, "system.methodSignature", {"method": "test.throw"})
    by_name = await result_of(server, "system.methodSignature", {"name": "test.throw"})
    assert (
        by_method
        == by_name
        == {
            "name": "test.throw",
            "params": {"message": {"type": "string"}},
            "result": {},
        }
    )


@pytest.mark.parametrize(
    ("params", "numbers"),
    [
        ({"stop": 3}, [0, 1, 2]),
        ({"start": 2, "stop": -1}, [2, 1, 0]),
        ({"start": 0, "stop": 1, "step": 0.25}, [0, 0.25, 0.5, 0.75]),
        ({"start": 0, "stop": 5, "step": -1}, []),
    ],
)
async def test_range(params: object, numbers: list[float], server: Server) -> None:
    assert (await server.call("test.range", params)).lines()[1:] == numbers


async def test_a_range_that_never_ends_is_refused(server: Server) -> None:
    error = await error_of(server, "test.range", {"start": 1, "stop": 0, "step": 0})
    assert error["data"]["code"] == "EDOM"


async def test_throw(server: Server) -> None:
    error = await error_of(server, "test.throw", {"message": "boom"})
    assert (error["code"], error["message"]) == (-32000, "boom")


# -- appliance ----------------------------------------------------------------------------


async def test_info_of_the_appliance(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = tmp_path / "os-release"
    release.write_text("ID=debian\nVERSION_ID=\"12\"\nXOA_BUILD='2026'\n# X=1\n")
    monkeypatch.setattr(appliance, "OS_RELEASE", release)
    assert await result_of(server, "appliance.getInfo") == {
        "os": "debian",
        "osVersion": "12",
        "build": "2026",
    }
    release.unlink()
    assert await result_of(server, "appliance.getInfo") == {}


def test_os_release_quotes() -> None:
    assert _read_os_release('A=1\nB="x y"\nC=\'\nD="\n\nE') == {
        "A": "1",
        "B": "x y",
        "C": "'",
        "D": '"',
    }


async def test_check_tells_each_part(server: Server) -> None:
    text = await result_of(server, "appliance.check")
    assert [line[:4].strip() in {"OK", "WARN", "FAIL"} for line in text.splitlines()] == [True] * 4
    assert "OK   task journal: answers" in text


async def test_check_finds_a_missing_data_directory(server: Server, tmp_path: Path) -> None:
    server.services.datadir = tmp_path / "none"
    assert "FAIL data directory: no such file" in await result_of(server, "appliance.check")


async def test_the_updater_says_who_updates(server: Server) -> None:
    state = await result_of(server, "appliance.updater.getState")
    # what xo-web does with it
    assert not state["state"].endswith("-upgrade-needed")
    assert "package manager" in state["message"]
    for method, params in {"upgrade": {}, "configure": {"channel": "x"}}.items():
        error = await error_of(server, f"appliance.updater.{method}", params)
        assert error["data"]["code"] == "ENOTSUP"


async def test_there_is_no_support_tunnel(server: Server) -> None:
    assert await result_of(server, "appliance.supportTunnel.getState") == {
        "open": False,
        "stdout": "",
    }
    assert (await error_of(server, "appliance.supportTunnel.open"))["data"]["code"] == "ENOTSUP"


# -- tasks and events ---------------------------------------------------------------------


async def sleeping(task: Task) -> None:
    assert task.pending
    await trio.sleep(30)


async def test_a_task_is_seen_cancelled_and_forgotten(server: Server) -> None:
    task = server.services.tasks.start("backup run", {"jobId": "j1"}, sleeping)
    await trio.lowlevel.checkpoint()
    shown = await result_of(server, "task.get", {"taskId": task.id})
    assert (shown["id"], shown["status"]) == (task.id, "pending")
    error = await error_of(server, "task.destroy", {"taskId": task.id})
    assert "cancel it first" in error["message"]
    assert await result_of(server, "task.cancel", {"taskId": task.id}) is True
    with trio.fail_after(2):
        while task.pending:
            await trio.sleep(0.01)
    shown = await result_of(server, "task.get", {"taskId": task.id})
    assert shown["status"] == "canceled"
    error = await error_of(server, "task.cancel", {"taskId": task.id})
    assert "already finished" in error["message"]
    assert await result_of(server, "task.destroy", {"taskId": task.id}) is True
    error = await error_of(server, "task.get", {"taskId": task.id})
    assert (error["code"], error["message"]) == (1, f"no such task {task.id}")


async def test_all_tasks_are_a_stream_newest_first(server: Server) -> None:
    async def done(_task: Task) -> None:
        await trio.lowlevel.checkpoint()

    ids = []
    for job in ("a", "b", "a"):
        ids.append(server.services.tasks.start("run", {"jobId": job}, done).id)
        await trio.sleep(0.01)
    _, *every = (await server.call("task.getAll")).lines()
    assert [task["id"] for task in every] == ids[::-1]
    _, *some = (await server.call("task.getAll", {"limit": 1, "filter": {"jobId": "a"}})).lines()
    assert [task["id"] for task in some] == [ids[2]]


async def test_status_of_tasks_is_checked(server: Server) -> None:
    for wrong, path, keyword in (
        ({"status": "lost"}, "/filter/status", "enum"),
        ({"job": "a"}, "/filter", "additionalProperties"),
        ({"since": "yesterday"}, "/filter/since", "type"),
    ):
        error = await error_of(server, "task.getAll", {"filter": wrong})
        assert error["code"] == 10
        (fault,) = error["data"]["errors"]
        assert (fault["instancePath"], fault["keyword"]) == (path, keyword)


async def test_events_go_on_from_a_token(server: Server) -> None:
    first = await result_of(server, "event.from")
    assert first["events"] == []
    task = server.services.tasks.start("run", {}, sleeping)
    page = await result_of(server, "event.from", {"token": first["token"], "timeout": 5})
    (event,) = page["events"]
    assert (event["class"], event["operation"]) == ("Task", "add")
    assert event["snapshot"]["id"] == task.id
    quiet = await result_of(server, "event.from", {"token": page["token"], "timeout": 0.05})
    assert quiet["events"] == []
    assert quiet["token"] == page["token"]
    lost = await result_of(server, "event.from", {"token": "nonsense"})
    assert lost["reset"] is True
    assert len(lost["events"]) == 1
    task.cancel()


async def test_event_tokens_are_no_secrets(server: Server) -> None:
    """They would push real secrets out of the memory that hides them."""
    method = server.app._endpoint._registry["event.from"]
    assert not method.carries_secrets
    assert server.app._endpoint._registry["remote.test"].carries_secrets


async def test_waiting_for_events_does_not_delay_the_stop(server: Server) -> None:
    token = (await result_of(server, "event.from"))["token"]
    async with server.client() as client:
        await client.send(
            b'{"id":0,"method":"event.from","params":{"timeout":50,"token":"%s"}}' % token.encode()
        )
        await trio.sleep(0.05)
        server.stopping.set()
        with trio.fail_after(2):
            answer = await client.receive()
            await server.stopped.wait()
    assert answer.json()["result"] == {"events": [], "token": token}


@pytest.mark.slow
async def test_many_waiters_wake_together(server: Server) -> None:
    token = (await result_of(server, "event.from"))["token"]
    awake = 0

    async def wait() -> None:
        nonlocal awake
        page = await result_of(server, "event.from", {"token": token, "timeout": 50})
        awake += len(page["events"]) == 1

    async with trio.open_nursery() as nursery:
        for _ in range(400):
            nursery.start_soon(wait)
        await trio.sleep(0.8)
        server.services.tasks.start("run", {}, sleeping)
        begun = trio.current_time()
    assert awake == 400
    assert trio.current_time() - begun < 5


# -- remotes ------------------------------------------------------------------------------


async def test_the_flat_form_of_a_remote_is_taken(server: Server) -> None:
    seen: list[Any] = []

    @contextlib.asynccontextmanager
    async def open_remote(spec: Mapping[str, Any]) -> AsyncIterator[Remote]:
        seen.append(spec)
        raise NotFound("no such directory", code="ENOTDIR")
        yield  # type: ignore[unreachable]

    server.services.open_remote = open_remote
    spec = {"url": "nfs://host:/share", "options": "vers=4"}
    assert (await error_of(server, "remote.ping", spec))["data"]["code"] == "ENOTDIR"
    assert (await error_of(server, "remote.ping", {"remote": spec}))["code"] == -32000
    assert seen == [spec, spec]
    assert (await error_of(server, "remote.ping", {}))["code"] == 10


@pytest.mark.parametrize("error", [NotFound("no such directory"), OSError("raw"), KeyError("x")])
async def test_a_failed_test_is_an_answer_with_its_message(
    error: Exception, server: Server
) -> None:
    """Weakness 7: upstream answers an empty object as the error."""

    @contextlib.asynccontextmanager
    async def open_remote(_spec: Mapping[str, Any]) -> AsyncIterator[Remote]:
        raise error
        yield  # type: ignore[unreachable]

    server.services.open_remote = open_remote
    result = await result_of(server, "remote.test", {"remote": {"url": "file:///x"}})
    assert result["success"] is False
    assert isinstance(result["error"], str)
    assert result["error"]


@pytest.fixture
def with_remotes(server: Server) -> Server:
    options = RemoteOptions(disable_file_remotes=False)
    server.services.open_remote = lambda spec: opened_remote(spec, options=options)
    return server


@pytest.mark.parametrize(
    "name",
    ["01-remote.ping", "02-remote.test", "03-remote.getInfo", "04-remote.getTotalBackupSize"],
)
async def test_a_local_remote_as_recorded(
    name: str, with_remotes: Server, tmp_path: Path, recorded_calls: list[dict[str, Any]]
) -> None:
    recorded = next(one for one in recorded_calls if one["name"] == name)
    (tmp_path / "remote1").mkdir()
    spec = {"id": "remote1", "url": f"file://{tmp_path}/remote1"}
    result = await result_of(with_remotes, recorded["method"], {"remote": spec})
    expected = recorded["answer"][0]["result"]
    assert result.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, bool) or value == 0:
            assert result[key] == value
        else:
            assert result[key] > 0


@pytest.mark.parametrize(
    "name", ["05-remote.ping-bad", "06-remote.test-bad", "07-remote.getInfo-bad"]
)
async def test_a_bad_remote_as_recorded(
    name: str, with_remotes: Server, tmp_path: Path, recorded_calls: list[dict[str, Any]]
) -> None:
    recorded = next(one for one in recorded_calls if one["name"] == name)
    (tmp_path / "file").touch()
    spec = {"id": "bad", "url": f"file://{tmp_path}/file/x"}
    answer = (await with_remotes.call(recorded["method"], {"remote": spec})).json()
    expected = recorded["answer"][0]
    if "error" in expected:
        assert answer["error"]["code"] == expected["error"]["code"]
        assert answer["error"]["data"]["code"] == expected["error"]["data"]["code"] == "ENOTDIR"
    else:
        assert answer["result"]["success"] is False
        assert "ENOTDIR" in answer["result"]["error"]


class Stale:
    """What is left of an open share when its server went away."""

    async def list(self, path: str) -> list[Any]:
        raise Unreachable(f"ESTALE: stale file handle, listing '{path}'", code="ESTALE")


async def test_a_remote_that_vanished_does_not_ping(server: Server) -> None:
    """Upstream's ping trusts a handler that is open already."""

    @contextlib.asynccontextmanager
    async def open_already(_spec: Mapping[str, Any]) -> AsyncIterator[Remote]:
        yield cast("Remote", Stale())

    server.services.open_remote = open_already
    error = await error_of(server, "remote.ping", {"remote": {"url": "nfs://host:/share"}})
    assert error["data"]["code"] == "ESTALE"


async def test_a_remote_that_fails_hides_no_other_in_a_listing(
    with_remotes: Server, tmp_path: Path
) -> None:
    """Absent is how XO knows it; a VM that was asked for is there even without backups."""
    good = {"url": f"file://{tmp_path}/good"}
    bad = {"url": f"file://{tmp_path}/file/x"}
    (tmp_path / "file").touch()
    params: dict[str, Any] = {"remotes": {"bad": bad, "good": good}}
    assert await result_of(with_remotes, "backup.listVmBackups", params) == {"good": {}}
    params["vmId"] = "b3a9b4d4-7a3b-4c8e-9f0e-9a6c2f6f1d11"
    found = await result_of(with_remotes, "backup.listVmBackups", params)
    assert found == {"good": {params["vmId"]: []}}


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("backup.listVmBackups", {"vmId": "../../etc"}),
        ("backup.deleteVmBackup", {"filename": "/xo-vm-backups/../../etc/passwd"}),
        ("backup.deleteVmBackups", {"filenames": ["/etc/20260101T000000Z.json"]}),
        ("remote.ping", {"remote": {"url": "file:///tmp/../etc"}}),
        ("remote.getInfo", {"remote": {"url": "file:///tmp/../etc"}}),
    ],
)
async def test_a_path_that_leads_elsewhere_is_refused(
    method: str, params: dict[str, Any], with_remotes: Server, tmp_path: Path
) -> None:
    remote = {"url": f"file://{tmp_path}/remote"}
    where = {"remotes": {"r": remote}} if method == "backup.listVmBackups" else {"remote": remote}
    error = await error_of(with_remotes, method, {**where, **params})
    assert (error["code"], error["data"]["code"]) == (-32000, "EINVAL")
