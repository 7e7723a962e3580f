"""One logged-in connection to a share: the only place that knows :mod:`smbprotocol`.  Blocks.

The library negotiates, logs in and derives the keys, and receives in one thread of its own per
connection.  Its socket is ours (:mod:`proxy.remotes.smb.transport`); so are the messages after the
login, which it would spend ten times as long on, refuse while credits are on their way, take
without a signature, and leave waiting when its thread dies.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import os
import socket
import struct
import threading
import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from cryptography.hazmat.primitives import cmac
from cryptography.hazmat.primitives.ciphers import algorithms
from cryptography.hazmat.primitives.ciphers.aead import AESCCM, AESGCM
from smbprotocol import Dialects
from smbprotocol.connection import Ciphers, Connection, SigningAlgorithms
from smbprotocol.exceptions import SMBAuthenticationError, SMBException, SMBResponseException
from smbprotocol.header import Commands
from smbprotocol.session import Session
from smbprotocol.tree import TreeConnect

from proxy.errors import ProxyError, Refused, Unauthorized, Unreachable
from proxy.remotes.smb import status
from proxy.remotes.smb.options import SMALLEST_DIALECT, SmbOptions, limited
from proxy.remotes.smb.status import StatusError, from_status
from proxy.remotes.smb.transport import CALL_SECONDS, CONNECT_SECONDS, Transport
from proxy.remotes.smb.wire import (
    COMPRESSED,
    ENCRYPTED,
    HEADER_SIZE,
    PAYLOAD_OF_A_CREDIT,
    SIGNATURE,
    SIGNED,
    Body,
    Header,
    Message,
    packed,
    parse_header,
)
from proxy.runtime.secrets import scrub_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from smbprotocol.structure import Structure

FLUSH_SECONDS: Final = 600.0
"""For one answer to a flush of a large file."""
IDLE_SECONDS: Final = 60
"""After this silence the server is asked whether it lives; after as much again it is dead."""
_CLOSE_SECONDS: Final = 2.0
_CREDITS: Final = 512
"""Asked for at once: 32 MiB on their way, where the server grants them."""
_LISTING: Final = 256 * 1024
_PENDING: Final = 0x103
_BAD_NETWORK_NAME: Final = 0xC000_00CC
NO_SHARE: Final = "ENOSHARE"
"""Of the error that says that the server has no such share (now)."""
_GMAC: Final = SigningAlgorithms.AES_GMAC
_GCM: Final = (Ciphers.AES_128_GCM, Ciphers.AES_256_GCM)
_TRANSFORM = struct.Struct("<4s16s16sIHHQ")
_AUTHENTICATED: Final = slice(20, 52)

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


class Pending:
    """A message whose answer is waited for."""

    __slots__ = ("body", "command", "event", "message_id", "status")

    def __init__(self, message_id: int, command: int) -> None:
        self.message_id = message_id
        self.command = command
        self.event = threading.Event()
        self.status: int | None = None
        """``None`` when the connection was lost before the answer."""
        self.body = memoryview(b"")


class _Connection(Connection):
    """The library's connection for the login; our messages pass it by (:meth:`submit`, and
    :meth:`_take` in its thread), with its keys, ids and credits."""

    def __init__(self, login: Login, transport: Transport, *, sign: bool) -> None:
        self._own_transport = transport
        self._granted = threading.Condition()
        self._pending: dict[int, Pending] = {}
        self._has_ended = False
        self._ciphers: tuple[_Cipher, _Cipher] | None = None
        super().__init__(uuid.uuid4(), login.server, login.options.port, require_signing=sign)
        self._receive_timeout = IDLE_SECONDS
        transport.taker = self._take

    @property
    def transport(self) -> Transport:
        return self._own_transport

    @transport.setter
    def transport(self, _theirs: object) -> None:
        """``connect`` would put its own here."""

    def submit(
        self, messages: Sequence[Message], session: Session, tree: TreeConnect, deadline: float
    ) -> list[Pending]:
        """Send, once the server has granted the credits."""
        multi = self.supports_multi_credit
        charges = [message.charge if multi else 0 for message in messages]
        first = self._reserve(sum(max(1, charge) for charge in charges), deadline)
        encrypt = bool(session.encrypt_data or tree.encrypt_data)
        sign = bool(session.signing_required and session.signing_key and not encrypt)
        buffer, places = packed(
            messages,
            first_id=first,
            charges=charges,
            sign=sign,
            session_id=session.session_id,
            tree_id=tree.tree_connect_id,
        )
        if sign:
            view = memoryview(buffer)
            for message, (number, start, end) in zip(messages, places, strict=True):
                part = view[start:end]
                part[SIGNATURE] = self._sign(part, session, number, message.command)
        pending = [
            Pending(number, message.command)
            for message, (number, _, _) in zip(messages, places, strict=True)
        ]
        with self._granted:
            if self._has_ended:
                raise ConnectionResetError("closed")
            self._pending.update((each.message_id, each) for each in pending)
        self.transport.send(self._encrypted(buffer, session) if encrypt else buffer)
        return pending

    def _reserve(self, wanted: int, deadline: float) -> int:
        """The first of so many ids in a row."""
        while True:
            with self.sequence_lock:
                window = self.sequence_window
                if window["high"] - window["low"] >= wanted:
                    window["low"] += wanted
                    return window["low"] - wanted
            with self._granted:
                if self._has_ended:
                    raise ConnectionResetError("closed")
                if time.monotonic() >= deadline:
                    raise TimeoutError("the server grants no credits")
                self._granted.wait(0.005)

    def forget(self, pending: Pending) -> None:
        self._pending.pop(pending.message_id, None)

    # -- signing and encrypting

    def _sign(
        self, part: Body, session: Session, message_id: int, command: int, *, answer: bool = False
    ) -> bytes:
        """Of a message whose signature is zeros ([MS-SMB2] 3.1.4.1)."""
        assert session.signing_key is not None, "no key"
        if self.dialect >= Dialects.SMB_3_1_1 and self.signing_algorithm_id == _GMAC:
            nonce = struct.pack("<QI", message_id, int(answer))
            return AESGCM(session.signing_key).encrypt(nonce, b"", part)
        if self.dialect >= Dialects.SMB_3_0_0:
            algorithm = cmac.CMAC(algorithms.AES(session.signing_key))
            algorithm.update(bytes(part))
            return algorithm.finalize()
        return self._generate_signature(
            bytes(part), session.signing_key, message_id, answer, command
        )

    def _encrypted(self, buffer: bytearray, session: Session) -> bytearray:
        sealing, _ = self._sealing(session)
        nonce = os.urandom(sealing.nonce_size)
        head = _TRANSFORM.pack(
            ENCRYPTED, bytes(16), nonce.ljust(16, b"\0"), len(buffer), 0, 1, session.session_id
        )
        sealed = sealing.cipher.encrypt(nonce, buffer, head[_AUTHENTICATED])
        result = bytearray(head)
        result[4:20] = sealed[-16:]
        result += memoryview(sealed)[:-16]
        return result

    def _decrypted(self, message: bytearray) -> bytearray:
        if len(message) < _TRANSFORM.size:
            raise ValueError("an encrypted answer is cut")
        _, tag, nonce, _, _, flags, session_id = _TRANSFORM.unpack_from(message)
        session = self.session_table.get(session_id)
        if session is None or flags != 1:
            raise ValueError("an encrypted answer of no session of ours")
        _, opening = self._sealing(session)
        body = bytes(memoryview(message)[_TRANSFORM.size :]) + tag
        plain = opening.cipher.decrypt(
            nonce[: opening.nonce_size], body, bytes(memoryview(message)[_AUTHENTICATED])
        )
        return bytearray(plain)

    def _sealing(self, session: Session) -> tuple[_Cipher, _Cipher]:
        if self._ciphers is None:
            keys = session.encryption_key, session.decryption_key
            assert keys[0] is not None, "no keys"
            assert keys[1] is not None, "no keys"
            is_gcm = self.dialect >= Dialects.SMB_3_1_1 and self.cipher_id in _GCM
            self._ciphers = (_Cipher(keys[0], is_gcm), _Cipher(keys[1], is_gcm))
        return self._ciphers

    # -- in the library's thread

    def _take(self, message: bytearray) -> bool:
        """Hand the answers to our messages to those that wait; false for the library's."""
        is_encrypted = message.startswith(ENCRYPTED)
        if is_encrypted:
            message = self._decrypted(message)
        elif message.startswith(COMPRESSED):
            raise ValueError("a compressed answer")
        start = 0
        if parse_header(message, 0).message_id not in self._pending:
            return False
        while start < len(message):
            header = parse_header(message, start)
            part = memoryview(message)[start : header.end]
            pending = self._pending.get(header.message_id)
            if pending is None or not header.is_answer or header.command != pending.command:
                raise ValueError("an answer to nothing that was asked")
            self._check_protection(part, header, is_encrypted=is_encrypted)
            with self.sequence_lock:
                self.sequence_window["high"] += header.credits
            if header.status != _PENDING:
                del self._pending[header.message_id]
                pending.status = header.status
                pending.body = part[HEADER_SIZE:]
                pending.event.set()
            start = header.end
        with self._granted:
            self._granted.notify_all()
        return True

    def _check_protection(self, part: memoryview, header: Header, *, is_encrypted: bool) -> None:
        session = next(iter(self.session_table.values()), None)
        if is_encrypted or session is None:
            return
        if session.encrypt_data:
            raise ValueError("an answer came in clear on an encrypted session")
        if not session.signing_required or header.status == _PENDING:
            return
        if not header.is_signed:
            raise ValueError("an answer came without a signature")
        shown = bytes(part[SIGNATURE])
        part[SIGNATURE] = bytes(16)
        own = self._sign(part, session, header.message_id, header.command, answer=True)
        if not hmac.compare_digest(shown, own):
            raise ValueError("an answer's signature is wrong")

    def verify_signature(self, header: Structure, session_id: int, force: bool = False) -> None:
        """Of answers to the library's own messages that were not encrypted.  It passes those that
        carry no signature, so that anybody on the way could answer in the server's name."""
        session = self.session_table.get(session_id)
        if (
            session is not None
            and header["status"].get_value() != _PENDING
            and header["command"].get_value() != Commands.SMB2_SESSION_SETUP
        ):
            if session.encrypt_data:
                raise SMBException("an answer came in clear on an encrypted session")
            if session.signing_required and not header["flags"].has_flag(SIGNED):
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
            with self._granted:
                self._has_ended = True
                waiting, self._pending = tuple(self._pending.values()), {}
                self._granted.notify_all()
            for pending in waiting:
                pending.event.set()

    @property
    def cause(self) -> Exception | None:
        """Why the library's thread ended, where that was no end of the connection."""
        return self._t_exc


class _Cipher:
    def __init__(self, key: bytes, is_gcm: bool) -> None:
        self.cipher = AESGCM(key) if is_gcm else AESCCM(key)
        self.nonce_size = 12 if is_gcm else 11


class Link:
    """A share that can be used.  Thread-safe; once lost it stays so, a new one is needed.

    Errors of single messages are :class:`StatusError`; ``Unreachable`` when it is lost.
    """

    def __init__(self, connection: _Connection, session: Session, tree: TreeConnect) -> None:
        self._connection = connection
        self._session = session
        self._tree = tree
        least = PAYLOAD_OF_A_CREDIT
        sizes = [connection.max_read_size, connection.max_write_size, connection.max_transact_size]
        if not connection.supports_multi_credit:
            sizes = [min(size, least) for size in sizes]
        self.max_read, self.max_write, most = (limited(max(4096, size)) for size in sizes)
        self.max_listing = min(most, _LISTING)
        self.dialect = connection.dialect
        self.is_encrypted = bool(session.encrypt_data or tree.encrypt_data)
        self.is_signed = bool(session.signing_required)

    @property
    def is_lost(self) -> bool:
        return not self._connection.transport.connected

    def start(self, *messages: Message, seconds: float = CALL_SECONDS) -> list[Pending]:
        """Send ``messages`` as one compound; for each answer :meth:`finish` must be called."""
        try:
            return self._connection.submit(
                messages, self._session, self._tree, time.monotonic() + seconds
            )
        except Exception as error:
            raise self._lose(error) from error

    def finish(self, pending: Pending, *, seconds: float = CALL_SECONDS) -> memoryview:
        """The body of the answer."""
        if not pending.event.wait(seconds):
            self._connection.forget(pending)
            raise self._lose(TimeoutError())
        if pending.status is None:
            raise self._lose(self._connection.cause or ConnectionResetError())
        if pending.status in status.SESSION_LOST:
            raise self._lose(ConnectionResetError())
        if pending.status != 0:
            raise StatusError(pending.status)
        return pending.body

    def call(self, message: Message, *, seconds: float = CALL_SECONDS) -> memoryview:
        return self.finish(self.start(message, seconds=seconds)[0], seconds=seconds)

    def compound(self, *messages: Message, seconds: float = CALL_SECONDS) -> list[memoryview]:
        """Messages about one file that the first opens and the last closes, in one round trip.

        Raises the first failure, with its ``step``.
        """
        return self.collect(self.start(*messages, seconds=seconds), seconds=seconds)

    def collect(
        self, requests: Sequence[Pending], *, seconds: float = CALL_SECONDS
    ) -> list[memoryview]:
        """The answers of a compound; all are taken, whatever the first ones are."""
        bodies: list[memoryview] = []
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
                with _bounded(self._connection, _CLOSE_SECONDS):
                    self._connection.disconnect(close=True, timeout=_CLOSE_SECONDS)
        with contextlib.suppress(Exception):
            self._connection.disconnect(close=False)

    def _lose(self, error: BaseException) -> Unreachable:
        self.abort()
        if isinstance(error, TimeoutError):
            code, why = "ETIMEDOUT", "the SMB server does not answer; the connection was given up"
        elif isinstance(error, OSError):
            code, why = "ECONNRESET", "the connection to the SMB server was lost"
        else:
            text = scrub_text(str(error) or type(error).__name__)[:500]
            code, why = "EPROTO", f"the connection to the SMB server was given up: {text}"
        return Unreachable(f"{code}: {why}", code=code)


def connect(login: Login, transport: Transport) -> Link:
    """Connect, log in, open the share.  Blocks for :data:`CONNECT_SECONDS` per step at most, and
    not beyond an abort of ``transport``.

    Raises ``Unreachable``, with the code :data:`NO_SHARE` naming the share; ``Unauthorized`` for a
    wrong user or password; ``Refused`` for a server that is not as safe as the options demand.
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
    with _bounded(connection, 2 * CONNECT_SECONDS):
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
def _bounded(connection: _Connection, seconds: float) -> Iterator[None]:
    """The library waits without an end for the answers to a login or a logoff."""
    timer = threading.Timer(seconds, connection.transport.abort)
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
        # a share that is gone must not look like a file that is: that could be removed
        if error.status in (_BAD_NETWORK_NAME, *status.MISSING):
            return Unreachable(
                f"ENOENT: the SMB server {where} has no share '{login.share}'",
                code=NO_SHARE,
                data=data,
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
