"""One connection: hypercorn's HTTP/1.1 protocol between a socket and the application.

Hypercorn's protocol code knows no event loop; its own loop-side code does not fit a daemon
that must stop while a client sleeps: it sends inside a shield, reads with one timeout for
requests and responses alike, and speaks HTTP/2 without a bound on what it buffers.  So this
module is the loop side.  Promises:

- Headers, the handshake and idleness have deadlines; a long answer has none as long as the
  client takes bytes; a client that takes none for ``send_timeout`` is cut off.
- What is buffered for one client is bounded: one piece of an answer (the producer waits for
  the kernel to take it), ten pieces of a request's body, and the kernel's own buffers.
- When the client goes away the application's task is cancelled.
- Cancelling :meth:`Connection.run` ends it at once, whatever the client does.
"""

from __future__ import annotations

import contextlib
import socket as stdlib_socket
import struct
from typing import TYPE_CHECKING, Any, cast

import structlog
import trio
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.events import Request
from hypercorn.protocol.h11 import STREAM_ID, H11Protocol
from hypercorn.protocol.http_stream import HTTPStream
from hypercorn.typing import ConnectionState, TaskGroup
from hypercorn.utils import parse_socket_addr

from proxy.rpc.replies import StreamBroken
from proxy.runtime.secrets import scrub_text

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import h11
    from hypercorn.config import Config
    from hypercorn.trio.worker_context import WorkerContext
    from trio import SocketStream, SSLStream

    from proxy.config import ApiConfig

_READ = 64 * 1024
_QUEUED = 10
"""Pieces of a request's body that wait for the application, each at most ``_READ`` bytes."""
_LINGER = 2.0
"""Seconds in which a client may still read an answer that came before its request ended."""
_LINGER_BYTES = 4 * 1024 * 1024

logger = structlog.get_logger(__name__)


class Connection:
    """Serves the requests of one connection, one after the other."""

    def __init__(
        self,
        app: Any,
        config: Config,
        context: WorkerContext,
        settings: ApiConfig,
        stream: SocketStream | SSLStream[SocketStream],
    ) -> None:
        self._app = app
        self._config = config
        self._context = context
        self._settings = settings
        self._stream = stream
        self._scope = trio.CancelScope()
        self._reading = trio.CancelScope()
        self._answering: trio.CancelScope | None = None
        self._deadline = trio.current_time() + (settings.header_timeout or float("inf"))
        self._sending = trio.Lock()
        self._broken = False
        self._lingering = False
        self.idle = True
        """No request is being answered."""

    async def run(self) -> None:
        """Serve until the client leaves, a deadline passes or the server stops."""
        try:
            with self._scope:
                await self._run()
        except Exception as error:
            logger.exception("connection failed", error=scrub_text(str(error)))
            self._broken = True
        finally:
            await self._close()

    def end(self) -> None:
        """Stop at once, whatever is under way."""
        self._broken = self._broken or not self.idle
        self._scope.cancel()

    async def _run(self) -> None:
        tcp = self._stream if isinstance(self._stream, trio.SocketStream) else None
        if tcp is None:
            encrypted = self._stream
            assert isinstance(encrypted, trio.SSLStream)
            tcp = encrypted.transport_stream
            try:
                with trio.CancelScope(deadline=self._deadline) as handshake:
                    await encrypted.do_handshake()
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return
            if handshake.cancelled_caught:
                return
        try:
            peer = tcp.socket.getpeername()
            here = tcp.socket.getsockname()
        except OSError:
            return  # gone already
        family = tcp.socket.family
        async with trio.open_nursery() as nursery:
            protocol = _Protocol(
                self._app,
                self._config,
                self._context,
                cast("TaskGroup", _Applications(self, nursery)),
                ConnectionState({}),
                tcp is not self._stream,
                parse_socket_addr(family, peer),
                parse_socket_addr(family, here),
                self._take,
            )
            self._protocol = protocol
            self._wait_for_request()
            await self._read_requests()
            nursery.cancel_scope.cancel()

    # -- reading -------------------------------------------------------------------------

    async def _read_requests(self) -> None:
        begun = False
        drained = 0
        while True:
            with trio.CancelScope(deadline=self._deadline) as self._reading:
                try:
                    data = await self._stream.receive_some(_READ)
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    data = b""
            if self._reading.cancelled_caught or not data or self._broken:
                break
            if self._lingering:
                drained += len(data)
                if drained > _LINGER_BYTES:
                    break
                continue
            if not self.idle:
                begun = False
            elif not begun:
                begun = True
                self._limit(self._settings.header_timeout)
            await self._protocol.handle(RawData(bytes(data)))
            if not self.idle:
                begun = False

    def _limit(self, seconds: float) -> None:
        """Give the client this long for its next bytes; 0 sets no limit."""
        self._deadline = trio.current_time() + seconds if seconds > 0 else float("inf")
        self._reading.deadline = self._deadline

    def _wait_for_request(self) -> None:
        self.idle = True
        self._limit(self._settings.idle_timeout)

    # -- the protocol's side -------------------------------------------------------------

    async def _take(self, event: Event) -> None:
        """What the protocol wants done to the socket."""
        if isinstance(event, RawData):
            await self._send(event.data)
        elif isinstance(event, Closed):
            self._linger()
        elif isinstance(event, Updated):
            if event.idle:
                self._wait_for_request()
            else:
                self.idle = False
                self._limit(0)

    async def _send(self, data: bytes) -> None:
        if self._broken:
            raise ClientGone
        if self._sending.locked():
            await self._sending.acquire()
        else:
            self._sending.acquire_nowait()
        try:
            with trio.CancelScope() as stall:
                if self._settings.send_timeout > 0:
                    stall.deadline = trio.current_time() + self._settings.send_timeout
                complete = False
                try:
                    await self._stream.send_all(data)
                    complete = True
                except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                    raise ClientGone from error
                finally:
                    if not complete:
                        # part of it may be out: nothing sensible can follow
                        self._broken = True
            if stall.cancelled_caught:
                self.end()
                await trio.lowlevel.checkpoint_if_cancelled()
        finally:
            self._sending.release()

    def _linger(self) -> None:
        """Our side is done.  Let the client read the answer before the socket closes.

        Closing with unread bytes in the kernel resets the connection, and the client would
        lose an answer that refused its request early.
        """
        if self._lingering:
            return
        self._lingering = True
        self.idle = True
        tcp = self._stream
        if isinstance(tcp, trio.SocketStream):
            with contextlib.suppress(OSError):
                tcp.socket.shutdown(stdlib_socket.SHUT_WR)
        self._limit(_LINGER)

    def answering(self, scope: trio.CancelScope | None) -> None:
        self._answering = scope

    def abort(self) -> None:
        """Break the connection so that the client sees a failure, not an end."""
        self._broken = True
        self._scope.cancel()

    async def _close(self) -> None:
        if self._broken:
            tcp = self._stream
            if not isinstance(tcp, trio.SocketStream):
                tcp = tcp.transport_stream
            with contextlib.suppress(OSError):
                # drop what the kernel still holds for a client that does not read
                tcp.socket.setsockopt(
                    stdlib_socket.SOL_SOCKET, stdlib_socket.SO_LINGER, struct.pack("ii", 1, 0)
                )
        await trio.aclose_forcefully(self._stream)


class ClientGone(OSError):
    """The client has closed its side, or the server cut it off."""


class _Applications:
    """What hypercorn's protocol needs to start the application (its ``TaskGroup``)."""

    def __init__(self, connection: Connection, nursery: trio.Nursery) -> None:
        self._connection = connection
        self._nursery = nursery

    async def spawn_app(
        self, app: Any, _config: Config, scope: Any, send: Callable[[Any], Awaitable[None]]
    ) -> Callable[[Any], Awaitable[None]]:
        put, receive = trio.open_memory_channel[Any](_QUEUED)
        self._nursery.start_soon(self._run, app, scope, receive, send)

        async def give(event: Any) -> None:
            try:
                put.send_nowait(event)
            except trio.WouldBlock:
                if event["type"] == "http.request":
                    with contextlib.suppress(trio.BrokenResourceError):
                        await put.send(event)
            except trio.BrokenResourceError:
                pass  # it has answered without waiting for the rest

        return give

    async def _run(
        self,
        app: Any,
        scope: Any,
        receive: trio.MemoryReceiveChannel[Any],
        send: Callable[[Any], Awaitable[None]],
    ) -> None:
        try:
            with receive:
                await app(scope, receive.receive, send)
            await send(None)
        except ClientGone:
            self._connection.abort()
        except StreamBroken:
            self._connection.abort()
        except Exception as error:
            if _means_gone(error):
                self._connection.abort()
                return
            logger.exception("request failed", error=scrub_text(str(error)))
            await self._fail(send)

    async def _fail(self, send: Callable[[Any], Awaitable[None]]) -> None:
        """500 when nothing was sent yet, else a broken connection."""
        body = b"Internal Server Error"
        headers = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(body))]
        try:
            await send({"type": "http.response.start", "status": 500, "headers": headers})
            await send({"type": "http.response.body", "body": body})
        except Exception:  # noqa: BLE001  the answer had begun
            self._connection.abort()


def _means_gone(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return all(_means_gone(inner) for inner in error.exceptions)
    return isinstance(error, ClientGone | StreamBroken)


class _Protocol(H11Protocol):
    """HTTP/1.0 and 1.1 only: no upgrade to HTTP/2, no WebSocket."""

    async def handle(self, event: Event) -> None:
        try:
            await super().handle(event)
        except _WrongVersion:
            await self._send_error_response(505)
            await self.send(Closed())

    async def _check_protocol(self, event: h11.Request) -> None:
        if event.http_version not in {b"1.0", b"1.1"}:
            raise _WrongVersion

    async def _create_stream(self, request: h11.Request) -> None:
        self.stream = HTTPStream(
            self.app,
            self.config,
            self.context,
            self.task_group,
            self.ssl,
            self.client,
            self.server,
            self.stream_send,
            STREAM_ID,
        )
        await self.stream.handle(
            Request(
                stream_id=STREAM_ID,
                headers=list(request.headers),
                http_version=request.http_version.decode(),
                method=request.method.decode("ascii").upper(),
                raw_path=request.target,
                state=self.connection_state,
            )
        )
        self.keep_alive_requests += 1


class _WrongVersion(Exception):
    pass
