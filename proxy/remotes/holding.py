"""What all locks of remotes share: who holds one, and how it is held for a block."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import trio

from proxy.errors import Busy, ProxyError
from proxy.runtime.deadlines import undo_within
from proxy.runtime.trouble import tell_trouble

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

_RELEASE_SECONDS = 10.0


class Held(Protocol):
    """A lock in the making."""

    lost: Busy | None
    """Why it is no longer ours."""

    async def acquire(self, wait: float) -> None:
        """Make it ours or raise ``Busy``.  On cancel :meth:`end` undoes it."""
        ...

    async def keep_fresh(self, body: trio.CancelScope) -> None:
        """Refresh until cancelled; on loss remember why and cancel ``body``."""
        ...

    async def end(self) -> None:
        """Give it up if it is ours.  Shielded and bounded by itself; raises nothing."""
        ...


LockT = TypeVar("LockT", bound=Held)


class Keeping:
    """What a lock says of itself and of others, however it is kept."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.lost: Busy | None = None

    async def give_up(self) -> None:
        """Remove the lock if it is ours."""
        raise NotImplementedError

    def leave_behind(self) -> None:
        """Remember that it is nobody's: the next run of ours need not wait until it is stale."""
        raise NotImplementedError

    async def end(self) -> None:
        """Remove the lock if it is ours; a failure is told, not raised."""
        try:
            with undo_within(f"releasing the lock of '{self.path}'", _RELEASE_SECONDS):
                await self.give_up()
        except ProxyError as error:
            self.leave_behind()  # what was done under it is done
            tell_trouble("lock not released", error, path=self.path)

    def lose(self, reason: str) -> None:
        self.lost = self.lost or Busy(
            f"the lock of '{self.path}' was lost: {reason}; what was being done was stopped",
            data={"path": self.path},
        )

    def busy(self, holder: Holder | None) -> Busy:
        known = f" by {holder}" if holder else ": another program is working there"
        data: dict[str, Any] = {"path": self.path}
        if holder is not None:
            data["holder"] = asdict(holder)
        return Busy(f"Lock file is already being held{known}, '{self.path}'", data=data)


@contextlib.asynccontextmanager
async def held(lock: LockT, wait: float) -> AsyncIterator[LockT]:
    """Hold ``lock`` for the block; see :meth:`proxy.remotes.interface.Remote.lock`.

    When it is lost the block is cancelled and ``Busy`` raised in its place.
    """
    failure: BaseException | None = None
    try:
        await lock.acquire(wait)
        body = trio.CancelScope()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lock.keep_fresh, body)
            try:
                with body:
                    yield lock
            except BaseException as error:  # noqa: BLE001 (raised below, out of the nursery's group)
                failure = error
            nursery.cancel_scope.cancel()
    finally:
        await lock.end()
        if failure is not None:
            raise failure
    if lock.lost is not None:
        raise lock.lost


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a lock.  ``boot`` and ``namespace`` say where ``pid`` means something."""

    host: str
    pid: int
    started: int
    """Start of the process in clock ticks since boot: tells a reused pid."""
    boot: str
    namespace: int
    owner: str
    since: float

    def __str__(self) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.since))
        return f"{self.owner} (process {self.pid} on {self.host}) since {when}"

    def is_dead(self) -> bool:
        """True only where this machine can know it."""
        here = ourselves()
        if (self.boot, self.namespace) != (here["boot"], here["namespace"]):
            return False
        return _start_of(self.pid) != self.started


def parse_record(text: bytes) -> Holder | None:
    """``None`` for anything that is not a record: anybody may write on a remote."""
    try:
        value: dict[str, Any] = json.loads(text)
        return Holder(
            host=str(value["host"])[:255],
            pid=int(value["pid"]),
            started=int(value["started"]),
            boot=str(value["boot"])[:64],
            namespace=int(value["namespace"]),
            owner=str(value["owner"])[:255],
            since=float(value["since"]),
        )
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
        return None


@cache
def ourselves() -> dict[str, Any]:
    pid = os.getpid()
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        namespace = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        boot, namespace = "", 0
    return {
        "host": socket.gethostname(),
        "pid": pid,
        "started": _start_of(pid) or 0,
        "boot": boot,
        "namespace": namespace,
    }


def _start_of(pid: int) -> int | None:
    """When the process started, ``None`` when there is none."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # the command's name stands in parentheses and may hold anything
    return int(status.rpartition(")")[2].split()[19])
