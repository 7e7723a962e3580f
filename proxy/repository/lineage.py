"""Looking at a VDI directory: everything that :mod:`proxy.repository.planning` decides on."""

from __future__ import annotations

import posixpath
from typing import TYPE_CHECKING

import trio

from proxy.disks.alias import LONGEST, is_alias, parse_alias
from proxy.disks.merge_state import MergeState, is_disk_name, read_states, state_path
from proxy.disks.opening import open_disk
from proxy.errors import Corrupt, NotFound, ProxyError
from proxy.formats.vhd import stream_size
from proxy.remotes import paths
from proxy.repository.chains import DATA, Lineage, StoredDisk, is_temporary, overlaps

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Sequence

    from proxy.remotes.interface import Entry, Remote

_AT_ONCE = 4
"""Disks opened at once: each is three to five small reads."""


async def read_lineage(remote: Remote, directory: str) -> Lineage:
    """Look at the VDI directory ``directory``.

    An error of the listing is raised; one of a disk, an alias or a state is in the answer.
    A directory that is missing holds nothing: object stores have no empty ones.
    """
    try:
        entries = await remote.list(directory)
    except NotFound as error:
        if error.code != "ENOENT":
            raise
        entries = []
    names = [entry.name for entry in entries]
    merges = await read_states(remote, directory, names)
    states = {disk: each for disk, each in merges.items() if isinstance(each, MergeState)}
    data = await _data(remote, directory, entries)
    disks = [paths.join(directory, name) for name in names if is_disk_name(name)]
    aliases, unreadable = await _aliases(remote, [path for path in disks if is_alias(path)])
    found: dict[str, StoredDisk] = {}
    dangling: dict[str, str] = {}

    async def look(path: str) -> None:
        try:
            found[path] = await stored_disk(
                remote, path, target=aliases.get(path), is_unfinished=path in merges
            )
        except NotFound as error:
            target = aliases.get(path)
            is_gone = (
                error.code == "ENOENT"
                and target is not None
                and target.startswith(paths.join(directory, DATA) + "/")
                and data is not None
                and not any(overlaps(target, each) for each in data)
            )
            if is_gone and target is not None:
                dangling[path] = target
            else:
                unreadable[path] = error
        except ProxyError as error:
            unreadable[path] = error

    await _each([path for path in disks if path not in unreadable], look)
    return Lineage(
        directory=directory,
        disks={path: found[path] for path in disks if path in found},
        unreadable={path: unreadable[path] for path in disks if path in unreadable},
        dangling=dangling,
        aliases=aliases,
        states=states,
        bad_states={
            state_path(disk): each
            for disk, each in merges.items()
            if not isinstance(each, MergeState)
        },
        data=data,
        temporary=tuple(
            paths.join(directory, entry.name)
            for entry in entries
            if not entry.is_dir and is_temporary(entry.name)
        ),
    )


async def stored_disk(
    remote: Remote, path: str, *, target: str | None = None, is_unfinished: bool = False
) -> StoredDisk:
    """The disk ``path``, whose alias names ``target``.  Raises what opening it raises."""
    async with open_disk(remote, path, is_unfinished=is_unfinished) as disk:
        parent = None
        if disk.is_differencing:
            parent = paths.join(paths.parent(path), disk.header.parent_name)
        return StoredDisk(
            path=path,
            uuid=disk.uuid,
            parent=parent,
            parent_uuid=disk.header.parent_uuid,
            size=stream_size(disk.header.max_entries, len(disk.blocks)),
            target=target,
        )


async def _each(items: Sequence[str], look: Callable[[str], Awaitable[None]]) -> None:
    limit = trio.CapacityLimiter(_AT_ONCE)

    async def one(item: str) -> None:
        async with limit:
            await look(item)

    async with trio.open_nursery() as nursery:
        for item in items:
            nursery.start_soon(one, item)


async def _data(remote: Remote, directory: str, entries: Sequence[Entry]) -> Collection[str] | None:
    if not any(entry.name == DATA for entry in entries):
        return ()
    path = paths.join(directory, DATA)
    try:
        return tuple(paths.join(path, entry.name) for entry in await remote.list(path))
    except ProxyError:
        return None


async def _aliases(
    remote: Remote, aliases: Sequence[str]
) -> tuple[dict[str, str | None], dict[str, ProxyError]]:
    """The target of each alias, and those that cannot be used.

    An alias that says something impossible still claims what it says; an empty one, which a
    crash of its writer leaves, claims nothing.
    """
    targets: dict[str, str | None] = {}
    unusable: dict[str, ProxyError] = {}
    contents = await remote.read_files(aliases, limit=LONGEST)
    for path, content in zip(aliases, contents, strict=True):
        if isinstance(content, ProxyError):
            targets[path] = None
            unusable[path] = content
            continue
        try:
            targets[path] = parse_alias(path, content)
        except Corrupt as error:
            unusable[path] = error
            text = content.decode(errors="surrogateescape").strip().replace("\0", "")
            if text:
                targets[path] = paths.normalise(posixpath.join("/", paths.parent(path), text))
    return targets, unusable
