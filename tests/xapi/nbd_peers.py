"""NBD servers that others wrote, and one of our own that can be wrong in any way."""

from __future__ import annotations

import socket
import struct
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

HELLO = b"NBDMAGICIHAVEOPT\0\3"


@contextmanager
def started(*command: str) -> Iterator[int]:
    """Run nbdkit or qemu-nbd on a socket that listens already; yields its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = int(listener.getsockname()[1])
        # systemd's socket activation: descriptor 3, and the process id that it is meant for
        activated = f'LISTEN_PID=$$ LISTEN_FDS=1 exec "$@" 3<&{listener.fileno()}'
        process = subprocess.Popen(
            ["bash", "-c", activated, "bash", *command],
            pass_fds=[listener.fileno()],
            stdout=subprocess.DEVNULL,
        )
    try:
        yield port
    finally:
        process.kill()
        process.wait()


@contextmanager
def nbdkit(*arguments: str) -> Iterator[int]:
    with started("nbdkit", "--foreground", "--exit-with-parent", *arguments) as port:
        yield port


@contextmanager
def qemu_nbd(image: Path, name: str) -> Iterator[int]:
    command = ["--read-only", "--format=raw", "--persistent", f"--export-name={name}", "--shared=4"]
    with started("qemu-nbd", *command, str(image)) as port:
        yield port


@dataclass
class Peer:
    """Serves ``content``; ``on_request`` answers each (handle, offset, length)."""

    content: bytes
    port: int = 0
    size: int | None = None
    tells: bytes = b""
    """Sent in place of a proper beginning."""
    on_request: Callable[[trio.SocketStream, int, int, int], Awaitable[None]] | None = None
    connections: int = 0
    opened: int = 0
    requests: list[tuple[int, int]] = field(default_factory=list)

    async def serve(self, stream: trio.SocketStream) -> None:
        self.connections += 1
        self.opened += 1
        try:
            await self._serve(stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError, EOFError):
            pass
        finally:
            self.connections -= 1
            await trio.aclose_forcefully(stream)

    async def _serve(self, stream: trio.SocketStream) -> None:
        await stream.send_all(self.tells or HELLO)
        assert await exactly(stream, 4) == b"\0\0\0\1"
        magic, option, length = struct.unpack(">8sII", await exactly(stream, 16))
        assert (magic, option) == (b"IHAVEOPT", 1)
        await exactly(stream, length)
        size = len(self.content) if self.size is None else self.size
        await stream.send_all(struct.pack(">QH", size, 3) + bytes(124))
        while True:
            request = struct.unpack(">IHHQQI", await exactly(stream, 28))
            assert request[0] == 0x25609513
            if request[2] == 2:
                return
            assert request[1:3] == (0, 0)
            handle, offset, length = request[3:]
            self.requests.append((offset, length))
            await (self.on_request or self.answer)(stream, handle, offset, length)

    async def answer(
        self, stream: trio.SocketStream, handle: int, offset: int, length: int
    ) -> None:
        await stream.send_all(reply(handle) + self.content[offset : offset + length])


def reply(handle: int, error: int = 0) -> bytes:
    return struct.pack(">IIQ", 0x67446698, error, handle)


async def exactly(stream: trio.SocketStream, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        part = await stream.receive_some(count - len(data))
        if not part:
            raise EOFError
        data += part
    return bytes(data)


@asynccontextmanager
async def listening(peer: Peer) -> AsyncIterator[Peer]:
    async with trio.open_nursery() as nursery:
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        peer.port = listener.socket.getsockname()[1]
        nursery.start_soon(trio.serve_listeners, peer.serve, [listener])
        yield peer
        nursery.cancel_scope.cancel()
