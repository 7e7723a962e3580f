"""Removing many objects: in batches where the store has them, else one by one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from proxy.errors import NotFound, ProxyError, Refused
from proxy.remotes.objects.listing import pages

if TYPE_CHECKING:
    from collections.abc import Sequence

    from proxy.remotes.objects.store import ObjectStore

_SINGLE_AT_ONCE = 16
_ROUNDS = 4
"""How often a tree is emptied again when somebody fills it while it is removed, or when the
store's listing lags behind."""


class Remover:
    """Knows whether the store has batches: what it refuses as unknown is not tried again, while
    a failure that passes changes nothing."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._batches = store.limits.most_deletes > 1

    async def remove(self, keys: Sequence[str]) -> Sequence[ProxyError | None]:
        """The outcome of each; a missing object is removed already."""
        size = max(self._store.limits.most_deletes, 1)
        outcomes: list[ProxyError | None] = []
        for first in range(0, len(keys), size):
            outcomes.extend(await self._some(keys[first : first + size]))
        return outcomes

    async def _some(self, keys: Sequence[str]) -> Sequence[ProxyError | None]:
        if self._batches and len(keys) > 1:
            try:
                return await self._store.delete_many(keys)
            except Refused as error:
                if error.code != "ENOTSUP":
                    raise
                self._batches = False
        outcomes: list[ProxyError | None] = [None] * len(keys)
        left = iter(enumerate(keys))

        async def work() -> None:
            for position, key in left:
                try:
                    await self._store.delete(key)
                except ProxyError as error:
                    outcomes[position] = error

        async with trio.open_nursery() as nursery:
            for _ in range(min(_SINGLE_AT_ONCE, len(keys))):
                nursery.start_soon(work)
        return outcomes

    async def remove_tree(self, prefix: str) -> bool:
        """Remove everything below ``prefix``, until a listing shows nothing.

        ``False`` when there was nothing.  What cannot be removed does not keep the rest; the
        first such error is raised in the end.
        """
        for rounds in range(_ROUNDS):
            failure: ProxyError | None = None
            found = 0
            async for page in pages(self._store, prefix, deep=True):
                keys = [each.key for each in page.objects]
                found += len(keys)
                for outcome in await self.remove(keys):
                    failure = failure or outcome
            if failure is not None:
                raise failure
            if not found:
                return rounds > 0
        return True


async def raise_first(outcomes: Sequence[ProxyError | None]) -> None:
    """Raise the first error among ``outcomes``."""
    await trio.lowlevel.checkpoint()
    for outcome in outcomes:
        if outcome is not None and not isinstance(outcome, NotFound):
            raise outcome
