"""Reading disks that are being merged: as the one disk that comes of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import trio

from proxy.disks.chain import Chain
from proxy.disks.disk import RandomAccess
from proxy.disks.merge_state import MergeState, Step, read_states
from proxy.disks.vhd_directory import VhdDirectory
from proxy.disks.vhd_file import VhdFile
from proxy.errors import Corrupt, NotFound
from proxy.remotes import paths

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence
    from uuid import UUID

    from proxy.remotes.interface import Remote


class Merging(RandomAccess):
    """``oldest`` with those of the disks that are merged into it, oldest first, as one disk.

    The newest disk that lists a block gives it; where its file is not there any more, it has
    been moved into the oldest, never into any other.
    """

    def __init__(
        self, oldest: VhdFile | VhdDirectory, newer: Sequence[VhdFile | VhdDirectory]
    ) -> None:
        newest = newer[-1] if newer else oldest
        self.path = newest.path
        self.header = oldest.header
        self.footer = newest.footer
        self.virtual_size = newest.virtual_size
        self.is_differencing = oldest.is_differencing
        self._chain = Chain([oldest, *newer])
        self.blocks = self._chain.blocks
        self._oldest = oldest
        self._moved = None
        if isinstance(oldest, VhdDirectory):
            # A moved block is part of the newest disk, which may be longer.
            self._moved = VhdDirectory(replace(oldest.head, footer=newest.footer), self.blocks)
        elif lost := [i for i in oldest.misplaced if not any(i in disk.blocks for disk in newer)]:
            raise Corrupt(
                f"the place of block {lost[0]} in '{oldest.path}' is impossible",
                data={"what": "block place", "path": oldest.path},
            )

    @property
    def uuid(self) -> UUID:
        return self.footer.uuid

    async def read_block(self, index: int, into: memoryview) -> None:
        """See :meth:`proxy.disks.disk.RandomDisk.read_block`."""
        owner = self._chain.owner(index)
        try:
            await self._chain.read_block(index, into)
        except (NotFound, Corrupt) as error:
            if self._moved is None or owner is self._oldest or not _is_missing(error):
                raise
            await self._moved.read_block(index, into)


def _is_missing(error: NotFound | Corrupt) -> bool:
    return isinstance(error, NotFound) or str(error.data.get("what", "")).endswith("missing")


ChainDisk: TypeAlias = VhdFile | VhdDirectory | Merging


class SettlingChain(Chain):
    """A chain that looks at its disks again when a merge has moved what it wants to read."""

    def __init__(
        self,
        merges: Merges,
        disks: Sequence[ChainDisk],
        look: Callable[[], Awaitable[tuple[Merges, Sequence[ChainDisk]]]],
    ) -> None:
        """``look`` gives merges and disks as they are by now."""
        super().__init__(disks)
        self._newest = disks[-1]
        self._look = look
        self._seen = _seen(merges, disks)
        self._settled: Chain | None = None
        self._looking = trio.Lock()

    async def read_block(self, index: int, into: memoryview) -> None:
        """See :meth:`proxy.disks.disk.RandomDisk.read_block`."""
        while True:
            settled = self._settled
            try:
                if settled is None:
                    await super().read_block(index, into)
                else:
                    await settled.read_block(index, into)
            except (NotFound, Corrupt):
                if not await self._has_changed(settled, index):
                    raise
            else:
                return

    async def _has_changed(self, tried: Chain | None, index: int) -> bool:
        """Look again, unless another reader did since; false when all is as it was, or the
        disk is not the same any more."""
        async with self._looking:
            if self._settled is not tried:
                return True
            merges, disks = await self._look()
            seen = _seen(merges, disks)
            if seen == self._seen or disks[-1].uuid != self._newest.uuid:
                return False
            chain = Chain(disks)
            if index not in chain.blocks or chain.virtual_size != self.virtual_size:
                return False
            self._seen, self._settled = seen, chain
            return True


def _seen(merges: Merges, disks: Sequence[ChainDisk]) -> object:
    return merges, [(type(disk), disk.path, disk.uuid) for disk in disks]


@dataclass(frozen=True, slots=True)
class Merges:
    """The merges under way in a directory, and what else a merge changes there."""

    names: frozenset[str]
    states: Mapping[str, MergeState]
    """By the path of the oldest disk."""

    @classmethod
    async def look(cls, remote: Remote, directory: str) -> Merges:
        """A state that cannot be used counts as none: reading decides without it."""
        try:
            names = frozenset(entry.name for entry in await remote.list(directory))
        except NotFound:
            return cls(frozenset(), {})
        states = await read_states(remote, directory, names)
        return cls(
            names, {disk: each for disk, each in states.items() if isinstance(each, MergeState)}
        )

    def newer(self, oldest: str) -> Sequence[str] | None:
        """The paths of the disks that are merged into ``oldest``, oldest first.

        ``None`` when its state does not say: then it is the one that stands on it.
        """
        chain = self.states[oldest].chain
        if chain is None:
            return None
        return [paths.join(paths.parent(oldest), name) for name in chain[1:]]

    def complete_instead_of(self, path: str) -> tuple[str, UUID | None] | None:
        """Where everything of the disk ``path`` is when its merge removes disks already, and
        the uuid that tells that it is so."""
        for oldest, state in self.states.items():
            newer = self.newer(oldest)
            if state.step is Step.CLEANUP and newer is not None and path in newer:
                return oldest, state.child_uuid
        return None
