"""Bulk connections over real sockets."""

from __future__ import annotations

import socket
import ssl
import struct
import threading
import time
from pathlib import Path

import pytest
import trio
import trio.lowlevel

from proxy.errors import Unreachable
from proxy.runtime import transport
from proxy.runtime.pinning import pinned_context
from proxy.runtime.transport import Connection, connect
from tests.certificates import Identity, make, write


async def test_a_reset_behind_the_last_bytes_is_no_clean_end() -> None:
    """A socket tells an error once: met behind delivered bytes, it must not be forgotten."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
    ours.setblocking(False)
    connection = Connection(ours, "peer")
    theirs.sendall(b"x" * 100_000)
    received = 0
    memory = memoryview(bytearray(1 << 20))
    async with trio.open_nursery() as nursery:

        async def reset() -> None:
            await trio.sleep(0.005)  # while the thread waits for more bytes
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            theirs.close()

        nursery.start_soon(reset)
        with pytest.raises(Unreachable) as caught:  # noqa: PT012  at which read, the kernel says
            while count := await connection.receive_into(memory):
                received += count
    assert caught.value.code == "ECONNRESET"
    assert received <= 100_000
    connection.abort()


async def pair() -> tuple[Connection, trio.SocketStream]:
    """A connection of ours, and the other end."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]
    ours = await connect("127.0.0.1", port, context=None, proxy=None, seconds=5)
    theirs = await listeners[0].accept()
    await listeners[0].aclose()
    return ours, theirs


async def test_exactly_so_many_bytes_and_no_more(nursery: trio.Nursery) -> None:
    """Behind ``STARTTLS`` the next byte belongs to TLS."""
    ours, theirs = await pair()
    await theirs.send_all(b"ab")
    nursery.start_soon(theirs.send_all, b"cdefg")
    assert await ours.receive_exactly(4) == b"abcd"
    assert await ours.receive_exactly(3) == b"efg"
    assert await ours.receive_ready(memoryview(bytearray(9))) is None
    await theirs.aclose()
    await ours.wait_readable()
    assert await ours.receive_ready(memoryview(bytearray(9))) == 0
    with pytest.raises(Unreachable) as caught:
        await ours.receive_exactly(1)
    assert caught.value.code == "ECONNRESET"
    ours.abort()


@pytest.fixture(scope="module")
def identity() -> Identity:
    return make("server")


@pytest.fixture
def server_context(identity: Identity, tmp_path: Path) -> ssl.SSLContext:
    write(identity, tmp_path, authority=identity)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server-cert.pem", tmp_path / "server-key.pem")
    return context


async def test_tls_begins_in_the_middle(
    nursery: trio.Nursery, identity: Identity, server_context: ssl.SSLContext
) -> None:
    ours, theirs = await pair()
    secure = trio.SSLStream(theirs, server_context, server_side=True)

    async def serve() -> None:
        assert await theirs.receive_some(5) == b"plain"
        await theirs.send_all(b"go")
        assert await secure.receive_some(100) == b"secret"
        await secure.send_all(b"answer")

    nursery.start_soon(serve)
    await ours.send_message(b"plain")
    assert await ours.receive_exactly(2) == b"go"
    await ours.start_tls(pinned_context())
    assert ours.certificate == identity.der
    await ours.send_message(b"secret")
    assert await ours.receive_exactly(6) == b"answer"
    ours.close(b"farewell")
    assert await secure.receive_some(100) == b"farewell"
    await trio.aclose_forcefully(secure)


async def test_tls_that_fails_closes_the_connection(nursery: trio.Nursery) -> None:
    ours, theirs = await pair()
    nursery.start_soon(theirs.send_all, b"this is no TLS at all\r\n")
    with pytest.raises(Unreachable) as caught:
        await ours.start_tls(pinned_context())
    assert caught.value.code == "EPROTO"
    assert "speaks no TLS" in caught.value.message
    assert ours.closed
    await theirs.aclose()


async def test_tls_that_is_cancelled_closes_the_connection(nursery: trio.Nursery) -> None:
    ours, theirs = await pair()
    nursery.start_soon(theirs.receive_some)  # the client's first message is taken
    with trio.move_on_after(0.01):
        await ours.start_tls(pinned_context())
    assert ours.closed
    await theirs.aclose()


async def test_reading_and_writing_at_once_over_tls(
    server_context: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One OpenSSL object, a thread that reads and a task that writes: they take turns."""
    inside = threading.Lock()
    collisions: list[str] = []

    def alone(name: str) -> None:
        function = getattr(transport, name)

        def call(*args: object) -> object:
            if not inside.acquire(blocking=False):
                collisions.append(name)
                return function(*args)
            try:
                time.sleep(0.001)  # long enough for the other to come, if it may
                return function(*args)
            finally:
                inside.release()

        monkeypatch.setattr(transport, name, call)

    ours, theirs = await pair()
    alone("_fill")
    alone("_drain")
    secure = trio.SSLStream(theirs, server_context, server_side=True)
    size, messages = 8 << 20, 200

    async def serve() -> None:
        await secure.do_handshake()
        async with trio.open_nursery() as both:
            both.start_soon(secure.send_all, bytes(range(256)) * (size // 256))
            left = messages * 28
            while left:
                left -= len(await secure.receive_some(65536))

    async def write_all() -> None:
        for _ in range(messages):
            await ours.send_message(bytes(28))
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as both:
        both.start_soon(serve)
        await ours.start_tls(pinned_context())
        both.start_soon(write_all)
        received = memoryview(bytearray(size))
        done = 0
        while done < size:
            moved = await ours.receive_ready(received[done:])
            if moved is None:
                await ours.wait_readable()
            else:
                assert moved
                done += moved
    assert bytes(received) == bytes(range(256)) * (size // 256)
    assert not collisions
    ours.abort()
    await trio.aclose_forcefully(secure)
