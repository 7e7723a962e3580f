"""A server that answers what a test tells it to: for what azurite cannot be made to do."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, unquote, urlsplit

import h11
import trio

from proxy.remotes.objects.azure import AzureStore
from proxy.remotes.objects.azure_client import AzureClient
from proxy.remotes.url import AzureUrl, parse_url
from tests.azurite import ACCOUNT, KEY

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@dataclass
class Request:
    method: str
    key: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes


@dataclass
class Answer:
    """``torn``: the connection ends after so many bytes of the body."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    torn: int | None = None


Answering = Callable[[Request], Awaitable[Answer | None]]
"""``None`` closes the connection without an answer."""


def refusal(status: int, code: str, message: str = "No.") -> Answer:
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
    return Answer(status, body.encode(), {"x-ms-error-code": code, "x-ms-request-id": "r-1"})


class Script:
    """Answers one after the other; what was asked stands in ``log``."""

    def __init__(self, *answers: Answer | None) -> None:
        self.log: list[Request] = []
        self._answers = list(answers)

    async def __call__(self, request: Request) -> Answer | None:
        self.log.append(request)
        await trio.lowlevel.checkpoint()
        assert self._answers, f"nobody expected {request.method} {request.key} {request.query}"
        return self._answers.pop(0)


@contextlib.asynccontextmanager
async def serving(answering: Answering, tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """The port of a service that is ``answering``."""
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")

        async def serve(socket: trio.SocketStream) -> None:
            stream: trio.abc.Stream = socket
            if tls is not None:
                stream = trio.SSLStream(socket, tls, server_side=True)
            with contextlib.suppress(trio.BrokenResourceError):
                async with stream:
                    await _serve(stream, answering)

        nursery.start_soon(trio.serve_listeners, serve, listeners)
        try:
            yield listeners[0].socket.getsockname()[1]
        finally:
            nursery.cancel_scope.cancel()


@contextlib.asynccontextmanager
async def talking_to(answering: Answering) -> AsyncIterator[AzureStore]:
    """A store whose service is ``answering``."""
    async with serving(answering) as port:
        store = AzureStore(AzureClient.of(url_of(port), seconds=5))
        try:
            yield store
        finally:
            await store.aclose()


def url_of(port: int) -> AzureUrl:
    key = KEY.replace("/", "%2F").replace("+", "%2B").replace("=", "%3D")
    parsed = parse_url(f"azurite+http://{ACCOUNT}:{key}@127.0.0.1:{port}/cont/dir")
    assert isinstance(parsed, AzureUrl)
    return parsed


async def _serve(stream: trio.abc.Stream, answering: Answering) -> None:
    while True:
        connection = h11.Connection(h11.SERVER)
        request: h11.Request | None = None
        body = b""
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                data = await stream.receive_some(65536)
                if not data and request is None:
                    return
                connection.receive_data(bytes(data))
            elif isinstance(event, h11.Request):
                request = event
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            else:
                break
        assert request is not None
        answer = await answering(_request(request, body))
        if answer is None:
            return
        headers = {"Content-Length": str(len(answer.body)), **answer.headers}
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        sent = b"" if request.method == b"HEAD" else answer.body[: answer.torn]
        await stream.send_all(f"HTTP/1.1 {answer.status} X\r\n{head}\r\n".encode() + sent)
        if answer.torn is not None:
            return


def _request(request: h11.Request, body: bytes) -> Request:
    parts = urlsplit(request.target.decode())
    return Request(
        request.method.decode(),
        unquote(parts.path.removeprefix(f"/{ACCOUNT}/cont").removeprefix("/")),
        dict(parse_qsl(parts.query, keep_blank_values=True)),
        {name.decode().lower(): value.decode() for name, value in request.headers},
        body,
    )
