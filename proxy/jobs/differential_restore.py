"""Restoring over a snapshot that still exists on the pool: only what differs is sent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import structlog

from proxy.disks.negative import Negative
from proxy.disks.opening import open_chain
from proxy.errors import ProxyError
from proxy.repository import list_vm_backups, read_backup
from proxy.repository.paths import disk_path, split_backup_path
from proxy.xapi import vms

if TYPE_CHECKING:
    import contextlib

    from proxy.disks.disk import Disk
    from proxy.remotes import Remote
    from proxy.repository import BackupRecord
    from proxy.xapi import Xapi

_log = structlog.get_logger("restore")

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Nearest:
    """A snapshot of the live disk, and what must be written over a clone of it."""

    snapshot_ref: str
    snapshot_uuid: str
    difference: Disk | None
    """``None``: a clone of the snapshot is what was backed up."""


async def find_nearest(
    xapi: Xapi,
    remote: Remote,
    record: BackupRecord,
    vdi: Record,
    sr_ref: str,
    path: str,
    stack: contextlib.AsyncExitStack,
) -> Nearest | None:
    """The oldest snapshot of the disk on ``sr_ref`` that a backup from ``record`` on made.

    ``path`` is the disk to restore.  What is opened stays so with ``stack``.  ``None`` when
    there is none or anything is in the way (a key backup in between, another size, an error):
    the disk is then restored as usual, and the log of the daemon says why.
    """
    try:
        return await _find(xapi, remote, record, vdi, sr_ref, path, stack)
    except ProxyError as error:
        _log.warning("no differential restore", disk=vdi.get("uuid"), error=error.message)
        return None


async def _find(
    xapi: Xapi,
    remote: Remote,
    record: BackupRecord,
    vdi: Record,
    sr_ref: str,
    path: str,
    stack: contextlib.AsyncExitStack,
) -> Nearest | None:
    live_uuid = vdi.get("$snapshot_of$uuid")
    if not isinstance(live_uuid, str):
        return None
    snapshots = await _snapshots_on(xapi, live_uuid, sr_ref)
    vm_uuid, _ = split_backup_path(record.backup.id)
    for backup in await list_vm_backups(remote, vm_uuid):
        if backup.timestamp < record.backup.timestamp or backup.mode != "delta":
            continue
        later = (await read_backup(remote, backup.id)).metadata
        vhds: dict[str, Any] = later.get("vhds") or {}
        vdis: dict[str, Record] = later.get("vdis") or {}
        for ref, other in vdis.items():
            snapshot_ref = snapshots.get(other.get("uuid", ""))
            relative = vhds.get(ref)
            if snapshot_ref is None or relative is None:
                continue
            tip = disk_path(backup.id, str(relative))
            if tip is None or other.get("virtual_size") != vdi.get("virtual_size"):
                continue
            if tip == path:
                return Nearest(snapshot_ref, other["uuid"], None)
            wanted = await stack.enter_async_context(open_chain(remote, path))
            # what changed since: the disks behind ours, each a delta, up to the snapshot's
            since = await stack.enter_async_context(open_chain(remote, tip, until=path))
            return Nearest(snapshot_ref, other["uuid"], Negative(wanted, since))
    return None


async def _snapshots_on(xapi: Xapi, live_uuid: str, sr_ref: str) -> dict[str, str]:
    """Snapshots of the live disk that have their data, on this SR: reference by uuid."""
    live = await xapi.record("VDI", await xapi.by_uuid("VDI", live_uuid))
    found: dict[str, str] = {}
    for ref in live.get("snapshots", []):
        snapshot = await vms.record_or_none(xapi, "VDI", ref)
        if (
            snapshot is not None
            and snapshot.get("SR") == sr_ref
            and snapshot.get("type") != "cbt_metadata"
        ):
            found[snapshot["uuid"]] = ref
    return found
