"""What a VDI directory holds, as values: disks, their links, merges under way, data.

``vdis/<job>/<vdi>/`` holds the disks of one VDI, each a VHD file or an alias of a VHD
directory in ``data/``, linked by the parent's name in each header.  :class:`Lineage` is one
look at it; :mod:`proxy.repository.lineage` takes the look, :mod:`proxy.repository.planning`
decides on it.  Nothing here does I/O.  Paths are from the remote's root, normalised.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from proxy.remotes import paths

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from uuid import UUID

    from proxy.disks.merge_state import MergeState
    from proxy.errors import ProxyError

DATA = "data"
"""The directory with the VHD directories, beside their aliases."""

# `.<ms>.<name>` of Xen Orchestra, for which it would be a disk; `.<ms>.<name>.tmp` of ours.
_TEMPORARY = re.compile(
    r"\.[0-9]{13}\.([0-9]{8}T[0-9]{6}Z(\.alias)?\.vhd|\.[^/]+\.merge\.json)(\.tmp)?"
)


def is_temporary(name: str) -> bool:
    """Whether a name in a VDI directory is that of an unfinished file."""
    return _TEMPORARY.fullmatch(name) is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredDisk:
    """A disk whose structures could be read."""

    path: str
    uuid: UUID
    parent_uuid: UUID
    parent: str | None = None
    """The path that its header names; ``None`` when it is the root of a chain."""
    size: int = 0
    """Bytes of the disk as a VHD stream, its parents not included."""
    target: str | None = None
    """What it is an alias of; ``None`` for a file."""

    @property
    def is_differencing(self) -> bool:
        return self.parent is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """One look at a VDI directory."""

    directory: str
    disks: Mapping[str, StoredDisk]
    """The readable disks by path."""
    unreadable: Mapping[str, ProxyError] = field(default_factory=dict[str, "ProxyError"])
    """Disks that are there and could not be opened, by path, dangling aliases aside."""
    dangling: Mapping[str, str] = field(default_factory=dict[str, str])
    """Aliases whose target is provably not there, with that target."""
    aliases: Mapping[str, str | None] = field(default_factory=dict[str, "str | None"])
    """Every alias with its target, ``None`` where it could not be read."""
    states: Mapping[str, MergeState] = field(default_factory=dict[str, "MergeState"])
    """Merges under way by the path of their oldest disk, be it there or not."""
    bad_states: Mapping[str, ProxyError] = field(default_factory=dict[str, "ProxyError"])
    """State files that cannot be used, by their own path."""
    data: Collection[str] | None = ()
    """What lies in ``data/``, by path; ``None`` when that could not be listed."""
    temporary: Collection[str] = ()
    """Unfinished files, of writers that may live."""

    def __contains__(self, path: object) -> bool:
        """Whether a disk of this path is there, readable or not."""
        return path in self.disks or path in self.unreadable or path in self.dangling

    def ancestors(self, path: str) -> Iterator[str]:
        """``path`` and what its chain stands on, as far as links can be read.

        The last one may not be there.  A loop ends where it closes.
        """
        seen: set[str] = set()
        current: str | None = path
        while current is not None and current not in seen:
            seen.add(current)
            yield current
            disk = self.disks.get(current)
            current = disk.parent if disk is not None else None

    def children(self, path: str) -> list[str]:
        return sorted(each.path for each in self.disks.values() if each.parent == path)

    def owns(self, path: str, elsewhere: Collection[str] = ()) -> bool:
        """Whether what the disk ``path`` consists of belongs to it alone, so that it may be
        changed, moved or removed with it.

        An alias owns its target only when that lies in our ``data/``, is named as a disk,
        and no other alias (``elsewhere``: targets of other VDI directories) means it, a part of
        it or something around it.  An alias that could not be read may mean anything.
        """
        if path not in self.aliases:
            return path in self
        target = self.aliases[path]
        if target is None or not self.is_data(target):
            return False
        others = [each for alias, each in self.aliases.items() if alias != path]
        if None in others:
            return False
        return not any(
            overlaps(target, other) for other in [*others, *elsewhere] if other is not None
        )

    def is_data(self, target: str) -> bool:
        data = paths.join(self.directory, DATA) + "/"
        return target.startswith(data) and len(target) > len(data) and target.endswith(".vhd")


def overlaps(one: str, other: str) -> bool:
    """Whether one path is the other, or inside it."""
    return one == other or one.startswith(other + "/") or other.startswith(one + "/") or not other
