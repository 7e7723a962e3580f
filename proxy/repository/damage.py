"""What this daemon knows to be damaged on a remote: noted by a verify, asked by the next run.

A delta on a damaged chain would be one more backup that cannot be restored, so the next run
makes the disk whole and says why.  The notes are this daemon's, in its journal: the backups
themselves are not changed.
"""

from __future__ import annotations

import contextlib
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

import msgspec

from proxy.remotes import paths

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from proxy.remotes.interface import Remote
    from proxy.tasks import Tasks

_KIND: Final = "damage"


class Depth(IntEnum):
    """What a verify looked at, and so what it takes to say that a damage is gone."""

    STRUCTURE = 1
    READ = 2
    """Every block was read."""
    CHECKSUMS = 3
    """Every block was read and is what was written."""


class Damage(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A damaged disk."""

    path: str
    """Of its file or alias."""
    uuid: UUID | None
    """``None``: so damaged that it does not say."""
    found: int
    """Seconds since 1970."""
    depth: Depth
    """The least that finds it."""
    message: str


class DamageNotes:
    """The notes about one remote."""

    def __init__(self, tasks: Tasks, remote: Remote) -> None:
        self._tasks = tasks
        self._prefix = f"{remote.url} "

    async def add(self, damage: Damage) -> None:
        """A disk that is noted already keeps the time when it was first found."""
        before = (await self.all()).get(damage.path)
        if before is not None and before.uuid == damage.uuid:
            damage = msgspec.structs.replace(
                damage, found=before.found, depth=max(before.depth, damage.depth)
            )
        await self._tasks.note(_KIND, self._prefix + damage.path, msgspec.to_builtins(damage))

    async def clear(self, path: str) -> None:
        await self._tasks.note(_KIND, self._prefix + path, None)

    async def all(self) -> dict[str, Damage]:
        """By path."""
        found: dict[str, Damage] = {}
        for key, value in (await self._tasks.notes(_KIND)).items():
            if key.startswith(self._prefix):
                # one of another version must not stop a backup
                with contextlib.suppress(msgspec.ValidationError):
                    found[key.removeprefix(self._prefix)] = msgspec.convert(value, Damage)
        return found


def damage_in(notes: Mapping[str, Damage], folder: str) -> Damage | None:
    """Any damage that is noted of a disk in ``folder``."""
    of_folder = (each for each in notes.values() if _is_in(each, folder))
    return next(of_folder, None)


def _is_in(damage: Damage, folder: str) -> bool:
    return paths.parent(damage.path) == paths.normalise(folder)


def damage_below(
    notes: Mapping[str, Damage],
    folder: str,
    names: Iterable[str],
    chain: Sequence[tuple[UUID, int]],
) -> Damage | None:
    """The noted damage that a chain in ``folder`` has, ``None`` when it has none.

    ``names`` are those of the folder's disks; ``chain`` is the uuid and time (seconds) of each
    disk, oldest first.  A damaged disk whose name is gone may have been merged into the root:
    only a root that was written after the damage was found is free of it.
    """
    present = frozenset(names)
    uuids = {uuid for uuid, _ in chain}
    for damage in notes.values():
        if not _is_in(damage, folder):
            continue
        if damage.uuid in uuids:
            return damage
        if paths.name(damage.path) not in present and chain[0][1] <= damage.found:
            return damage
    return None


def evidence_of(damage: Damage) -> dict[str, Any]:
    """For the log of the run that goes around it."""
    return {"path": damage.path, "damage": damage.message, "found": damage.found}
