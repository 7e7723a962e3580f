"""``backup.verify`` over HTTP: records a line each, a task, and an end when nobody listens."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio

from proxy.config import Config
from proxy.config.schema import RemotesConfig
from proxy.config.values import Seconds
from proxy.jobs import open_services
from proxy.remotes.local import LocalRemote
from proxy.repository import lock_vm, open_full_backup

from .conftest import Server, running

VM = "fda19ed2-4e86-4644-a698-498a6317efb6"


@pytest.fixture
async def proxy(tmp_path: Path) -> AsyncIterator[Server]:
    """A server with the real services, and a remote with one full backup of 40 MB."""
    config = Config(
        remotes=RemotesConfig(disable_file_remotes=False), resource_cache_delay=Seconds(0)
    )
    async with running(tmp_path) as server:
        stub = server.services
        async with open_services(lambda: config, stub.tasks, stub.nursery) as services:
            with contextlib.ExitStack() as stack:
                stack.enter_context(pytest.MonkeyPatch.context()).setattr(
                    stub, "start_verify", services.start_verify
                )
                await _write(tmp_path / "remote")
                yield server
                with trio.CancelScope(shield=True), trio.fail_after(10):
                    await services.wait_idle()


async def _write(root: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, size in (("ova.xml", 10), ("Ref:1/00000000", 40_000_000)):
            member = tarfile.TarInfo(name)
            member.size = size
            archive.addfile(member, io.BytesIO(bytes(size)))
    data = buffer.getvalue()
    remote = await LocalRemote.open(str(root), url=f"file://{root}")
    async with (
        lock_vm(remote, VM, owner="test"),
        open_full_backup(remote, VM, 1_767_225_600_000) as writer,
    ):
        await writer.write(data)
        vm = {"uuid": VM, "name_label": "vm1"}
        metadata = {"jobId": "j", "scheduleId": "s", "timestamp": 1_767_225_600_000, "vm": vm}
        await writer.commit(metadata, hashlib.md5(data).digest())
    await remote.aclose()


async def _ended(server: Server, task_id: str) -> dict[str, Any]:
    with trio.fail_after(10):
        while True:
            task: dict[str, Any] = json.loads(bytes(await server.services.tasks.get(task_id)))
            if task["status"] != "pending":
                return task
            await trio.sleep(0.005)


async def test_it_streams_reports_and_is_a_task(proxy: Server, tmp_path: Path) -> None:
    params = {"remote": {"url": f"file://{tmp_path}/remote"}, "level": "read"}
    head, start, backup, summary = (await proxy.call("backup.verify", params)).lines()
    assert head["result"] == {"$responseType": "ndjson"}
    assert start["type"] == "start"
    assert (backup["type"], backup["status"]) == ("backup", "ok")
    assert backup["id"] == f"/xo-vm-backups/{VM}/20260101T000000Z.json"
    assert (summary["type"], summary["status"]) == ("summary", "ok")
    assert summary["bytesRead"] == backup["read"] > 40_000_000
    task = (await proxy.call("task.get", {"taskId": start["taskId"]})).json()["result"]
    assert (task["data"]["name"], task["status"]) == ("verify", "success")
    _, *tasks = (await proxy.call("task.getAll")).lines()
    assert [each["id"] for each in tasks] == [start["taskId"]]


async def test_damage_ends_the_stream_well_and_the_task_as_a_failure(
    proxy: Server, tmp_path: Path
) -> None:
    (xva,) = tmp_path.rglob("*.xva")
    with xva.open("r+b") as file:
        file.seek(20_000_000)
        file.write(b"x")
    params = {
        "remote": {"url": f"file://{tmp_path}/remote"},
        "vmId": VM,
        "filename": f"/xo-vm-backups/{VM}/20260101T000000Z.json",
        "level": "read",
    }
    _, start, backup, summary = (await proxy.call("backup.verify", params)).lines()
    assert backup["status"] == summary["status"] == "damaged"
    assert [problem["what"] for problem in backup["problems"]] == ["checksum"]
    task = await _ended(proxy, start["taskId"])
    assert task["status"] == "failure"
    assert task["data"]["error"]["code"] == "ECORRUPT"


async def test_a_client_that_leaves_cancels_it(proxy: Server, tmp_path: Path) -> None:
    params = {"remote": {"url": f"file://{tmp_path}/remote"}, "level": "read"}
    async with proxy.client() as client:
        message = {"id": 0, "jsonrpc": "2.0", "method": "backup.verify", "params": params}
        await client.send(json.dumps(message).encode())
        await client.head()
        lines = b""
        while lines.count(b"\n") < 1 or b"taskId" not in lines:
            part = await client.part()
            assert part is not None
            lines += part
    task_id = json.loads(lines.split(b"\n")[1])["taskId"]
    assert (await _ended(proxy, task_id))["status"] == "canceled"


@pytest.mark.parametrize(
    ("more", "code"),
    [
        ({"filename": "../../etc/passwd"}, -32000),
        ({"filename": f"/xo-vm-backups/{VM}/../../../etc/passwd.json"}, -32000),
        ({"vmId": "../../etc"}, -32000),
        ({"sample": 0.5}, -32000),
        ({"level": "read", "sample": 0}, 10),
        ({"level": "read", "sample": 2}, 10),
        ({"level": "everything"}, 10),
        ({"filename": f"/xo-vm-backups/{VM}/20200101T000000Z.json"}, -32000),
    ],
)
async def test_what_cannot_be_meant_is_an_error(
    proxy: Server, tmp_path: Path, more: dict[str, Any], code: int
) -> None:
    params = {"remote": {"url": f"file://{tmp_path}/remote"}, **more}
    answer = (await proxy.call("backup.verify", params)).json()
    assert answer["error"]["code"] == code
    assert len((await proxy.call("task.getAll")).lines()) == 1
