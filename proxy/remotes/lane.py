"""Threads for the files of one mount, so that a mount that hangs holds nobody else.

A system call on a network mount whose server is gone may never return, and no cancel reaches
it.  Each mount therefore has threads of its own, every call a deadline, and what does not end by
then is abandoned: its caller is told ``ETIMEDOUT``, its thread stays until the server comes back
or the mount goes.

An abandoned call may still take effect.  So nothing new begins on the mount until it has
ended; the rules that make that enough are elsewhere: a file's calls exclude each other
(:mod:`proxy.remotes.new_file`), memory that a caller uses again is not filled
(:mod:`proxy.remotes.local`), and between two effects a thread asks whether it is still wanted
(:func:`proxy.runtime.threads.stop_if_abandoned`).
"""

from __future__ import annotations

import contextlib
import contextvars
import math
import os
import threading
from typing import TYPE_CHECKING, Any, TypeVar, cast

import structlog
import trio

from proxy.errors import ProxyError, Unreachable
from proxy.remotes.breaker import Circuit
from proxy.runtime.threads import Threads, Work, abandonable, runs_inline

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from outcome import Outcome

    from proxy.remotes.breaker import Breaker

_log = structlog.get_logger("proxy.remotes")

T = TypeVar("T")

_CANCEL_SECONDS = 5.0
"""How long a cancelled call is waited for before it is abandoned: usually it ends at once, and
its undo then meets nobody."""
_END_SECONDS = 2.0
"""How long the end of something is waited for on a remote that is known not to answer."""
_LOCKS = 4


class _Call:
    """One function in its thread.  ``abandon`` and the thread's end exclude each other."""

    def __init__(
        self, function: Callable[..., Any], args: tuple[object, ...], dispose: Any = None
    ) -> None:
        self.ended = trio.Event()
        self.abandoned = False
        self.outcome: Outcome[Any] | None = None
        self._function = function
        self._args = args
        self._dispose = dispose
        self._mutex = threading.Lock()

    def run(self) -> Any:
        with abandonable(lambda: self.abandoned):
            return self._function(*self._args)

    def finish(self, outcome: Outcome[Any]) -> None:
        """In the thread."""
        with self._mutex:
            self.outcome = outcome
            unwanted = self.abandoned
        if unwanted and self._dispose is not None:
            try:
                self._dispose(outcome.unwrap())
            except Exception as error:  # noqa: BLE001  nobody is left to tell it to
                _log.debug("an abandoned operation ended", error=str(error))

    def abandon(self) -> bool:
        """False when it has just ended."""
        with self._mutex:
            self.abandoned = self.outcome is None
            return self.abandoned


class Lane(Threads):
    """The threads of one mount.

    ``patience``: seconds that one call may take, 0 for ever.  ``probe`` asks the remote whether
    it works, by other means than these threads, and raises a ``ProxyError``.
    """

    abandons = True

    def __init__(
        self,
        breaker: Breaker,
        probe: Callable[[], Awaitable[None]],
        *,
        patience: float,
        threads: int = 16,
    ) -> None:
        self.breaker = breaker
        self._probe = probe
        self._patience = patience or math.inf
        self._limits = {
            Work.DISK: trio.CapacityLimiter(threads),
            Work.LOCK: trio.CapacityLimiter(_LOCKS),
        }
        self._looks = trio.CapacityLimiter(threads)
        self._endings = trio.CapacityLimiter(math.inf)
        self._running: set[_Call] = set()
        self._stuck: dict[_Call, float] = {}
        """Abandoned calls with effects, and when they began."""
        self._moved = trio.Event()
        self._idle = trio.Event()
        self._idle.set()

    async def run(
        self,
        work: Work,
        function: Callable[..., T],
        *args: object,
        abandon: bool = False,
        dispose: Callable[[T], object] | None = None,
    ) -> T:
        """As :meth:`Threads.run`; ``Unreachable`` (``ETIMEDOUT``) after ``patience`` seconds,
        or at once while the remote is known not to answer.

        On cancel it waits a few seconds for the function to end, as its undo comes next.
        """
        if runs_inline():
            await trio.lowlevel.checkpoint()
            return function(*args)
        await self._admit(waits=work is not Work.LOCK)
        limit = self._looks if abandon else self._limits[work]
        call = _Call(function, args, dispose)
        began = trio.current_time()
        until = began + self._patience
        with trio.move_on_at(until):
            await limit.acquire_on_behalf_of(call)
            self._start(call, limit)
        if call not in self._running:
            raise self._expired(call, "no thread was free: all wait for the remote")
        grace = 0 if abandon else _CANCEL_SECONDS
        try:
            with trio.move_on_at(until):
                await call.ended.wait()
        except trio.Cancelled:
            with trio.move_on_after(grace, shield=True):
                await call.ended.wait()
            if call.abandon():
                self._hold(call, began, fenced=not abandon)
                raise
        if call.outcome is None and call.abandon():
            self._hold(call, began, fenced=not abandon)
            raise self._expired(call, "nothing happened")
        return cast("T", self._result(call))

    def _result(self, call: _Call) -> Any:
        assert call.outcome is not None, "a call that has not ended"
        try:
            result = call.outcome.unwrap()
        except Unreachable as error:
            self.breaker.failed(error, trio.current_time())
            raise
        except ProxyError:
            self.breaker.succeeded()
            raise
        self.breaker.succeeded()
        return result

    def _expired(self, call: _Call, what: str) -> Unreachable:
        error = Unreachable(
            f"ETIMEDOUT: {what} for {self._patience:g} s on {self.breaker.what}",
            code="ETIMEDOUT",
            data={"seconds": self._patience},
        )
        if call in self._running:
            _log.error("an operation hangs", remote=self.breaker.what, seconds=self._patience)
        self.breaker.hangs(error, trio.current_time())
        return error

    async def end(self, function: Callable[[], None], work: Work = Work.DISK) -> None:
        """Run the end of something: at once, whatever hangs, in a thread more.

        On a remote that is known not to answer it is waited for only briefly, then
        ``Unreachable``; it goes on alone, and ends when the remote is back.
        """
        del work
        if runs_inline():
            function()
            return
        call = _Call(function, ())
        self._endings.acquire_on_behalf_of_nowait(call)
        self._start(call, self._endings)
        answers = self.breaker.outage is None and not self._stuck
        try:
            with trio.move_on_after(self._patience if answers else _END_SECONDS):
                await call.ended.wait()
        finally:
            call.abandon()
        if call.outcome is None:
            raise Unreachable(f"ETIMEDOUT: {self.breaker.what} does not answer", code="ETIMEDOUT")
        call.outcome.unwrap()

    def close(self, descriptor: int) -> None:
        """In a thread, as it may wait for the server; nobody waits for it."""
        if runs_inline():
            os.close(descriptor)
            return
        call = _Call(os.close, (descriptor,))
        self._endings.acquire_on_behalf_of_nowait(call)
        self._start(call, self._endings)

    @property
    def hangs(self) -> bool:
        """Whether calls that were given up still run."""
        return bool(self._stuck) or any(call.abandoned for call in self._running)

    async def wait_idle(self, seconds: float) -> bool:
        """Whether all threads have ended within ``seconds``."""
        with trio.move_on_after(seconds):
            await self._idle.wait()
        return not self._running

    def statistics(self) -> dict[str, object]:
        return {
            "circuit": self.breaker.circuit.value,
            "running": len(self._running),
            "stuck": len(self._stuck),
        }

    # -- admission

    async def _admit(self, *, waits: bool) -> None:
        """Return when an operation may begin.

        While an abandoned one runs that may still end in time, others wait for it
        (``waits``); behind that they fail.
        """
        while True:
            now = trio.current_time()
            left = math.inf
            if self._stuck:
                left = min(self._stuck.values()) + self._patience - now
            if left <= 0:
                if self.breaker.circuit is Circuit.CLOSED:
                    self._expired(min(self._stuck, key=self._began), "an operation did not end")
                raise self.breaker.refusal(now)
            if not self.breaker.admit(now):
                await self._ask()
                continue
            if not (waits and self._stuck):
                return
            with trio.move_on_after(left):
                await self._moved.wait()

    def _began(self, call: _Call) -> float:
        return self._stuck[call]

    async def _ask(self) -> None:
        failure: ProxyError | None = None
        try:
            await self._probe()
        except ProxyError as error:
            failure = error
        except BaseException:
            self.breaker.give_up_probe()
            raise
        self.breaker.probed(failure, trio.current_time())
        level = _log.warning if failure else _log.info
        level("asked a remote", remote=self.breaker.what, error=str(failure) if failure else None)

    # -- threads

    def _start(self, call: _Call, limit: trio.CapacityLimiter) -> None:
        token = trio.lowlevel.current_trio_token()

        def ended() -> None:
            limit.release_on_behalf_of(call)
            self._running.discard(call)
            if not self._running:
                self._idle.set()
            if self._stuck.pop(call, None) is not None:
                _log.info("an operation that hung has ended", remote=self.breaker.what)
                self._moved.set()
                self._moved = trio.Event()
            call.ended.set()

        def deliver(outcome: Outcome[Any]) -> None:
            call.finish(outcome)
            with contextlib.suppress(trio.RunFinishedError):  # the daemon has stopped without us
                token.run_sync_soon(ended)

        self._running.add(call)
        if self._idle.is_set():
            self._idle = trio.Event()
        context = contextvars.copy_context()
        try:
            trio.lowlevel.start_thread_soon(lambda: context.run(call.run), deliver)
        except BaseException:
            ended()
            raise

    def _hold(self, call: _Call, began: float, *, fenced: bool) -> None:
        if fenced and not call.ended.is_set():
            self._stuck[call] = began
