"""What data requests share: task, faults, gates, and how they end.

A transfer ends in three ways that do not depend on each other: on the wire (closed, reset,
stalled), in its task (success, failure, cancelled, pending) and in the pool's state (disks
detached, operation over).  Faults set the first two apart; the third always happens.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import trio

from proxy.errors import XapiError
from proxy.simulator.http import Gone, error_page, head
from proxy.simulator.tasks import Work

if TYPE_CHECKING:
    from proxy.simulator.faults import Fault, Gate
    from proxy.simulator.http import Head, Wire
    from proxy.simulator.pool import SimulatedPool

_CANCELLED_BY_PEER = ("INTERNAL_ERROR", 'Unix.Unix_error(Unix.EPIPE, "write", "")')


@dataclass(eq=False)
class Transfer:
    """A data request under way, or over (``ended``: how)."""

    path: str
    task: str
    anonymous: bool
    fault: Fault | None = None
    gates: tuple[Gate, ...] = ()
    sent: int = 0
    """Bytes of the body that passed, in either direction."""
    ended: str = ""


class Refusal(Exception):
    """Answer with this status instead of data; ``error`` fails the task."""

    def __init__(self, status: int, error: XapiError | None = None, detail: str = "") -> None:
        super().__init__(status)
        self.status = status
        self.error = error
        self.detail = detail


class CutShort(Exception):
    """A fault ended the body here."""


def named_sr(pool: SimulatedPool, request: Head) -> str | None:
    """The SR that an import names by reference or uuid, unchecked; ``None`` without one."""
    sr = request.common("sr_id")
    if not sr and request.common("sr_uuid"):
        try:
            sr = pool.store.by_uuid("SR", request.common("sr_uuid"))
        except XapiError as error:
            raise Refusal(500, error) from error
    return sr or None


async def guarded(
    pool: SimulatedPool, wire: Wire, request: Head, transfer: Transfer, handler: Any
) -> None:
    """Run the handler; whatever happens the transfer is accounted for and its task settled."""
    fault = transfer.fault
    work = Work(trio.CancelScope(), cancellable=not (fault and fault.ignore_cancel))
    pool.tasks.attach(transfer.task, work)
    pool.transfers.add(transfer)
    pool.transfer_log.append(transfer)
    try:
        with work.scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_watch, wire, nursery.cancel_scope, transfer, request.method)
                await pool.gates.pass_by(request.path, "before")
                transfer.gates = tuple(pool.gates.along(request.path))
                await handler(pool, wire, request, transfer)
                nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        await _ended_badly(pool, wire, transfer, group)
    finally:
        pool.tasks.detach(transfer.task)
        pool.transfers.discard(transfer)
        if work.canceled and work.cancellable:
            transfer.ended = transfer.ended or "cancelled"
            pool.tasks.cancelled(transfer.task)
        elif not transfer.ended:
            transfer.ended = "client left"
            pool.tasks.fail(
                transfer.task, XapiError(_CANCELLED_BY_PEER[0], [_CANCELLED_BY_PEER[1]])
            )
        if transfer.anonymous and pool.store.find("task", transfer.task):
            pool.store.destroy("task", transfer.task)


async def _watch(wire: Wire, scope: trio.CancelScope, transfer: Transfer, method: str) -> None:
    """Notice at once, also in a stall, that the client is gone.

    Only while nothing else would: a PUT body that still waits unread must be taken first.
    """
    await wire.client_left()
    if method == "PUT":
        # the importer meets the end itself, unless it stands at a gate or in a stall
        before = -1
        while before != transfer.sent:
            before = transfer.sent
            await trio.sleep(0.05)
    scope.cancel()


async def _ended_badly(
    pool: SimulatedPool, wire: Wire, transfer: Transfer, group: BaseExceptionGroup[Any]
) -> None:
    """Translate how the handler ended into wire and task."""
    refusals, rest = group.split(Refusal)
    if refusals is not None:
        refusal = _first(refusals)
        transfer.ended = f"refused {refusal.status}"
        if refusal.error is not None:
            pool.tasks.fail(transfer.task, refusal.error)
        detail = refusal.detail or (refusal.error.message if refusal.error else "")
        with contextlib.suppress(Gone):
            await wire.respond(refusal.status, error_page(detail))
    failures, rest = rest.split(XapiError) if rest else (None, None)
    if failures is not None:
        transfer.ended = transfer.ended or "failed"
        pool.tasks.fail(transfer.task, _first(failures))
    surprises, rest = rest.split((TypeError, ValueError, KeyError)) if rest else (None, None)
    if surprises is not None:
        # a request or an archive that makes no sense: xapi fails the task likewise
        transfer.ended = "failed"
        error = XapiError("INTERNAL_ERROR", [repr(_first(surprises))])
        pool.tasks.fail(transfer.task, error)
    _, rest = rest.split((Gone, CutShort)) if rest else (None, None)
    if rest is not None:
        raise rest


def _first(group: BaseExceptionGroup[Any]) -> Any:
    error: Any = group
    while isinstance(error, BaseExceptionGroup):
        inner: Any = error  # pyright: ignore[reportUnknownVariableType]
        error = inner.exceptions[0]
    return error  # pyright: ignore[reportUnknownVariableType]


# Out


class Outlet:
    """Sends a body through the byte gates and the cut, rate and stall of its fault."""

    def __init__(self, pool: SimulatedPool, wire: Wire, transfer: Transfer) -> None:
        self._pool = pool
        self._wire = wire
        self._transfer = transfer
        self._fault = transfer.fault
        self._gates = list(transfer.gates)
        self._started = trio.current_time()

    async def send(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        transfer = self._transfer
        await self._stops()
        while view:
            part = view[: self._until_stop(len(view))]
            await self._wire.send(part)
            transfer.sent += len(part)
            view = view[len(part) :]
            if self._fault and self._fault.rate:
                due = self._started + transfer.sent / self._fault.rate
                await trio.sleep_until(due)
            await self._stops()

    async def send_together(self, pieces: list[memoryview]) -> None:
        """Send pieces as :meth:`send` does, faster where nothing is set up to interfere."""
        if self._gates or self._fault:
            for piece in pieces:
                await self.send(piece)
            return
        await self._wire.send_together(pieces)
        self._transfer.sent += sum(map(len, pieces))

    def _until_stop(self, most: int) -> int:
        stops = [gate.at_bytes for gate in self._gates]
        if self._fault and self._fault.cut and self._fault.after_bytes is not None:
            stops.append(self._fault.after_bytes)
        if self._fault and self._fault.rate:
            most = min(most, max(4096, int(self._fault.rate / 20)))
        ahead = [stop - self._transfer.sent for stop in stops if stop > self._transfer.sent]
        return min([most, *ahead])

    async def _stops(self) -> None:
        while self._gates and self._gates[0].at_bytes <= self._transfer.sent:
            await self._gates.pop(0).hold()
        fault = self._fault
        stop = fault.after_bytes if fault and fault.cut else None
        if fault is not None and stop is not None and self._transfer.sent >= stop:
            await self.cut(fault)

    async def finish(self) -> None:
        """The body is whole: the rest of the faults."""
        for gate in self._gates:
            await gate.hold()
        fault = self._fault
        if fault and fault.cut:
            await self.cut(fault)
        await self._pool.gates.pass_by(self._transfer.path, "after")
        if fault and fault.error:
            raise XapiError(fault.error[0], list(fault.error[1:]))

    async def cut(self, fault: Fault) -> None:
        """End the body here, as the fault wants it."""
        pool, transfer = self._pool, self._transfer
        if fault.cut == "stall":
            await trio.sleep_forever()
        error = fault.error or ("VDI_IO_ERROR", "Device I/O errors")
        if fault.task == "success":
            pool.tasks.succeed(transfer.task)
        elif fault.task == "failure":
            pool.tasks.fail(transfer.task, XapiError(error[0], list(error[1:])))
        transfer.ended = f"cut: {fault.cut}"
        if fault.cut == "http500":
            page = error_page(": ".join(error))
            await self._wire.send(head(500, page) + page)
        elif fault.cut == "reset":
            await self._wire.reset()
        raise CutShort


# In


class Inlet(Outlet):
    """Passes what was received through the byte gates and faults, in the same places."""

    async def take(self, size: int) -> None:
        """Account for ``size`` received bytes: stops where a gate or a cut stands."""
        while size:
            part = self._until_stop(size)
            self._transfer.sent += part
            size -= part
            if self._fault and self._fault.rate:
                await trio.sleep_until(self._started + self._transfer.sent / self._fault.rate)
            await self._stops()
