"""How much the backups of a remote take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from proxy.repository.listing import list_all

if TYPE_CHECKING:
    from proxy.remotes.interface import Remote


async def total_backup_size(remote: Remote) -> int:
    """Bytes of all VM backups, as their metadata says; XO and pool metadata do not count."""
    backups = await list_all(remote)
    return sum(backup.bytes_on_disk for vm in backups.values() for backup in vm)
