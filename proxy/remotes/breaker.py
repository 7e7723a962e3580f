"""Fails at once what would only wait: the circuit breaker of one mount.  No I/O, no clock.

*Closed*, everything goes through.  After a number of failures in a row, or one operation that
hangs for good, it is *open*: everything fails at once, with the reason and since when.  After a
pause it is *half open*: one caller asks the remote, in a process that can be killed, and what
that tells closes it or begins a longer pause.
"""

from __future__ import annotations

import enum
import time
from dataclasses import dataclass

from proxy.errors import ProxyError, Unreachable

_CODES = frozenset(
    ("ECONNREFUSED", "ETIMEDOUT", "EHOSTUNREACH", "ENETUNREACH", "ENOTCONN", "ESTALE")
)
"""Those on which Xen Orchestra asks again later."""


class Circuit(enum.Enum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half open"


@dataclass(frozen=True, slots=True)
class Outage:
    since: float
    """By the wall clock: for people."""
    error: ProxyError


class Breaker:
    """For one event loop.  ``now`` is the loop's clock in seconds, ``what`` for messages."""

    def __init__(
        self, what: str, *, failures: int = 5, pause: float = 5, longest_pause: float = 60
    ) -> None:
        self.what = what
        self.circuit = Circuit.CLOSED
        self.outage: Outage | None = None
        """Of the first failure since the last success."""
        self._most = failures
        self._failed = 0
        self._first_pause = pause
        self._longest_pause = longest_pause
        self._pause = pause
        self._until = 0.0

    def admit(self, now: float) -> bool:
        """True: go on.  False: ask the remote first, then say :meth:`probed`.

        Raises ``Unreachable`` while it is open.
        """
        if self.circuit is Circuit.CLOSED:
            return True
        if self.circuit is Circuit.OPEN and now >= self._until:
            self.circuit = Circuit.HALF_OPEN
            return False
        raise self.refusal(now)

    def succeeded(self) -> None:
        """The remote has answered, be it with a refusal.

        An operation that began before the circuit opened does not close it: the probe does.
        """
        if self.circuit is Circuit.CLOSED:
            self._failed, self.outage = 0, None

    def failed(self, error: ProxyError, now: float) -> None:
        """One operation did not reach the remote."""
        self._failed += 1
        self._remember(error)
        if self.circuit is Circuit.CLOSED and self._failed >= self._most:
            self._open(now)

    def hangs(self, error: ProxyError, now: float) -> None:
        """One operation was given up while it still runs: nothing else may begin."""
        self._remember(error)
        if self.circuit is not Circuit.OPEN:
            self._open(now)

    def probed(self, error: ProxyError | None, now: float) -> None:
        """What the question told that :meth:`admit` asked for."""
        if error is None:
            self.circuit, self._failed, self.outage = Circuit.CLOSED, 0, None
            self._pause = self._first_pause
            return
        self._remember(error)
        self._pause = min(self._pause * 2, self._longest_pause)
        self._open(now)

    def give_up_probe(self) -> None:
        """Whoever asked was cancelled: the next one asks."""
        if self.circuit is Circuit.HALF_OPEN:
            self.circuit = Circuit.OPEN

    def refusal(self, now: float) -> Unreachable:
        """What callers get while it is open."""
        assert self.outage is not None, "refused without a reason"
        since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.outage.since))
        wait = max(self._until - now, 0)
        code = self.outage.error.code
        return Unreachable(
            f"{self.what} does not answer since {since}: {self.outage.error.message}; it is "
            f"asked again in {wait:.0f} s",
            code=code if code in _CODES else "ETIMEDOUT",
            data={"since": since, "retryIn": round(wait), "lastError": self.outage.error.message},
        )

    def _remember(self, error: ProxyError) -> None:
        since = self.outage.since if self.outage is not None else time.time()
        self.outage = Outage(since, error)

    def _open(self, now: float) -> None:
        self.circuit = Circuit.OPEN
        self._until = now + self._pause
