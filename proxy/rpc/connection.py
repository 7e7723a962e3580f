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
import traceback
from typing import TYPE_CHECKING, Any, cast

import h11
import structlog
import trio
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.events import Body, EndBody, Request, Response
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.h11 import STREAM_ID, H11Protocol
from hypercorn.protocol.http_stream import HTTPStream
from hypercorn.typing import ConnectionState, TaskGroup
from hypercorn.utils import parse_socket_addr  # pyright: ignore[reportUnknownVariableType]

from proxy.rpc.headers import PHRASES, with_fixed_headers
from proxy.rpc.quick import WholeAnswer, read_whole
from proxy.rpc.replies import ClientGone, StreamBroken
from proxy.runtime.secrets import scrub_text

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

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
_NEVER = float("inf")

logger = structlog.get_logger(__name__)


class Connection:
    """Serves the requests of one connection, one after the other.

    Its deadlines are watched from outside, by :meth:`overdue`: a scope with a deadline for
    every read and write would cost a tenth of a small call.
    """

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
        self._tcp = stream if isinstance(stream, trio.SocketStream) else stream.transport_stream
        self._scope = trio.CancelScope()
        self._reading = trio.CancelScope()
        self._read_by = _NEVER
        self._send_by = _NEVER
        self._sending = trio.Lock()
        self._broken = False
        self._lingering = False
        self._complete = False
        """The last request was read and answered in full."""
        self._begun = False
        """Some of the next request's headers are here; their deadline runs."""
        self.idle = True
        """No request is being answered."""
        self._limit(settings.header_timeout)

    async def run(self) -> None:
        """Serve until the client leaves, a deadline passes or the server stops."""
        try:
            with self._scope:
                await self._run()
        except Exception as error:  # noqa: BLE001  one connection must not stop the server
            _log_fault("connection failed", error)
            self._broken = True
        finally:
            await self._close()

    def overdue(self, now: float) -> bool:
        """The client has let a deadline pass."""
        return now > self._read_by or now > self._send_by

    def end(self) -> None:
        """Stop at once; an answer under way breaks off, so that it cannot pass for complete."""
        self._broken = self._broken or not self.idle
        self._scope.cancel()

    async def _run(self) -> None:
        if self._stream is not self._tcp:
            try:
                await cast("SSLStream[SocketStream]", self._stream).do_handshake()
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return
        try:
            peer = self._tcp.socket.getpeername()
            here = self._tcp.socket.getsockname()
        except OSError:
            return  # gone already
        family = self._tcp.socket.family
        async with trio.open_nursery() as nursery:
            self._protocol = _Protocol(
                self._app,
                self._config,
                self._context,
                cast("TaskGroup", _Applications(self, nursery)),
                ConnectionState({}),
                self._tcp is not self._stream,
                parse_socket_addr(family, peer),
                parse_socket_addr(family, here),
                self._take,
            )
            self._wait_for_request()
            with self._reading:
                await self._read_requests()
            if not self._complete:
                nursery.cancel_scope.cancel()  # the client left

    # -- reading -------------------------------------------------------------------------

    async def _read_requests(self) -> None:
        drained = 0
        while not self._broken:
            try:
                data = await self._stream.receive_some(_READ)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return
            if not data:
                return
            if self._lingering:
                drained += len(data)
                if drained > _LINGER_BYTES:
                    return
                continue
            try:
                if self.idle and await self._answer_at_once(data):
                    continue
                await self._protocol.handle(RawData(bytes(data)))
            except (ClientGone, StreamBroken):
                self.abort()
                return
            self._expect_more()

    async def _answer_at_once(self, data: bytes | bytearray) -> bool:
        """Answer a small call that came in one piece, if nothing in it needs more.

        ``False``: nothing was done, the protocol is to read ``data``.
        """
        protocol = self._protocol
        if protocol.has_begun() or self._context.terminated.is_set():
            return False
        request = read_whole(data)
        if request is None:
            return False
        self.idle = False
        self._limit(0)
        answered: bool = await self._app.answer_at_once(
            request.target, request.headers, request.body, WholeAnswer(self._send).send
        )
        if answered:
            self._wait_for_request()
        return answered

    def _expect_more(self) -> None:
        """Set the deadline for what the client owes now."""
        if self._lingering:
            return
        if not self.idle:
            owes_body = self._protocol.connection.their_state is h11.SEND_BODY
            self._limit(self._settings.body_timeout if owes_body else 0)
        elif not self._begun and self._protocol.connection.trailing_data[0]:
            self._begun = True
            self._limit(self._settings.header_timeout)

    def _limit(self, seconds: float) -> None:
        """Give the client this long for its next bytes; 0 sets no limit."""
        self._read_by = trio.current_time() + seconds if seconds > 0 else _NEVER

    def _wait_for_request(self) -> None:
        self.idle = True
        self._begun = False
        self._limit(self._settings.idle_timeout)

    # -- the protocol's side -------------------------------------------------------------

    async def _take(self, event: Event) -> None:
        """What the protocol wants done to the socket."""
        if isinstance(event, RawData):
            if event.data:
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
        if self._settings.send_timeout > 0:
            self._send_by = trio.current_time() + self._settings.send_timeout
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
            self._send_by = _NEVER
            self._sending.release()

    def _linger(self) -> None:
        """Our side is done.  Let the client read the answer before the socket closes.

        Closing with unread bytes in the kernel resets the connection, and the client would
        lose an answer that refused its request early.
        """
        if self._lingering or self._complete:
            return
        if self._protocol.connection.their_state in {h11.DONE, h11.MUST_CLOSE, h11.CLOSED}:
            self._complete = True
            self._reading.cancel()
            return
        self._lingering = True
        self.idle = True
        if self._stream is self._tcp:
            with contextlib.suppress(OSError):
                self._tcp.socket.shutdown(stdlib_socket.SHUT_WR)
        self._limit(_LINGER)

    def abort(self) -> None:
        """Break the connection so that the client sees a failure, not an end."""
        self._broken = True
        self._scope.cancel()

    async def _close(self) -> None:
        if self._broken:
            with contextlib.suppress(OSError):
                # drop what the kernel still holds for a client that does not read
                self._tcp.socket.setsockopt(
                    stdlib_socket.SOL_SOCKET, stdlib_socket.SO_LINGER, struct.pack("ii", 1, 0)
                )
        await trio.aclose_forcefully(self._stream)


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
        async def take() -> Any:
            # no pass through the scheduler for what is here already
            try:
                return receive.receive_nowait()
            except trio.WouldBlock:
                return await receive.receive()

        try:
            with receive:
                await app(scope, take, send)
            await send(None)
        except (ClientGone, StreamBroken):
            self._connection.abort()
        except BaseExceptionGroup as group:
            cancelled, faults = group.split(trio.Cancelled)
            if faults is not None:
                await self._failed(faults, send)
            if cancelled is not None:
                raise cancelled from None
        except Exception as error:  # noqa: BLE001  a fault of the application ends its connection
            await self._failed(error, send)

    async def _failed(self, error: BaseException, send: Callable[[Any], Awaitable[None]]) -> None:
        if _means_gone(error):
            self._connection.abort()
        else:
            _log_fault("request failed", error)
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


def _log_fault(message: str, error: BaseException) -> None:
    # not as exc_info: a renderer may show local variables, and thereby secrets
    text = "".join(traceback.format_exception(error))
    logger.error(message, traceback=scrub_text(text))


def _means_gone(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        group = cast("BaseExceptionGroup[BaseException]", error)
        return all(_means_gone(inner) for inner in group.exceptions)
    return isinstance(error, ClientGone | StreamBroken)


class _Protocol(H11Protocol):
    """HTTP/1.0 and 1.1 only: no upgrade to HTTP/2, no WebSocket."""

    _held = b""
    """The headers of an answer, sent together with its first bytes."""

    async def handle(self, event: Event) -> None:
        try:
            await super().handle(event)
        except _WrongVersion:
            await self._send_error_response(505)
            await self.send(Closed())

    async def stream_send(self, event: StreamEvent) -> None:
        if isinstance(event, Response) and event.status_code >= 200:
            self._held = with_fixed_headers(self._head(event.status_code, event.headers))
        elif isinstance(event, Body | EndBody):
            part = h11.Data(data=event.data) if isinstance(event, Body) else h11.EndOfMessage()
            data = self._held + self._encode(part)
            self._held = b""
            await self.send(RawData(data))
        else:
            await super().stream_send(event)

    def has_begun(self) -> bool:
        """Whether it has read some of a request that is not answered."""
        connection = self.connection
        return connection.their_state is not h11.IDLE or bool(connection.trailing_data[0])

    def _head(self, status: int, headers: list[tuple[bytes, bytes]]) -> bytes:
        # clients show the phrase: without it XO's message would be "401 " and nothing else
        answer = h11.Response(headers=headers, status_code=status, reason=PHRASES.get(status, b""))
        return self._encode(answer)

    async def _send_error_response(self, status_code: int) -> None:
        head = self._head(status_code, [(b"content-length", b"0"), (b"connection", b"close")])
        if head:  # else an answer has begun: what follows it must not end it
            end = self._encode(h11.EndOfMessage())
            await self.send(RawData(with_fixed_headers(head) + end))

    def _encode(self, event: h11.Event) -> bytes:
        try:
            return cast("h11.Connection", self.connection).send(event) or b""
        except h11.LocalProtocolError:
            if self.connection.their_state is h11.ERROR:
                return b""
            raise

    async def _check_protocol(self, event: h11.Request) -> None:
        if event.http_version not in {b"1.0", b"1.1"}:
            raise _WrongVersion

    async def _create_stream(self, request: h11.Request) -> None:
        self.stream = _Stream(
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


class _Stream(HTTPStream):
    """Gives the application the last piece of a body together with its end."""

    _piece: bytes | None = None

    async def handle(self, event: StreamEvent) -> None:
        if self.closed or not isinstance(event, Body | EndBody):
            await super().handle(event)
            return
        before = self._piece
        self._piece = bytes(event.data) if isinstance(event, Body) else None
        if self._piece is None:
            await self.app_put({"type": "http.request", "body": before or b"", "more_body": False})
        elif before is not None:
            await self.app_put({"type": "http.request", "body": before, "more_body": True})


class _WrongVersion(Exception):
    pass
