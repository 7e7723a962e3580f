"""Who a thing on a pool belongs to: keys in ``other_config`` of VMs, VDIs and tasks.

Most are Xen Orchestra's, which finds its bases, replicas and snapshots by them; the last ones
are ours.  A host copies a VM's ``other_config`` to each of its snapshots: what is marked on the
live VM before a snapshot is taken marks the snapshot from its first moment, and equally one
that a user takes in that moment.  So a mark alone never says that a thing is ours: a sweep
must also find the temporary name that only we give, and what is done to a live VM for a time
is marked with that VM's uuid, which no copy has.
"""

from __future__ import annotations

from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from proxy.errors import ProxyError
from proxy.runtime.deadlines import undo_within
from proxy.runtime.trouble import tell_trouble
from proxy.xapi.together import together
from proxy.xapi.vms import disks

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping

    from proxy.xapi.client import Xapi

UNDO_SECONDS: Final = 60.0

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
"""Ours, on a live VM that we shut down for its backup: ``<installation>/<run>/<the VM's uuid>``."""
BLOCKED: Final = "xo:backup:blocked:"
"""Ours, on a live VM whose migration is blocked, followed by the id of the run that needs it;
the value is ``<installation>/<the VM's uuid>``.  A key for each run, as several may back up one VM:
the last one lifts the block."""
HEALTH_CHECK: Final = "xo:backup:healthcheck"
"""Ours, on a VM that only a health check needs, and on each of its disks: *its own uuid*.  A copy
of such a thing has another uuid, so that this key, unlike the others, tells what it is by itself.
While the VM is being copied: the id of the health check's task."""

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
    HEALTH_CHECK,
)
"""What a live VM must not carry: the target SR of a replica is not among them."""


@dataclass(frozen=True, slots=True)
class Owner:
    """The run that something is done for."""

    installation: str
    run: str

    @property
    def marks(self) -> dict[str, str]:
        return {PROXY: self.installation, RUN: self.run}


def _always(run: str) -> bool:
    return bool(run)


@dataclass(frozen=True, slots=True)
class _Acting:
    owner: Owner
    is_live: Callable[[str], bool]


_acting: ContextVar[_Acting | None] = ContextVar("acting", default=None)


@contextmanager
def acting_for(owner: Owner, is_live: Callable[[str], bool] = _always) -> Iterator[None]:
    """What this Trio task, and those it starts in the block, do on pools is done for ``owner``.

    Host tasks and blocks on migration are marked with it, wherever in the house they are made.
    ``is_live`` knows the runs of the owner's installation.
    """
    token = _acting.set(_Acting(owner, is_live))
    try:
        yield
    finally:
        _acting.reset(token)


def present_owner() -> Owner | None:
    """See :func:`acting_for`; ``None`` outside of a run."""
    acting = _acting.get()
    return None if acting is None else acting.owner


def may_live(other: Owner) -> bool:
    """Whether the run may be at work: of another installation nobody here knows."""
    acting = _acting.get()
    if acting is None or acting.owner.installation != other.installation:
        return True
    return acting.is_live(other.run)


def shut_down_mark(owner: Owner, vm_uuid: str) -> str:
    """The value of :data:`SHUT_DOWN` on this VM."""
    return f"{owner.installation}/{owner.run}/{vm_uuid}"


def shut_down_by(vm: Mapping[str, Any]) -> Owner | None:
    """Whose mark it is that says that ``vm`` was shut down; none on a copy of the marked VM."""
    keys: Mapping[str, str] = vm.get("other_config") or {}
    installation, _, rest = keys.get(SHUT_DOWN, "").partition("/")
    run, _, uuid = rest.partition("/")
    return Owner(installation, run) if uuid and uuid == vm.get("uuid") else None


def blocked_by(vm: Mapping[str, Any]) -> list[Owner]:
    """The runs that need ``vm`` where it is; none on a copy of the marked VM."""
    keys: Mapping[str, str] = vm.get("other_config") or {}
    found: list[Owner] = []
    for key, value in keys.items():
        installation, _, uuid = value.partition("/")
        if key.startswith(BLOCKED) and uuid and uuid == vm.get("uuid"):
            found.append(Owner(installation, key.removeprefix(BLOCKED)))
    return found


async def forget_interventions(xapi: Xapi, vm_ref: str) -> None:
    """Remove from a new VM the marks of what was being done to the one it was made from."""
    vm = await xapi.record("VM", vm_ref)
    keys: Mapping[str, str] = vm.get("other_config") or {}
    gone = [key for key in keys if is_of_intervention(key)]
    await xapi.update_map("VM", vm_ref, "other_config", dict.fromkeys(gone))


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


async def mark_trial(xapi: Xapi, vm_ref: str, marks: Mapping[str, str]) -> None:
    """Make a VM and its disks known as those of a health check: ``marks``, :data:`HEALTH_CHECK`,
    and nothing of what the VM is a copy of.  The disks come first."""
    keys: dict[str, str | None] = {**dict.fromkeys(RESET_KEYS), SR: None, **marks}
    vm = await xapi.record("VM", vm_ref)

    async def write(disk: tuple[dict[str, Any], str, dict[str, Any]]) -> None:
        _, ref, vdi = disk
        await _write(xapi, "VDI", ref, vdi, {**keys, HEALTH_CHECK: str(vdi["uuid"])})

    await together(write, await disks(xapi, vm))
    await _write(xapi, "VM", vm_ref, vm, {**keys, HEALTH_CHECK: str(vm["uuid"])})


def is_of_health_check(record: Mapping[str, Any]) -> bool:
    """Whether this VM or VDI exists only for a health check (running or not), by its record."""
    keys: Mapping[str, str] = record.get("other_config") or {}
    return HEALTH_CHECK in keys and keys[HEALTH_CHECK] == record.get("uuid")


@asynccontextmanager
async def marked(xapi: Xapi, vm_ref: str, marks: Mapping[str, str]) -> AsyncIterator[None]:
    """Put ``marks`` on a VM for the block, in which a host copies it: so the copy is marked from
    its first moment.  That they cannot be taken off is told, never raised."""
    try:
        await xapi.update_map("VM", vm_ref, "other_config", marks)
        yield
    finally:
        try:
            with undo_within("remove the marks of a run", UNDO_SECONDS):
                await xapi.update_map("VM", vm_ref, "other_config", dict.fromkeys(marks))
        except ProxyError as error:
            tell_trouble("could not remove the marks of a run", error, vm=vm_ref)


async def _write(
    xapi: Xapi, cls: str, ref: str, record: Mapping[str, Any], keys: Mapping[str, str | None]
) -> None:
    present: Mapping[str, str] = record.get("other_config") or {}
    changes = {key: value for key, value in keys.items() if present.get(key) != value}
    if changes:
        await xapi.update_map(cls, ref, "other_config", changes)
