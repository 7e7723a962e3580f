"""The rules of upstream's lock, whatever the storage: when one is taken, waited for, kept, lost.

Xen Orchestra (npm proper-lockfile 4 with its defaults) makes a directory ``<path>.lock``, refreshes
its mtime every 5 s, takes a lock over whose mtime is 10 s old, and releases by ``rmdir``.  How
a storage does each step is told in :mod:`proxy.remotes.lock`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Final, TypeVar

import trio

from proxy.errors import Busy, ProxyError, Refused
from proxy.remotes import paths
from proxy.remotes.holding import Holder, Keeping, ourselves
from proxy.runtime.threads import SHARED, Work

if TYPE_CHECKING:
    from collections.abc import Callable

    from proxy.runtime.threads import Threads

T = TypeVar("T")

REFRESH_SECONDS = 5.0
STALE_SECONDS = 10.0
RACES: Final = 20
"""Rounds of 'taken' and then 'not there' before we give up."""
MTIME_TOLERANCE: Final = 2.0
"""Seconds; FAT keeps even seconds only, and servers round what they are told."""
LONGEST_RECORD: Final = 4096
_RETRY_SECONDS = 1.0
_POLL_SECONDS = 0.5

_left_behind: set[tuple[int, int, int]] = set()
"""The identities of locks of this process that nobody holds but that could not be removed."""


@dataclass(frozen=True, slots=True)
class Seen:
    identity: tuple[int, int, int]
    age: float
    """Seconds by the file system's clock; negative when the mtime lies in its future."""
    holder: Holder | None


class KeptLock(Keeping):
    """What all locks share.  A storage overrides the four steps that block."""

    def __init__(self, path: str, owner: str, threads: Threads = SHARED) -> None:
        super().__init__(paths.normalise(path))
        if not self.path:
            raise Refused("EBUSY: the root of a remote cannot be locked", code="EBUSY")
        self.identity = (0, 0, 0)
        self._threads = threads
        self._owner = owner
        self._directory = paths.parent(self.path)
        name = paths.name(self.path)
        self._name = f"{name}.lock"
        self._record_name = f".{name}.lock-holder"
        self._fresh_at = 0.0

    # -- the steps of a storage

    def _try(self) -> Seen | None:
        """``None`` when the lock is ours now, else what stands in the way."""
        raise NotImplementedError

    def _take_over(self, stale: tuple[int, int, int]) -> bool:
        """Remove the lock if it is still the one that was found ``stale``."""
        raise NotImplementedError

    def _refresh_now(self) -> str | None:
        """Why the lock is no longer ours, ``None`` while it is."""
        raise NotImplementedError

    def release(self) -> None:
        """Remove the lock if it is ours.  Idempotent."""
        raise NotImplementedError

    async def in_thread(
        self,
        function: Callable[..., T],
        *args: object,
        dispose: Callable[[T], object] | None = None,
    ) -> T:
        return await self._threads.run(Work.LOCK, function, *args, dispose=dispose)

    async def give_up(self) -> None:
        """Abandoned on a remote that hangs: it removes only what is ours."""
        await self._threads.end(self.release, Work.LOCK)

    def leave_behind(self) -> None:
        _left_behind.add(self.identity)

    # -- the rules

    async def acquire(self, wait: float) -> None:
        """Make the lock ours or raise ``Busy``.  On cancel :meth:`release` undoes it."""
        until = trio.current_time() + wait
        watched: tuple[tuple[int, int, int], float] | None = None
        alive = False
        while True:
            seen = await self.in_thread(self._try, dispose=self._undo)
            if seen is None:
                self._fresh_at = trio.current_time()
                return
            now = trio.current_time()
            if watched is None or watched[0] != seen.identity:
                alive = watched is not None
                watched = (seen.identity, now)
            elif now - watched[1] >= STALE_SECONDS:
                if await self.in_thread(self._take_over, seen.identity):
                    continue
                watched = None
            dead = seen.holder is not None and seen.holder.is_dead()
            dead = dead or seen.identity in _left_behind
            if dead and await self.in_thread(self._take_over, seen.identity):
                _left_behind.discard(seen.identity)
                continue
            doubtful = not -MTIME_TOLERANCE <= seen.age <= STALE_SECONDS
            if now >= until and (alive or not doubtful):
                raise self.busy(seen.holder)
            await trio.sleep(_POLL_SECONDS)

    def _undo(self, seen: Seen | None) -> None:
        """Nobody waits any more for what :meth:`_try` found."""
        if seen is None:
            self.release()

    def not_a_lock(self) -> Busy:
        return Busy(
            f"Lock file is already being held: '{self.path}.lock' is old but holds files, which "
            "no lock does; look at them and remove it by hand",
            data={"path": self.path},
        )

    def many_want_it(self) -> Busy:
        return Busy(
            f"Lock file is already being held: many want '{self.path}'", data={"path": self.path}
        )

    # -- keeping

    async def keep_fresh(self, body: trio.CancelScope) -> None:
        """Refresh until cancelled; on loss remember why and cancel ``body``."""
        pause = REFRESH_SECONDS
        while True:
            await trio.sleep(pause)
            pause = REFRESH_SECONDS
            try:
                await self._refresh()
            except Busy:
                body.cancel()
                return
            except ProxyError as error:
                if trio.current_time() - self._fresh_at < STALE_SECONDS - _RETRY_SECONDS:
                    pause = _RETRY_SECONDS
                    continue
                self.lose(f"it could not be refreshed: {error.message}")
                body.cancel()
                return

    async def check(self) -> None:
        """Raise ``Busy`` if the lock was lost, else refresh it."""
        await self._refresh()

    async def _refresh(self) -> None:
        if self.lost is None:
            now = trio.current_time()
            reason = await self.in_thread(self._refresh_now)
            if reason is None:
                self._fresh_at = now
                return
            self.lose(reason)
        if self.lost is not None:
            raise self.lost

    # -- the record of the holder

    def record(self, since: float) -> bytes:
        record = Holder(**ourselves(), owner=self._owner, since=since)
        return json.dumps(asdict(record)).encode()[:LONGEST_RECORD]
