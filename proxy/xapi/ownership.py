"""Who a thing on a pool belongs to: keys in ``other_config`` of VMs and VDIs.

Most are Xen Orchestra's, which finds its bases, replicas and snapshots by them; two are
ours.  A host copies a VM's ``other_config`` to each of its snapshots: what is marked on the
live VM before a snapshot is taken marks the snapshot from its first moment, and equally one
that a user takes in that moment.  So a mark alone never says that a thing is ours: a sweep
must also find the temporary name that only we give.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from proxy.xapi.together import together
from proxy.xapi.vms import disks

if TYPE_CHECKING:
    from collections.abc import Mapping

    from proxy.xapi.client import Xapi

CONTENT_KEY: Final = "xo:backup:contentKey"
COPY_OF: Final = "xo:copy_of"
DATETIME: Final = "xo:backup:datetime"
DELTA_CHAIN_LENGTH: Final = "xo:backup:deltaChainLength"
EXPORTED: Final = "xo:backup:exported"
INCLUDE_NON_NBD_QCOW2_FIX: Final = "xo:backup:includeNonNbdQcow2Fix"
JOB: Final = "xo:backup:job"
SCHEDULE: Final = "xo:backup:schedule"
SR: Final = "xo:backup:sr"
VM: Final = "xo:backup:vm"
BASE_DELTA_VDI: Final = "xo:base_delta_vdi"

PROXY: Final = "xo:backup:proxy"
"""Ours: the id of the installation that made the thing."""
RUN: Final = "xo:backup:run"
"""Ours: the id of the run that made it, removed when the thing is finished."""
SHUT_DOWN: Final = "xo:backup:shutdown"
"""Ours, on a live VM that we shut down for its backup: ``<installation>/<run>``."""

RESET_KEYS: Final = (
    CONTENT_KEY,
    COPY_OF,
    DATETIME,
    DELTA_CHAIN_LENGTH,
    EXPORTED,
    INCLUDE_NON_NBD_QCOW2_FIX,
    JOB,
    SCHEDULE,
    VM,
    PROXY,
    RUN,
)
"""What a live VM must not carry: the target SR of a replica is not among them."""


_OF_XEN_ORCHESTRA: Final = frozenset({*RESET_KEYS, SR} - {PROXY, RUN})
_OURS: Final = "xo:backup:"


def is_of_intervention(key: str) -> bool:
    """Whether a key says what was being done to a VM, which is not true of a copy of it."""
    return key.startswith(_OURS) and key not in _OF_XEN_ORCHESTRA | {PROXY, RUN}


def without_keys(config: Mapping[str, str]) -> dict[str, str]:
    """``other_config`` without anything that tells of backups: what a copy begins with."""
    gone = (COPY_OF, BASE_DELTA_VDI)
    return {k: v for k, v in config.items() if not k.startswith(_OURS) and k not in gone}


async def set_keys(xapi: Xapi, vm_ref: str, keys: Mapping[str, str | None]) -> None:
    """Write ``keys`` (``None``: remove) on a VM and on each of its disks.

    Entries that have their value already cost no call.  The disks come first, the VM last:
    a VM that carries a key has disks that carry it.
    """
    vm = await xapi.record("VM", vm_ref)

    async def write(disk: tuple[dict[str, Any], str, dict[str, Any]]) -> None:
        await _write(xapi, "VDI", disk[1], disk[2], keys)

    await together(write, await disks(xapi, vm))
    await _write(xapi, "VM", vm_ref, vm, keys)


async def set_content_keys(xapi: Xapi, vm_ref: str) -> None:
    """Write on each disk of a snapshot that its content is its own (:data:`CONTENT_KEY`).

    Replicas carry the same key: Xen Orchestra finds by it which of them equals the disk.
    """
    vm = await xapi.record("VM", vm_ref)

    async def write(disk: tuple[dict[str, Any], str, dict[str, Any]]) -> None:
        _, ref, vdi = disk
        await _write(xapi, "VDI", ref, vdi, {CONTENT_KEY: str(vdi["uuid"])})

    await together(write, await disks(xapi, vm))


async def reset_keys(xapi: Xapi, vm_ref: str) -> None:
    """Remove :data:`RESET_KEYS` from a VM and each of its disks, where they are present."""
    await set_keys(xapi, vm_ref, dict.fromkeys(RESET_KEYS))


async def reset_disk_keys(xapi: Xapi, vdi_ref: str) -> None:
    """Remove :data:`RESET_KEYS` from one disk, which no VM need have."""
    vdi = await xapi.record("VDI", vdi_ref)
    await _write(xapi, "VDI", vdi_ref, vdi, dict.fromkeys(RESET_KEYS))


async def _write(
    xapi: Xapi, cls: str, ref: str, record: Mapping[str, Any], keys: Mapping[str, str | None]
) -> None:
    present: Mapping[str, str] = record.get("other_config") or {}
    changes = {key: value for key, value in keys.items() if present.get(key) != value}
    if changes:
        await xapi.update_map(cls, ref, "other_config", changes)
