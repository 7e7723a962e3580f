"""A served pool and a small client of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import httpx
import pytest
import trio

from proxy.simulator import SimulatedPool, serve
from proxy.simulator.disks import BLOCK, UNIT


class Client:
    """Speaks JSON-RPC and the data handlers; keeps its session."""

    def __init__(self, url: str, http: httpx.AsyncClient) -> None:
        self.url = url
        self.http = http
        self.session = ""

    async def raw(self, method: str, *params: Any, version: str | None = "2.0") -> Any:
        body: dict[str, Any] = {"id": 0, "method": method, "params": list(params)}
        if version:
            body["jsonrpc"] = version
        answer = await self.http.post(f"{self.url}/jsonrpc", json=body)
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "application/json"
        return answer.json()

    async def login(self) -> None:
        self.session = (await self.raw("session.login_with_password", "root", "simulated"))[
            "result"
        ]

    async def call(self, method: str, *params: Any) -> Any:
        answer = await self.raw(method, self.session, *params)
        if "error" in answer:
            raise Failure(answer["error"]["message"], answer["error"]["data"])
        return answer["result"]

    async def settled(self, task: str) -> dict[str, Any]:
        """The record of a task that is not pending any more."""
        token = ""
        while True:
            answer = await self.call("event.from", [f"task/{task}"], token, 5.1)
            token = answer["token"]
            for event in answer["events"]:
                if event["snapshot"]["status"] not in ("pending", "cancelling"):
                    return dict(event["snapshot"])

    def data_url(self, path: str, **params: str) -> httpx.URL:
        return httpx.URL(self.url + path, params={"session_id": self.session, **params})

    async def export(self, vm: str, task: str, **params: str) -> bytes:
        url = self.data_url("/export/", ref=vm, task_id=task, **params)
        body = bytearray()
        async with self.http.stream("GET", url) as answer:
            assert answer.status_code == 200
            assert "content-length" not in answer.headers
            assert answer.headers["task-id"] == task
            async for data in answer.aiter_raw():
                body += data
        return bytes(body)

    async def new_task(self) -> str:
        return str(await self.call("task.create", "[XO] test", ""))

    async def export_disk(self, vdi: str, **params: str) -> tuple[bytes, dict[str, Any]]:
        """The body of a disk's export and how its task ended."""
        task = await self.new_task()
        answer = await self.http.get(
            self.data_url("/export_raw_vdi/", vdi=vdi, task_id=task, **params)
        )
        assert answer.status_code == 200, answer.text
        assert "content-length" not in answer.headers
        return answer.content, await self.settled(task)

    async def import_disk(
        self, vdi: str, body: bytes, **params: str
    ) -> tuple[httpx.Response, dict[str, Any]]:
        """The answer to a disk's import and how its task ended."""
        task = await self.new_task()
        url = self.data_url("/import_raw_vdi/", vdi=vdi, task_id=task, **params)
        answer = await self.http.put(url, content=body)
        return answer, await self.settled(task)

    async def put(self, body: bytes, task: str, **params: str) -> httpx.Response:
        return await self.http.put(self.data_url("/import/", task_id=task, **params), content=body)


class Failure(Exception):
    """An error that XAPI answered."""

    def __init__(self, code: str, params: list[str]) -> None:
        super().__init__(code, params)
        self.code = code
        self.params = params


@pytest.fixture
async def pool(nursery: trio.Nursery) -> SimulatedPool:
    """One halted and one running VM, served."""
    made = SimulatedPool.small(vms=1, disks_per_vm=2, disk_size=3 << 20)
    made.add_generated(range(2, 3), disks=1, size=2 << 20, running=False)
    await nursery.start(partial(serve, made))
    return made


ODD_SIZE = 5 * BLOCK + UNIT + 1536
"""A last block that is only in part inside the disk, and in it a last MiB likewise."""


async def one_odd_disk(nursery: trio.Nursery) -> SimulatedPool:
    """One halted VM with a half-empty disk of an odd size, served."""
    made = SimulatedPool.small(disk_size=ODD_SIZE, running=False, fill=0.5, kind="text", seed=7)
    await nursery.start(partial(serve, made))
    return made


@pytest.fixture
def vdi(pool: SimulatedPool) -> str:
    """The first disk of the first VM."""
    return pool.vms.disks(pool.vm("vm1"))[0]


def content(pool: SimulatedPool, vdi: str) -> bytes:
    return b"".join(pool.disks.contents[vdi].chunks())


@pytest.fixture
async def client(pool: SimulatedPool) -> AsyncIterator[Client]:
    async with httpx.AsyncClient(timeout=10) as http:
        made = Client(pool.url, http)
        await made.login()
        yield made
