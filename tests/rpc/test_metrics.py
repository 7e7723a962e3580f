"""``GET /metrics``, read by Prometheus's own parser."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.lowlevel
from prometheus_client.parser import text_string_to_metric_families

from proxy.config import ApiConfig
from proxy.jobs.traffic import RemoteTraffic
from proxy.remotes.metrics import Counts
from proxy.rpc.exposition import resident_memory
from tests.rpc.conftest import TOKEN

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager

    from tests.rpc.conftest import Answer, Server


async def scrape(server: Server, **options: Any) -> Answer:
    async with server.client() as client:
        return await client.post(b"", verb="GET", path="/metrics", **options)


def samples(answer: Answer) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.body.decode())
        for sample in family.samples
    }


def value(answer: Answer, name: str, **labels: str) -> float:
    return samples(answer)[name, tuple(sorted(labels.items()))]


async def test_the_daemon_in_numbers(server: Server) -> None:
    async def fail(_: object) -> None:
        raise RuntimeError

    async def work(_: object) -> None:
        await trio.lowlevel.checkpoint()

    async def wait(_: object) -> None:
        await trio.sleep_forever()

    tasks = server.services.tasks
    tasks.start("waits", {}, wait, nursery=server.services.nursery)
    for each in (fail, work, work):
        task = tasks.start("ends", {}, each)
        _ = [record async for record in tasks.watch(task)]
    await trio.testing.wait_all_tasks_blocked(0.01)
    answer = await scrape(server)
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    assert value(answer, "xo_proxy_tasks_running") == 1
    assert value(answer, "xo_proxy_tasks_ended_total", status="failure") == 1
    assert value(answer, "xo_proxy_tasks_ended_total", status="success") == 2
    assert value(answer, "xo_proxy_tasks_ended_total", status="canceled") == 0
    assert value(answer, "xo_proxy_event_waiters") == 0
    assert value(answer, "xo_proxy_client_connections") == 1
    assert value(answer, "xo_proxy_open_peers", peer="remote") == 2
    assert value(answer, "xo_proxy_info", version="1.0.0") == 1
    memory = value(answer, "xo_proxy_resident_memory_bytes")
    assert memory == pytest.approx(resident_memory(), rel=0.2)
    assert memory > 10 * 2**20


async def test_what_was_done_on_remotes(server: Server) -> None:
    class Store:
        def requests(self) -> dict[str, int]:
            return {"GET": 7}

    traffic = RemoteTraffic("s3", "id-1")
    traffic.operations["read_file"] = Counts(3, 1, 4096, 1.5, {"ENOENT": 1})
    traffic.operations["stat"] = Counts(1)
    traffic.open.append(Store())  # type: ignore[arg-type]
    server.services.traffic._remotes["s3", "id-1"] = traffic
    answer = await scrape(server)
    where = {"type": "s3", "remote": "id-1", "verb": "read_file"}
    assert value(answer, "xo_proxy_remote_operations_total", **where) == 3
    assert value(answer, "xo_proxy_remote_operations_running", **where) == 1
    assert value(answer, "xo_proxy_remote_bytes_total", **where) == 4096
    assert value(answer, "xo_proxy_remote_seconds_total", **where) == 1.5
    assert value(answer, "xo_proxy_remote_errors_total", **where, code="ENOENT") == 1
    assert value(answer, "xo_proxy_remote_requests_total", **{**where, "verb": "GET"}) == 7


async def test_a_waiting_event_call_counts(server: Server) -> None:
    token = (await server.call("event.from")).json()["result"]["token"]

    async def work(_: object) -> None:
        await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.call, "event.from", {"token": token, "timeout": 20})
        with trio.fail_after(5):
            while value(await scrape(server), "xo_proxy_event_waiters") != 1:
                await trio.sleep(0.01)
        server.services.tasks.start("wakes it", {}, work)


@pytest.mark.parametrize(
    ("options", "status"),
    [
        ({"token": None}, 401),
        ({"token": "wrong"}, 401),
        ({"token": None, "headers": {"Authorization": "Bearer wrong"}}, 401),
        ({"token": None, "headers": {"Authorization": f"Basic {TOKEN}"}}, 401),
        ({"token": None, "headers": {"Authorization": f"Bearer {TOKEN}"}}, 200),
        ({"token": TOKEN}, 200),
    ],
)
async def test_only_who_has_the_token_may_look(
    server: Server, options: dict[str, Any], status: int
) -> None:
    answer = await scrape(server, **options)
    assert answer.status == status
    assert (b"xo_proxy" in answer.body) == (status == 200)


async def test_it_can_be_switched_off(
    start: Callable[..., AbstractAsyncContextManager[Server]],
) -> None:
    async with start(settings=ApiConfig(metrics=False)) as server:
        assert (await scrape(server)).status == 404


async def test_other_verbs_are_refused(server: Server) -> None:
    async with server.client() as client:
        assert (await client.post(b"", verb="DELETE", path="/metrics")).status == 405
