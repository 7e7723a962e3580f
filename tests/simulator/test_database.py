"""/pool/xmldbdump: out, in, only tried, refused, cut."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any
from xml.etree import ElementTree

import httpx
import pytest
import trio

from proxy.errors import Corrupt
from proxy.formats.pool_database import DatabaseCheck
from proxy.simulator import SimulatedPool
from tests.simulator.conftest import Client


async def dump(client: Client) -> tuple[bytes, dict[str, Any]]:
    task = await client.new_task()
    answer = await client.http.get(client.data_url("/pool/xmldbdump", task_id=task))
    assert answer.status_code == 200
    assert "content-length" not in answer.headers
    return answer.content, await client.settled(task)


async def restore(client: Client, body: bytes, **params: str) -> dict[str, Any]:
    task = await client.new_task()
    url = client.data_url("/pool/xmldbdump", task_id=task, **params)
    answer = await client.http.put(url, content=body)
    assert (answer.status_code, answer.content) == (200, b"")
    return await client.settled(task)


async def test_the_database_goes_out_and_in(client: Client, pool: SimulatedPool) -> None:
    body, record = await dump(client)
    assert record["status"] == "success"
    rows = {table.get("name"): len(table) for table in ElementTree.fromstring(body).iter("table")}
    assert (rows["pool"], rows["host"], rows["SR"]) == (1, 2, 2)
    assert (await restore(client, body, dry_run="true"))["status"] == "success"
    assert (pool.restored, pool.dry_runs) == ([], 1)
    record = await restore(client, body)
    assert (record["status"], record["result"]) == ("success", "")
    assert (pool.restored, pool.dry_runs) == ([body], 1)


@pytest.mark.parametrize("dry_run", ["true", "false"])
async def test_what_does_not_fit_is_refused_by_the_task_alone(
    client: Client, pool: SimulatedPool, dry_run: str
) -> None:
    body, _ = await dump(client)
    record = await restore(client, body[:-20], dry_run=dry_run)
    assert (record["status"], record["error_info"][0]) == ("failure", "INTERNAL_ERROR")
    older = body.replace(b'"603"', b'"602"')
    record = await restore(client, older, dry_run=dry_run)
    assert record["error_info"] == ["RESTORE_INCOMPATIBLE_VERSION"]
    pool.fail("/pool/xmldbdump", error=("RESTORE_TARGET_MISSING_DEVICE", "eth1"))
    record = await restore(client, body, dry_run=dry_run)
    assert record["error_info"] == ["RESTORE_TARGET_MISSING_DEVICE", "eth1"]
    assert (pool.restored, pool.dry_runs) == ([], 0)


async def test_a_restore_needs_its_length(client: Client, pool: SimulatedPool) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"<database/>"

    answer = await client.http.put(client.data_url("/pool/xmldbdump"), content=pieces())
    assert answer.status_code == 400
    assert pool.restored == []


async def test_a_cut_upload_restores_nothing(client: Client, pool: SimulatedPool) -> None:
    body, _ = await dump(client)
    task = await client.new_task()

    async def pieces() -> AsyncIterator[bytes]:
        yield body[:1000]
        await trio.sleep_forever()

    with trio.move_on_after(0.2):
        await client.http.put(
            client.data_url("/pool/xmldbdump", task_id=task),
            content=pieces(),
            headers={"content-length": str(len(body))},
        )
    assert (await client.settled(task))["status"] == "failure"
    assert pool.restored == []


async def test_nothing_stops_a_restore_that_has_every_byte(
    client: Client, pool: SimulatedPool
) -> None:
    body, _ = await dump(client)
    gate = pool.pause_at("/pool/xmldbdump", stage="after")
    task = await client.new_task()

    async def put(url: httpx.URL) -> None:
        await client.http.put(url, content=body)

    async with trio.open_nursery() as nursery:
        url = client.data_url("/pool/xmldbdump", task_id=task)
        nursery.start_soon(put, url)
        await gate.reached()
        await client.call("task.cancel", task)
        gate.release()
    assert (await client.settled(task))["status"] == "success"
    assert pool.restored == [body]


async def test_a_cut_export_looks_like_an_end(client: Client, pool: SimulatedPool) -> None:
    pool.fail("/pool/xmldbdump", cut="end", after_bytes=500)
    body, record = await dump(client)
    assert (len(body), record["status"]) == (500, "failure")
    pool.fail("/pool/xmldbdump", cut="reset", after_bytes=500)
    with pytest.raises(httpx.ReadError):
        await dump(client)


async def test_a_pool_in_an_upgrade_sends_no_rows(client: Client, pool: SimulatedPool) -> None:
    pool.is_upgrading = True
    body, record = await dump(client)
    assert record["status"] == "success"
    assert ElementTree.fromstring(body).findall("table/row") == []
    check = DatabaseCheck(pool.store.get("pool", pool.ref)["uuid"])
    check.feed(memoryview(body))
    with pytest.raises(Corrupt, match="being upgraded"):
        check.finish()
