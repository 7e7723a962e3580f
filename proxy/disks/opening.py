"""Opening disks by the names that metadata and children have for them."""

from __future__ import annotations

import contextlib
import posixpath
from typing import TYPE_CHECKING, Final, TypeAlias

import trio

from proxy.disks.alias import is_alias, read_alias
from proxy.disks.merging import ChainDisk, Merges, Merging, SettlingChain
from proxy.disks.vhd_directory import DirectoryHead, VhdDirectory
from proxy.disks.vhd_file import VhdFile, open_vhd_file
from proxy.errors import Conflict, Corrupt, NotFound, ProxyError, Refused, Unreachable
from proxy.remotes import paths

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from contextlib import AsyncExitStack

    from proxy.disks.chain import Chain
    from proxy.remotes.interface import Remote

StoredDisk: TypeAlias = VhdFile | VhdDirectory

LONGEST_CHAIN: Final = 1024
"""Disks of one chain: bounds what a hostile remote costs, and how many files are open."""


@contextlib.asynccontextmanager
async def open_disk(
    remote: Remote, path: str, *, is_unfinished: bool = False
) -> AsyncIterator[StoredDisk]:
    """The disk that ``path`` names: an alias of a VHD directory or file, or one of these.

    An encrypted remote holds VHD directories only, as its files are not read in parts:
    ``Refused`` (``ENOTSUP``) for a file there.  ``NotFound`` when the path, or what its alias
    names, is missing; ``Corrupt`` and ``Refused`` as for :func:`open_vhd_directory`.
    ``is_unfinished``: others are being merged into it (see :func:`open_vhd_file`).
    """
    async with contextlib.AsyncExitStack() as stack:
        path = paths.normalise(path)
        [disk] = await _complete([await _find(stack, remote, path, is_unfinished=is_unfinished)])
        yield disk


@contextlib.asynccontextmanager
async def open_chain(
    remote: Remote, path: str, *, until: str | None = None
) -> AsyncIterator[Chain]:
    """The disk ``path`` with all of its ancestors, or only those newer than ``until``.

    A parent is looked for under the name that its child's header has, in the child's folder.
    ``NotFound`` when one is missing, or when ``until`` is no ancestor; ``Corrupt`` when one is
    not the disk (by its uuid) that the child was made from, lies outside of the folder, or
    is an ancestor of itself.  The link to ``until`` itself is not checked: it is not opened.

    Which blocks there are is read for all directories at once.

    A merge may be under way in the chain, begin, or end while the chain is open: it reads the
    same.  Of disks that are being merged :attr:`Chain.disks` has what comes of them.
    """
    path = paths.normalise(path)
    stop = None if until is None else paths.normalise(until)
    if path == stop:
        raise ValueError("a chain that ends before its first disk")
    async with contextlib.AsyncExitStack() as stack:

        async def look() -> tuple[Merges, list[ChainDisk]]:
            return await _open_settled(stack, remote, path, stop)

        yield SettlingChain(*await look(), look)


_SETTLING: Final = 10
"""How often a chain is looked at again because a merge changed it meanwhile."""


async def _open_settled(
    stack: AsyncExitStack, remote: Remote, path: str, stop: str | None
) -> tuple[Merges, list[ChainDisk]]:
    """The chain, oldest first, with the merges that it was read through."""
    merges = await Merges.look(remote, paths.parent(path))
    for _ in range(_SETTLING):
        try:
            walk = _Walk(stack, remote, merges)
            found = await walk.up(path, stop)
            disks = await _complete([disk for _, disk in found])
            return merges, _joined([name for name, _ in found], disks, merges)
        except (NotFound, Corrupt):
            before, merges = merges, await Merges.look(remote, paths.parent(path))
            if merges == before:
                raise
    raise Unreachable(f"the chain of '{path}' changes again and again", code="EBUSY")


def _joined(names: Sequence[str], disks: Sequence[StoredDisk], merges: Merges) -> list[ChainDisk]:
    """Both newest first; the answer is oldest first, with disks under merge made one."""
    chain: list[ChainDisk] = []
    left = list(zip(names, disks, strict=True))
    while left:
        name, disk = left.pop()
        if name not in merges.states:
            chain.append(disk)
            continue
        members = merges.newer(name)
        newer: list[StoredDisk] = []
        while left and (left[-1][0] in members if members is not None else not newer):
            newer.append(left.pop()[1])
        chain.append(Merging(disk, newer))
    return chain


class _Walk:
    """From a disk to its ancestors."""

    def __init__(self, stack: AsyncExitStack, remote: Remote, merges: Merges) -> None:
        self._stack = stack
        self._remote = remote
        self._merges = merges

    async def up(self, path: str, stop: str | None) -> list[tuple[str, VhdFile | DirectoryHead]]:
        """The names and disks from ``path`` to the root of its chain, or to before ``stop``."""
        disk = await self._find(path)
        found = [(path, disk)]
        seen = {path}
        while disk.footer.is_differencing:
            parent_path = _parent_path(path, disk.header.parent_name)
            if parent_path == stop:
                return found
            if parent_path in seen or len(found) == LONGEST_CHAIN:
                raise Corrupt(
                    f"the chain of '{path}' does not end: '{parent_path}' is an ancestor of "
                    f"itself, or there are more than {LONGEST_CHAIN} disks",
                    data={"what": "chain", "path": path, "parent": parent_path},
                )
            seen.add(parent_path)
            parent = await self._find_parent(path, parent_path)
            self._check_link(path, disk, parent_path, parent)
            disk, path = parent, parent_path
            found.append((path, disk))
        if stop is not None:
            raise NotFound(
                f"'{stop}' is no ancestor: the chain ends at the full disk '{path}'",
                data={"path": stop, "root": path},
            )
        return found

    async def _find(self, path: str) -> VhdFile | DirectoryHead:
        """The disk ``path``, or the one that has taken it in."""
        complete = self._merges.complete_instead_of(path)
        if complete is not None:
            oldest, uuid = complete
            with contextlib.suppress(NotFound):
                disk = await _find(self._stack, self._remote, oldest)
                if uuid in (None, disk.footer.uuid):
                    return disk
        is_unfinished = path in self._merges.states
        return await _find(self._stack, self._remote, path, is_unfinished=is_unfinished)

    async def _find_parent(self, path: str, parent_path: str) -> VhdFile | DirectoryHead:
        try:
            return await self._find(parent_path)
        except NotFound as error:
            raise NotFound(
                f"'{parent_path}', the parent of the disk '{path}', is missing",
                code=error.code,
                data={"path": parent_path, "child": path},
            ) from error

    def _check_link(
        self,
        path: str,
        disk: VhdFile | DirectoryHead,
        parent_path: str,
        parent: VhdFile | DirectoryHead,
    ) -> None:
        expected = disk.header.parent_uuid
        state = self._merges.states.get(parent_path)
        # Merged, the oldest disk has the newest one's uuid already.
        was = parent.footer.uuid if state is None else state.parent_uuid
        if expected not in (parent.footer.uuid, was or expected):
            raise Corrupt(
                f"'{parent_path}' is not the disk that '{path}' was made from: its uuid is "
                f"{parent.footer.uuid}, not {expected}",
                data={"what": "parent uuid", "path": path, "parent": parent_path},
            )


def _parent_path(path: str, name: str) -> str:
    folder = paths.parent(path)
    resolved = paths.normalise(posixpath.join("/", folder, name))
    if not name or not resolved.startswith(f"{folder}/" if folder else ""):
        raise Corrupt(
            f"the parent {name[:80]!r} of the disk '{path}' is not in its folder",
            data={"what": "parent name", "path": path},
        )
    return resolved


async def _find(
    stack: AsyncExitStack, remote: Remote, path: str, *, is_unfinished: bool = False
) -> VhdFile | DirectoryHead:
    """What is known of a disk without its blocks; a file stays open as long as ``stack``."""
    if is_alias(path):
        target = await read_alias(remote, path)
        try:
            return await _find_target(stack, remote, target, is_unfinished=is_unfinished)
        except NotFound as error:
            raise NotFound(
                f"'{target}', the data of the disk '{path}', is missing",
                code=error.code,
                data={"path": target, "alias": path},
            ) from error
    if remote.is_encrypted:
        return await _find_target(stack, remote, path, is_unfinished=is_unfinished)
    try:
        return await stack.enter_async_context(
            open_vhd_file(remote, path, check_end=not is_unfinished)
        )
    except (Conflict, NotFound) as error:
        # an object store knows no directories
        if error.code not in ("EISDIR", "ENOENT"):
            raise
        try:
            return await DirectoryHead.read(remote, path)
        except NotFound:
            if isinstance(error, NotFound):
                raise error from None  # it names the path that was asked for
            raise


async def _find_target(
    stack: AsyncExitStack, remote: Remote, path: str, *, is_unfinished: bool
) -> VhdFile | DirectoryHead:
    """A directory, as nearly everything that has an alias is; otherwise a file."""
    try:
        return await DirectoryHead.read(remote, path)
    except NotFound as error:
        if not remote.is_encrypted:
            try:
                return await stack.enter_async_context(
                    open_vhd_file(remote, path, check_end=not is_unfinished)
                )
            except (Conflict, NotFound):
                raise error from None
        if error.code != "ENOTDIR":
            raise
        raise Refused(
            f"'{path}' is a VHD file, which cannot be read on an encrypted remote",
            code="ENOTSUP",
            data={"path": path},
        ) from error


async def _complete(found: Sequence[VhdFile | DirectoryHead]) -> list[StoredDisk]:
    """Read which blocks the directories have, all at once; the first one's error is raised."""
    disks: dict[int, StoredDisk] = {}
    errors: dict[int, ProxyError] = {}

    async def complete(position: int, head: DirectoryHead) -> None:
        try:
            disks[position] = await head.open()
        except ProxyError as error:
            errors[position] = error

    async with trio.open_nursery() as nursery:
        for position, disk in enumerate(found):
            if isinstance(disk, DirectoryHead):
                nursery.start_soon(complete, position, disk)
            else:
                disks[position] = disk
    if errors:
        raise errors[min(errors)]
    return [disks[position] for position in range(len(found))]
