"""Which backups a remote holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog
import trio

from proxy.errors import NotFound, ProxyError, Unreachable
from proxy.repository.cache import read_directory
from proxy.repository.paths import ROOT, is_vm_name

if TYPE_CHECKING:
    from proxy.remotes.interface import Remote
    from proxy.repository.metadata import Backup

_log = structlog.get_logger(__name__)

_TOGETHER = 4
"""VM directories read at once: enough to keep two cores and a network storage busy."""


async def list_vm_backups(remote: Remote, vm_uuid: str) -> list[Backup]:
    """The backups of one VM, oldest first; empty when it has none.

    A backup whose metadata cannot be read is left out and logged.  An error of the
    directory passes through: an empty list always means that there is nothing.
    """
    return (await read_directory(remote, vm_uuid)).backups


async def list_vms(remote: Remote) -> list[str]:
    """The names of all VM directories, sorted."""
    try:
        entries = await remote.list(ROOT)
    except NotFound:
        return []
    return [entry.name for entry in entries if entry.is_dir and is_vm_name(entry.name)]


async def list_all(remote: Remote) -> dict[str, list[Backup]]:
    """The backups of every VM that has one, by VM uuid, each list oldest first.

    One VM directory that is not ours to read is left out and logged; a remote that stops
    answering fails the whole list (``Unreachable``).
    """
    found: dict[str, list[Backup]] = {}
    failures: list[ProxyError] = []
    limit = trio.CapacityLimiter(_TOGETHER)

    async def one(vm_uuid: str) -> None:
        async with limit:
            try:
                found[vm_uuid] = await list_vm_backups(remote, vm_uuid)
            except Unreachable as error:
                failures.append(error)
                nursery.cancel_scope.cancel()
            except ProxyError as error:
                _log.warning("a VM is not listed", vm=vm_uuid, error=error.message)

    vms = await list_vms(remote)
    async with trio.open_nursery() as nursery:
        for vm_uuid in vms:
            nursery.start_soon(one, vm_uuid)
    if failures:
        raise failures[0]
    return {vm_uuid: found[vm_uuid] for vm_uuid in vms if found.get(vm_uuid)}
