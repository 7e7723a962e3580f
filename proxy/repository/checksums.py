"""The checksums of a disk's blocks, beside the disk: what lets a verify see a wrong byte.

``<VDI dir>/.<TS>.xxh3`` belongs to ``<TS>.vhd`` or ``<TS>.alias.vhd``; Xen Orchestra leaves
such names alone.  It counts only as long as the disk is what it was when it was written: same
uuid, and same size and time of the file, or of ``bat`` and ``footer`` of the directory, which
every merge rewrites.  After somebody else's change the checksums are unknown, which says
nothing about the disk.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from proxy.disks.alias import SUFFIX as ALIAS_SUFFIX
from proxy.disks.alias import is_alias, read_alias
from proxy.disks.opening import StoredDisk, open_disk
from proxy.disks.vhd_directory import VhdDirectory
from proxy.errors import NotFound, ProxyError
from proxy.formats import vhd_directory
from proxy.formats.checksums import LONGEST, MOST_BLOCKS, BlockSums, Checksums, Place
from proxy.remotes import paths
from proxy.runtime.deadlines import undo_within
from proxy.runtime.threads import Work, in_thread
from proxy.runtime.trouble import tell_trouble

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Sequence
    from uuid import UUID

    from proxy.remotes.interface import Remote

_SUFFIX: Final = ".xxh3"
_FILE = re.compile(r"\.(?P<stem>[^/.][^/]*)\.xxh3")
_TEMPORARY = re.compile(r"\.[0-9]{13}\.\.[^/]+\.xxh3(\.tmp)?")
_MERGE_SECONDS: Final = 120


@dataclass(frozen=True, slots=True)
class Unknown:
    """Why a disk has no checksums that count; ``reason`` is a stable code.

    ``NONE``: none were written (by Xen Orchestra, or before there were any).  ``CHANGED``: the
    disk was merged or written by somebody else since.  ``UNREADABLE``: the file is damaged, or
    the storage does not give it.
    """

    reason: str
    message: str


def checksums_path(disk: str) -> str:
    """Where the checksums of the disk ``disk`` (file or alias) are."""
    name = paths.name(disk)
    stem = name.removesuffix(ALIAS_SUFFIX if is_alias(name) else ".vhd")
    return paths.join(paths.parent(disk), f".{stem}{_SUFFIX}")


def orphan_checksums(names: Iterable[str]) -> list[str]:
    """Of the names in a VDI directory: checksums without their disk, and unfinished ones.

    For the clean, which holds the lock.
    """
    names = frozenset(names)
    found = [name for name in names if _TEMPORARY.fullmatch(name) is not None]
    for name in names:
        match = _FILE.fullmatch(name)
        if match is not None and name not in found:
            disks = {f"{match['stem']}.vhd", f"{match['stem']}{ALIAS_SUFFIX}"}
            if not disks & names:
                found.append(name)
    return sorted(found)


async def places_of(remote: Remote, data: str, *, is_directory: bool) -> tuple[Place, ...]:
    """The present state of the file or directory ``data`` that a disk consists of."""
    if is_directory:
        parts = (vhd_directory.TABLE, vhd_directory.FOOTER)
        files = [paths.join(data, part) for part in parts]
    else:
        files = [data]
    stats = [await remote.stat(file) for file in files]
    return tuple(Place(stat.size, max(0, round(stat.mtime * 1_000_000))) for stat in stats)


async def write_checksums(
    remote: Remote, disk: str, uuid: UUID, sums: BlockSums, *, is_directory: bool
) -> None:
    """Store the checksums of the complete disk ``disk``, bound to what it is now.

    Nothing is stored for a disk above 16 TiB.
    """
    if sums.count > MOST_BLOCKS:
        return
    data = await read_alias(remote, disk) if is_alias(disk) else disk
    places = await places_of(remote, data, is_directory=is_directory)
    encoded = await in_thread(Work.CPU, Checksums(uuid, places, sums).encode)
    await remote.write_file(checksums_path(disk), encoded)


async def remove_checksums(remote: Remote, disk: str) -> None:
    """No error when there are none."""
    await remote.unlink(checksums_path(disk))


async def read_checksums(remote: Remote, path: str, disk: StoredDisk) -> Checksums | Unknown:
    """The checksums of ``disk``, opened as ``path``, if they are of what it is now.

    Never raises for what is stored, nor for a storage that does not give it.
    """
    try:
        raw = await remote.read_file(checksums_path(path), limit=LONGEST)
        found = await in_thread(Work.CPU, Checksums.decode, raw)
        places = await places_of(remote, disk.path, is_directory=isinstance(disk, VhdDirectory))
    except NotFound:
        return Unknown("NONE", "no checksums were stored for this disk")
    except ProxyError as error:
        return Unknown("UNREADABLE", f"its checksums cannot be read: {error.message}")
    if (found.uuid, found.places, found.sums.flags) != (disk.uuid, places, disk.blocks.flags):
        return Unknown(
            "CHANGED", "the disk was merged or written by somebody else since its checksums"
        )
    return found


@contextlib.asynccontextmanager
async def merging_checksums(remote: Remote, chain: Sequence[str]) -> AsyncIterator[None]:
    """Around the merge of the disks ``chain``, oldest first, into one with the last one's name.

    When the block ends well the merged disk has the checksums of all, where those of each were
    known before it, else none; the others' are removed.  When it fails, or after a crash, what
    is there no longer fits any disk and is unknown.  Trouble here is told, never raised.
    """
    before = await _known(remote, chain)
    yield
    try:
        with undo_within(f"the checksums of '{chain[-1]}'", _MERGE_SECONDS):
            await _after_merge(remote, chain, before)
    except ProxyError as error:
        tell_trouble("the checksums of a merged disk are lost", error, path=chain[-1])


async def _known(remote: Remote, chain: Sequence[str]) -> BlockSums | None:
    """What the merged disk will have; ``None`` when any disk's checksums are unknown."""
    merged: BlockSums | None = None
    for path in chain:
        try:
            async with open_disk(remote, path) as disk:
                found = await read_checksums(remote, path, disk)
        except ProxyError:
            return None  # the merge will say why
        if isinstance(found, Unknown):
            return None
        if merged is None:
            merged = found.sums
        else:
            merged = await in_thread(Work.CPU, merged.under, found.sums)
    return merged


async def _after_merge(remote: Remote, chain: Sequence[str], sums: BlockSums | None) -> None:
    for path in chain[:-1]:
        await remove_checksums(remote, path)
    merged = chain[-1]
    if sums is not None:
        async with open_disk(remote, merged) as disk:
            if sums.flags == disk.blocks.flags:
                is_directory = isinstance(disk, VhdDirectory)
                await write_checksums(remote, merged, disk.uuid, sums, is_directory=is_directory)
                return
    await remove_checksums(remote, merged)
