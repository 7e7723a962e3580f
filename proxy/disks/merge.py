"""Make one disk of a chain: the blocks of the newer disks go into the oldest one, which then
takes the newest one's name.  Metadata and grandchildren, which know that name, stay as they are.

Every step is durable before the next begins, so after a crash the remote shows one of these
states.  "Next clean" is ours (:mod:`proxy.repository.planning` tells them apart) and Xen
Orchestra's.  *P* is the oldest disk, *c1…cn* the newer ones, *D(x)* the data that the alias
*x* names (a file is its own data).

=== ================================== ============================ ===========================
 #  on the remote                      next clean of ours           next clean of Xen Orchestra
=== ================================== ============================ ===========================
 0  no state                           begins                       begins
 1  state ``mergeBlocks``              moves the blocks             resumes at ``currentBlock``
 2  P's header and table have room     the same; tables only gain   resumes; it writes the same
    for all blocks; in a directory     entries, and the newest disk table of a directory at the
    the table lists them already       that lists a block has it    end
 3  some blocks moved (directories of  finds a moved block missing  the same: a missing block
    one codec: renamed) or copied      in the child and present in  that P has is accepted
                                       P; copies again what it may
                                       have copied
 4  all moved, P's footer is cn's      3 with nothing to do         the same
 5  state ``cleanup``                  renames P to cn              unlinks c1…cn, renames P
 6  P's name is cn's (one rename; in   removes c1…c(n-1), then      P is missing: removes the
    the same instant P's is gone and   the state, then D(cn) of     state; c1…c(n-1) have no
    the old cn with it)                before, which no alias means active descendant and D(cn)
                                                                    no alias: removes them
 7  some of c1…c(n-1), D(cn) removed   as 6                         as 6
 8  only the state is left             removes it                   removes it
=== ================================== ============================ ===========================

Steps 1 to 5 leave each block in P or in the newest child that lists it, so the chain reads
the same through the state (:mod:`proxy.disks.opening`).  Since 6 it reads without.

The reverse order, children first, loses the chain when it stops in between; what Xen Orchestra
has left so is resumed too: P alone with a state ``cleanup`` (or ``cleanupVhds``) is renamed.
"""

from __future__ import annotations

import contextlib
from array import array
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from proxy.disks.alias import is_alias, read_alias
from proxy.disks.merge_blocks import Moving
from proxy.disks.merge_directory import DirectoryTarget
from proxy.disks.merge_file import FileTarget
from proxy.disks.merge_state import MergeState, Phase, Step, write_state
from proxy.disks.opening import open_disk
from proxy.disks.vhd_directory import open_vhd_directory
from proxy.errors import Corrupt, NotFound
from proxy.formats.vhd import BLOCK_SIZE, blocks_of, stream_size
from proxy.remotes import paths

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection, Sequence

    from proxy.disks.merge_blocks import Target
    from proxy.disks.opening import StoredDisk
    from proxy.remotes.interface import Lock, Remote

    Progress = Callable[[int, int], None]
    """Takes the blocks that are moved and those that there are to move."""


async def merge_chain(
    remote: Remote,
    chain: Sequence[str],
    *,
    lock: Lock,
    owned: Collection[str],
    state: MergeState | None = None,
    phase: Phase = Phase.BLOCKS,
    progress: Progress | None = None,
) -> None:
    """Merge the disks ``chain``, oldest first, of one directory; the last name is kept.

    ``lock`` is that of the VM's directory and checked before each destructive step.  What a
    disk consists of is removed only for those in ``owned``; of the others the alias goes alone.
    ``state`` and ``phase`` say where an earlier merge stopped.  The state is left behind, in
    step ``cleanup``: the caller removes it when metadata says what the disk now is.

    ``Corrupt`` when a block of the chain is missing or cannot be read; before anything is
    changed, where that can be seen.  After an error or a cancel, which strikes between two
    batches of blocks, the merge can be resumed.
    """
    if phase is Phase.BLOCKS:
        state = await _Blocks(remote, chain, lock, progress).run(state)
    if phase is not Phase.REST:
        await _rename(remote, chain, lock=lock, owned=owned, state=state)
    for path in chain[1:-1]:
        await remove_disk(remote, path, lock=lock, owned=path in owned)


async def remove_disk(remote: Remote, path: str, *, lock: Lock, owned: bool) -> None:
    """Remove a disk: the name first, so that what is left after a crash is data without name.

    No error when it does not exist.  The target of an alias is removed when ``owned``.
    """
    data = await _data_of(remote, path) if owned else None
    await lock.check()
    await remote.unlink(path)
    if data is not None:
        await _remove_data(remote, data, lock)


async def _data_of(remote: Remote, path: str) -> str | None:
    """What the alias ``path`` names, ``None`` for a file or when it is gone."""
    if not is_alias(path):
        return None
    with contextlib.suppress(NotFound, Corrupt):
        return await read_alias(remote, path)
    return None


async def _remove_data(remote: Remote, data: str, lock: Lock) -> None:
    try:
        is_dir = (await remote.stat(data)).is_dir
    except NotFound:
        return
    await lock.check()
    if is_dir:
        await remote.rmtree(data)
    else:
        await remote.unlink(data)


async def _rename(
    remote: Remote,
    chain: Sequence[str],
    *,
    lock: Lock,
    owned: Collection[str],
    state: MergeState | None,
) -> None:
    """Steps 5 and 6, and the newest disk's old data of 7.

    An alias names its data from their common directory, so that renaming it is enough.
    """
    parent, target = chain[0], chain[-1]
    merged = await _data_of(remote, parent)
    old = await _data_of(remote, target) if target in owned else None
    if state is not None and state.step is not Step.CLEANUP:
        await lock.check()
        await write_state(remote, parent, replace(state, step=Step.CLEANUP))
    await lock.check()
    await remote.rename(parent, target)
    if old is not None and old != merged:
        await _remove_data(remote, old, lock)


BATCH: Final = 1000
"""Blocks renamed between two states: each state costs two flushes of the disk's cache."""
COPIED: Final = 64
"""Blocks copied between two states."""


class _Blocks:
    """Steps 1 to 4."""

    def __init__(
        self, remote: Remote, chain: Sequence[str], lock: Lock, progress: Progress | None
    ) -> None:
        self._remote = remote
        self._chain = chain
        self._lock = lock
        self._progress = progress

    async def run(self, state: MergeState | None) -> MergeState:
        async with contextlib.AsyncExitStack() as stack:
            await self._lock.check()
            target = await stack.enter_async_context(_open_target(self._remote, self._chain[0]))
            children = [
                await stack.enter_async_context(open_disk(self._remote, path))
                for path in self._chain[1:]
            ]
            return await self._move(target, children, state)

    async def _move(
        self, target: Target, children: Sequence[StoredDisk], state: MergeState | None
    ) -> MergeState:
        newest = children[-1]
        moving = Moving(children, is_resumed=state is not None)
        entries = max(
            target.entries,
            blocks_of(newest.footer.current_size),
            *(child.header.max_entries for child in children),
        )
        if state is None:
            await moving.check(self._remote)
            state = MergeState(
                chain=tuple(paths.name(path) for path in self._chain),
                next_block=next(iter(moving.indexes), 0),
                child_uuid=newest.footer.uuid,
                parent_uuid=target.uuid,
            )
            await self._lock.check()
            await write_state(self._remote, self._chain[0], state)
        await self._lock.check()
        await target.prepare(entries, moving.indexes)
        state = await self._move_all(target, moving, state)
        await self._lock.check()
        await target.finish(newest.footer)
        return state

    async def _move_all(self, target: Target, moving: Moving, state: MergeState) -> MergeState:
        indexes = array("L", moving.indexes)
        total, done = len(indexes), 0
        while done < total and indexes[done] < state.next_block:
            done += 1
        self._tell(done, total)
        while done < total:
            size = BATCH if target.renames(moving, indexes[done : done + BATCH]) else COPIED
            batch = indexes[done : done + size]
            await self._lock.check()
            done += len(batch)
            state = replace(
                state,
                next_block=await target.take(moving, batch),
                merged_size=state.merged_size + len(batch) * BLOCK_SIZE,
                final_size=stream_size(target.entries, target.present),
            )
            await write_state(self._remote, self._chain[0], state)
            self._tell(done, total)
        return replace(
            state,
            next_block=target.entries,
            final_size=stream_size(target.entries, target.present),
        )

    def _tell(self, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(done, total)


@contextlib.asynccontextmanager
async def _open_target(remote: Remote, path: str) -> AsyncIterator[Target]:
    data = await read_alias(remote, path) if is_alias(path) else path
    if (await remote.stat(data)).is_dir:
        async with open_vhd_directory(remote, data) as disk:
            yield DirectoryTarget(remote, disk)
    else:
        async with FileTarget.open(remote, data) as file:
            yield file
