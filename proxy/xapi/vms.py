"""What is done to VMs and their disks: list, stop, start, destroy."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final

import trio

from proxy.errors import Conflict, Refused, XapiError
from proxy.xapi.together import all_of, together

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from proxy.xapi.client import Xapi

Record = dict[str, Any]

EMPTY_REFS: Final = frozenset({"", "OpaqueRef:NULL"})
_IN_USE_TRIES: Final = 10
_IN_USE_DELAY: Final = 5.0


def is_ref(ref: object) -> bool:
    """Whether ``ref`` names something: not empty, not NULL, not left over from an archive."""
    return isinstance(ref, str) and ref not in EMPTY_REFS and not ref.startswith("Ref:")


async def record_or_none(xapi: Xapi, cls: str, ref: str) -> Record | None:
    """The record, or ``None`` when the object is gone."""
    try:
        return await xapi.record(cls, ref)
    except XapiError as error:
        if error.code != "HANDLE_INVALID":
            raise
        return None


async def disks(xapi: Xapi, vm: Record) -> list[tuple[Record, str, Record]]:
    """``(VBD record, VDI ref, VDI record)`` of each disk of ``vm``, in the order of its VBDs.

    CD drives, empty VBDs and VDIs that do not exist any more are left out; a VDI that is
    attached twice comes once.
    """

    async def read(vbd_ref: str) -> tuple[Record, str, Record] | None:
        vbd = await record_or_none(xapi, "VBD", vbd_ref)
        if vbd is None or vbd.get("type") != "Disk" or not is_ref(vbd.get("VDI")):
            return None
        vdi = await record_or_none(xapi, "VDI", vbd["VDI"])
        return None if vdi is None else (vbd, vbd["VDI"], vdi)

    found: dict[str, tuple[Record, str, Record]] = {}
    for disk in await together(read, [ref for ref in vm.get("VBDs", []) if is_ref(ref)]):
        if disk is not None:
            found.setdefault(disk[1], disk)
    return list(found.values())


async def clean_shutdown(
    xapi: Xapi, vm_ref: str, *, on_late_success: Callable[[Any], Awaitable[None]] | None = None
) -> None:
    """Ask the guest to shut down and wait until it did.

    A guest that began to shut down ends halted even when the task is cancelled: register the
    restart before calling this.
    """
    await xapi.call_async("VM.clean_shutdown", vm_ref, on_late_success=on_late_success)


async def start(xapi: Xapi, vm_ref: str) -> None:
    """Start a halted VM on any host; one that runs already is left alone."""
    try:
        await xapi.call_async("VM.start", vm_ref, False, False)
    except XapiError as error:
        if error.code != "VM_BAD_POWER_STATE" or error.params[-1:] != ["running"]:
            raise


async def destroy_vdi(xapi: Xapi, vdi_ref: str) -> None:
    """Destroy a VDI and see it gone; one that is gone already is fine.

    ``VDI_IN_USE`` is mostly a control domain that has not let go yet: it is disconnected, and
    the destroy tried again for 50 s.  On cancel the VDI may exist or not.
    """

    async def attempt() -> None:
        try:
            await xapi.call_async("VDI.destroy", vdi_ref)
        except XapiError as error:
            if error.code != "HANDLE_INVALID":
                raise

    await when_free(xapi, [vdi_ref], attempt)


async def when_free(
    xapi: Xapi, vdi_refs: Sequence[str], attempt: Callable[[], Awaitable[None]]
) -> None:
    """Await ``attempt``, and again for 50 s as long as it raises ``VDI_IN_USE``.

    That is mostly a control domain that has not let go of ``vdi_refs`` yet: they are
    disconnected in between.  The last error is raised.
    """
    for turn in range(_IN_USE_TRIES + 1):
        try:
            await attempt()
        except XapiError as error:
            if error.code != "VDI_IN_USE" or turn == _IN_USE_TRIES:
                raise
        else:
            return
        for vdi_ref in vdi_refs:
            await disconnect_from_control_domain(xapi, vdi_ref)
        await trio.sleep(_IN_USE_DELAY)


async def call_unless_gone(xapi: Xapi, method: str, ref: str) -> None:
    """Call ``method`` with ``ref``; that the object of ``ref`` is gone already is fine."""
    try:
        await xapi.call_async(method, ref)
    except XapiError as error:
        if error.code != "HANDLE_INVALID" or ref not in error.params:
            raise


async def disconnect_from_control_domain(xapi: Xapi, vdi_ref: str) -> None:
    """Unplug and destroy the VBDs by which control domains hold a VDI; others stay."""
    vdi = await record_or_none(xapi, "VDI", vdi_ref)
    if vdi is None:
        return
    for vbd_ref in vdi.get("VBDs", []):
        vbd = await record_or_none(xapi, "VBD", vbd_ref)
        if vbd is None or not await _is_control_domain(xapi, vbd["VM"]):
            continue
        try:
            await _unplug(xapi, vbd_ref)
            await xapi.call("VBD.destroy", vbd_ref)
        except XapiError as error:
            # The transfer that made it may be removing it at this moment.
            if error.code not in ("HANDLE_INVALID", "OPERATION_NOT_ALLOWED", "DEVICE_NOT_ATTACHED"):
                raise


async def detach_leaked(xapi: Xapi, vbd_ref: str) -> str | None:
    """Remove a drive that serves nobody any more; why it stays, if it does.

    Never by force: while anything in its domain has the disk open the host refuses.
    """
    try:
        await _unplug(xapi, vbd_ref, method="VBD.unplug")
        await xapi.call("VBD.destroy", vbd_ref)
    except XapiError as error:
        if error.code == "HANDLE_INVALID":
            return None
        if error.code in ("DEVICE_DETACH_REJECTED", "DEVICE_DETACH_TIMEOUT"):
            return f"it is in use: {error.message}"
        raise
    return None


async def _unplug(xapi: Xapi, vbd_ref: str, method: str = "VBD.unplug_force") -> None:
    for _ in range(2):
        try:
            await xapi.call(method, vbd_ref)
            return
        except XapiError as error:
            if error.code == "VBD_NOT_UNPLUGGABLE":
                await xapi.call("VBD.set_unpluggable", vbd_ref, True)
                continue
            if error.code in ("HANDLE_INVALID", "DEVICE_ALREADY_DETACHED"):
                return
            raise


async def _is_control_domain(xapi: Xapi, vm_ref: str) -> bool:
    vm = await record_or_none(xapi, "VM", vm_ref)
    return vm is not None and bool(vm.get("is_control_domain"))


async def destroy_vm(xapi: Xapi, vm_ref: str, *, bypass_blocked: bool = False) -> None:
    """Destroy a VM, its snapshots and its disks, and see it gone; one gone already is fine.

    Disks that another VM uses stay.  Raises ``Refused`` when destroying is blocked on the VM
    (unless bypassed) or it is a control domain or a default template, ``Conflict`` when the
    VM exists afterwards, and the first error of a disk or snapshot once all were tried.  It
    can be run again after a failure or a cancel.
    """
    vm = await record_or_none(xapi, "VM", vm_ref)
    if vm is None:
        return
    label = vm.get("name_label", vm_ref)
    if vm.get("is_control_domain") or vm.get("is_default_template"):
        raise Refused(f"{label} is a control domain or a default template: not destroyed")
    owned = await disks(xapi, vm)
    await _make_destroyable(xapi, vm_ref, vm, bypass_blocked=bypass_blocked)
    await _destroy_record(xapi, vm_ref, owned)
    if await record_or_none(xapi, "VM", vm_ref) is not None:
        raise Conflict(f"{label} still exists after it was destroyed", code="VM_NOT_DESTROYED")

    async def destroy_snapshot(ref: str) -> None:
        await destroy_vm(xapi, ref, bypass_blocked=bypass_blocked)

    async def destroy_disk(ref: str) -> None:
        if not await _used_elsewhere(xapi, ref, vm_ref):
            await destroy_vdi(xapi, ref)

    errors = await all_of(destroy_snapshot, [ref for ref in vm.get("snapshots", []) if is_ref(ref)])
    refs = [ref for _, ref, _ in owned]
    if is_ref(vm.get("suspend_VDI")):
        refs.append(vm["suspend_VDI"])
    errors += await all_of(destroy_disk, refs)
    if errors:
        raise errors[0]


async def _make_destroyable(xapi: Xapi, vm_ref: str, vm: Record, *, bypass_blocked: bool) -> None:
    blocked: Record = vm.get("blocked_operations") or {}
    running = vm.get("power_state") != "Halted"
    obstacles = [op for op in ("destroy", "hard_shutdown") if op in blocked]
    if "destroy" in blocked and not bypass_blocked:
        raise Refused(
            f"destroying {vm.get('name_label', vm_ref)} is blocked: {blocked['destroy']}",
            code="OPERATION_BLOCKED",
            data={"operation": "destroy", "reason": str(blocked["destroy"])},
        )
    if bypass_blocked:
        changes: dict[str, str | None] = {
            op: None for op in obstacles if running or op == "destroy"
        }
        await xapi.update_map("VM", vm_ref, "blocked_operations", changes)
    if vm.get("is_a_template"):
        await not_a_template(xapi, vm_ref)
    if running:
        await xapi.call_async("VM.hard_shutdown", vm_ref)


async def _destroy_record(xapi: Xapi, vm_ref: str, owned: list[tuple[Record, str, Record]]) -> None:
    vdi_refs = [vdi_ref for _, vdi_ref, _ in owned]
    await when_free(xapi, vdi_refs, partial(call_unless_gone, xapi, "VM.destroy", vm_ref))


async def not_a_template(xapi: Xapi, vm_ref: str) -> None:
    """Make a fresh snapshot visible as a VM; a licence that forbids it is no obstacle."""
    try:
        await xapi.call("VM.set_is_a_template", vm_ref, False)
    except XapiError as error:
        if error.code != "LICENSE_RESTRICTION":
            raise


async def _used_elsewhere(xapi: Xapi, vdi_ref: str, vm_ref: str) -> bool:
    vdi = await record_or_none(xapi, "VDI", vdi_ref)
    if vdi is None:
        return False
    for vbd_ref in vdi.get("VBDs", []):
        vbd = await record_or_none(xapi, "VBD", vbd_ref)
        if vbd is None or vbd["VM"] == vm_ref:
            continue
        if not await _is_control_domain(xapi, vbd["VM"]):
            return True
    return False


__all__ = [
    "clean_shutdown",
    "destroy_vdi",
    "destroy_vm",
    "detach_leaked",
    "disconnect_from_control_domain",
    "disks",
    "is_ref",
    "not_a_template",
    "record_or_none",
    "start",
]
