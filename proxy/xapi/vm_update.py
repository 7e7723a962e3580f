"""Changing a halted VM into the likeness of another, and back again as it was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from proxy.xapi import vm_create, vms
from proxy.xapi.together import together

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from proxy.xapi.client import Xapi

Record = dict[str, Any]

_FIELDS: Final = (
    *("name_label", "name_description", "user_version", "tags", "other_config", "xenstore_data"),
    *("actions_after_crash", "actions_after_reboot", "actions_after_shutdown"),
    *("domain_type", "HVM_boot_policy", "HVM_boot_params", "HVM_shadow_multiplier", "platform"),
    *("PCI_bus", "PV_args", "PV_bootloader", "PV_bootloader_args", "PV_kernel"),
    *("PV_legacy_args", "PV_ramdisk", "recommendations", "has_vendor_device", "NVRAM"),
    *("hardware_platform_version", "order", "shutdown_delay", "start_delay", "VCPUs_params"),
    "ha_restart_priority",
)
_MEMORY: Final = (
    *("memory_static_min", "memory_static_max", "memory_dynamic_min", "memory_dynamic_max"),
)


async def set_fields(
    xapi: Xapi, vm_ref: str, present: Mapping[str, Any], wanted: Mapping[str, Any]
) -> None:
    """Give a halted VM the fields of ``wanted`` that differ from ``present``, which it has.

    Memory and processors in the order in which each step is a VM that a host allows.  Fields
    that either lacks are left alone.  A failure or a cancel leaves a prefix done.
    """

    def differs(name: str) -> bool:
        return name in wanted and name in present and wanted[name] != present[name]

    if any(differs(name) for name in _MEMORY) and all(name in wanted for name in _MEMORY):
        limits = [int(wanted[name]) for name in _MEMORY]
        await xapi.call("VM.set_memory_limits", vm_ref, *limits)
    processors = ["VCPUs_max", "VCPUs_at_startup"]
    if int(wanted.get("VCPUs_max", 0)) < int(present.get("VCPUs_max", 0)):
        processors.reverse()
    for name in (*processors, *_FIELDS):
        if differs(name):
            value = wanted[name]
            if name == "HVM_shadow_multiplier":
                value = float(value)  # XAPI takes no integer for it
            await xapi.call(f"VM.set_{name}", vm_ref, value)


@dataclass(frozen=True, slots=True)
class SavedVm:
    """All of a halted VM that :func:`put_back` restores."""

    record: Record
    drives: dict[str, Record]
    """By reference."""
    interfaces: dict[str, Record]
    tpms: list[str]
    """Their contents."""


async def save(xapi: Xapi, vm_ref: str) -> SavedVm:
    """What a VM is now."""
    record = await xapi.record("VM", vm_ref)

    async def read(item: tuple[str, str]) -> tuple[str, Record]:
        return item[1], await xapi.record(item[0], item[1])

    async def contents(ref: str) -> str:
        return str(await xapi.call("VTPM.get_contents", ref))

    return SavedVm(
        record,
        dict(await together(read, [("VBD", ref) for ref in _refs(record, "VBDs")])),
        dict(await together(read, [("VIF", ref) for ref in _refs(record, "VIFs")])),
        await together(contents, _refs(record, "VTPMs")),
    )


async def put_back(xapi: Xapi, vm_ref: str, saved: SavedVm) -> None:
    """Make the VM again what it was: drives, interfaces, TPMs, fields.

    The disks of its former drives must exist.  Can be run again after a failure.
    """
    present = await xapi.record("VM", vm_ref)
    for ref in _refs(present, "VBDs"):
        if ref not in saved.drives:
            await xapi.call("VBD.destroy", ref)
    for ref, record in saved.drives.items():
        if ref not in present["VBDs"]:
            await xapi.call("VBD.create", _drive(record))
    for ref in _refs(present, "VIFs"):
        if ref not in saved.interfaces:
            await xapi.call("VIF.destroy", ref)
    for ref, record in saved.interfaces.items():
        if ref not in present["VIFs"]:
            await xapi.call("VIF.create", _interface(record))
    if _refs(present, "VTPMs") != _refs(saved.record, "VTPMs"):
        await vm_create.restore_vtpms(xapi, vm_ref, saved.tpms)
    await set_fields(xapi, vm_ref, present, saved.record)


def _drive(record: Record) -> Record:
    return _only(record, (*vm_create.VBD_FIELDS, "empty", "VDI", "VM"))


def _interface(record: Record) -> Record:
    return _only(record, (*vm_create.VIF_FIELDS, "network", "VM"))


def _only(record: Record, fields: Sequence[str]) -> Record:
    return {name: record[name] for name in fields if name in record}


def _refs(record: Mapping[str, Any], field: str) -> list[str]:
    found: list[str] = record.get(field) or []
    return [ref for ref in found if vms.is_ref(ref)]
