"""One logged-in connection to a share: the only place that knows :mod:`smbprotocol`.  Blocks.

The library does negotiation, login, signing, encryption and the counting of credits, one thread
of its own per connection.  What it does otherwise than a daemon of backups needs is set right
here, each with its reason: its socket (:class:`Transport`), and in :class:`_Connection` that it
takes unsigned answers, refuses requests for which credits are still on their way, and can
leave callers waiting when its thread dies.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import socket
import struct
import threading
import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from smbprotocol import Dialects
from smbprotocol.connection import Connection, SigningAlgorithms
from smbprotocol.exceptions import SMBAuthenticationError, SMBException, SMBResponseException
from smbprotocol.header import Commands, Smb2Flags
from smbprotocol.session import Session
from smbprotocol.tree import TreeConnect

from proxy.errors import NotFound, ProxyError, Refused, Unauthorized, Unreachable
from proxy.remotes.smb import status
from proxy.remotes.smb.options import SMALLEST_DIALECT, SmbOptions, limited
from proxy.remotes.smb.status import StatusError, from_status
from proxy.remotes.smb.wire import PAYLOAD_OF_A_CREDIT, Message
from proxy.runtime.secrets import scrub_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from smbprotocol.connection import Request
    from smbprotocol.structure import Structure

CONNECT_SECONDS: Final = 15.0
CALL_SECONDS: Final = 60.0
"""For one answer; a server that needs longer, as to flush, says so and gets more."""
FLUSH_SECONDS: Final = 600.0
IDLE_SECONDS: Final = 60
"""After this silence the server is asked whether it lives; after as much again it is dead."""
_CLOSE_SECONDS: Final = 2.0
_CREDITS: Final = 512
"""Asked for at once: 32 MiB on their way, where the server grants them."""
_LARGEST_ANSWER: Final = 9 * 1024 * 1024
_PENDING: Final = 0x103
_NOBODYS: Final = 0xFFFF_FFFF_FFFF_FFFF
_BAD_NETWORK_NAME: Final = 0xC000_00CC

for _name in ("smbprotocol", "spnego"):
    # They log salts, keys and whole messages; what goes wrong reaches us as an exception.
    logging.getLogger(_name).setLevel(logging.CRITICAL + 1)


@dataclass(frozen=True, slots=True, repr=False)
class Login:
    """Where to and as whom.  Has no ``repr``: it holds the password."""

    server: str
    share: str
    username: str
    password: str
    domain: str
    options: SmbOptions


class Transport:
    """The socket under a connection, in place of the library's own.

    That one blocks for good in a send to a dead server and cannot be closed meanwhile, waits
    with ``select``, which fails from the 1,024th descriptor on, and copies each message
    three times.
    """

    def __init__(self, address: str, port: int) -> None:
        self.connected = False
        self._address = address
        self._port = port
        self._socket: socket.socket | None = None
        self._sending = threading.Lock()
        self._is_aborted = False

    def connect(self) -> None:
        until = time.monotonic() + CONNECT_SECONDS
        found = socket.getaddrinfo(self._address, self._port, type=socket.SOCK_STREAM)
        failure: OSError = TimeoutError("no address answers")
        for family, kind, protocol, _, address in found:
            connected = socket.socket(family, kind, protocol)
            try:
                self._reach(connected, address, until)
                connected.setblocking(True)
                connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connected.setsockopt(
                    socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(CALL_SECONDS * 1000)
                )
            except OSError as error:
                connected.close()
                failure = error
            else:
                self._socket, self.connected = connected, True
                return
        raise failure

    def _reach(self, connected: socket.socket, address: Any, until: float) -> None:
        """In steps, so that :meth:`abort` is heard."""
        connected.setblocking(False)
        number = connected.connect_ex(address)
        if number != errno.EINPROGRESS:
            if number:
                raise OSError(number, os.strerror(number))
            return
        poll = select.poll()
        poll.register(connected, select.POLLOUT)
        while not poll.poll(100):
            if self._is_aborted:
                raise ConnectionAbortedError(errno.ECONNABORTED, "given up")
            if time.monotonic() >= until:
                raise TimeoutError("the server does not answer")
        number = connected.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number:
            raise OSError(number, os.strerror(number))

    def close(self) -> None:
        """End it, whoever is sending or receiving.  Idempotent, never waits."""
        self.connected = False
        if self._socket is not None:
            with contextlib.suppress(OSError):  # ended already
                self._socket.shutdown(socket.SHUT_RDWR)

    def abort(self) -> None:
        """As :meth:`close`, and throw away what is still to be sent; also while connecting."""
        self._is_aborted = True
        if self._socket is not None:
            with contextlib.suppress(OSError):
                linger = struct.pack("ii", 1, 0)
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close()

    def release(self) -> None:
        """Give the descriptor back; for the receiving thread at its end, or without one."""
        self.close()
        with self._sending:  # a number in use must not become somebody else's file
            if self._socket is not None:
                self._socket.close()

    def send(self, message: Any) -> None:
        if not isinstance(message, bytes):  # encrypted, not packed yet
            message = message.pack()
        with self._sending:
            if self._socket is None or not self.connected:
                raise ConnectionResetError("closed")
            parts = [struct.pack(">I", len(message)), message]
            sent = self._socket.sendmsg(parts)
            rest = memoryview(message)[max(0, sent - 4) :]
            if sent < 4:
                raise ConnectionResetError("the socket took no four bytes")
            if rest:
                self._socket.sendall(rest)

    def recv(self, timeout: float) -> bytes:
        """The next message, ``b""`` at the end; ``TimeoutError`` when there is none in time."""
        assert self._socket is not None, "not connected"
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        if not poll.poll(timeout * 1000):
            raise TimeoutError
        head = self._receive(4)
        if len(head) < 4:
            return b""
        (length,) = struct.unpack(">I", head)
        if length > _LARGEST_ANSWER:
            raise ValueError(f"the server announces a message of {length} bytes")
        message = self._receive(length)
        return message if len(message) == length else b""

    def _receive(self, length: int) -> bytes:
        assert self._socket is not None, "not connected"
        try:
            first = self._socket.recv(length, socket.MSG_WAITALL)
            if len(first) == length:
                return first
            parts, missing = [first], length - len(first)
            while missing and parts[-1]:
                parts.append(self._socket.recv(missing, socket.MSG_WAITALL))
                missing -= len(parts[-1])
            return b"".join(parts)
        except OSError:
            return b""


class _Connection(Connection):
    def __init__(self, login: Login, transport: Transport, *, sign: bool) -> None:
        self._own_transport = transport
        self._credits = threading.Condition()
        self._reserved = 0
        super().__init__(uuid.uuid4(), login.server, login.options.port, require_signing=sign)
        self._receive_timeout = IDLE_SECONDS

    @property
    def transport(self) -> Transport:
        return self._own_transport

    @transport.setter
    def transport(self, _theirs: object) -> None:
        """``connect`` would put its own here."""

    def _calculate_credit_charge(self, message: Any) -> int:
        if isinstance(message, Message):
            return message.charge if self.supports_multi_credit else 0
        return super()._calculate_credit_charge(message)

    def submit(
        self, messages: Sequence[Message], *, sid: int, tid: int, deadline: float
    ) -> list[Request]:
        """Send, once the server has granted the credits; the library raises at once."""
        charge = sum(max(1, self._calculate_credit_charge(message)) for message in messages)
        with self._credits:
            while self._granted() - self._reserved < charge:
                if not self.transport.connected:
                    raise ConnectionResetError("closed while waiting for credits")
                if time.monotonic() >= deadline:
                    raise TimeoutError("the server grants no credits")
                self._credits.wait(0.005)
            self._reserved += charge
        try:
            return self._send(messages, session_id=sid, tree_id=tid, related=len(messages) > 1)
        finally:
            with self._credits:
                self._reserved -= charge
                self._credits.notify_all()

    def _granted(self) -> int:
        window = self.sequence_window
        return window["high"] - window["low"]

    def verify_signature(self, header: Structure, session_id: int, force: bool = False) -> None:
        """Called for answers that were not encrypted.  The library passes those that carry no
        signature, so that anybody on the way could answer in the server's name."""
        session = self.session_table.get(session_id)
        protected = (
            session is not None
            and header["status"].get_value() != _PENDING
            and header["message_id"].get_value() != _NOBODYS
            and header["command"].get_value() != Commands.SMB2_SESSION_SETUP
        )
        if protected and session is not None:
            if session.encrypt_data:
                raise SMBException("an answer came in clear on an encrypted session")
            if session.signing_required and not header["flags"].has_flag(
                Smb2Flags.SMB2_FLAGS_SIGNED
            ):
                raise SMBException("an answer came without a signature")
        super().verify_signature(header, session_id, force)

    def _process_message_thread(self) -> None:
        """The library's thread; whatever ends it, nobody is left waiting and nothing is printed."""
        try:
            super()._process_message_thread()
        except Exception as error:  # noqa: BLE001 (told to whoever waits for an answer)
            self._t_exc = self._t_exc or error
        finally:
            self._own_transport.release()
            for request in tuple(self.outstanding_requests.values()):
                request.response_event.set()
            with self._credits:
                self._credits.notify_all()


class Link:
    """A share that can be used.  Thread-safe; once lost it stays so, a new one is needed.

    Errors of single messages are :class:`StatusError`; ``Unreachable`` when it is lost.
    """

    def __init__(self, connection: _Connection, session: Session, tree: TreeConnect) -> None:
        self._connection = connection
        self._session = session
        self._tree = tree
        options_of_server = (connection.max_read_size, connection.max_write_size)
        least = PAYLOAD_OF_A_CREDIT
        if not connection.supports_multi_credit:
            options_of_server = (least, least)
        self.max_read, self.max_write = (limited(max(4096, size)) for size in options_of_server)
        most = connection.max_transact_size if connection.supports_multi_credit else least
        self.max_listing = max(4096, min(most, 256 * 1024))
        self.dialect = connection.dialect
        self.is_encrypted = bool(session.encrypt_data or tree.encrypt_data)
        self.is_signed = bool(session.signing_required)

    @property
    def is_lost(self) -> bool:
        return not self._connection.transport.connected

    def start(self, *messages: Message, seconds: float = CALL_SECONDS) -> list[Request]:
        """Send ``messages`` as one compound; for each answer :meth:`finish` must be called."""
        try:
            return self._connection.submit(
                messages,
                sid=self._session.session_id,
                tid=self._tree.tree_connect_id,
                deadline=time.monotonic() + seconds,
            )
        except Exception as error:
            raise self._lose(error) from error

    def finish(self, request: Request, *, seconds: float = CALL_SECONDS) -> bytes:
        """The body of the answer."""
        try:
            answer = self._connection.receive(request, timeout=seconds, resolve_symlinks=False)
            body: bytes = answer["data"].get_value()
        except SMBResponseException as error:
            if error.status in status.SESSION_LOST:
                raise self._lose(error) from error
            raise StatusError(error.status) from None
        except Exception as error:
            raise self._lose(error) from error
        return body

    def call(self, message: Message, *, seconds: float = CALL_SECONDS) -> bytes:
        return self.finish(self.start(message, seconds=seconds)[0], seconds=seconds)

    def compound(self, *messages: Message, seconds: float = CALL_SECONDS) -> list[bytes]:
        """Messages about one file that the first opens and the last closes, in one round trip.

        Raises the first failure, with its ``step``.
        """
        return self.collect(self.start(*messages, seconds=seconds), seconds=seconds)

    def collect(self, requests: Sequence[Request], *, seconds: float = CALL_SECONDS) -> list[bytes]:
        """The answers of a compound; all are taken, whatever the first ones are."""
        bodies: list[bytes] = []
        failure: StatusError | None = None
        for step, request in enumerate(requests):
            try:
                bodies.append(self.finish(request, seconds=seconds))
            except StatusError as error:
                failure = failure or StatusError(error.status, step)
        if failure is not None:
            raise failure
        return bodies

    def abort(self) -> None:
        """End it at once: what was sent and not yet received is thrown away."""
        self._connection.transport.abort()

    def close(self) -> None:
        """Log off, if the server answers soon, and wait for the library's thread."""
        with contextlib.suppress(Exception):
            if not self.is_lost:
                self._connection.disconnect(close=True, timeout=_CLOSE_SECONDS)
        with contextlib.suppress(Exception):
            self._connection.disconnect(close=False)

    def _lose(self, error: BaseException) -> Unreachable:
        was_lost = self.is_lost
        self.abort()
        if isinstance(error, Unreachable):
            return error
        if was_lost or isinstance(error, ConnectionError):
            return Unreachable(
                "ECONNRESET: the connection to the SMB server was lost", code="ECONNRESET"
            )
        timed_out = isinstance(error, TimeoutError) or "timeout" in str(error)
        if timed_out:
            return Unreachable(
                "ETIMEDOUT: the SMB server does not answer; the connection was given up",
                code="ETIMEDOUT",
            )
        return Unreachable(
            f"EPROTO: the connection to the SMB server was given up: {scrub_text(str(error))}",
            code="EPROTO",
        )


def connect(login: Login, transport: Transport) -> Link:
    """Connect, log in, open the share.  Blocks for :data:`CONNECT_SECONDS` per step at most, and
    not beyond an abort of ``transport``.

    Raises ``Unreachable``; ``Unauthorized`` for a wrong user or password; ``NotFound`` naming the
    share; ``Refused`` for a server that is not as safe as the options demand.
    """
    connection = _Connection(login, transport, sign=not login.options.guest)
    try:
        link = _opened(connection, login)
    except BaseException as error:
        transport.abort()
        with contextlib.suppress(Exception):
            connection.disconnect(close=False)
        transport.release()
        if isinstance(error, ProxyError) or not isinstance(error, Exception):
            raise
        raise _translated(error, login) from error
    return link


def _opened(connection: _Connection, login: Login) -> Link:
    options = login.options
    algorithms = [SigningAlgorithms.AES_GMAC, SigningAlgorithms.AES_CMAC]
    if options.dialect is not None and options.dialect < SMALLEST_DIALECT:
        algorithms.append(SigningAlgorithms.HMAC_SHA256)
    # without HMAC-SHA256 the library offers 3.0, 3.0.2 and 3.1.1
    connection.connect(options.dialect, CONNECT_SECONDS, preferred_signing_algos=algorithms)
    if options.dialect is None and connection.dialect < Dialects.SMB_3_0_0:
        raise Refused(
            f"the SMB server '{login.server}' knows no SMB 3; the option vers=2.1 permits less",
            code="EPROTONOSUPPORT",
            data={"option": "vers"},
        )
    user = f"{login.domain}\\{login.username}" if login.domain else login.username
    session = Session(connection, user, login.password, require_encryption=options.seal)
    with _bounded(connection):
        session.connect()
        session.password = None
        if options.guest:
            session.signing_required = bool(session.signing_key) and session.signing_required
        tree = TreeConnect(session, f"\\\\{login.server}\\{login.share}")
        # 3.1.1 has it in its keys, the others are asked again under their signature
        tree.connect(require_secure_negotiate=bool(session.signing_key))
        # paths on a DFS share would have to name the server; without the mark they need not
        tree.is_dfs_share = False
        if connection.supports_multi_credit:
            connection.echo(sid=session.session_id, credit_request=_CREDITS)
    return Link(connection, session, tree)


@contextlib.contextmanager
def _bounded(connection: _Connection) -> Any:
    """The library waits without an end for the answers to a login."""
    timer = threading.Timer(2 * CONNECT_SECONDS, connection.transport.abort)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def _translated(error: Exception, login: Login) -> ProxyError:
    where = f"'{login.server}'"
    data: dict[str, Any] = {"server": login.server, "share": login.share}
    if isinstance(error, SMBResponseException):
        if error.status == _BAD_NETWORK_NAME:
            return NotFound(
                f"ENOENT: the SMB server {where} has no share '{login.share}'", data=data
            )
        return from_status(error.status, "connecting to", f"{login.server}\\{login.share}")
    if isinstance(error, SMBAuthenticationError):
        return Unauthorized(f"EAUTH: the login to the SMB server {where} failed", data=data)
    text = scrub_text(str(error))[:500]
    if "as a guest" in text:
        return Unauthorized(
            f"EAUTH: the SMB server {where} let us in as a guest only, so the user name or the "
            "password is wrong; the option 'guest' would take it",
            data=data,
        )
    if "encryption is required" in text:
        return Refused(
            f"the SMB server {where} cannot encrypt, which the option 'seal' demands",
            code="EPROTONOSUPPORT",
            data={**data, "option": "seal"},
        )
    return _unreachable(error, text, login, data)


def _unreachable(error: Exception, text: str, login: Login, data: dict[str, Any]) -> Unreachable:
    where = f"'{login.server}'"
    if isinstance(error, socket.gaierror):
        code, why = "ENOTFOUND", f"the name of the SMB server {where} is not known"
    elif isinstance(error, TimeoutError) or "timeout" in text:
        code, why = "ETIMEDOUT", f"the SMB server {where} does not answer"
    elif isinstance(error, ConnectionRefusedError):
        code = "ECONNREFUSED"
        why = f"nothing listens on port {login.options.port} of the SMB server {where}"
    elif isinstance(error, OSError):
        code, why = "ECONNRESET", f"the SMB server {where} cannot be reached: {text}"
    else:
        code, why = "EPROTO", f"no SMB connection to {where}: {text}"
    return Unreachable(f"{code}: {why}", code=code, data=data)
