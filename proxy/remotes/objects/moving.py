"""Renames where there are none: a copy by the store, then the removal of the old name.

A crash between the two shows both names, never neither: the old one is removed only when the
store has confirmed the copy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from proxy.errors import NotFound, ProxyError, Refused
from proxy.remotes import paths
from proxy.remotes.objects.listing import Keys, missing, pages
from proxy.remotes.objects.removing import Remover, raise_first
from proxy.runtime.deadlines import undo_within

if TYPE_CHECKING:
    from collections.abc import Sequence

    from proxy.remotes.objects.store import ObjectStore

_AT_ONCE = 16
_PARTS_AT_ONCE = 4
_UNDO_SECONDS = 30


class Mover:
    def __init__(self, store: ObjectStore, keys: Keys, remover: Remover) -> None:
        self._store = store
        self._keys = keys
        self._remover = remover

    async def rename(self, old: str, new: str) -> None:
        """``NotFound`` when there is no ``old``, file or directory."""
        if await self.rename_all([(old, new)]):
            raise missing("rename", old)

    async def rename_all(self, pairs: Sequence[tuple[str, str]]) -> Sequence[int]:
        """The positions of pairs whose ``old`` is missing; paths are normalised.

        Pairs that do not touch each other go together, others in order.
        """
        gone: list[int] = []
        position = 0
        while position < len(pairs):
            count = _independent(pairs[position:])
            group = pairs[position : position + count]
            gone.extend(position + each for each in await self._group(group))
            position += count
        return tuple(gone)

    async def _group(self, pairs: Sequence[tuple[str, str]]) -> list[int]:
        """Copy all, then remove the old names of those that were copied, also when another one
        failed."""
        copied: list[str] = []
        gone: list[int] = []
        failures: list[ProxyError] = []
        left = iter(enumerate(pairs))

        async def work() -> None:
            for position, (old, new) in left:
                if failures:
                    return
                try:
                    copied.extend(await self._copy(old, new))
                except NotFound as error:
                    if error.code == "ENOENT":
                        gone.append(position)
                    else:
                        failures.append(error)
                except ProxyError as error:
                    failures.append(error)

        async with trio.open_nursery() as nursery:
            for _ in range(min(_AT_ONCE, len(pairs))):
                nursery.start_soon(work)
        await raise_first(await self._remover.remove(copied))
        if failures:
            raise failures[0]
        return sorted(gone)

    async def _copy(self, old: str, new: str) -> Sequence[str]:
        """Copy a file, or a directory with all that is in it; the keys that are now to go."""
        source, target = self._keys.of(old), self._keys.of(new)
        if old == new:
            await self._store.head(source)
            return ()
        try:
            await self.copy(source, target)
        except NotFound as error:
            if error.code != "ENOENT":
                raise
        else:
            return (source,)
        prefix, into = self._keys.below(old), self._keys.below(new)
        if into.startswith(prefix):
            raise Refused(
                f"EINVAL: a directory cannot be renamed into itself, rename '{old}'",
                code="EINVAL",
                data={"path": old},
            )
        copied: list[str] = []
        async for page in pages(self._store, prefix, deep=True):
            for each in page.objects:
                await self.copy(each.key, into + each.key[len(prefix) :])
                copied.append(each.key)
        if not copied:
            raise missing("rename", old)
        return copied

    async def copy(self, source: str, target: str) -> None:
        """Of any size."""
        limits = self._store.limits
        try:
            await self._store.copy(source, target)
        except Refused as refusal:
            # servers say "too large" in many ways; its size tells
            try:
                status = await self._store.head(source)
            except ProxyError:
                raise refusal from None
            if status.size <= limits.largest_copy:
                raise
            await self._copy_parts(source, target, status.size)

    async def _copy_parts(self, source: str, target: str, size: int) -> None:
        limits = self._store.limits
        part = max(limits.largest_copy // 8, limits.smallest_part, -(-size // limits.most_parts))
        ranges = list(enumerate(range(0, size, part), start=1))
        upload = await self._store.upload(target)
        done = False
        try:
            left = iter(ranges)

            async def work() -> None:
                for number, offset in left:
                    await upload.copy(number, source, offset, min(part, size - offset))

            try:
                async with trio.open_nursery() as nursery:
                    for _ in range(min(_PARTS_AT_ONCE, len(ranges))):
                        nursery.start_soon(work)
            except* ProxyError as group:
                raise _first(group) from None
            await upload.complete()
            done = True
        finally:
            if not done:
                with undo_within(f"giving up the copy to '{target}'", _UNDO_SECONDS):
                    await upload.abort()


def _first(group: BaseExceptionGroup[ProxyError]) -> ProxyError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, ProxyError)
    return error


def _independent(pairs: Sequence[tuple[str, str]]) -> int:
    """How many of the first pairs can go in any order: no name of one is, or is above or below,
    a name of another."""
    used: set[str] = set()
    above: set[str] = set()
    for position, pair in enumerate(pairs):
        names = {name for path in pair for name in _upwards(path)}
        if position and (names & used or above.intersection(pair)):
            return position
        used.update(pair)
        above |= names
    return len(pairs)


def _upwards(path: str) -> list[str]:
    """``path`` and all directories that it is in."""
    found = [path]
    while path := paths.parent(path):
        found.append(path)
    return found
