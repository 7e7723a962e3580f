"""Bulk connections: TCP or TLS sockets that move bytes straight to and from reused buffers.

This is the one place that opens them.  A socket is never blocking: the event loop waits
until it is ready (so a cancel is felt at once), then a worker thread moves as much as is
there, up to a whole buffer, with the GIL released.  :data:`PATIENCE` lets the thread wait a
moment for more, so that one hop carries hundreds of KiB and not one TLS record of 16 KiB.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import os
import select
import socket
import ssl
import struct
import time
from typing import TYPE_CHECKING, Final, cast
from urllib.parse import unquote, urlsplit

import trio

from proxy.errors import ProxyError, Unauthorized, Unreachable
from proxy.runtime.deadlines import deadline
from proxy.runtime.threads import Work, in_thread

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractAsyncContextManager

ENOUGH: Final = 256 * 1024
"""Bytes that are worth a hop: a thread that moved them no longer waits for more."""
PATIENCE: Final = 0.02
"""Seconds that a thread may wait for :data:`ENOUGH`; bounds how late a cancel is felt."""
LARGEST_HEAD: Final = 64 * 1024

_CERTIFICATE_CODES: Final = {
    # OpenSSL's X509_V_ERR_* numbers, under the names that Node.js gives them and XO knows.
    10: "CERT_HAS_EXPIRED",
    18: "DEPTH_ZERO_SELF_SIGNED_CERT",
    19: "SELF_SIGNED_CERT_IN_CHAIN",
    20: "UNABLE_TO_GET_ISSUER_CERT_LOCALLY",
    21: "UNABLE_TO_VERIFY_LEAF_SIGNATURE",
    62: "ERR_TLS_CERT_ALTNAME_INVALID",
    64: "ERR_TLS_CERT_ALTNAME_INVALID",
}
CERTIFICATE_CODES: Final = frozenset({*_CERTIFICATE_CODES.values(), "CERT_REJECTED"})
"""Codes of a peer that is there, but whose certificate is not trusted."""


def client_context(*, allow_unauthorized: bool) -> ssl.SSLContext:
    """TLS settings towards a host; ``allow_unauthorized`` accepts any certificate.

    Hosts before XCP-ng 8.2 carry RSA-1024 or SHA-1 self-signed certificates: refusing the key
    of a peer whose identity is not checked anyway would gain nothing.
    """
    if not allow_unauthorized:
        return ssl.create_default_context()
    # Without the authorities that nobody will be asked about: reading them takes 40 ms of CPU.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    return context


_PLAIN_ANSWERS = frozenset({"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE"})
"""OpenSSL's reasons, by its version, when what answers is no TLS."""
_NO_TLS = ": what listens there speaks no TLS; check the port, and whether http was meant"


NO_CONNECTION = frozenset({"ECONNREFUSED", "EHOSTUNREACH", "ENETUNREACH", "ENOTFOUND", "ETIMEDOUT"})
"""Of hosts that are not there, or not to be reached from here."""


def connect_error(error: BaseException, peer: str) -> ProxyError:
    """Say why ``peer`` could not be reached, with Node.js's name of the reason as the code.

    Looks through the causes, because trio and httpx wrap what the system said.
    """
    for cause in _causes(error):
        if isinstance(cause, ProxyError):
            return cause
        if isinstance(cause, ssl.SSLCertVerificationError):
            code = _CERTIFICATE_CODES.get(cause.verify_code, "CERT_REJECTED")
            return Unreachable(
                f"the certificate of {peer} is not trusted ({cause.verify_message}):"
                " set allowUnauthorized if this host is self-signed",
                code=code,
            )
        if isinstance(cause, ssl.SSLError):
            reason = cause.reason or "protocol error"
            hint = _NO_TLS if reason in _PLAIN_ANSWERS else ""
            return Unreachable(f"TLS with {peer} failed: {reason}{hint}", code="EPROTO")
        if isinstance(cause, socket.gaierror):
            return Unreachable(f"cannot resolve the name of {peer}", code="ENOTFOUND")
        if isinstance(cause, OSError) and cause.errno:
            name = errno.errorcode.get(cause.errno, "EIO")
            # not its own text, in which Trio names the address in Python's way
            text = os.strerror(cause.errno).lower()
            return Unreachable(f"{name}: {peer}: {text}", code=name)
    return Unreachable(f"lost the connection to {peer}", code="ECONNRESET")


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    pending = [error]
    while pending:
        current = pending.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        if isinstance(current, BaseExceptionGroup):
            pending.extend(cast("BaseExceptionGroup[BaseException]", current).exceptions)
        pending.extend(e for e in (current.__cause__, current.__context__) if e is not None)


class Connection:
    """One socket to ``peer`` (``host:port``).  Used by one reader and one writer at a time.

    With TLS a thread of the one and a thread of the other would tear OpenSSL's state apart:
    they take turns, and nobody holds the turn while waiting for the peer.

    A cancelled wait leaves the connection usable only for :meth:`abort` or :meth:`close`;
    both are idempotent, never block, and must not be called while a call is in progress
    (a cancelled call has ended when its exception arrives).
    """

    def __init__(self, sock: socket.socket, peer: str) -> None:
        self.peer = peer
        self._socket: socket.socket | None = sock
        self._turn = _turns(sock)
        self._lossy = False
        self._failure: OSError | None = None
        """Met behind bytes that were delivered first; a socket tells it only once."""

    @property
    def closed(self) -> bool:
        return self._socket is None

    @property
    def _sock(self) -> socket.socket:
        if self._socket is None:
            raise Unreachable(f"the connection to {self.peer} is closed", code="ECONNRESET")
        return self._socket

    async def receive_into(self, view: memoryview) -> int:
        """Fill ``view`` with what is there, at least one byte; 0 at the end of the stream.

        Raises ``Unreachable`` when the connection breaks.
        """
        sock = self._sock
        try:
            while True:
                if self._failure is not None:
                    raise self._failure
                async with self._turn:
                    moved, wanted, self._failure = await in_thread(Work.NETWORK, _fill, sock, view)
                if wanted is None or moved:
                    return moved
                await _ready(sock, wanted)
        except OSError as error:
            raise self._broken(error) from error

    async def receive_now(self, view: memoryview) -> int | None:
        """What is there without waiting: a count, 0 at the end, ``None`` when nothing is.

        Moves it in the event loop: for views of a few KiB.
        """
        try:
            async with self._turn:
                if self._failure is not None:
                    raise self._failure
                moved, wanted, self._failure = _fill(self._sock, view, 0)
        except OSError as error:
            raise self._broken(error) from error
        await trio.lowlevel.checkpoint()
        return None if wanted is not None and not moved else moved

    async def receive_ready(self, view: memoryview) -> int | None:
        """As :meth:`receive_now` in a worker thread, which waits a moment for more to come.

        ``view`` is not touched any more when this returned or raised, soon also on cancel.
        """
        sock = self._sock
        try:
            async with self._turn:
                if self._failure is not None:
                    raise self._failure
                moved, wanted, self._failure = await in_thread(Work.NETWORK, _fill, sock, view)
        except OSError as error:
            raise self._broken(error) from error
        return None if wanted is not None and not moved else moved

    async def receive_exactly(self, count: int) -> bytes:
        """``count`` bytes, a few KiB, and not one more; raises ``Unreachable`` when it ends."""
        received = bytearray(count)
        view = memoryview(received)
        while view:
            moved = await self.receive_now(view)
            if moved is None:
                await self.wait_readable()
                continue
            if not moved:
                raise Unreachable(f"{self.peer} closed the connection", code="ECONNRESET")
            view = view[moved:]
        return bytes(received)

    async def send_all(self, data: memoryview) -> None:
        """Hand all of ``data`` to the socket.  On cancel some of it may be sent already."""
        sock = self._sock
        offset = 0
        try:
            while offset < len(data):
                async with self._turn:
                    moved, wanted = await in_thread(Work.NETWORK, _drain, sock, data[offset:])
                offset += moved
                if wanted is not None:
                    await _ready(sock, wanted)
        except OSError as error:
            raise self._broken(error) from error

    async def send_some(self, data: memoryview) -> int:
        """Hand over what the socket takes now, at least one byte; says how many.

        Lets the caller see signs of life of a slow peer between the pieces of a large block.
        """
        sock = self._sock
        try:
            while True:
                async with self._turn:
                    moved, wanted = await in_thread(Work.NETWORK, _drain, sock, data)
                if moved or wanted is None:
                    return moved
                await _ready(sock, wanted)
        except OSError as error:
            raise self._broken(error) from error

    async def send_message(self, data: bytes) -> None:
        """Send a few bytes from the event loop.  On cancel some of them may be sent already."""
        view = memoryview(data)
        sock = self._sock
        try:
            while True:
                async with self._turn:
                    moved, wanted = _drain(sock, view, 0)
                view = view[moved:]
                if wanted is None:
                    return
                await _ready(sock, wanted)
        except OSError as error:
            raise self._broken(error) from error

    async def start_tls(self, context: ssl.SSLContext, server_name: str | None = None) -> None:
        """Speak TLS from the next byte on; nothing may have been read beyond the last one.

        Raises ``Unreachable``; then, and on cancel, the connection is closed.
        """
        sock, self._socket = self._sock, None
        try:
            self._socket = await _handshake(sock, context, server_name)
        except OSError as error:
            raise self._broken(error) from error
        self._turn = _turns(self._socket)

    @property
    def certificate(self) -> bytes | None:
        """The peer's certificate (DER) as it came in the TLS handshake, trusted or not."""
        sock = self._socket
        return sock.getpeercert(binary_form=True) if isinstance(sock, ssl.SSLSocket) else None

    async def wait_readable(self) -> None:
        """Wait until a byte, the end or an error can be read."""
        sock = self._sock
        if isinstance(sock, ssl.SSLSocket) and sock.pending():
            await trio.lowlevel.checkpoint()
            return
        await trio.lowlevel.wait_readable(sock)

    def is_quiet(self) -> bool:
        """Whether nothing came, neither a byte nor the end: an idle connection is still good."""
        sock = self._socket
        if sock is None or (isinstance(sock, ssl.SSLSocket) and sock.pending()):
            return False
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        return not poll.poll(0)

    @property
    def lossy(self) -> bool:
        """Whether TCP saw lost or reordered segments (more than 1 in 1,000): a bad network."""
        if self._socket is not None:
            self._lossy = _is_lossy(self._socket)
        return self._lossy

    def abort(self) -> None:
        """Close at once; what still waits to be sent is thrown away (the peer sees a reset)."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                )
        self.close()

    def close(self, farewell: bytes = b"") -> None:
        """Close; what was sent still arrives, and a short ``farewell`` if there is room for it."""
        if self._socket is not None:
            self._lossy = self.lossy
            sock, self._socket = self._socket, None
            if farewell:
                with contextlib.suppress(OSError):
                    sock.send(farewell)
            sock.close()

    def send_eof(self) -> None:
        """Say that nothing more will be sent; what was sent still arrives, and so do answers."""
        sock = self._socket
        if sock is None:
            return
        with contextlib.suppress(OSError, ValueError):
            if isinstance(sock, ssl.SSLSocket):
                sock.unwrap()  # sends the alert and does not wait for the peer's
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_WR)

    def _broken(self, error: OSError) -> ProxyError:
        return connect_error(error, self.peer)


def _turns(sock: socket.socket) -> AbstractAsyncContextManager[object]:
    return trio.Lock() if isinstance(sock, ssl.SSLSocket) else contextlib.nullcontext()


def _fill(
    sock: socket.socket, view: memoryview, patience: float = PATIENCE
) -> tuple[int, int | None, OSError | None]:
    """Move bytes from ``sock``.

    Returns the count, what to wait for (``None``: nothing) and the error behind the bytes.
    """
    moved = 0
    until = 0.0
    while moved < len(view):
        try:
            count = sock.recv_into(view[moved:])
        except (BlockingIOError, ssl.SSLWantReadError):
            wanted = select.POLLIN
        except ssl.SSLWantWriteError:
            wanted = select.POLLOUT
        except OSError as error:
            if moved:
                return moved, None, error  # the next call would see an end and no error
            raise
        else:
            if count == 0:
                return moved, None, None
            moved += count
            continue
        if moved == 0 or moved >= ENOUGH or patience <= 0:
            return moved, wanted, None
        until = until or time.monotonic() + patience
        if not _poll(sock, wanted, until):
            return moved, wanted, None
    return moved, None, None


def _drain(
    sock: socket.socket, data: memoryview, patience: float = PATIENCE
) -> tuple[int, int | None]:
    """Move bytes to ``sock``; returns the count and what to wait for (``None``: all moved)."""
    moved = 0
    until = time.monotonic() + patience
    while moved < len(data):
        try:
            moved += sock.send(data[moved:])
        except (BlockingIOError, ssl.SSLWantWriteError):
            wanted = select.POLLOUT
        except ssl.SSLWantReadError:
            wanted = select.POLLIN
        else:
            continue
        if not _poll(sock, wanted, until):
            return moved, wanted
    return moved, None


def _poll(sock: socket.socket, wanted: int, until: float) -> bool:
    left = until - time.monotonic()
    if left <= 0:
        return False
    poll = select.poll()
    poll.register(sock, wanted)
    return bool(poll.poll(left * 1000))


async def _ready(sock: socket.socket, wanted: int) -> None:
    if wanted == select.POLLIN:
        await trio.lowlevel.wait_readable(sock)
    else:
        await trio.lowlevel.wait_writable(sock)


def _is_lossy(sock: socket.socket) -> bool:
    """Read ``struct tcp_info`` (linux/tcp.h): total_retrans, segs_out/in, rcv_ooopack."""
    with contextlib.suppress(OSError, struct.error):
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 232)
        (retransmitted,) = struct.unpack_from("=I", info, 100)
        sent, received = struct.unpack_from("=II", info, 136)
        (reordered,) = struct.unpack_from("=I", info, 224)
        return bool(reordered > max(8, received // 1000) or retransmitted > max(8, sent // 1000))
    return False


async def connect(
    host: str, port: int, *, context: ssl.SSLContext | None, proxy: str | None, seconds: float
) -> Connection:
    """Open a connection, through the CONNECT ``proxy`` if one is given, with TLS if ``context``.

    ``seconds`` bounds all of it.  Raises ``Unreachable``; on cancel nothing stays open.
    """
    peer = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    with deadline(f"connection to {peer}", seconds):
        sock = await _open_socket(host, port, proxy, peer)
        try:
            if context is not None:
                sock = await _handshake(sock, context, host)
        except OSError as error:
            sock.close()
            raise connect_error(error, peer) from error
        except BaseException:
            sock.close()
            raise
        return Connection(sock, peer)


async def _open_socket(host: str, port: int, proxy: str | None, peer: str) -> socket.socket:
    if proxy is None:
        return await _open_tcp(host, port, peer)
    parts = urlsplit(proxy)
    if parts.scheme != "http" or parts.hostname is None:
        raise Unreachable("httpProxy must be an http:// URL", code="EPROTO")
    via = f"{parts.hostname}:{parts.port or 8080}"
    sock = await _open_tcp(parts.hostname, parts.port or 8080, f"the HTTP proxy {via}")
    connection = Connection(sock, f"the HTTP proxy {via}")
    try:
        lines = [f"CONNECT {peer} HTTP/1.1", f"Host: {peer}"]
        if parts.username is not None:
            secret = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
            lines.append(f"Proxy-Authorization: Basic {base64.b64encode(secret).decode()}")
        await connection.send_all(memoryview("\r\n".join([*lines, "", ""]).encode()))
        head, rest = await read_head(connection)
        status = head.split(b" ", 2)[1:2]
        if rest or status != [b"200"]:
            kind = Unauthorized if status == [b"407"] else Unreachable
            raise kind(f"the HTTP proxy {via} refused to connect to {peer}", code="EPROXY")
    except BaseException:
        connection.close()
        raise
    return sock


async def _open_tcp(host: str, port: int, peer: str) -> socket.socket:
    try:
        stream = await trio.open_tcp_stream(host, port)
    except OSError as error:
        raise connect_error(error, peer) from error
    sock = socket.socket(fileno=stream.socket.detach())
    sock.setblocking(False)
    # A host that vanished without a word is noticed while an idle transfer waits.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15)
    return sock


async def _handshake(
    sock: socket.socket, context: ssl.SSLContext, host: str | None
) -> ssl.SSLSocket:
    secure = context.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
    try:
        while True:
            try:
                secure.do_handshake()
                return secure
            except ssl.SSLWantReadError:
                await trio.lowlevel.wait_readable(secure)
            except ssl.SSLWantWriteError:
                await trio.lowlevel.wait_writable(secure)
    except BaseException:
        secure.close()
        raise


async def read_head(connection: Connection, early: bytes = b"") -> tuple[bytes, bytes]:
    """Read up to the empty line: the head with it, and the bytes that came after.

    ``early`` holds bytes that an earlier read took too many.

    An end before any byte is ``Unreachable`` (``ECONNRESET``); a head above
    :data:`LARGEST_HEAD` is ``EPROTO``.
    """
    received = bytearray(early)
    chunk = memoryview(bytearray(16 * 1024))
    while True:
        end = received.find(b"\r\n\r\n")
        if end >= 0:
            return bytes(received[: end + 4]), bytes(received[end + 4 :])
        if len(received) > LARGEST_HEAD:
            raise Unreachable(f"{connection.peer} sent an endless header", code="EPROTO")
        await connection.wait_readable()
        count = await connection.receive_now(chunk)
        if count == 0:
            raise Unreachable(
                f"{connection.peer} closed the connection without an answer", code="ECONNRESET"
            )
        if count is None:
            continue
        received += chunk[:count]


__all__ = [
    "NO_CONNECTION",
    "Connection",
    "client_context",
    "connect",
    "connect_error",
    "read_head",
]
