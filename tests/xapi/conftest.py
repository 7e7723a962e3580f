"""A host of our own writing, small enough to be wrong in any way that a test wants."""

from __future__ import annotations

import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import trio

from proxy.simulator import Gate, SimulatedPool, serve
from proxy.simulator.pool import PASSWORD
from proxy.xapi import Xapi, XapiOptions, connect

SESSION = "OpaqueRef:session-1-secret"
POOL = "OpaqueRef:pool"
TASK = "OpaqueRef:task"

Stream = trio.abc.Stream


class Failure(Exception):
    """An error that a call of the fake host answers."""

    def __init__(self, *description: str) -> None:
        super().__init__(*description)
        self.description = description


@dataclass
class Request:
    method: str
    target: str
    headers: dict[str, str]
    stream: Stream
    early: bytes

    @property
    def query(self) -> dict[str, str]:
        return {k: v[0] for k, v in parse_qs(urlsplit(self.target).query).items()}


@dataclass
class FakeHost:
    """Answers calls from ``results`` (a value, or a function of the arguments).

    ``calls`` lists what arrived, without the session.  ``transfer`` handles GET and PUT.
    """

    results: dict[str, Any] = field(default_factory=dict)
    calls: list[tuple[str, list[Any]]] = field(default_factory=list)
    transfer: Callable[[Request], Awaitable[None]] | None = None
    requests: list[Request] = field(default_factory=list)
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    port: int = 0
    sessions: set[str] = field(default_factory=set)
    logins: int = 0
    context: ssl.SSLContext | None = None
    changed: trio.Event = field(default_factory=trio.Event)
    content_type: str = "application/json"

    def methods(self) -> list[str]:
        return [method for method, _ in self.calls]

    def settle(self, status: str, result: str = "", error: tuple[str, ...] = ()) -> None:
        for task in self.tasks.values():
            if task["status"] == "pending":
                task.update(status=status, result=result, error_info=list(error))
        self.changed.set()
        self.changed = trio.Event()

    async def serve(self, stream: Stream) -> None:
        try:
            if self.context is not None:
                stream = trio.SSLStream(
                    stream, self.context, server_side=True, https_compatible=True
                )
            async with stream:
                buffer = b""
                while True:
                    while b"\r\n\r\n" not in buffer:
                        data = await stream.receive_some(65536)
                        if not data:
                            return
                        buffer += data
                    head, _, buffer = buffer.partition(b"\r\n\r\n")
                    first, *lines = head.decode().split("\r\n")
                    method, target, _ = first.split(" ")
                    headers = {
                        name.lower(): value
                        for name, _, value in (line.partition(": ") for line in lines)
                    }
                    if method != "POST":
                        request = Request(method, target, headers, stream, buffer)
                        self.requests.append(request)
                        assert self.transfer is not None
                        await self.transfer(request)
                        return
                    length = int(headers["content-length"])
                    while len(buffer) < length:
                        buffer += await stream.receive_some(65536)
                    body, buffer = buffer[:length], buffer[length:]
                    answer = json.dumps(await self.answer(json.loads(body))).encode()
                    await stream.send_all(
                        b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n%s"
                        % (self.content_type.encode(), len(answer), answer)
                    )
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass

    async def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        method, params = message["method"], message["params"]
        try:
            result = await self.call(method, params)
        except Failure as failure:
            code, *data = failure.description
            error = {"code": 1, "message": code, "data": data}
            return {"jsonrpc": "2.0", "id": 0, "error": error}
        return {"jsonrpc": "2.0", "id": 0, "result": result}

    async def call(self, method: str, params: list[Any]) -> Any:
        if method == "session.login_with_password":
            self.calls.append((method, params))
            if method in self.results:
                value = self.results[method]
                return await value(*params) if callable(value) else value
            self.logins += 1
            session = f"OpaqueRef:session-{self.logins}-secret"
            self.sessions.add(session)
            return session
        session, *args = params
        self.calls.append((method, args))
        if session not in self.sessions:
            raise Failure("SESSION_INVALID", session)
        if method in self.results:
            value = self.results[method]
            return await value(*args) if callable(value) else value
        return await self.default(method, args, session)

    async def default(  # noqa: PLR0911 - one answer a method
        self, method: str, args: list[Any], session: str
    ) -> Any:
        match method:
            case "session.logout":
                self.sessions.discard(session)
                return ""
            case "pool.get_all":
                return [POOL]
            case "task.create":
                return self.new_task()
            case "task.get_record" if args[0] in self.tasks:
                return self.tasks[args[0]]
            case "task.destroy" if args[0] in self.tasks:
                del self.tasks[args[0]]
                return ""
            case "task.cancel" | "task.set_status":
                self.tasks[args[0]]["status"] = "cancelled"
                self.changed.set()
                self.changed = trio.Event()
                return ""
            case "event.from":
                return await self.events(*args)
            case _:
                raise Failure("HANDLE_INVALID", method.partition(".")[0], str(args[:1]))

    def new_task(self) -> str:
        ref = f"{TASK}-{len(self.calls)}"
        self.tasks[ref] = {"status": "pending", "result": "", "error_info": []}
        return ref

    async def events(self, subscriptions: list[str], token: str, seconds: float) -> Any:
        cls, _, ref = subscriptions[0].partition("/")
        if token:
            with trio.move_on_after(seconds):
                await self.changed.wait()
        record = self.tasks.get(ref)
        events = [{"class": cls, "operation": "mod", "ref": ref, "snapshot": record}]
        return {"token": "1,1", "events": events if record else []}


@asynccontextmanager
async def running(host: FakeHost) -> AsyncIterator[FakeHost]:
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        host.port = listeners[0].socket.getsockname()[1]
        nursery.start_soon(trio.serve_listeners, host.serve, listeners)
        yield host
        nursery.cancel_scope.cancel()


@pytest.fixture
async def host() -> AsyncIterator[FakeHost]:
    async with running(FakeHost()) as host:
        yield host


@pytest.fixture
async def pool(nursery: trio.Nursery) -> SimulatedPool:
    """A simulated pool on the network: one running VM with two disks of 4 MiB."""
    pool = SimulatedPool.small(disks_per_vm=2)
    await nursery.start(partial(serve, pool))
    return pool


@pytest.fixture
async def xapi(pool: SimulatedPool) -> AsyncIterator[Xapi]:
    async with connect(XapiOptions(pool.url, "root", PASSWORD)) as xapi:
        yield xapi


async def cancel_at(gate: Gate, function: Callable[[], Awaitable[object]]) -> None:
    """Run ``function``, cancel it when somebody stands at ``gate``; it must end soon."""
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(function)
            await gate.reached()
            nursery.cancel_scope.cancel()


async def clean(pool: SimulatedPool) -> None:
    """The pool has no leftovers, at the latest a moment from now."""
    with trio.move_on_after(2):
        while pool.leftovers():
            await trio.sleep(0.01)
    assert pool.leftovers() == {}


@pytest.fixture
def options(host: FakeHost) -> XapiOptions:
    return XapiOptions(f"http://127.0.0.1:{host.port}", "root", "the-password")
