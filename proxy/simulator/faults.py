"""What goes wrong, and where the pool stands still: programmed by tests, deterministic.

A *point* is a call (``VM.snapshot``; ``Async.`` and underscores are stripped) or an HTTP
handler (``/export``).  A fault applies to the n-th time its point is passed from now on; a
gate stops there until it is released.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import trio

Cut = Literal["reset", "end", "stall", "http500"]
Damage = Literal["no footer", "partial bitmap"]


@dataclass(slots=True)
class Fault:
    """One thing that goes wrong at ``at``.

    For calls:

    * ``error``: code and parameters; the task of an ``Async`` call fails with it, or the
      call itself with ``at_call``.
    * ``drop``: close the connection without an answer, ``before`` or ``after`` the effect.
    * ``hang``: the effect happens, but the task stays pending (a plain call never answers).
    * ``ignore_cancel``: ``task.cancel`` is noted, and the work goes on to its end.

    For transfers:

    * ``error``: everything looks well on the wire, then the task fails.
    * ``status``: refuse with this HTTP status (and fail the task, if ``error`` is given).
    * ``redirect``: answer 302 to this base URL.
    * ``cut``: at byte ``after_bytes`` (none: after the last) reset the connection, end it
      cleanly, stall until the client leaves, or write a second HTTP answer (``http500``).
    * ``task``: how the task of a cut transfer ends (``failure``); ``success`` is the pool
      that lies, ``pending`` the one that died.
    * ``rate``: bytes per second.
    * ``damage``: a VHD export without its last footer, or whose first block has a bitmap that
      leaves out its last sector; everything else looks well.

    For NBD see :mod:`proxy.simulator.nbd`; ``size``: tell this size of the export.

    For both ``delay``: seconds before anything happens.
    """

    at: str
    nth: int = 1
    times: int | None = 1
    error: tuple[str, ...] | None = None
    at_call: bool = False
    delay: float = 0.0
    drop: Literal["before", "after"] | None = None
    hang: bool = False
    ignore_cancel: bool = False
    status: int | None = None
    redirect: str | None = None
    cut: Cut | None = None
    after_bytes: int | None = None
    task: Literal["failure", "success", "pending"] = "failure"
    rate: float | None = None
    damage: Damage | None = None
    size: int | None = None
    hits: int = field(default=0, init=False)
    """How often it was applied."""
    _seen: int = field(default=0, init=False)

    def applies(self) -> bool:
        """Count one passage of the point; says whether the fault hits it."""
        self._seen += 1
        if self._seen < self.nth or (self.times is not None and self.hits >= self.times):
            return False
        self.hits += 1
        return True


class Faults:
    """The programmed faults, in the order they were added."""

    def __init__(self) -> None:
        self._all: list[Fault] = []

    def add(self, fault: Fault) -> Fault:
        """Program a fault; its ``hits`` tell later whether it happened."""
        self._all.append(fault)
        return fault

    def remove(self, fault: Fault) -> None:
        if fault in self._all:
            self._all.remove(fault)

    def clear(self) -> None:
        self._all.clear()

    def take(self, point: str) -> Fault | None:
        """The fault that hits this passage of ``point``, if any."""
        hit: Fault | None = None
        for fault in self._all:
            if fault.at == point and fault.applies() and hit is None:
                hit = fault
        return hit

    def __len__(self) -> int:
        return len(self._all)


Stage = Literal["before", "after", "bytes"]


class Gate:
    """Holds the next passage of a point until :meth:`release`; later ones pass.

    ``stage`` is ``before`` the effect (for a transfer: before its HTTP answer), ``after`` it
    (the effect is done, the answer or the task's end is not), or at a byte of a transfer.
    The wait inside is cancelled by ``task.cancel`` and by the end of the connection.
    """

    def __init__(self, point: str, stage: Stage, at_bytes: int, nth: int) -> None:
        self.point = point
        self.stage: Stage = stage
        self.at_bytes = at_bytes
        self._nth = nth
        self._reached = trio.Event()
        self._open = trio.Event()
        self._left = trio.Event()

    def matches(self, point: str, stage: Stage) -> bool:
        """Whether this passage is the one to hold (counts passages)."""
        if point != self.point or stage != self.stage or self._reached.is_set():
            return False
        self._nth -= 1
        return self._nth <= 0

    async def hold(self) -> None:
        """Stand here until released; whoever comes second passes."""
        if self._reached.is_set():  # both transfers began before the first came here
            await trio.lowlevel.checkpoint()
            return
        self._reached.set()
        try:
            await self._open.wait()
        finally:
            self._left.set()

    async def reached(self) -> None:
        """Wait until somebody stands at the gate."""
        await self._reached.wait()

    async def left(self) -> None:
        """Wait until who stood at the gate is gone: released, cancelled or disconnected."""
        await self._left.wait()

    @property
    def is_reached(self) -> bool:
        return self._reached.is_set()

    def release(self) -> None:
        """Let it pass, also when it comes only later."""
        self._open.set()


class Gates:
    """The gates that a test set up."""

    def __init__(self) -> None:
        self._all: list[Gate] = []

    def add(self, point: str, stage: Stage, at_bytes: int = 0, nth: int = 1) -> Gate:
        gate = Gate(point, stage, at_bytes, nth)
        self._all.append(gate)
        return gate

    async def pass_by(self, point: str, stage: Stage) -> None:
        """Stop at a gate, if one stands here."""
        for gate in self._all:
            if gate.matches(point, stage):
                await gate.hold()

    def along(self, point: str) -> list[Gate]:
        """The byte gates of a transfer that starts now."""
        found = [gate for gate in self._all if gate.matches(point, "bytes")]
        return sorted(found, key=lambda gate: gate.at_bytes)

    def release_all(self) -> None:
        for gate in self._all:
            gate.release()
        self._all.clear()
