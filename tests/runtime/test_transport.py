"""Bulk connections over real sockets."""

from __future__ import annotations

import socket
import struct

import pytest
import trio

from proxy.errors import Unreachable
from proxy.runtime.transport import Connection


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
