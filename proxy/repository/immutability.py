"""Backups that the storage protects against everybody, us included.

Two mechanisms: the remote says that it is immutable (option ``immutable``, Object Lock), or a
daemon on the storage server makes the files of each backup immutable when its metadata is
complete and lifts that when its time is over; it says so in ``/immutability.json``.

What is protected cannot be deleted before its time.  Metadata goes first, so a refusal leaves a
backup listed and whole, or unlisted with data that a later clean removes.  Retention finds the
same backups again at the next run, and a merge its disks: both wait, with a warning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from proxy.errors import Many, NotFound, ProxyError, Refused
from proxy.remotes.wrapper import protected_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from proxy.remotes.interface import Remote
    from proxy.repository.metadata import Backup

DECLARATION = "/immutability.json"


def is_protection(error: BaseException) -> bool:
    """Whether nothing but the storage's protection was in the way."""
    if isinstance(error, Many):
        return bool(error.errors) and all(map(is_protection, error.errors))
    return isinstance(error, Refused) and error.code == "EPERM"


async def is_protected(remote: Remote, path: str, error: Refused) -> bool:
    """Whether ``error``, of removing ``path``, comes from the storage's protection.

    SMB servers say ``EACCES`` for it, as for whoever lacks a right: that is believed only where a
    protection is declared and the file cannot be written now either.
    """
    if is_protection(error):
        return True
    if error.code != "EACCES" or not await is_declared(remote):
        return False
    return all(await protected_of(remote, [path]))


async def is_declared(remote: Remote) -> bool:
    """Whether somebody says that backups on this remote are protected; in doubt yes."""
    if remote.is_immutable:
        return True
    try:
        await remote.stat(DECLARATION)
    except NotFound:
        return False
    except ProxyError:
        return True
    return True


async def with_protection(
    remote: Remote, by_vm: Mapping[str, Sequence[Backup]]
) -> dict[str, list[Backup]]:
    """The same backups, ``is_immutable`` where the storage refuses to change them *now*.

    Tried and not taken from what is declared: a protection that was never switched on, or is over,
    is no protection.  Nothing is tried where nobody declares one.
    """
    if not any(by_vm.values()) or not await is_declared(remote):
        return {vm: list(backups) for vm, backups in by_vm.items()}
    ids = [backup.id for backups in by_vm.values() for backup in backups]
    protected = dict(zip(ids, await protected_of(remote, ids), strict=True))
    return {
        vm: [
            msgspec.structs.replace(backup, is_immutable=protected[backup.id]) for backup in backups
        ]
        for vm, backups in by_vm.items()
    }
