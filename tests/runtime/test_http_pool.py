from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from proxy.errors import Unreachable
from proxy.runtime.http_pool import HttpPool
from proxy.runtime.transport import client_context
from tests import certificates

MIB = 1024 * 1024


class Server:
    """Answers each request with what ``answer`` makes of its head and the length of its body."""

    def __init__(self, answer: Callable[[bytes, int], bytes], context: Any = None) -> None:
        self.answer = answer
        self.context = context
        self.connections = 0
        self.port = 0

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.port = listeners[0].socket.getsockname()[1]
        task_status.started()
        await trio.serve_listeners(self._talk, listeners)

    async def _talk(self, plain: trio.SocketStream) -> None:
        self.connections += 1
        stream: Any = plain
        try:
            if self.context is not None:
                stream = trio.SSLStream(
                    plain, self.context, server_side=True, https_compatible=True
                )
            async with stream:
                received = bytearray()
                while True:
                    while b"\r\n\r\n" not in received:
                        more = await stream.receive_some()
                        if not more:
                            return
                        received += more
                    head, _, rest = bytes(received).partition(b"\r\n\r\n")
                    length = 0
                    for line in head.lower().split(b"\r\n"):
                        if line.startswith(b"content-length:"):
                            length = int(line.partition(b":")[2])
                    while len(rest) < length:
                        rest += await stream.receive_some()
                    received = bytearray(rest[length:])
                    answer = self.answer(head, length)
                    await stream.send_all(answer)
                    if b"close" in answer:
                        return
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass


@asynccontextmanager
async def pool_on(
    answer: Callable[[bytes, int], bytes] | None = None,
    context: ssl.SSLContext | None = None,
    server_context: ssl.SSLContext | None = None,
    **options: Any,
) -> AsyncIterator[tuple[HttpPool, Server]]:
    server = Server(answer or (lambda _, length: ok(b"%d" % length)), server_context)
    failure: BaseException | None = None
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve)
        pool = HttpPool("127.0.0.1", server.port, context=context, **options)
        try:
            yield pool, server
        except BaseException as error:  # noqa: BLE001 (raised below, out of the group)
            failure = error
        pool.close()
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


def ok(body: bytes, *headers: str) -> bytes:
    head = ["HTTP/1.1 200 OK", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(head).encode() + body


async def ask(pool: HttpPool, method: str = "GET", body: bytes = b"") -> bytes | None:
    async with pool.request(method, "/x", [("X-A", "b")], body) as exchange:
        assert exchange.status == 200
        return await exchange.read_all(1000)


async def test_a_connection_is_used_again_when_its_answer_was_read() -> None:
    async with pool_on() as (pool, server):
        for size in (0, 10, 70_000, 3 * MIB):
            assert await ask(pool, "PUT", bytes(size)) == b"%d" % size
        assert server.connections == 1


@pytest.mark.parametrize(
    "answer",
    [
        ok(b"x", "Connection: close"),
        ok(b"x") + b"surplus",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\nmore",
        b"HTTP/1.1 204 No\r\n\r\nbody of nothing",
    ],
)
async def test_it_is_not_when_anything_else_came(answer: bytes) -> None:
    async with pool_on(lambda *_: answer) as (pool, server):
        for _ in range(2):
            async with pool.request("GET", "/x") as exchange:
                await exchange.read_all(1000)
        assert server.connections == 2


async def test_chunks_are_put_together_and_the_connection_kept() -> None:
    answer = (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
    )
    async with pool_on(lambda *_: answer) as (pool, server):
        assert await ask(pool) == b"abcde"
        assert await ask(pool) == b"abcde"
        assert server.connections == 1


async def test_an_answer_that_is_left_in_the_middle_closes_it() -> None:
    async with pool_on(lambda *_: ok(bytes(500_000))) as (pool, server):
        for _ in range(2):
            async with pool.request("GET", "/x") as exchange:
                assert await exchange.read_all(1000) is None
        assert server.connections == 2


async def test_a_server_that_closed_an_idle_connection_is_met_by_a_new_one() -> None:
    async with pool_on(lambda *_: ok(b"x")) as (pool, server):
        await ask(pool)
        server.answer = lambda *_: ok(b"x", "X-Then: close")
        await ask(pool)  # and it closes, without having said so
        await trio.sleep(0.05)
        await ask(pool)
        assert server.connections == 2


async def test_a_cut_answer_is_unreachable() -> None:
    cut = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\nX-Then: close\r\n\r\nhalf"
    async with pool_on(lambda *_: cut) as (pool, _):
        with pytest.raises(Unreachable) as caught:
            await ask(pool)
        assert caught.value.code == "ECONNRESET"


async def test_silence_is_bounded() -> None:
    async with pool_on(lambda *_: b"", seconds=0.05) as (pool, _):
        with pytest.raises(Unreachable) as caught:
            await ask(pool)
        assert caught.value.code == "ETIMEDOUT"


async def test_a_cancel_closes_the_connection() -> None:
    async with pool_on(lambda *_: b"") as (pool, server):
        with trio.move_on_after(0.05):
            await ask(pool)
        server.answer = lambda *_: ok(b"x")
        assert await ask(pool) == b"x"
        assert server.connections == 2


async def test_a_body_that_is_too_long_is_not_read() -> None:
    endless = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + bytes(200_000)
    async with pool_on(lambda *_: endless) as (pool, _):
        assert await ask(pool) is None


def server_context(folder: Path) -> ssl.SSLContext:
    identity = certificates.make("store")
    file = folder / "store.pem"
    file.write_bytes(identity.pem.encode() + identity.key_pem)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(file)
    return context


async def test_tls_with_a_certificate_of_its_own(tmp_path: Path) -> None:
    there = server_context(tmp_path)
    trusting = client_context(allow_unauthorized=True)
    async with pool_on(context=trusting, server_context=there) as (pool, server):
        for size in (10, 3 * MIB, 3 * MIB):
            assert await ask(pool, "PUT", bytes(size)) == b"%d" % size
        assert server.connections == 1
    checking = client_context(allow_unauthorized=False)
    async with pool_on(context=checking, server_context=there) as (pool, _):
        with pytest.raises(Unreachable) as caught:
            await ask(pool)
        assert caught.value.code == "DEPTH_ZERO_SELF_SIGNED_CERT"


@pytest.mark.parametrize(
    ("host", "port", "tls", "header"),
    [
        ("h", 443, True, "h"),
        ("h", 443, False, "h:443"),
        ("h", 80, False, "h"),
        ("h", 9000, True, "h:9000"),
        ("::1", 80, False, "[::1]"),
        ("::1", 9000, False, "[::1]:9000"),
    ],
)
def test_the_host_header_is_as_it_is_signed(
    host: str, port: int, header: str, *, tls: bool
) -> None:
    context = client_context(allow_unauthorized=True) if tls else None
    assert HttpPool(host, port, context=context).host_header == header
