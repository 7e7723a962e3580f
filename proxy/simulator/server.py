"""The pool on the network: listeners, connections, and which handler answers what."""

from __future__ import annotations

import errno
import socket
import ssl
from functools import partial
from typing import TYPE_CHECKING

import h11
import trio

from proxy.simulator.calls import Dropped, Peer
from proxy.simulator.certificate import server_context
from proxy.simulator.data import serve_data
from proxy.simulator.http import READ_SIZE, Gone, Head, Wire, error_page, head
from proxy.simulator.nbd import serve_nbd
from proxy.simulator.rpc import Malformed, answer_json, answer_xml

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from proxy.simulator.pool import SimulatedPool

_LARGEST_BODY = 64 * 1024 * 1024
_SEND_BUFFER = 4 * 1024 * 1024
_BACKLOG = 1024


async def serve(
    pool: SimulatedPool,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    tls: bool = False,
    slave_host: str | None = None,
    task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve ``pool`` until cancelled; reports its URL when it listens.

    With ``slave_host`` (another loopback address) the second host of the pool listens there
    on the same port: it refuses calls with ``HOST_IS_SLAVE`` and serves data.
    """
    pool.set_address(pool.master, host)
    listener = _listen(host, port)
    port = listener.getsockname()[1]
    listeners = [(listener, Peer(pool.master))]
    if slave_host is not None:
        listeners.append((_listen(slave_host, port), Peer(pool.slave, is_master=False)))
        pool.set_address(pool.slave, slave_host)
    context = server_context() if tls else None
    pool.url = f"{'https' if tls else 'http'}://{host}:{port}"
    async with pool.running(), trio.open_nursery() as nursery:
        for sock, peer in listeners:
            nursery.start_soon(_accept, sock, partial(_connected, pool, peer, context))
            disks = _listen(sock.getsockname()[0], 0)
            pool.nbd.ports[peer.host] = disks.getsockname()[1]
            nursery.start_soon(_accept, disks, partial(_connected_nbd, pool, peer))
        task_status.started(pool.url)


def _listen(host: str, port: int) -> trio.socket.SocketType:
    sock = socket.create_server((host, port), backlog=_BACKLOG)
    sock.setblocking(False)
    return trio.socket.from_stdlib_socket(sock)


async def _accept(
    listener: trio.socket.SocketType,
    connected: Callable[[trio.socket.SocketType], Awaitable[None]],
) -> None:
    with listener:
        async with trio.open_nursery() as nursery:
            while True:
                try:
                    sock, _ = await listener.accept()
                except OSError as error:
                    if error.errno in (errno.EMFILE, errno.ENFILE, errno.ECONNABORTED):
                        await trio.sleep(0.05)
                        continue
                    raise
                nursery.start_soon(connected, sock)


async def _connected(
    pool: SimulatedPool,
    peer: Peer,
    context: ssl.SSLContext | None,
    sock: trio.socket.SocketType,
) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
    raw = trio.SocketStream(sock)
    stream: trio.abc.Stream = raw
    if context is not None:
        stream = trio.SSLStream(_Eager(raw), context, server_side=True, https_compatible=True)
    await serve_connection(pool, stream, peer, raw=raw)


async def _connected_nbd(pool: SimulatedPool, peer: Peer, sock: trio.socket.SocketType) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
    await serve_nbd(pool, peer.host, trio.SocketStream(sock))


class _Eager(trio.abc.Stream):
    """Reads all that is there: TLS on top asks for 16 KiB at a time, which costs it its speed."""

    def __init__(self, raw: trio.SocketStream) -> None:
        self._raw = raw

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        return await self._raw.receive_some(READ_SIZE)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._raw.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._raw.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        await self._raw.aclose()


async def serve_connection(
    pool: SimulatedPool,
    stream: trio.abc.Stream,
    peer: Peer | None = None,
    *,
    raw: trio.SocketStream | None = None,
) -> None:
    """Serve one connection over any stream, also one in memory (``pool.running()`` around)."""
    wire = Wire(stream, raw)
    pool.connections += 1
    try:
        while await _request(pool, wire, peer or Peer(pool.master)):
            pass
    except (Gone, Dropped, h11.RemoteProtocolError, trio.BrokenResourceError, ssl.SSLError):
        pass
    finally:
        pool.connections -= 1
        await _close(stream)


async def _close(stream: trio.abc.Stream) -> None:
    with trio.move_on_after(2, shield=True):
        try:
            if isinstance(stream, trio.SocketStream):
                await _drain(stream)
            await stream.aclose()
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
            pass
    await trio.aclose_forcefully(stream)


async def _drain(stream: trio.SocketStream) -> None:
    """Let the peer read our last bytes: closing over unread input would reset them away."""
    try:
        await stream.send_eof()
    except (trio.BrokenResourceError, trio.ClosedResourceError, trio.BusyResourceError):
        return
    with trio.move_on_after(0.2):
        while await stream.receive_some(65536):
            pass


async def _request(pool: SimulatedPool, wire: Wire, peer: Peer) -> bool:
    """Answer one request; says whether another may follow."""
    parser = h11.Connection(h11.SERVER, max_incomplete_event_size=64 * 1024)
    event = await _next(parser, wire)
    if not isinstance(event, h11.Request):
        return False
    headers = {name.decode().lower(): value.decode() for name, value in event.headers}
    request = Head.make(event.method.decode(), event.target.decode(), headers)
    if request.method != "POST":
        if request.method in ("GET", "PUT"):
            wire.unread(parser.trailing_data[0])
            await serve_data(pool, wire, request)
        else:
            await wire.respond(501)
        return False
    body = await _body(parser, wire)
    wire.unread(parser.trailing_data[0])
    keep = headers.get("connection", "").lower() != "close" and event.http_version == b"1.1"
    try:
        if request.path == "/jsonrpc":
            answer, kind = await answer_json(pool.calls, peer, body), "application/json"
        else:
            answer, kind = await answer_xml(pool.calls, peer, body), "text/xml"
    except Malformed:
        await wire.respond(500, error_page("the body is no call"))
        return False
    await wire.send(head(200, answer, {"content-type": kind}, close=not keep) + answer)
    return keep


async def _next(parser: h11.Connection, wire: Wire) -> object:
    while True:
        event = parser.next_event()
        if event is not h11.NEED_DATA:
            return event
        parser.receive_data(await wire.read())


async def _body(parser: h11.Connection, wire: Wire) -> bytes:
    body = bytearray()
    while True:
        event = await _next(parser, wire)
        if isinstance(event, h11.Data):
            body += event.data
            if len(body) > _LARGEST_BODY:
                raise Gone
        elif isinstance(event, h11.EndOfMessage):
            return bytes(body)
        else:
            raise Gone
