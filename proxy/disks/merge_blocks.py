"""The blocks that a merge moves, and what they are moved into.

Whatever they are moved into keeps one promise: at every instant, also of a crash, each block
of the chain is in the oldest disk or in the newest child that lists it, and where a table
says where the data is, it says so only when the data is there.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING, Final, Protocol

import trio

from proxy.disks.disk import Blocks, block_pool
from proxy.disks.vhd_directory import VhdDirectory
from proxy.errors import Corrupt, NotFound
from proxy.formats import vhd_directory
from proxy.formats.vhd import FULL_BITMAP

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence
    from uuid import UUID

    from proxy.disks.disk import RandomDisk
    from proxy.formats.vhd import Footer
    from proxy.remotes.interface import Remote

IN_FLIGHT: Final = 8
"""Blocks read, compressed and written at once."""


class Target(Protocol):
    """The oldest disk while blocks are merged into it.  For one task."""

    uuid: UUID
    entries: int
    """Blocks that its table has room for."""
    present: int
    """Blocks that it has or, once prepared, will have."""

    def renames(self, moving: Moving, indexes: Sequence[int]) -> bool:
        """Whether all of ``indexes`` are taken without reading them."""
        ...

    async def prepare(self, entries: int, indexes: Iterable[int]) -> None:
        """Make room for ``entries`` blocks, of which ``indexes`` will come."""
        ...

    async def take(self, moving: Moving, indexes: Sequence[int]) -> int:
        """Move or copy blocks, ascending.  May be repeated after a crash.

        Returns the index below which every block of ``moving`` is here for good.
        """
        ...

    async def finish(self, newest: Footer) -> None:
        """Become what ``newest`` says: size, uuid, time.  All durable on return."""
        ...


class Moving:
    """The blocks of ``children``, oldest first; the newest that has a block gives it."""

    def __init__(self, children: Sequence[RandomDisk], *, is_resumed: bool) -> None:
        self.is_resumed = is_resumed
        self.indexes = Blocks(b"")
        self._children = children
        for child in children:
            self.indexes = self.indexes | child.blocks

    def owner(self, index: int) -> RandomDisk:
        return next(child for child in reversed(self._children) if index in child.blocks)

    async def check(self, remote: Remote) -> None:
        """``Corrupt`` when a child lacks the file of a block that it lists.

        Once blocks are moved, such a hole could not be told from a block moved already.
        """
        for child in self._children:
            if isinstance(child, VhdDirectory):
                await _check_files(remote, child)

    async def copy(
        self, indexes: Iterable[int], store: Callable[[int, memoryview], Awaitable[None]]
    ) -> None:
        """Read blocks, several at once, and ``store`` each; the first error ends it."""
        pool = block_pool(IN_FLIGHT)
        left = iter(indexes)
        errors: list[Exception] = []

        async def work() -> None:
            for index in left:
                buffer = await pool.acquire()
                try:
                    buffer.memory[: len(FULL_BITMAP)] = FULL_BITMAP
                    await self.owner(index).read_block(index, buffer.memory)
                    await store(index, buffer.memory)
                except Exception as error:  # noqa: BLE001 (raised below, not in a group)
                    errors.append(error)
                    nursery.cancel_scope.cancel()
                finally:
                    buffer.release()

        async with trio.open_nursery() as nursery:
            for _ in range(IN_FLIGHT):
                nursery.start_soon(work)
        if errors:
            raise errors[0]


async def _check_files(remote: Remote, disk: VhdDirectory) -> None:
    folder, names = "", frozenset[str]()
    for index in disk.blocks:
        path = f"{disk.path}/{vhd_directory.block_path(index)}"
        above, _, name = path.rpartition("/")
        if above != folder:
            folder, names = above, frozenset[str]()
            with contextlib.suppress(NotFound):
                names = frozenset(entry.name for entry in await remote.list(folder))
        if name not in names:
            raise block_missing(path)


def block_missing(path: str) -> Corrupt:
    return Corrupt(
        f"the file '{path}' of a block is missing", data={"what": "block missing", "path": path}
    )


def become(footer: Footer, newest: Footer) -> Footer:
    """``footer`` of the oldest disk when it has become what ``newest`` was: all but the type
    and what nobody reads."""
    return replace(
        footer,
        current_size=newest.current_size,
        original_size=newest.original_size,
        geometry=newest.geometry,
        timestamp=newest.timestamp,
        uuid=newest.uuid,
    )
