"""The lock of a directory on an object store: a lease, kept in the object ``<path>.lock``.

The object is a record of who holds it, with a number that changes at each refresh.  Every write
of it is conditional (absent, or still the object that was seen), so the store itself decides
between two who want it at once.

- *Stale* is a lease that did not move for :data:`LEASE_SECONDS` of our own watching, or whose
  holder is a dead process of this machine: clocks of two hosts are never compared.
- *Fencing*: :meth:`Lease.check` writes the record anew on the condition that it is still ours.
  From then on nobody can have it for the seconds of a lease, by the rule above, and what is
  destroyed right behind it is destroyed by its holder.
- A lease that is lost stops the body at once.
- Releasing writes the record once more (which proves that it is ours and starts the seconds
  again), then removes it within them.

Where a store has no conditional writes (:meth:`ObjectStore.capabilities` tells) the record is
written, and read back after :data:`_SETTLE_SECONDS`: of two who want it at once, the last
writer has it.  A write that takes longer than that to arrive can make both believe that they
are the holder until the next refresh, and between the look at a refresh and its write a lease
that was taken over is taken back.  That window is what such a store costs.

Xen Orchestra has no locks on object stores and ignores names that end in ``.lock``.
"""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import trio

from proxy.errors import Busy, Conflict, NotFound, ProxyError
from proxy.remotes.holding import Holder, Keeping, ourselves, parse_record
from proxy.remotes.objects.store import Condition
from proxy.runtime.deadlines import deadline

if TYPE_CHECKING:
    from proxy.remotes.objects.store import ObjectStore

LEASE_SECONDS = 30.0
REFRESH_SECONDS = 10.0
_MARGIN_SECONDS = 8.0
"""How long before the end of a lease we give it up when it cannot be refreshed."""
_RETRY_SECONDS = 1.0
_POLL_SECONDS = 2.0
_SETTLE_SECONDS = 2.0
_LONGEST_RECORD = 4096


_left_behind: set[str] = set()
"""Of leases of this process that nobody holds but that could not be removed."""


@dataclass(frozen=True, slots=True)
class _Seen:
    etag: str
    mtime: float
    holder: Holder | None
    nonce: str


class Lease(Keeping):
    """``key`` is the object's; ``path`` is what is locked, for messages.

    ``store`` should not try again by itself for longer than a lease lasts.
    """

    def __init__(self, store: ObjectStore, key: str, path: str, owner: str) -> None:
        super().__init__(path)
        self._store = store
        self._key = key
        self._owner = owner
        self._nonce = secrets.token_hex(16)
        self._number = 0
        self._since = 0.0
        self._etag: str | None = None
        """Of the record as we wrote it last; ``None`` while nothing is ours."""
        self._fresh_at = 0.0
        self._conditional = True
        self._removable = False
        self._turn = trio.Lock()

    # -- taking

    async def acquire(self, wait: float) -> None:
        found = await self._store.capabilities()
        self._conditional = bool(found.get("conditionalPut"))
        self._removable = bool(found.get("conditionalDelete"))
        until = trio.current_time() + wait
        watched: tuple[str, float] | None = None
        alive = False
        self._since = time.time()
        while True:
            seen = await self._look()
            if seen is None or seen.nonce == self._nonce:
                if await self._write(Condition(absent=True) if seen is None else _still(seen)):
                    return
                continue
            now = trio.current_time()
            if watched is None or watched[0] != seen.etag:
                alive = watched is not None
                watched = (seen.etag, now)
            dead = seen.nonce in _left_behind or (seen.holder is not None and seen.holder.is_dead())
            if dead or now - watched[1] >= LEASE_SECONDS:
                if await self._write(_still(seen)):
                    return
                continue
            # only a guess about waiting: nothing is taken over by what clocks say
            doubtful = not -LEASE_SECONDS <= time.time() - seen.mtime <= LEASE_SECONDS
            if now >= until and (alive or not doubtful):
                raise self.busy(seen.holder)
            await trio.sleep(_POLL_SECONDS)

    async def _look(self) -> _Seen | None:
        while True:
            try:
                status = await self._store.head(self._key)
                content = memoryview(bytearray(min(status.size, _LONGEST_RECORD)))
                count = await self._store.get_into(self._key, 0, content, etag=status.etag)
            except NotFound as error:
                if error.code != "ENOENT":
                    raise
                return None
            except Conflict:
                continue  # refreshed between the two
            record = bytes(content[:count])
            return _Seen(status.etag, status.mtime, parse_record(record), _nonce(record))

    async def _write(self, condition: Condition) -> bool:
        """Write the record; whether it is ours now."""
        self._number += 1
        now = trio.current_time()
        holder = Holder(**ourselves(), owner=self._owner, since=self._since)
        record = {**asdict(holder), "nonce": self._nonce, "number": self._number}
        data = json.dumps(record).encode()
        if not self._conditional:
            return await self._write_and_look(data, now)
        try:
            self._etag = await self._store.put(self._key, data, condition=condition)
        except (Conflict, NotFound) as error:
            if error.code == "ENOBUCKET":
                raise
            return False
        self._fresh_at = now
        return True

    async def _write_and_look(self, data: bytes, now: float) -> bool:
        taken = self._etag is None
        self._etag = await self._store.put(self._key, data)
        if taken:
            await trio.sleep(_SETTLE_SECONDS)
            seen = await self._look()
            if seen is None or seen.nonce != self._nonce:
                self._etag = None
                return False
        self._fresh_at = now
        return True

    # -- keeping

    async def keep_fresh(self, body: trio.CancelScope) -> None:
        pause = REFRESH_SECONDS
        while True:
            await trio.sleep(pause)
            pause = REFRESH_SECONDS
            left = self._fresh_at + LEASE_SECONDS - _MARGIN_SECONDS - trio.current_time()
            try:
                with deadline("refreshing the lease", max(left, 0.1)):
                    await self._refresh()
            except Busy:
                body.cancel()
                return
            except ProxyError as error:
                if left > _RETRY_SECONDS:
                    pause = _RETRY_SECONDS
                    continue
                self.lose(f"it could not be refreshed: {error.message}")
                body.cancel()
                return

    async def check(self) -> None:
        """Raise ``Busy`` unless the lease is still ours and, from now on, for a while."""
        await self._refresh()

    async def _refresh(self) -> None:
        async with self._turn:
            if self.lost is None:
                reason = await self._refresh_now()
                if reason is not None:
                    self.lose(reason)
        if self.lost is not None:
            raise self.lost

    async def _refresh_now(self) -> str | None:
        """Why the lease is no longer ours, ``None`` while it is."""
        assert self._etag is not None, "not held"
        if self._conditional:
            if await self._write(Condition(etag=self._etag)):
                return None
            # a refresh whose answer was lost moved it, too
            seen = await self._look()
            if seen is not None and seen.nonce == self._nonce and await self._write(_still(seen)):
                return None
        else:
            seen = await self._look()
            if seen is not None and seen.nonce == self._nonce:
                await self._write(_still(seen))
                return None
        if seen is None:
            return "its object is gone"
        return f"{seen.holder or 'somebody else'} took it over"

    # -- giving it up

    def leave_behind(self) -> None:
        _left_behind.add(self._nonce)

    async def give_up(self) -> None:
        if self._etag is None:
            # a first write that was cut short may have had its effect
            seen = await self._look() if self._number else None
            if seen is None or seen.nonce != self._nonce:
                return
            self._etag = seen.etag
        if self.lost is not None or await self._refresh_now() is not None:
            return
        etag, self._etag = self._etag, None
        await self._store.delete(
            self._key, condition=Condition(etag=etag) if self._removable else None
        )


def _still(seen: _Seen) -> Condition:
    return Condition(etag=seen.etag)


def _nonce(record: bytes) -> str:
    try:
        value = json.loads(record)
        return str(value["nonce"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return ""
