"""No client can hold the daemon: each way to try it, over real sockets."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import ssl
import tracemalloc
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.lowlevel

from proxy.errors import Conflict
from proxy.rpc import Address, Binary, Context, Registry, open_listeners
from proxy.rpc.methods.system import Nothing
from proxy.rpc.serving import allow_descriptors

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from tests.rpc.conftest import Server

    Start = Callable[..., AbstractAsyncContextManager[Server]]

VERSION_CALL = b'{"id":0,"jsonrpc":"2.0","method":"system.getServerVersion"}'
HEAD = b"POST /api/v1 HTTP/1.1\r\nHost: p\r\nCookie: authenticationToken=a-token\r\n"

streams = Registry()


@streams.method("stream.flood", Nothing)
async def flood(_context: Context, _: Nothing) -> AsyncIterator[bytes]:
    async def records() -> AsyncIterator[bytes]:
        while True:
            yield b'"' + b"x" * 60_000 + b'"'

    return records()


@streams.method("stream.bytes", Nothing)
async def some_bytes(_context: Context, _: Nothing) -> Binary:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(8):
            await trio.lowlevel.checkpoint()
            yield b"z" * 300_000

    return Binary(chunks())


@streams.method("stream.wait", Nothing)
async def wait(_context: Context, _: Nothing) -> bool:
    await trio.sleep(0.6)
    return True


def version_request() -> bytes:
    return HEAD + b"Content-Length: %d\r\n\r\n" % len(VERSION_CALL) + VERSION_CALL


async def ended(stream: trio.abc.ReceiveStream, within: float = 3) -> bytes:
    """Read until the server closes or resets; what came before."""
    got = b""
    with trio.fail_after(within):
        try:
            while data := await stream.receive_some(65536):
                got += data
        except trio.BrokenResourceError:
            pass
    return got


async def test_a_client_that_sends_its_headers_slowly_is_dropped(
    start: Start, settings: Any
) -> None:
    async with start(settings=settings(header_timeout=0.2)) as server:
        stream = await server.raw()
        async with stream:
            await stream.send_all(b"POST /api/v1 HT")
            with trio.fail_after(3):
                with pytest.raises(trio.BrokenResourceError):  # noqa: PT012
                    while True:
                        await trio.sleep(0.05)
                        await stream.send_all(b"T")


async def test_a_request_that_stops_half_way_is_dropped(start: Start, settings: Any) -> None:
    async with start(settings=settings(header_timeout=0.2)) as server:
        stream = await server.raw()
        async with stream:
            await stream.send_all(HEAD)
            assert await ended(stream) == b""


async def test_a_body_that_stalls_is_dropped(start: Start, settings: Any) -> None:
    async with start(settings=settings(body_timeout=0.2)) as server:
        stream = await server.raw()
        async with stream:
            await stream.send_all(HEAD + b"Content-Length: 100\r\n\r\n{")
            assert await ended(stream) == b""
        assert (await server.call("system.getServerVersion")).status == 200


async def test_a_slow_body_that_moves_is_read(start: Start, settings: Any) -> None:
    async with start(settings=settings(body_timeout=0.4)) as server:
        stream = await server.raw()
        async with stream:
            await stream.send_all(HEAD + b"Content-Length: %d\r\n\r\n" % len(VERSION_CALL))
            for index in range(len(VERSION_CALL)):
                if index % 6 == 0:
                    await trio.sleep(0.08)
                await stream.send_all(VERSION_CALL[index : index + 1])
            assert b'"result"' in await stream.receive_some(4096)


async def test_a_body_beyond_the_limit_is_refused_unread(start: Start, settings: Any) -> None:
    async with start(settings=settings(max_body_size=1000)) as server:
        stream = await server.raw()
        async with stream:
            await stream.send_all(HEAD + b"Content-Length: 1001\r\n\r\n{")
            assert (await ended(stream)).startswith(b"HTTP/1.1 413")


async def test_a_chunked_body_beyond_the_limit_is_refused(start: Start, settings: Any) -> None:
    async with start(settings=settings(max_body_size=1000)) as server:
        stream = await server.raw()
        async with stream:
            await stream.send_all(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
            await stream.send_all(b"400\r\n" + b" " * 1024 + b"\r\n400\r\n" + b" " * 1024 + b"\r\n")
            assert (await ended(stream)).startswith(b"HTTP/1.1 413")


async def test_large_bodies_together_are_bounded(start: Start, settings: Any) -> None:
    """Promise I9: many clients at once cost no more than two of the largest bodies."""
    async with start(settings=settings(max_body_size=1000)) as server:
        pieces = b"384\r\n" + b" " * 900 + b"\r\n1\r\n \r\n"
        async with contextlib.AsyncExitStack() as open_ones:
            answers = []
            for _ in range(3):
                stream = await open_ones.enter_async_context(await server.raw())
                await stream.send_all(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + pieces)
                answers.append(stream)
            assert (await ended(answers[-1])).startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
            for stream in answers[:2]:
                await stream.send_all(b"0\r\n\r\n")
                assert b"invalid JSON" in await stream.receive_some(4096)
        assert (await server.call("system.getServerVersion")).status == 200


async def test_the_body_is_let_go_before_the_call_ends(start: Start) -> None:
    """A run's stream lasts for hours, and XO sends its whole configuration with some."""
    held: list[int] = []
    methods = Registry()

    @methods.method("test.hold", Nothing)
    async def hold(_context: Context, _: Nothing) -> None:  # pyright: ignore[reportUnusedFunction]
        await trio.lowlevel.checkpoint()
        held.append(tracemalloc.get_traced_memory()[0])

    call = b'{"id":0,"jsonrpc":"2.0","method":"test.hold"}'
    size = 4_000_000
    request = HEAD + b"Content-Length: %d\r\n\r\n" % size + call.rjust(size)
    async with start(methods) as server:
        stream = await server.raw()
        async with stream:
            tracemalloc.start()
            try:
                await stream.send_all(request)
                assert b'"result":true' in await stream.receive_some(4096)
            finally:
                tracemalloc.stop()
    assert held[0] < size / 2


@pytest.mark.parametrize(
    ("request_line", "status_line"),
    [
        (b"POST /api/v1 HTTP/1.1", b"HTTP/1.1 401 Unauthorized"),
        (b"GET /api/v1 HTTP/1.1", b"HTTP/1.1 405 Method Not Allowed"),
        (b"GET / HTTP/1.1", b"HTTP/1.1 404 Not Found"),
        (b"nonsense", b"HTTP/1.1 400 Bad Request"),
    ],
)
async def test_a_status_has_its_phrase(
    server: Server, request_line: bytes, status_line: bytes
) -> None:
    """It is all that XO shows of an answer that is not 200."""
    stream = await server.raw()
    async with stream:
        await stream.send_all(request_line + b"\r\nHost: proxy\r\nContent-Length: 0\r\n\r\n")
        assert (await stream.receive_some(4096)).startswith(status_line + b"\r\n")


async def test_401_comes_before_the_body_is_read(start: Start, settings: Any) -> None:
    async with start(settings=settings()) as server:
        stream = await server.raw()
        async with stream:
            await stream.send_all(
                b"POST /api/v1 HTTP/1.1\r\nHost: p\r\nContent-Length: 1000000000\r\n\r\n"
            )
            answer = await ended(stream)
    assert answer.startswith(b"HTTP/1.1 401")
    assert answer.endswith(b"\r\n\r\nUnauthorized")


async def test_headers_beyond_any_need_are_refused(server: Server) -> None:
    stream = await server.raw()
    async with stream:
        await stream.send_all(b"POST /api/v1 HTTP/1.1\r\nHost: p\r\nX: " + b"x" * 70_000)
        assert (await ended(stream)).startswith(b"HTTP/1.1 431")


async def test_an_idle_connection_is_closed(start: Start, settings: Any) -> None:
    async with start(settings=settings(idle_timeout=0.2)) as server:
        stream = await server.raw()
        async with stream:
            await stream.send_all(version_request())
            assert (await ended(stream)).startswith(b"HTTP/1.1 200")


async def test_a_reader_that_stalls_is_cut_off(start: Start, settings: Any) -> None:
    async with start(streams, settings=settings(send_timeout=0.3)) as server:
        async with server.client() as client:
            await client.send(b'{"id":0,"method":"stream.flood"}')
            with trio.fail_after(5):
                await trio.sleep(0.1)
                while connections(server):
                    await trio.sleep(0.05)


async def test_a_reader_that_stalls_does_not_delay_the_stop(start: Start) -> None:
    """Hypercorn sends inside a shield; one stalled reader kept the daemon from stopping."""
    async with start(streams, grace=0.1) as server:
        async with server.client() as client:
            await client.send(b'{"id":0,"method":"stream.flood"}')
            await trio.sleep(0.2)
            server.stopping.set()
            with trio.fail_after(2):
                await server.stopped.wait()


async def test_a_reader_that_stalls_costs_less_than_a_mebibyte(start: Start) -> None:
    async with start(streams, grace=0.1) as server:
        clients = [await narrow(server) for _ in range(10)]
        for stream in clients:
            body = b'{"id":0,"method":"stream.flood"}'
            await stream.send_all(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        await trio.sleep(0.2)
        before = resident()
        await trio.sleep(0.2)
        assert resident() - before < len(clients) * 2**20
        for stream in clients:
            await stream.aclose()


async def narrow(server: Server) -> trio.SocketStream:
    """A connection that the kernel buffers little for."""
    sock = trio.socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    await sock.connect(("127.0.0.1", server.port))
    return trio.SocketStream(sock)


def resident() -> int:
    with open("/proc/self/statm") as statm:  # noqa: PTH123
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def connections(server: Server) -> int:
    """Connections of this process to the server that the server's side still has."""
    count = 0
    with open("/proc/net/tcp") as table:  # noqa: PTH123
        for line in list(table)[1:]:
            fields = line.split()
            if fields[1].endswith(f":{server.port:04X}") and fields[3] == "01":
                count += 1
    return count


@pytest.mark.parametrize(
    "preface",
    [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00",
        b"POST /api/v1 HTTP/3.0\r\nHost: p\r\n\r\n",
    ],
)
async def test_http_2_is_refused(preface: bytes, server: Server) -> None:
    """Hypercorn's HTTP/2 buffers without a bound while a client's window is closed."""
    stream = await server.raw()
    async with stream:
        await stream.send_all(preface)
        assert (await ended(stream)).startswith(b"HTTP/1.1 505")


async def test_an_upgrade_to_http_2_is_ignored(server: Server) -> None:
    stream = await server.raw()
    async with stream:
        await stream.send_all(
            b"GET /api/v1 HTTP/1.1\r\nHost: p\r\nConnection: Upgrade, HTTP2-Settings\r\n"
            b"Upgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n"
        )
        assert (await stream.receive_some(4096)).startswith(b"HTTP/1.1 405")


async def test_a_websocket_is_not_opened(server: Server) -> None:
    stream = await server.raw()
    async with stream:
        await stream.send_all(
            b"GET /api/v1 HTTP/1.1\r\nHost: p\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        assert (await stream.receive_some(4096)).startswith(b"HTTP/1.1 405")


async def test_noise_is_refused(server: Server) -> None:
    stream = await server.raw()
    async with stream:
        await stream.send_all(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n")
        assert (await ended(stream)).startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize("path", ["/", "/api/v1/foo", "/api/v12", "/proxy/v1/x", "/%00"])
async def test_other_paths_are_answered_at_once(path: str, server: Server) -> None:
    """Weakness 12: upstream never answers them."""
    async with server.client() as client:
        with trio.fail_after(2):
            answer = await client.post(VERSION_CALL, path=path)
    assert answer.status == 404


@pytest.mark.parametrize(("verb", "status"), [("PUT", 405), ("DELETE", 405), ("PROPFIND", 501)])
async def test_other_verbs_are_refused(verb: str, status: int, server: Server) -> None:
    async with server.client() as client:
        answer = await client.post(b"", verb=verb)
    assert (answer.status, answer.headers["allow"]) == (status, "POST")


async def test_more_than_a_thousand_requests_on_one_connection(server: Server) -> None:
    """Hypercorn closes after 1,000."""
    stream = await server.raw()
    async with stream:
        await stream.send_all(version_request() * 1100)
        got = b""
        while got.count(b'"result"') < 1100:
            data = await stream.receive_some(65536)
            assert data
            got += data
    assert b"connection: close" not in got


async def test_a_thousand_idle_connections(start: Start, settings: Any) -> None:
    async with start(settings=settings(idle_timeout=60)) as server:
        streams = []
        async with trio.open_nursery() as nursery:

            async def connect() -> None:
                streams.append(await server.raw())

            for _ in range(1100):
                nursery.start_soon(connect)
        assert (await server.call("system.getServerVersion")).status == 200
        server.stopping.set()
        with trio.fail_after(3):
            await server.stopped.wait()
        for stream in streams:
            await stream.aclose()


async def test_connections_beyond_the_limit_are_closed(start: Start, settings: Any) -> None:
    async with start(settings=settings(max_connections=3)) as server:
        streams = [await server.raw() for _ in range(3)]
        await trio.sleep(0.05)
        async with await server.raw() as fourth:
            assert await ended(fourth) == b""
        await streams.pop().aclose()
        await trio.sleep(0.05)
        assert (await server.call("system.getServerVersion")).status == 200
        for stream in streams:
            await stream.aclose()


async def test_clients_leave_files_to_backups(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise I9: with the 1,024 open files of a shell, idle clients would take them all."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 1024), hard))
    try:
        assert allow_descriptors() == min(hard, 65_536)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    monkeypatch.setattr("proxy.rpc.serving.allow_descriptors", lambda: 4)
    async with start() as server:
        streams = [await server.raw() for _ in range(2)]
        await trio.sleep(0.05)
        async with await server.raw() as third:
            assert await ended(third) == b""
        for stream in streams:
            await stream.aclose()


async def test_an_answer_may_take_longer_than_every_deadline_of_the_client(
    start: Start, settings: Any
) -> None:
    """Hypercorn's ``read_timeout`` kills long polls, Quart's ``RESPONSE_TIMEOUT`` streams."""
    short = settings(header_timeout=0.2, body_timeout=0.2, idle_timeout=0.2, send_timeout=0.2)
    async with start(streams, settings=short) as server:
        server.app.config["RESPONSE_TIMEOUT"] = server.app.config["RESPONSE_TIMEOUT"]
        assert server.app.config["RESPONSE_TIMEOUT"] is None
        answer = await server.call("stream.wait")
    assert answer.json()["result"] is True


async def test_bytes_arrive_as_they_are(start: Start) -> None:
    async with start(streams) as server:
        answer = await server.call("stream.bytes")
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.body == b"z" * 2_400_000
    assert answer.whole


async def test_stop_lets_a_running_answer_end(start: Start) -> None:
    async with start(streams) as server:
        async with server.client() as client:
            await client.send(b'{"id":0,"method":"stream.wait"}')
            await trio.sleep(0.05)
            server.stopping.set()
            answer = await client.receive()
            assert answer.json()["result"] is True
            await server.stopped.wait()


async def test_stop_refuses_new_connections_and_ends_idle_ones(server: Server) -> None:
    async with server.client() as idle:
        await idle.call("system.getServerVersion")
        server.stopping.set()
        assert await ended(idle.stream, 1) == b""
        await server.stopped.wait()
        with pytest.raises(OSError, match="connect"):
            await server.raw()


async def test_a_second_signal_cuts_running_answers_off(start: Start) -> None:
    async with start(streams, grace=60) as server:
        async with server.client() as client:
            await client.send(b'{"id":0,"method":"stream.flood"}')
            await client.head()
            server.stopping.set()
            await trio.sleep(0.05)
            assert not server.stopped.is_set()
            server.now.set()
            with trio.fail_after(2):
                await server.stopped.wait()


async def test_tls_offers_http_1_only(
    start: Start, tls_pair: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    ours, theirs = tls_pair
    theirs.set_alpn_protocols(["h2", "http/1.1"])
    async with start(tls=ours) as server:
        stream = trio.SSLStream(
            await server.raw(), theirs, server_hostname="localhost", https_compatible=True
        )
        async with stream:
            await stream.do_handshake()
            assert stream.selected_alpn_protocol() == "http/1.1"
            await stream.send_all(version_request())
            assert b'"result"' in await stream.receive_some(4096)


async def test_a_tls_handshake_that_stalls_is_dropped(
    start: Start, settings: Any, tls_pair: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    async with start(tls=tls_pair[0], settings=settings(header_timeout=0.2)) as server:
        async with await server.raw() as stream:
            await stream.send_all(b"\x16\x03\x01")
            assert await ended(stream) == b""


async def test_old_tls_is_refused(
    start: Start, tls_pair: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    ours, theirs = tls_pair
    assert ours.minimum_version is ssl.TLSVersion.TLSv1_2
    async with start(tls=ours) as server:
        async with await server.raw() as stream:
            await stream.send_all(b"POST /api/v1 HTTP/1.1\r\nHost: p\r\n\r\n")
            # an alert, no answer in the clear
            assert b"HTTP" not in await ended(stream)
    assert theirs.check_hostname is False


async def test_listen_on_localhost_means_both_loopbacks() -> None:
    listeners = open_listeners(Address(0, "localhost"))
    names = [listener.socket.getsockname()[:2] for listener in listeners]  # type: ignore[union-attr]
    for listener in listeners:
        await listener.aclose()
    assert {name[0] for name in names} <= {"127.0.0.1", "::1"}
    assert names[0][0] == "127.0.0.1"
    assert len({name[1] for name in names}) == 1


async def test_listen_where_somebody_listens() -> None:
    (first,) = open_listeners(Address(0, "127.0.0.1"))
    port = first.socket.getsockname()[1]  # type: ignore[union-attr]
    with pytest.raises(Conflict, match="is another proxy running") as caught:
        open_listeners(Address(port, "127.0.0.1"))
    assert caught.value.code == "EADDRINUSE"
    await first.aclose()


async def test_listen_on_a_path_left_by_a_killed_process(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(path))
    left.close()
    (listener,) = open_listeners(Address(socket=path))
    with pytest.raises(Conflict):
        open_listeners(Address(socket=path))
    await listener.aclose()


async def test_accepted_connections_notice_a_vanished_host() -> None:
    (listener,) = open_listeners(Address(0, "127.0.0.1"))
    port = listener.socket.getsockname()[1]  # type: ignore[union-attr]
    async with await trio.open_tcp_stream("127.0.0.1", port):
        accepted = await listener.accept()
        assert isinstance(accepted, trio.SocketStream)
        assert accepted.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 60_000
        assert accepted.socket.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        await accepted.aclose()
    await listener.aclose()


async def test_an_answer_survives_when_the_rest_of_its_request_is_unread(server: Server) -> None:
    """Closing with unread bytes resets a connection, and the client loses the answer."""
    stream = await server.raw()
    async with stream:
        await stream.send_all(
            b"POST /api/v1 HTTP/1.1\r\nHost: p\r\nContent-Length: 500000\r\n\r\n" + b" " * 100_000
        )
        await trio.sleep(0.05)
        await stream.send_all(b" " * 100_000)
        assert (await ended(stream)).startswith(b"HTTP/1.1 401")
