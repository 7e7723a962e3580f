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
from proxy.repository.qcow2_bases import is_suspect_base

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


def _unreadable(
    damaged: Mapping[str, Damage], folder: str, base_uuid: str, unreadable: Mapping[str, str]
) -> NoParent:
    known = damage_in(damaged, folder)
    if known is not None:
        return _damaged(known)
    return NoParent(
        "UNREADABLE",
        "no disk of the remote equals the base, and some cannot be read",
        {"base": base_uuid, "unreadable": dict(unreadable)},
    )


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
    suspects_qcow2: bool = True,
) -> Parent | NoParent:
    """Look for the disk whose uuid is ``base_uuid``, newest name first.

    Its whole chain must open and have none of the ``damaged`` disks, no other disk may be
    chained on it, and its kind must be what the remote wants now.  ``suspects_qcow2``: nor may it
    be what Xen Orchestra once read wrong from a qcow2 disk.  Never raises for what is
    stored; an error of the storage itself passes through only for the listing.
    """
    folder = disk_directory(vm_uuid, job_id, disk_uuid)
    try:
        entries = await remote.list(folder)
    except NotFound:
        return NoParent("NO_BACKUP", "the remote has no backup of this disk", {"path": folder})
    names = sorted((entry.name for entry in entries if _is_disk(entry.name)), reverse=True)
    unreadable: dict[str, str] = {}
    children: dict[str, str] = {}
    for name in names:
        try:
            tip = await _open_tip(remote, folder, name, UUID(base_uuid), children)
        except ProxyError as error:
            unreadable[name] = error.message
            continue
        if tip is not None:
            damage = damage_below(damaged, folder, names, tip.members)
            if damage is not None:
                return _damaged(damage)
            return await _accept(remote, tip, children, suspects_qcow2=suspects_qcow2)
    if not unreadable:
        return NoParent(
            "BASE_NOT_STORED",
            "no disk of the remote equals the base snapshot",
            {"base": base_uuid, "disks": names[:10]},
        )
    return _unreadable(damaged, folder, base_uuid, unreadable)


def _is_disk(name: str) -> bool:
    return name.endswith(".vhd") and not name.startswith(".")


@dataclass(frozen=True, slots=True)
class _Tip:
    """The disk that equals the base, with the disks of its chain."""

    parent: Parent
    is_directory: bool
    members: list[tuple[UUID, int]]


async def _open_tip(
    remote: Remote, folder: str, name: str, wanted: UUID, children: dict[str, str]
) -> _Tip | None:
    """``None`` for another disk, of which ``children`` then says whose child it is."""
    path = f"{folder}/{name}"
    async with open_disk(remote, path) as disk:
        if disk.uuid != wanted:
            if disk.is_differencing:
                children[disk.header.parent_name] = name
            return None
        is_directory = isinstance(disk, VhdDirectory)
        compression = disk.compression if isinstance(disk, VhdDirectory) else Compression.NONE
    async with open_chain(remote, path) as chain:
        footers = [each.footer for each in chain.disks if isinstance(each, _Stored)]
    members = [(footer.uuid, footer.timestamp) for footer in footers]
    return _Tip(Parent(name, path, wanted, compression), is_directory, members)


async def _accept(
    remote: Remote, tip: _Tip, children: Mapping[str, str], *, suspects_qcow2: bool
) -> Parent | NoParent:
    parent = tip.parent
    if parent.name in children:
        # A second child would make the merge of either of them lose the other.
        return NoParent(
            "HAS_CHILD",
            "another disk is chained on the one that equals the base",
            {"path": parent.path, "child": children[parent.name]},
        )
    if tip.is_directory != remote.use_vhd_directory or is_alias(parent.name) != tip.is_directory:
        kind = "directories" if remote.use_vhd_directory else "files"
        return NoParent(
            "STORAGE_CHANGED", f"the remote keeps disks as {kind} now", {"path": parent.path}
        )
    if suspects_qcow2 and await is_suspect_base(remote, parent.path):
        return NoParent(
            "QCOW2_SUSPECT",
            "forcing a full: qcow2 base predates the non-NBD qcow2 fix and looks corrupt",
            {"parentDestPath": parent.path},
        )
    return parent
