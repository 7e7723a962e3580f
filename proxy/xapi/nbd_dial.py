"""Where a disk is served over NBD, and how one of these places is reached."""

from __future__ import annotations

from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

import trio

from proxy.errors import ProxyError, Unreachable
from proxy.formats.nbd import LONGEST_TEXT, Export, Receive, Send, StartTls, greet, open_export
from proxy.runtime import transport
from proxy.runtime.deadlines import deadline
from proxy.runtime.pinning import check_pin, pinned_context

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Generator, Mapping, Sequence

    from proxy.formats.nbd import Step
    from proxy.runtime.transport import Connection

T = TypeVar("T")

NO_NBD: Final = "NO_NBD_AVAILABLE"
MOST_PER_HOST: Final = 16
"""What a host serves at once, to all its clients."""
_HEAD_START: Final = 0.25
"""Seconds before the next candidate is tried beside one that has not answered yet."""


@dataclass(frozen=True, slots=True)
class NbdInfo:
    """One place where a disk is served: an entry of ``VDI.get_nbd_info``.

    The name of the export holds the session, so it is a secret.  Without ``certificate`` (PEM)
    TLS is not tried; with it, ``allow_plain`` says whether a server may refuse TLS.
    """

    address: str
    port: int
    name: str = field(repr=False)
    certificate: str = field(default="", repr=False)
    subject: str = ""
    allow_plain: bool = False

    @classmethod
    def from_record(cls, record: Mapping[str, Any], *, allow_plain: bool = False) -> Self:
        """Read XAPI's entry; raises ``Unreachable`` (``EPROTO``) when it is none."""
        try:
            address, name = str(record["address"]), str(record["exportname"])
            port = int(record["port"])
            address.encode("idna")
            usable = 0 < port < 65536 and len(name.encode()) <= LONGEST_TEXT
        except (KeyError, ValueError, TypeError) as error:
            raise Unreachable("VDI.get_nbd_info answered no address", code="EPROTO") from error
        if not usable:
            raise Unreachable("VDI.get_nbd_info answered no address", code="EPROTO")
        certificate, subject = str(record.get("cert") or ""), str(record.get("subject") or "")
        return cls(address, port, name, certificate, subject, allow_plain)

    @property
    def host(self) -> str:
        """What all addresses of one host have in common."""
        return self.subject or self.address


class Dialer:
    """Opens connections to the candidates ``infos``, each to the best one that works.

    Best is who failed least and has the fewest connections of ours; nobody gets more than
    :data:`MOST_PER_HOST`.  A candidate that keeps silent does not hold up the others.
    """

    def __init__(self, infos: Sequence[NbdInfo], *, size: int | None, seconds: float) -> None:
        self.infos = list(infos)
        self.size = size
        """Bytes that a candidate must have; what the first one told if nothing was given."""
        self._seconds = seconds
        self._failures: Counter[tuple[str, int]] = Counter()
        self._connections: Counter[str] = Counter()

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[tuple[Connection, Export]]:
        """A connection on which the export is open; closed at the end.

        Raises ``Unreachable`` (``NO_NBD_AVAILABLE``) when none could be opened in time; its
        ``data`` tells each candidate's reason.  On cancel nothing stays open.
        """
        info, connection, export = await self._open()
        try:
            yield connection, export
        finally:
            connection.abort()
            self._connections[info.host] -= 1

    def failed(self, peer: str) -> None:
        """``peer`` worked and works no more: try it last for now."""
        for info in self.infos:
            if _peer(info) == peer:
                self._failures[info.address, info.port] += 1

    async def _open(self) -> tuple[NbdInfo, Connection, Export]:
        reasons: dict[str, str] = {}
        left = list(self.infos)
        try:
            with deadline("NBD: connection", self._seconds):
                while left:
                    info, connection = await self._race(left, reasons)
                    try:
                        export = await _drive(open_export(info.name), connection)
                        self._check_size(export, connection.peer)
                    except BaseException as error:
                        connection.abort()
                        self._connections[info.host] -= 1
                        if not isinstance(error, ProxyError):
                            raise
                        self._struck(info, left, reasons, error)
                        continue
                    self._failures[info.address, info.port] = 0
                    return info, connection, export
        except Unreachable as error:
            if error.code == "ETIMEDOUT":
                reasons.setdefault("", error.message)
        raise Unreachable(
            "the disk cannot be read over NBD"
            + (f": {next(iter(reasons.values()))}" if reasons else ": no host serves it"),
            code=NO_NBD,
            data={"reasons": [f"{peer} {why}".strip() for peer, why in reasons.items()]},
        )

    def _check_size(self, export: Export, peer: str) -> None:
        if self.size is None:
            self.size = export.size
        if export.size < self.size:
            raise Unreachable(
                f"{peer} serves {export.size} bytes of a disk of {self.size}", code="EPROTO"
            )

    def _rank(self, info: NbdInfo) -> tuple[int, int]:
        return self._failures[info.address, info.port], self._connections[info.host]

    def _struck(
        self, info: NbdInfo, left: list[NbdInfo], reasons: dict[str, str], error: ProxyError
    ) -> None:
        left.remove(info)
        self._failures[info.address, info.port] += 1
        reasons[_peer(info)] = error.message

    async def _race(
        self, left: list[NbdInfo], reasons: dict[str, str]
    ) -> tuple[NbdInfo, Connection]:
        """The first of ``left`` that greets; those that failed are removed from it."""
        winners: list[tuple[NbdInfo, Connection]] = []

        async def attempt(info: NbdInfo, failed: trio.Event) -> None:
            try:
                connection = await self._greeted(info)
            except BaseException as error:
                self._connections[info.host] -= 1
                failed.set()
                if not isinstance(error, ProxyError):
                    raise
                self._struck(info, left, reasons, error)
                return
            if winners:
                connection.abort()
                self._connections[info.host] -= 1
                return
            winners.append((info, connection))
            nursery.cancel_scope.cancel()

        try:
            async with trio.open_nursery() as nursery:
                untried = list(left)
                while untried:
                    info = min(untried, key=self._rank)
                    untried.remove(info)
                    if self._connections[info.host] >= MOST_PER_HOST:
                        left.remove(info)
                        reasons[_peer(info)] = "has as many connections as a host serves"
                        continue
                    self._connections[info.host] += 1
                    failed = trio.Event()
                    nursery.start_soon(attempt, info, failed)
                    with trio.move_on_after(_HEAD_START):
                        await failed.wait()
        except BaseException:
            for info, connection in winners:
                connection.abort()
                self._connections[info.host] -= 1
            raise
        if not winners:
            raise Unreachable("no candidate is left", code=NO_NBD)
        return winners[0]

    async def _greeted(self, info: NbdInfo) -> Connection:
        """Connect, and start TLS where the server has it."""
        connection = await transport.connect(
            info.address, info.port, context=None, proxy=None, seconds=self._seconds
        )
        try:
            steps = greet(tls=bool(info.certificate), allow_plain=info.allow_plain)
            if await _drive(steps, connection):
                check_pin(
                    connection.certificate,
                    info.certificate,
                    connection.peer,
                    subject=info.subject,
                )
        except BaseException:
            connection.abort()
            raise
        return connection


def _peer(info: NbdInfo) -> str:
    """As ``Connection.peer`` names it."""
    return f"[{info.address}]:{info.port}" if ":" in info.address else f"{info.address}:{info.port}"


async def _drive(steps: Generator[Step, bytes, T], connection: Connection) -> T:
    """Carry out the steps of a handshake."""
    step = next(steps)
    while True:
        answer = b""
        match step:
            case Send(data):
                await connection.send_message(data)
            case Receive(count):
                answer = await connection.receive_exactly(count)
            case StartTls():
                await connection.start_tls(pinned_context())
        try:
            step = steps.send(answer)
        except StopIteration as stop:
            result: T = stop.value
            return result
