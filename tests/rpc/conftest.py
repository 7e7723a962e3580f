"""A real server on a loopback socket, and a client that sees every byte."""

from __future__ import annotations

import contextlib
import functools
import json
import ssl
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import h11
import msgspec
import pytest
import trio

from proxy.config import ApiConfig
from proxy.config.values import Bytes, Seconds
from proxy.jobs.traffic import Traffic
from proxy.rpc import Address, Registry, create_app, open_listeners, serve, tls_context
from proxy.rpc.methods import standard
from proxy.tasks import Tasks, open_tasks

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping
    from contextlib import AbstractAsyncContextManager

    from proxy.jobs import MetadataRestoreRequest, SweepRequest, VerifyRequest, VerifyRun
    from proxy.jobs.requests import BackupRequest, RestoreRequest
    from proxy.remotes.interface import Remote
    from proxy.rpc.app import App
    from proxy.tasks import Task

TOKEN = "a-token"
FIXTURES = Path(__file__).parent.parent / "fixtures" / "rpc"


class Tokens:
    def __init__(self, token: str = TOKEN) -> None:
        self.token = token
        self.failure: Exception | None = None

    def current(self) -> str:
        return self.token

    async def rotate(self, new: str) -> None:
        await trio.lowlevel.checkpoint()
        if self.failure is not None:
            raise self.failure
        self.token = new


class StubServices:
    def __init__(self, nursery: trio.Nursery, tasks: Tasks, datadir: Path) -> None:
        self.nursery = nursery
        self.tasks = tasks
        self.datadir = datadir
        self.traffic = Traffic()
        self.open_remote: (
            Callable[[Mapping[str, Any]], AbstractAsyncContextManager[Remote]] | None
        ) = None

    def start_backup(self, request: BackupRequest, /) -> Task:
        raise AssertionError(request)

    async def start_restore(self, request: RestoreRequest, /) -> Task:
        raise AssertionError(request)

    async def start_metadata_restore(self, request: MetadataRestoreRequest, /) -> Task:
        raise AssertionError(request)

    async def start_verify(self, request: VerifyRequest, /) -> VerifyRun:
        raise AssertionError(request)

    def start_sweep(self, request: SweepRequest, /) -> Task:
        raise AssertionError(request)

    def running_jobs(self) -> list[str]:
        return []

    def open_connections(self) -> dict[str, int]:
        return {"remote": 2, "pool": 1}

    def remote(
        self, spec: Mapping[str, Any], /, *, create: bool = True
    ) -> AbstractAsyncContextManager[Remote]:
        del create
        assert self.open_remote is not None
        return self.open_remote(spec)


class Answer:
    def __init__(self, status: int, headers: dict[str, str], body: bytes, *, whole: bool) -> None:
        self.status = status
        self.headers = headers
        self.body = body
        self.whole = whole
        """It ended as HTTP says it must; ``False`` when the connection broke off."""

    def json(self) -> Any:
        return json.loads(self.body)

    def lines(self) -> list[Any]:
        """As XO's client reads: an empty line or blanks at the end are errors."""
        text = self.body.decode()
        parts = text.split("\n")
        if parts[-1] == "":
            parts.pop()
        return [json.loads(part) for part in parts]


class Client:
    """One connection."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self._h11 = h11.Connection(h11.CLIENT)

    async def call(
        self, method: str, params: object = None, *, token: str = TOKEN, identifier: object = 0
    ) -> Answer:
        message = {"id": identifier, "jsonrpc": "2.0", "method": method, "params": params or {}}
        return await self.post(json.dumps(message).encode(), token=token)

    async def post(
        self,
        body: bytes,
        *,
        token: str | None = TOKEN,
        verb: str = "POST",
        path: str = "/api/v1",
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        await self.send(body, token=token, verb=verb, path=path, headers=headers)
        return await self.receive()

    async def send(
        self,
        body: bytes,
        *,
        token: str | None = TOKEN,
        verb: str = "POST",
        path: str = "/api/v1",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        lines = {"Host": "proxy", "Content-Length": str(len(body)), **(headers or {})}
        if token is not None:
            lines["Cookie"] = f"authenticationToken={token}"
        request = h11.Request(method=verb, target=path, headers=list(lines.items()))
        data = self._h11.send(request) or b""
        data += (self._h11.send(h11.Data(data=body)) or b"") if body else b""
        data += self._h11.send(h11.EndOfMessage()) or b""
        await self.stream.send_all(data)

    async def receive(self) -> Answer:
        """The whole answer to the last request."""
        status, headers = await self.head()
        body = b""
        whole = True
        try:
            while (part := await self.part()) is not None:
                body += part
        except (h11.RemoteProtocolError, trio.BrokenResourceError):
            whole = False
        if whole and self._h11.their_state is h11.DONE:
            self._h11.start_next_cycle()
        return Answer(status, headers, body, whole=whole)

    async def head(self) -> tuple[int, dict[str, str]]:
        event = await self._event()
        assert isinstance(event, h11.Response)
        return event.status_code, {k.decode().lower(): v.decode() for k, v in event.headers}

    async def part(self) -> bytes | None:
        """The next piece of the body; ``None`` at its end."""
        event = await self._event()
        if isinstance(event, h11.Data):
            return bytes(event.data)
        assert isinstance(event, h11.EndOfMessage)
        return None

    async def _event(self) -> object:
        while True:
            event = self._h11.next_event()
            if event is not h11.NEED_DATA:
                return event
            self._h11.receive_data(bytes(await self.stream.receive_some(65536)))


class Server:
    """The API on a free port of the loopback."""

    def __init__(self, app: App, services: StubServices, tokens: Tokens) -> None:
        self.app = app
        self.services = services
        self.tokens = tokens
        self.port = 0
        self.stopping = trio.Event()
        self.now = trio.Event()
        self.stopped = trio.Event()
        self.tls: ssl.SSLContext | None = None

    async def raw(self) -> trio.SocketStream:
        return await trio.open_tcp_stream("127.0.0.1", self.port)

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        stream = await self.raw()
        async with stream:
            yield Client(stream)

    async def call(self, method: str, params: object = None, **more: Any) -> Answer:
        async with self.client() as client:
            return await client.call(method, params, **more)


def quick(**changes: float) -> ApiConfig:
    """The vendor's settings with some changed: seconds, or bytes for sizes."""
    typed = {
        name: Bytes(value) if "size" in name else value if "max_c" in name else Seconds(value)
        for name, value in changes.items()
    }
    return msgspec.structs.replace(ApiConfig(), **typed)


@contextlib.asynccontextmanager
async def running(
    tmp_path: Path,
    *more: Registry,
    settings: ApiConfig | None = None,
    grace: float = 5,
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[Server]:
    config = settings or ApiConfig()
    with trio.fail_after(20):
        async with (
            trio.open_nursery() as nursery,
            open_tasks(str(tmp_path / "journal.sqlite"), nursery) as tasks,
        ):
            services = StubServices(nursery, tasks, tmp_path)
            tokens = Tokens()
            app = create_app(services, standard(*more), tokens, lambda: config)
            server = Server(app, services, tokens)
            listeners = open_listeners(Address(0, "127.0.0.1"), tls)
            plain = listeners[0]
            if isinstance(plain, trio.SSLListener):
                plain = cast("trio.SocketListener", plain.transport_listener)
            server.port = plain.socket.getsockname()[1]

            async def run(task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
                await serve(
                    app,
                    listeners,
                    settings=lambda: config,
                    stopping=server.stopping,
                    now=server.now,
                    grace=grace,
                    task_status=task_status,
                )
                server.stopped.set()

            await nursery.start(run)
            yield server
            server.stopping.set()
            server.now.set()
            await server.stopped.wait()
            nursery.cancel_scope.cancel()


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    async with running(tmp_path) as started:
        yield started


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., AbstractAsyncContextManager[Server]]:
    return functools.partial(running, tmp_path)


@pytest.fixture
def settings() -> Callable[..., ApiConfig]:
    return quick


@pytest.fixture(scope="session")
def recorded_calls() -> list[dict[str, Any]]:
    return cast("list[dict[str, Any]]", json.loads((FIXTURES / "calls.json").read_text()))


@pytest.fixture(scope="session")
def recorded_http() -> list[dict[str, Any]]:
    return cast("list[dict[str, Any]]", json.loads((FIXTURES / "http-cases.json").read_text()))


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate made by OpenSSL, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-days", "2", "-subj", "/CN=localhost"),
            *("-keyout", folder / "key.pem", "-out", folder / "cert.pem"),
        ],
        check=True,
        capture_output=True,
    )
    return folder / "cert.pem", folder / "key.pem"


@pytest.fixture
def tls_pair(certificate: tuple[Path, Path]) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """The server's context, and one of a client that like XO trusts everybody."""
    theirs = ssl.create_default_context()
    theirs.check_hostname = False
    theirs.verify_mode = ssl.CERT_NONE
    return tls_context(*certificate), theirs
