"""The socket under a connection to an SMB server.  Blocks."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
import threading
import time
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable

CONNECT_SECONDS: Final = 15.0
CALL_SECONDS: Final = 60.0
"""For one answer, and for the server's side to take what was sent."""
_LARGEST_ANSWER: Final = 9 * 1024 * 1024


class Transport:
    """The socket under a connection, in place of the library's own.

    That one blocks for good in a send to a dead server and cannot be closed meanwhile, waits
    with ``select``, which fails from the 1,024th descriptor on, and copies each message
    three times.
    """

    def __init__(self, address: str, port: int) -> None:
        self.connected = False
        self.taker: Callable[[bytearray], bool] = _takes_nothing
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
        if not isinstance(message, bytes | bytearray):  # one of the library's, encrypted
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
        """The next message that :attr:`taker` does not take, ``b""`` at the end; ``TimeoutError``
        when nothing comes in time."""
        while True:
            message = self._message(timeout)
            if not message or not self.taker(message):
                return bytes(message)

    def _message(self, timeout: float) -> bytearray:
        assert self._socket is not None, "not connected"
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        if not poll.poll(timeout * 1000):
            raise TimeoutError
        head = self._receive(4)
        if len(head) < 4:
            return bytearray()
        (length,) = struct.unpack(">I", head)
        if length > _LARGEST_ANSWER:
            raise ValueError(f"the server announces a message of {length} bytes")
        message = self._receive(length)
        return message if len(message) == length else bytearray()

    def _receive(self, length: int) -> bytearray:
        assert self._socket is not None, "not connected"
        buffer = bytearray(length)
        filled = 0
        try:
            while filled < length:
                rest = memoryview(buffer)[filled:]
                count = self._socket.recv_into(rest, 0, socket.MSG_WAITALL)
                if count == 0:
                    break
                filled += count
        except OSError:  # ended, by the server or by us
            filled = 0
        return buffer if filled == length else buffer[:filled]


def _takes_nothing(_message: bytearray) -> bool:
    return False
