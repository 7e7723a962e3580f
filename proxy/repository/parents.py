"""Which stored disk a delta can be chained on, and if none, why."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable
from uuid import UUID

from proxy.disks.alias import is_alias
from proxy.disks.opening import open_chain, open_disk
from proxy.disks.vhd_directory import VhdDirectory
from proxy.errors import NotFound, ProxyError
from proxy.formats.vhd_directory import Compression
from proxy.repository.damage import damage_below, damage_in, evidence_of
from proxy.repository.paths import disk_directory

if TYPE_CHECKING:
    from collections.abc import Mapping

    from proxy.formats.vhd import Footer
    from proxy.remotes.interface import Remote
    from proxy.repository.damage import Damage


@dataclass(frozen=True, slots=True)
class Parent:
    """The newest disk of a chain, whose content equals the base snapshot's."""

    name: str
    """Of its file or alias: what the child's header says."""
    path: str
    uuid: UUID
    compression: Compression
    """Of its blocks where it is a directory; its children use the same, so that a merge by
    whoever does it can move blocks as they are.  ``none`` for a file."""


@dataclass(frozen=True, slots=True)
class NoParent:
    """Why a remote cannot take a delta of a disk; ``reason`` is a stable code."""

    reason: str
    message: str
    evidence: dict[str, Any] = field(default_factory=dict[str, Any])


@runtime_checkable
class _Stored(Protocol):
    """What every disk of a stored chain is, also one that is being merged."""

    footer: Footer


def _damaged(damage: Damage) -> NoParent:
    return NoParent(
        "DAMAGED",
        f"the chain is damaged, a verify found: {damage.message}",
        evidence_of(damage),
    )


async def find_parent(
    remote: Remote,
    vm_uuid: str,
    job_id: str,
    disk_uuid: str,
    base_uuid: str,
    *,
    damaged: Mapping[str, Damage],
) -> Parent | NoParent:
    """Look for the disk whose uuid is ``base_uuid``, newest name first.

    Its whole chain must open and have none of the ``damaged`` disks, and its kind must be what
    the remote wants now.  Never raises for what is stored; an error of the storage itself
    passes through only for the listing.
    """
    folder = disk_directory(vm_uuid, job_id, disk_uuid)
    try:
        entries = await remote.list(folder)
    except NotFound:
        return NoParent("NO_BACKUP", "the remote has no backup of this disk", {"path": folder})
    names = sorted(
        (
            entry.name
            for entry in entries
            if entry.name.endswith(".vhd") and not entry.name.startswith(".")
        ),
        reverse=True,
    )
    wanted = UUID(base_uuid)
    unreadable: dict[str, str] = {}
    for name in names:
        path = f"{folder}/{name}"
        try:
            async with open_disk(remote, path) as disk:
                if disk.uuid != wanted:
                    continue
                is_directory = isinstance(disk, VhdDirectory)
                compression = disk.compression if isinstance(disk, VhdDirectory) else None
            async with open_chain(remote, path) as chain:
                footers = [each.footer for each in chain.disks if isinstance(each, _Stored)]
                members = [(footer.uuid, footer.timestamp) for footer in footers]
        except ProxyError as error:
            unreadable[name] = error.message
            continue
        damage = damage_below(damaged, folder, names, members)
        if damage is not None:
            return _damaged(damage)
        if is_directory != remote.use_vhd_directory or is_alias(name) != is_directory:
            return NoParent(
                "STORAGE_CHANGED",
                "the remote keeps disks as "
                + ("directories" if remote.use_vhd_directory else "files")
                + " now",
                {"path": path},
            )
        return Parent(
            name=name, path=path, uuid=wanted, compression=compression or Compression.NONE
        )
    if unreadable:
        known = damage_in(damaged, folder)
        if known is not None:
            return _damaged(known)
        return NoParent(
            "UNREADABLE",
            "no disk of the remote equals the base, and some cannot be read",
            {"base": base_uuid, "unreadable": unreadable},
        )
    return NoParent(
        "BASE_NOT_STORED",
        "no disk of the remote equals the base snapshot",
        {"base": base_uuid, "disks": names[:10]},
    )
