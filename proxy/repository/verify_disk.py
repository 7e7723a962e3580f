"""Verifying one stored disk: its structure, and on demand every byte of it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import trio

from proxy.disks.opening import StoredDisk, open_chain, open_disk
from proxy.disks.vhd_directory import VhdDirectory
from proxy.errors import NotFound, ProxyError
from proxy.formats import vhd, vhd_directory
from proxy.formats.checksums import BlockSums, block_digest
from proxy.formats.vhd_directory import Compression
from proxy.remotes import paths
from proxy.remotes.encryption import algorithm_of
from proxy.repository.checksums import Unknown, places_of, read_checksums
from proxy.repository.damage import Depth
from proxy.repository.verify_reports import (
    MOST_PROBLEMS,
    NOT_READ,
    Comparison,
    DiskReport,
    Problem,
    Status,
    rooted,
    unauthenticated,
    worst,
)
from proxy.runtime.threads import Work, in_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from uuid import UUID

    from proxy.disks.disk import RandomDisk
    from proxy.formats.checksums import Place
    from proxy.remotes.interface import FileStat, Remote
    from proxy.repository.sampling import Sample
    from proxy.runtime.buffers import BufferPool

_AT_ONCE: Final = 4
"""Blocks of one disk that are read at once."""
_BLOCK = re.compile(r"(0|[1-9][0-9]{0,6})/(0|[1-9][0-9]{0,2})")


@dataclass(frozen=True, slots=True)
class Reading:
    """How the data is read; ``None`` in its place looks at structures only."""

    pool: BufferPool
    sample: Sample | None
    moved: Callable[[int], None]
    """Hears of the bytes of each block that was read."""


@dataclass(slots=True)
class Found:
    """What is known of one disk so far."""

    path: str
    uuid: UUID | None = None
    timestamp: int = 0
    parent: str | None = None
    parent_uuid: UUID | None = None
    blocks: int = 0
    read: int = 0
    checksum: Comparison = NOT_READ
    is_merging: bool = False
    depth: Depth = Depth.STRUCTURE
    """How deep this look went."""
    needed: Depth = Depth.STRUCTURE
    """How deep a look must go to see the damage."""
    problems: list[Problem] = field(default_factory=list["Problem"])

    def add(self, problem: Problem, *, needed: Depth = Depth.STRUCTURE) -> None:
        if len(self.problems) < MOST_PROBLEMS:
            self.problems.append(problem)
            self.needed = max(self.needed, needed)

    @property
    def is_full(self) -> bool:
        return len(self.problems) >= MOST_PROBLEMS

    @property
    def status(self) -> Status:
        return worst(problem.status for problem in self.problems)

    def excuse(self, status: Status, message: str) -> None:
        """What looked like damage proves nothing, because of ``message``."""
        kept = [problem for problem in self.problems if problem.status is not Status.DAMAGED]
        seen = "; ".join(each.message for each in self.problems[:3] if each not in kept)
        what = status.value
        self.problems = [
            *kept,
            Problem(status=status, what=what, message=f"{message} ({seen})", path=self.path),
        ]

    def report(self) -> DiskReport:
        return DiskReport(
            path=self.path,
            uuid=None if self.uuid is None else str(self.uuid),
            status=self.status,
            parent=self.parent,
            is_merging=self.is_merging,
            blocks=self.blocks,
            read=self.read,
            checksum=self.checksum,
            problems=list(self.problems),
        )


async def look_at(remote: Remote, path: str, reading: Reading | None) -> Found:
    """Look at the disk ``path``.  Never raises for what is stored, nor for the storage.

    Something that is wrong is looked at twice, so that one bad read is no damage; and what was
    changed in the meantime is not called damaged.
    """
    found = Found(path)
    for attempt in (1, 2):
        found = Found(path)
        try:
            async with open_disk(remote, path) as disk:
                await _Look(remote, path, disk, found).all(reading)
        except ProxyError as error:
            found.add(Problem.of(error, path=path))
            if attempt == 1 and found.uuid is None:
                continue
        break
    return found


class _Look:
    """One look at an open disk."""

    def __init__(self, remote: Remote, path: str, disk: StoredDisk, found: Found) -> None:
        self._remote = remote
        self._disk = disk
        self._found = found
        self._is_directory = isinstance(disk, VhdDirectory)
        found.uuid = disk.uuid
        found.timestamp = disk.footer.timestamp
        found.blocks = len(disk.blocks)
        if disk.is_differencing:
            # of a name that leads elsewhere the chain says so
            found.parent = rooted(paths.join(paths.parent(path), disk.header.parent_name))
            found.parent_uuid = disk.header.parent_uuid

    async def all(self, reading: Reading | None) -> None:
        before = await self._places()
        if isinstance(self._disk, VhdDirectory):
            await self._files(self._disk)
        if reading is not None:
            await self._data(reading)
        if self._found.status is Status.DAMAGED and await self._has_changed(before):
            self._found.excuse(
                Status.UNKNOWN, "it was changed while it was looked at: verify it again"
            )

    async def _places(self) -> tuple[Place, ...]:
        return await places_of(self._remote, self._disk.path, is_directory=self._is_directory)

    async def _has_changed(self, before: tuple[Place, ...]) -> bool:
        try:
            return await self._places() != before
        except NotFound:
            return True

    # -- files of a directory ----------------------------------------------------------------

    async def _files(self, disk: VhdDirectory) -> None:
        """Every block that the table lists has a file of a size that a block can have."""
        missing = bytearray(disk.blocks.flags)
        top = paths.join(disk.path, vhd_directory.BLOCKS)
        exact = disk.compression is Compression.NONE
        try:
            async for path, stat in self._remote.walk(top):
                match = _BLOCK.fullmatch(path.removeprefix(top + "/"))
                index = -1 if match is None else int(match[1]) * 1000 + int(match[2])
                if not 0 <= index < len(missing) or not disk.blocks.flags[index]:
                    continue  # nobody's: the clean of a later merge takes it along
                missing[index] = 0
                self._size(index, path, stat, exact=exact)
        except NotFound as error:
            if error.code != "ENOENT":
                raise
        index = missing.find(1)
        while index >= 0 and not self._found.is_full:
            self._found.add(
                Problem(
                    status=Status.DAMAGED,
                    what="block missing",
                    message=f"block {index} has no file; {missing.count(1)} are missing in all",
                    path=paths.join(disk.path, vhd_directory.block_path(index)),
                    block=index,
                )
            )
            index = missing.find(1, index + 1)

    def _size(self, index: int, path: str, stat: FileStat, *, exact: bool) -> None:
        if stat.size == vhd.STORED_BLOCK if exact else 0 < stat.size <= vhd_directory.LONGEST_BLOCK:
            return
        self._found.add(
            Problem(
                status=Status.DAMAGED,
                what="block size",
                message=f"the file of block {index} has {stat.size} bytes, which no block has",
                path=path,
                block=index,
            )
        )

    # -- data ----------------------------------------------------------------------------------

    async def _data(self, reading: Reading) -> None:
        found, disk = self._found, self._disk
        known = await read_checksums(self._remote, found.path, disk)
        sums = None if isinstance(known, Unknown) else known.sums
        indexes: Iterable[int] = disk.blocks
        if reading.sample is not None:
            indexes = reading.sample.of(disk.blocks, str(disk.uuid))
        wrong = await read_blocks(disk, indexes, sums, reading, found)
        algorithm = algorithm_of(self._remote)
        if isinstance(known, Unknown) and algorithm is not None and not algorithm.is_authenticated:
            found.checksum = unauthenticated(algorithm)
        elif isinstance(known, Unknown):
            found.checksum = Comparison(
                result="unknown", reason=known.reason, message=known.message
            )
        else:
            found.checksum = Comparison(
                result="mismatch" if wrong else "match", compared=found.read
            )
        if found.read == found.blocks:
            found.depth = Depth.READ if sums is None else Depth.CHECKSUMS


async def read_blocks(
    disk: RandomDisk,
    indexes: Iterable[int],
    sums: BlockSums | None,
    reading: Reading,
    found: Found,
) -> int:
    """Read blocks, several at once, into ``found``; how many are not what ``sums`` say.

    Ends early when there are too many problems to tell.
    """
    wrong = 0
    left = iter(indexes)

    async def work(left: Iterator[int]) -> None:
        nonlocal wrong
        for index in left:
            if found.is_full:
                return
            problem = None
            for _ in range(2):
                problem = await _read_block(disk, found.path, index, sums, reading.pool)
                if problem is None:
                    break
            found.read += 1
            reading.moved(vhd.BLOCK_SIZE)
            if problem is not None:
                is_sum = problem.what == "checksum"
                wrong += is_sum
                found.add(problem, needed=Depth.CHECKSUMS if is_sum else Depth.READ)

    async with trio.open_nursery() as nursery:
        for _ in range(_AT_ONCE):
            nursery.start_soon(work, left)
    return wrong


async def _read_block(
    disk: RandomDisk, path: str, index: int, sums: BlockSums | None, pool: BufferPool
) -> Problem | None:
    buffer = await pool.acquire()
    try:
        await disk.read_block(index, buffer.memory)
        expected = None if sums is None else sums.get(index)
        if expected is None:
            return None
        data = buffer.memory[vhd.BITMAP_SIZE :]
        if await in_thread(Work.CPU, block_digest, data) == expected:
            return None
    except ProxyError as error:
        return Problem.of(error, path=path, block=index)
    finally:
        buffer.release()
    return Problem(
        status=Status.DAMAGED,
        what="checksum",
        message=f"the data of block {index} is not what was written",
        path=path,
        block=index,
    )


async def look_through_merge(
    remote: Remote, path: str, members: Iterable[str], reading: Reading | None
) -> list[Found]:
    """Look at the chain of ``path`` while its disks ``members`` are being merged.

    It is all right when the chain opens, and on demand reads, through the merge.  Otherwise
    nothing is known of the members before the merge has ended.
    """
    whole = Found(path)
    try:
        async with open_chain(remote, path) as chain:
            if reading is not None:
                indexes: Iterable[int] = chain.blocks
                if reading.sample is not None:
                    indexes = reading.sample.of(chain.blocks, path)
                await read_blocks(chain, indexes, None, reading, whole)
    except ProxyError as error:
        whole.add(Problem.of(error, path=path))
    if whole.status is Status.DAMAGED:
        whole.excuse(Status.MERGING, "it is being merged: verify it again when that has ended")
    return [Found(member, is_merging=True, problems=list(whole.problems)) for member in members]


def link_problem(child: Found, parent: Found | None) -> Problem | None:
    """What is wrong between a disk and the one that it says it was made from."""
    assert child.parent is not None
    if paths.parent(child.parent) != paths.parent(child.path):
        return Problem(
            status=Status.DAMAGED,
            what="parent name",
            message=f"the parent '{child.parent[:120]}' of this disk is not in its folder",
            path=child.path,
        )
    if parent is None:
        return Problem(
            status=Status.DAMAGED,
            what="parent missing",
            message=f"'{child.parent}', the parent of this disk, is missing",
            path=child.parent,
        )
    if parent.uuid is not None and parent.uuid != child.parent_uuid:
        return Problem(
            status=Status.DAMAGED,
            what="parent uuid",
            message=f"'{child.parent}' is not the disk that this one was made from: its uuid is"
            f" {parent.uuid}, not {child.parent_uuid}",
            path=child.parent,
        )
    return None
