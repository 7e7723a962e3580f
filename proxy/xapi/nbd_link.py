"""One NBD connection with several reads in flight, each received straight into its block."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from proxy.errors import ProxyError, Unreachable
from proxy.formats.nbd import REPLY_SIZE, Requests, disconnect
from proxy.runtime.deadlines import deadline

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Awaitable, Callable

    from proxy.runtime.transport import Connection

_SCRATCH: Final = 256 * 1024


class Read:
    """``len(view)`` bytes at ``offset`` that somebody waits for.

    ``done`` is set when they are in ``view`` or ``error`` says why not.
    """

    def __init__(self, offset: int, view: memoryview) -> None:
        self.offset = offset
        self.length = len(view)
        self.done = trio.Event()
        self.error: ProxyError | None = None
        self._view: memoryview | None = view
        self._lent = False
        self._returned = trio.Event()

    @property
    def wanted(self) -> bool:
        return self._view is not None

    def finish(self, error: ProxyError | None = None) -> None:
        self.error = error
        self.done.set()

    def lend(self, received: int) -> memoryview | None:
        """What is still to be filled; ``None`` when nobody waits any more."""
        if self._view is None:
            return None
        self._lent = True
        return self._view[received:]

    def give_back(self) -> None:
        """No thread writes into the view any more."""
        self._lent = False
        if self._view is None:
            self._returned.set()

    async def abandon(self) -> None:
        """Nobody waits any more; returns, whatever is cancelled, when no thread has the view."""
        self._view = None
        if self._lent:
            with trio.CancelScope(shield=True):
                await self._returned.wait()


class NbdLink:
    """A connection on which an export was opened.

    It is lent up to ``depth`` reads.  One that the server refuses fails alone, and the link
    is not used for new ones: with another connection the host attaches the disk anew.
    ``seconds`` bounds the silence while a reply is due.  ``replied`` is called after each.
    """

    def __init__(
        self, connection: Connection, *, depth: int, seconds: float, replied: Callable[[], None]
    ) -> None:
        self._connection = connection
        self._depth = depth
        self._seconds = seconds
        self._replied = replied
        self._requests = Requests()
        self._reads: dict[int, Read] = {}
        self._outbox = bytearray()
        self._outgoing = trio.Event()
        self._incoming = trio.Event()
        self._scratch = memoryview(bytearray(_SCRATCH))
        self._torn = False
        """A request is sent in part: nothing else may follow it."""
        self._worn = False
        self.served = 0
        """Reads that succeeded."""

    @property
    def in_flight(self) -> int:
        return len(self._reads)

    @property
    def has_room(self) -> bool:
        return not self._worn and len(self._reads) < self._depth

    def take(self, read: Read) -> None:
        """Serve ``read``; never blocks."""
        handle, request = self._requests.read(read.offset, read.length)
        self._reads[handle] = read
        self._outbox += request
        self._outgoing.set()
        self._incoming.set()

    async def run(self) -> ProxyError:
        """Serve until the connection breaks or the server refused a read; says why.

        Afterwards, also on cancel, the socket is closed and no thread works on it.
        """
        reasons: list[ProxyError] = []

        async def until_broken(task: Callable[[], Awaitable[ProxyError]]) -> None:
            try:
                reasons.append(await task())
            except ProxyError as error:
                reasons.append(error)
            nursery.cancel_scope.cancel()

        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(until_broken, self._send)
                nursery.start_soon(until_broken, self._receive)
        finally:
            self._worn = True
            self._connection.close(b"" if self._torn else disconnect())
        return reasons[0]

    def orphans(self) -> list[Read]:
        """The reads that were not answered, once :meth:`run` has ended."""
        left = [read for read in self._reads.values() if read.wanted]
        self._reads.clear()
        return left

    async def _send(self) -> ProxyError:
        while True:
            await self._outgoing.wait()
            self._outgoing = trio.Event()
            data = bytes(self._outbox)
            self._outbox.clear()
            self._torn = True
            await self._connection.send_message(data)
            self._torn = False

    async def _receive(self) -> ProxyError:
        while True:
            if not self._reads:
                self._incoming = trio.Event()
                await self._incoming.wait()
            with self._patience():
                header = await self._connection.receive_exactly(REPLY_SIZE)
            reply = self._requests.reply(header)
            read = self._reads[reply.handle]
            if reply.error:
                refusal = Unreachable(
                    f"{self._connection.peer} cannot read the disk at byte {read.offset}:"
                    f" {reply.error}",
                    code=reply.error,
                    data={"offset": read.offset},
                )
                read.finish(refusal)
                self._worn = True
            else:
                await self._fill(read)
                read.finish()
                self.served += 1
            del self._reads[reply.handle]
            self._replied()
            if self._worn and not self._reads:
                return Unreachable(f"{self._connection.peer} refused a read", code="EIO")

    async def _fill(self, read: Read) -> None:
        received = 0
        while received < read.length:
            view = read.lend(received)
            if view is None:
                view = self._scratch[: read.length - received]
            try:
                with self._patience():
                    moved = await self._connection.receive_ready(view)
            finally:
                read.give_back()
            if moved is None:
                with self._patience():
                    await self._connection.wait_readable()
            elif moved == 0:
                raise Unreachable(
                    f"{self._connection.peer} closed the connection", code="ECONNRESET"
                )
            else:
                received += moved

    def _patience(self) -> contextlib.AbstractContextManager[object]:
        return deadline(f"NBD: data from {self._connection.peer}", self._seconds)
