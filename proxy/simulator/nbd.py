"""Disks over NBD, read-only, as the hosts of a pool serve them.

Each host serves on a port of its own, whatever the networks say; ``VDI.get_nbd_info`` tells
about it, and a client gets further than the connection, only when a network has the purpose
``nbd`` (with TLS) or ``insecure_nbd`` (without), and not both are in use.

Points for faults and gates: ``NBD`` a connection (cut, rate and byte gates count all bytes that
are sent on it), ``NBD.starttls`` (``error``: refused), ``NBD.export`` (``error``: hang up,
``size``: tell this size), ``NBD.read`` (``error``: its name is the error of the reply, ``hang``:
no reply).  ``drop`` hangs up at any of them.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

import trio

from proxy.errors import Corrupt, XapiError
from proxy.formats.nbd import REQUEST_SIZE, Command, Export, Receive, Send, StartTls
from proxy.formats.nbd_server import Given, Lookup, Request, Tls, parse_request, reply, shake_hands
from proxy.runtime.threads import Work, in_thread
from proxy.simulator.certificate import certificate_pem, server_context
from proxy.simulator.disks import UNIT
from proxy.simulator.http import Gone, Wire
from proxy.simulator.transfers import CutShort, Outlet, Transfer

if TYPE_CHECKING:
    from proxy.simulator.disks import DiskContent
    from proxy.simulator.faults import Fault
    from proxy.simulator.pool import SimulatedPool

MOST_CONNECTIONS = 16
"""Of one host, whoever opens them."""
_LARGEST_READ = 32 * 1024 * 1024
_ZEROS = bytes(UNIT)
_STUCK = 3
"""Looks at a connection that its client left, before it counts as standing still."""


class NbdHosts:
    """Where the pool's hosts serve NBD, and how many connections each has."""

    def __init__(self, pool: SimulatedPool) -> None:
        self._pool = pool
        self.ports: dict[str, int] = {}
        """By host."""
        self.open: Counter[str] = Counter()

    def _purposes(self) -> set[str]:
        networks = self._pool.store.all("network")
        found = {purpose for _, record in networks for purpose in record["purpose"]}
        return found & {"nbd", "insecure_nbd"}

    @property
    def tls(self) -> Tls | None:
        """What a new connection gets; ``None``: nothing, the pool serves no NBD."""
        match sorted(self._purposes()):
            case ["nbd"]:
                return "required"
            case ["insecure_nbd"]:
                return "refused"
            case _:
                return None

    def info(self, session: str, vdi: str) -> list[dict[str, Any]]:
        """The answer of ``VDI.get_nbd_info``."""
        store = self._pool.store
        self._pool.disks.content(vdi)
        record = store.get("VDI", vdi)
        pbds = [store.get("PBD", ref) for ref in store.get("SR", record["SR"])["PBDs"]]
        hosts = {pbd["host"] for pbd in pbds if pbd["currently_attached"]} & self.ports.keys()
        return [
            {
                "exportname": f"/{record['uuid']}?session_id={session}",
                "address": pif["IP"],
                "port": self.ports[pif["host"]],
                "cert": certificate_pem(),
                "subject": store.get("host", pif["host"])["hostname"],
            }
            for _, pif in store.all("PIF")
            if pif["host"] in hosts and pif["currently_attached"] and pif["IP"]
            if {"nbd", "insecure_nbd"} & set(store.get("network", pif["network"])["purpose"])
        ]

    def resolve(self, name: str) -> str:
        """The VDI that an export's name means; raises ``XapiError``."""
        path, _, query = name.partition("?")
        self._pool.sessions.check(parse_qs(query).get("session_id", [""])[0])
        vdi = self._pool.store.by_uuid("VDI", path.removeprefix("/"))
        self._pool.disks.content(vdi)
        return vdi


async def serve_nbd(pool: SimulatedPool, host: str, raw: trio.SocketStream) -> None:
    """Serve one connection to ``host``; its disk is attached to dom0 while it is read."""
    tls = pool.nbd.tls
    transfer = Transfer("NBD", "", anonymous=True, fault=pool.faults.take("NBD"))
    pool.connections += 1
    pool.nbd.open[host] += 1
    pool.transfers.add(transfer)
    pool.transfer_log.append(transfer)
    connection = _Connection(pool, raw, transfer)
    try:
        if tls is not None and pool.nbd.open[host] <= MOST_CONNECTIONS:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(connection.watch, nursery.cancel_scope)
                await connection.run(tls)
                transfer.ended = "complete"
                nursery.cancel_scope.cancel()
    except* (Gone, CutShort, Corrupt, _HungUp, OSError):
        pass
    except* (trio.BrokenResourceError, trio.ClosedResourceError):
        pass
    finally:
        transfer.ended = transfer.ended or "client left"
        pool.transfers.discard(transfer)
        pool.nbd.open[host] -= 1
        pool.connections -= 1
        connection.release()
        await trio.aclose_forcefully(raw)


class _HungUp(Exception):
    """The server ends the connection without a word."""


class _Connection:
    def __init__(self, pool: SimulatedPool, raw: trio.SocketStream, transfer: Transfer) -> None:
        self._pool = pool
        self._raw = raw
        self._transfer = transfer
        self._wire = Wire(raw, raw)
        self._outlet = Outlet(pool, self._wire, transfer)
        self._content: DiskContent | None = None
        self._drive = ""
        self._reading = False

    async def watch(self, scope: trio.CancelScope) -> None:
        """Notice also at a gate or in a stall that the client is gone.

        While requests are read their reader meets the end, behind what was still sent: to
        close over an unread goodbye would reset the connection.
        """
        await self._wire.client_left()
        stuck = 0
        while stuck < _STUCK:
            await trio.sleep(0.02)
            stuck = 0 if self._reading else stuck + 1
        scope.cancel()

    def release(self) -> None:
        """Detach the disk, at once or when dom0 gets round to it."""
        if self._drive and self._pool.dom0_lag > 0:
            self._pool.spawn(_release_later, self._pool, self._drive)
        elif self._drive:
            self._pool.disks.detach_from_dom0(self._drive)

    async def run(self, tls: Tls) -> None:
        await self._pass("NBD", self._transfer.fault)
        self._transfer.gates = tuple(self._pool.gates.along("NBD"))
        self._outlet = Outlet(self._pool, self._wire, self._transfer)
        if self._pool.faults.take("NBD.starttls"):
            tls = "refused"
        export = await self._shake_hands(tls)
        if export is None:
            return
        while True:
            request = parse_request(await self._receive(REQUEST_SIZE))
            if request.command == Command.DISCONNECT:
                return
            await self._answer(request, export.size)

    async def _pass(self, point: str, fault: Fault | None) -> None:
        if fault is not None:
            await trio.sleep(fault.delay)
            if fault.drop:
                raise _HungUp
        await self._pool.gates.pass_by(point, "before")

    async def _receive(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            self._reading = True
            part = await self._wire.stream.receive_some(count - len(data))
            self._reading = False
            if not part:
                raise Gone
            data += part
        return bytes(data)

    async def _shake_hands(self, tls: Tls) -> Export | None:
        steps = shake_hands(tls=tls)
        given: Given = None
        while True:
            try:
                step = steps.send(given)
            except StopIteration as stop:
                export: Export | None = stop.value
                return export
            given = b""
            match step:
                case Send(data):
                    await self._outlet.send(data)
                case Receive(count):
                    given = await self._receive(count)
                case StartTls():
                    await self._pool.gates.pass_by("NBD.starttls", "before")
                    self._wire.stream = trio.SSLStream(
                        self._raw, server_context(), server_side=True, https_compatible=True
                    )
                case Lookup(name, opening):
                    given = await self._lookup(name, opening=opening)

    async def _lookup(self, name: str, *, opening: bool) -> Export | None:
        pool = self._pool
        fault = pool.faults.take("NBD.export") if opening else None
        if opening:
            await self._pass("NBD.export", fault)
        if fault is not None and fault.error:
            return None
        try:
            vdi = pool.nbd.resolve(name)
            self._content = pool.disks.content(vdi)
            if opening:
                self._drive = pool.disks.attach_to_dom0(vdi)
        except XapiError:
            return None
        size = self._content.size
        if opening:
            await pool.gates.pass_by("NBD.export", "after")
        return Export(fault.size if fault is not None and fault.size is not None else size)

    async def _answer(self, request: Request, size: int) -> None:
        if request.payload > _LARGEST_READ:
            raise _HungUp
        await self._receive(request.payload)
        error = _refusal(request, size)
        fault = self._pool.faults.take("NBD.read") if not error else None
        await self._pass("NBD.read", fault)
        if fault is not None and fault.hang:
            return
        if fault is not None and fault.error:
            error = fault.error[0]
        drive = self._pool.store.find("VBD", self._drive)
        if drive is None or not drive["currently_attached"]:
            raise _HungUp
        await self._outlet.send(reply(request.handle, error))
        if not error:
            await self._send_data(request.offset, request.length)
            await self._pool.gates.pass_by("NBD.read", "after")

    async def _send_data(self, offset: int, length: int) -> None:
        content = self._content
        assert content is not None
        while length:
            count = min(length, UNIT - offset % UNIT)
            if offset >= content.size:
                pieces = None  # it told more than there is
            elif content.file is not None:
                pieces = await in_thread(Work.DISK, content.read, offset, count)
            else:
                pieces = content.read(offset, count)
            await self._outlet.send_together(pieces or [memoryview(_ZEROS)[:count]])
            offset += count
            length -= count


def _refusal(request: Request, size: int) -> str:
    """The error of a request that is not served."""
    if request.command == Command.WRITE:
        return "EPERM"
    fits = request.offset + request.length <= size and 0 < request.length <= _LARGEST_READ
    return "" if request.command == Command.READ and fits else "EINVAL"


async def _release_later(pool: SimulatedPool, drive: str) -> None:
    await trio.sleep(pool.dom0_lag)
    pool.disks.detach_from_dom0(drive)
