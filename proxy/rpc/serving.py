"""Listeners, and the server that runs the application on them.

The accept loop is ours and each connection is a :class:`proxy.rpc.connection.Connection`
over hypercorn's protocol: hypercorn's own server cannot bound a stalled reader or stop while
one is there.  Only HTTP/1.1 is offered, which is what XO speaks.
"""

from __future__ import annotations

import contextlib
import errno
import resource
import socket
import ssl
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import structlog
import trio
from hypercorn.config import Config
from hypercorn.trio.lifespan import Lifespan
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.utils import wrap_app  # pyright: ignore[reportUnknownVariableType]

from proxy.errors import Conflict, Refused, Unreachable
from proxy.rpc.connection import Connection

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from proxy.config import ApiConfig
    from proxy.rpc.app import App

BACKLOG = 1024
"""A restart of XO opens hundreds of connections at once."""
SPARE_DESCRIPTORS = 256
"""Open files that clients leave to backups: remotes, pools, the journal."""
USER_TIMEOUT_MS = 60_000
"""How long the kernel keeps unacknowledged bytes for a host that has vanished."""

_DESCRIPTORS = 65_536
"""Enough for every setting; what a process may have can be a billion."""

Listener: TypeAlias = "trio.SocketListener | trio.SSLListener[trio.SocketStream]"

logger = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen.  ``socket`` (a Unix socket's path) or ``fd`` rule out the others.

    ``hostname`` ``None`` means every address, ``localhost`` both loopbacks; ``port`` 0 any.
    """

    port: int = 0
    hostname: str | None = None
    socket: Path | None = None
    fd: int | None = None


def tls_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """A server context: TLS 1.2 or later, HTTP/1.1 only."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return prepare_tls(context)


def prepare_tls(context: ssl.SSLContext) -> ssl.SSLContext:
    """Give a context that somebody else made the properties that the API relies on."""
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # a client that can speak HTTP/2 only is told so in the handshake
    context.set_alpn_protocols(["http/1.1"])
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    return context


def open_listeners(address: Address, tls: ssl.SSLContext | None = None) -> list[Listener]:
    """Bind and listen.  Synchronous: it happens before privileges are dropped.

    Raises ``Conflict`` (``EADDRINUSE``), ``Refused`` (``EACCES``) or ``Unreachable``; then
    nothing stays open.
    """
    sockets: list[socket.socket] = []
    try:
        try:
            sockets.extend(_bind(address))
        except OSError as error:
            raise _explain(error, address) from error
        listeners: list[Listener] = []
        for each in sockets:
            _prepare(each)
            each.listen(BACKLOG)
            plain = trio.SocketListener(trio.socket.from_stdlib_socket(each))
            if tls is None:
                listeners.append(plain)
            else:
                listeners.append(trio.SSLListener(plain, prepare_tls(tls), https_compatible=True))
    except BaseException:
        for each in sockets:
            each.close()
        raise
    return listeners


def _bind(address: Address) -> Iterable[socket.socket]:
    if address.fd is not None:
        yield socket.socket(fileno=address.fd)
    elif address.socket is not None:
        yield _bind_path(address.socket)
    else:
        yield from _bind_hosts(address.hostname, address.port)


def _bind_path(path: Path) -> socket.socket:
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(path.stat().st_mode) and not _is_served(path):
            path.unlink()  # left by a process that was killed
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(path))
        path.chmod(0o600)
    except BaseException:
        listener.close()
        raise
    return listener


def _is_served(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
    return True


def _bind_hosts(hostname: str | None, port: int) -> Iterable[socket.socket]:
    bound: list[socket.socket] = []
    try:
        for family, host in _hosts(hostname, port):
            listener = socket.socket(family, socket.SOCK_STREAM)
            bound.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                # "every address" is one socket for both protocols
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, hostname is not None)
            listener.bind((host, port))
            # a second loopback gets the port that the first one was given
            port = listener.getsockname()[1]
    except BaseException:
        for listener in bound:
            listener.close()
        raise
    return bound


def _hosts(hostname: str | None, port: int) -> list[tuple[socket.AddressFamily, str]]:
    has_v6 = _has_ipv6()
    if hostname is None:
        return [(socket.AF_INET6, "::") if has_v6 else (socket.AF_INET, "0.0.0.0")]  # noqa: S104
    if hostname == "localhost":
        loopbacks = [(socket.AF_INET, "127.0.0.1")]
        return [*loopbacks, (socket.AF_INET6, "::1")] if has_v6 else loopbacks
    found = socket.getaddrinfo(hostname, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return list(dict.fromkeys((info[0], str(info[4][0])) for info in found))


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def _prepare(listener: socket.socket) -> None:
    """Options that accepted connections inherit."""
    if listener.family == socket.AF_UNIX:
        return
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)


def _explain(error: OSError, address: Address) -> Exception:
    where = str(address.socket or f"{address.hostname or '*'}:{address.port}")
    if isinstance(error, socket.gaierror):
        return Unreachable(f"cannot listen on {where}: the name is unknown", code="ENOTFOUND")
    code = errno.errorcode.get(error.errno or 0, "EIO")
    text = f"cannot listen on {where}: {(error.strerror or str(error)).lower()}"
    if error.errno == errno.EADDRINUSE:
        return Conflict(f"{text}; is another proxy running?", code=code)
    if error.errno in {errno.EACCES, errno.EPERM}:
        return Refused(f"{text}; ports below 1024 need CAP_NET_BIND_SERVICE", code=code)
    return Unreachable(text, code=code)


def allow_descriptors() -> int:
    """Allow this process as many open files as the system lets it; that number.

    A shell's usual limit of 1,024 would let idle clients take the files that a backup needs.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _DESCRIPTORS)
    if soft == resource.RLIM_INFINITY:
        return _DESCRIPTORS
    if soft >= wanted:
        return soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


async def serve(
    app: App,
    listeners: Sequence[Listener],
    *,
    settings: Callable[[], ApiConfig],
    stopping: trio.Event,
    now: trio.Event | None = None,
    grace: float = 60.0,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until ``stopping`` is set, then end gracefully.

    Graceful: no new connections, idle ones end at once, running answers may end by
    themselves for ``grace`` seconds; calls that only wait for events end early.  When ``now``
    is set, or the grace is over, what is left is cut off.  A cancel cuts everything off at
    once.  The listeners are closed on return.
    """
    config = Config()
    config.include_server_header = False
    config.include_date_header = False  # with the fixed headers
    config.accesslog = None
    config.errorlog = None
    # never answer "connection: close" because of a count
    config.keep_alive_max_requests = 2**62
    context = WorkerContext(None)
    server = _Server(app, config, context, settings)
    app.connections = lambda: server.count
    lifespan = Lifespan(wrap_app(app, 0, "asgi"), config, {})
    async with trio.open_nursery() as outer:
        await outer.start(lifespan.handle_lifespan)
        await lifespan.wait_for_startup()
        try:
            async with trio.open_nursery() as connections:
                connections.start_soon(server.watch)
                async with trio.open_nursery() as accepting:
                    for listener in listeners:
                        accepting.start_soon(server.accept, listener, connections)
                    task_status.started()
                    await stopping.wait()
                    accepting.cancel_scope.cancel()
                await context.terminated.set()
                app.stopping.set()
                server.end_idle()
                connections.start_soon(
                    _cut_off, server, connections, grace, trio.Event() if now is None else now
                )
        finally:
            for listener in listeners:
                await trio.aclose_forcefully(listener)
        await lifespan.wait_for_shutdown()
        outer.cancel_scope.cancel()


async def _cut_off(
    server: _Server, connections: trio.Nursery, grace: float, now: trio.Event
) -> None:
    """End what is left when the time is over, or return when nothing is left."""
    with trio.move_on_after(grace):
        async with trio.open_nursery() as waiting:

            async def wait_for_all() -> None:
                await server.emptied()
                waiting.cancel_scope.cancel()

            async def wait_for_now() -> None:
                await now.wait()
                waiting.cancel_scope.cancel()

            waiting.start_soon(wait_for_all)
            waiting.start_soon(wait_for_now)
    if server.count:
        logger.warning("connections cut off", count=server.count)
    server.end_all()
    connections.cancel_scope.cancel()


class _Server:
    """The open connections."""

    def __init__(
        self, app: App, config: Config, context: WorkerContext, settings: Callable[[], ApiConfig]
    ) -> None:
        self._app = app
        self._config = config
        self._context = context
        self._settings = settings
        self._open: set[Connection] = set()
        self._changed = trio.Event()
        self._descriptors = allow_descriptors()

    @property
    def count(self) -> int:
        return len(self._open)

    async def watch(self) -> None:
        """End connections whose deadline has passed.  Runs until cancelled."""
        while True:
            settings = self._settings()
            limits = (
                settings.header_timeout,
                settings.body_timeout,
                settings.idle_timeout,
                settings.send_timeout,
            )
            await trio.sleep(min(1.0, *(limit / 4 for limit in limits if limit > 0)))
            now = trio.current_time()
            for connection in [one for one in self._open if one.overdue(now)]:
                connection.end()

    async def accept(self, listener: Listener, nursery: trio.Nursery) -> None:
        """Accept for ever.  Running out of descriptors pauses it, with a warning."""
        async with listener:
            await trio.serve_listeners(self._serve, [listener], handler_nursery=nursery)

    async def _serve(self, stream: trio.SocketStream | trio.SSLStream[trio.SocketStream]) -> None:
        settings = self._settings()
        ours = max(self._descriptors - SPARE_DESCRIPTORS, self._descriptors // 2)
        limit = min(settings.max_connections, ours)
        if len(self._open) >= limit:
            logger.warning("too many connections", limit=limit)
            await trio.aclose_forcefully(stream)
            return
        connection = Connection(self._app, self._config, self._context, settings, stream)
        self._open.add(connection)
        try:
            await connection.run()
        finally:
            self._open.discard(connection)
            self._changed.set()
            self._changed = trio.Event()

    def end_idle(self) -> None:
        for connection in self._open:
            if connection.idle:
                connection.end()

    def end_all(self) -> None:
        for connection in self._open:
            connection.end()

    async def emptied(self) -> None:
        while self._open:
            await self._changed.wait()
