"""Connections that several users share and that outlive their last user for a while."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Generic, TypeVar

import structlog
import trio

from proxy.errors import Refused

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager

_log = structlog.get_logger("services")

R = TypeVar("R")

_LAST_USES = 120.0
"""Seconds that a cancelled resource is kept open for the undo of its users."""


class _Entry(Generic[R]):
    """One open thing; a task of its own holds it open, so that no user's cancel cuts it."""

    def __init__(self) -> None:
        self.users = 0
        self.changed = trio.Event()
        self.scope = trio.CancelScope()
        self.opened = trio.Event()
        self.resource: R | None = None
        self.error: Exception | None = None

    def notify(self) -> None:
        self.changed.set()
        self.changed = trio.Event()


async def _last_uses(entry: _Entry[R]) -> None:
    """When everything is cancelled at once, users that undo something still need it."""
    with trio.CancelScope(shield=True), trio.move_on_after(_LAST_USES):
        while entry.users > 0:
            await entry.changed.wait()


class Shared(Generic[R]):
    """A cache of open resources by key.

    The key must hold everything that the resource was made from: with a changed option, key
    or password the next user gets a new resource at once.  ``delay`` (seconds) is read each
    time a last user leaves.
    """

    def __init__(self, nursery: trio.Nursery, delay: Callable[[], float]) -> None:
        self._nursery = nursery
        self._delay = delay
        self._entries: dict[str, _Entry[R]] = {}

    @contextlib.asynccontextmanager
    async def use(
        self, key: str, opener: Callable[[], AbstractAsyncContextManager[R]]
    ) -> AsyncIterator[R]:
        """The resource for ``key``, opened when nobody has it open; raises what opening raises.

        When the last user is cancelled while it opens, the opening is cancelled too.
        """
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = _Entry()
            self._nursery.start_soon(self._keep, key, entry, opener)
        entry.users += 1
        try:
            await entry.opened.wait()
            if entry.error is not None:
                raise entry.error
            assert entry.resource is not None
            yield entry.resource
        finally:
            entry.users -= 1
            entry.notify()
            if entry.users == 0 and not entry.opened.is_set():
                self._forget(key, entry)
                entry.scope.cancel("nobody waits for it")

    async def _keep(
        self, key: str, entry: _Entry[R], opener: Callable[[], AbstractAsyncContextManager[R]]
    ) -> None:
        try:
            with entry.scope:
                async with opener() as resource:
                    entry.resource = resource
                    entry.opened.set()
                    try:
                        await self._until_unused(key, entry)
                    finally:
                        await _last_uses(entry)
        except Exception as error:  # noqa: BLE001  the users of the entry get it
            if entry.opened.is_set():
                _log.warning("a shared connection broke", error=str(error))
            entry.error = error
        finally:
            if entry.error is None and entry.resource is None:
                entry.error = Refused("the daemon stops", code="ESHUTDOWN")
            self._forget(key, entry)
            entry.opened.set()

    async def _until_unused(self, key: str, entry: _Entry[R]) -> None:
        while True:
            changed = entry.changed
            if entry.users > 0:
                await changed.wait()
                continue
            with trio.move_on_after(self._delay()):
                await changed.wait()
            if entry.users == 0 and not changed.is_set():
                self._forget(key, entry)
                return

    def _forget(self, key: str, entry: _Entry[R]) -> None:
        if self._entries.get(key) is entry:
            del self._entries[key]

    def statistics(self) -> dict[str, int]:
        """How many are open, and how many users they have together."""
        return {
            "open": len(self._entries),
            "users": sum(entry.users for entry in self._entries.values()),
        }
