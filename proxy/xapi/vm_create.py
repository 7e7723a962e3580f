"""Making a VM and its devices from the records that a backup keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import trio

from proxy.errors import Refused, XapiError
from proxy.formats.vhd import MAX_VIRTUAL_SIZE
from proxy.xapi import ownership, vms
from proxy.xapi.vdi_import import RECEIVING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from proxy.xapi.client import Xapi

Record = dict[str, Any]

NULL: Final = "OpaqueRef:NULL"
IMPORTING: Final = "Importing…"
"""Why a VM that is being made cannot be started."""
_UNFINISHED: Final = f"[{IMPORTING}] "
_START: Final = ("start", "start_on")
_CLONE_SECONDS: Final = 120.0

_VM_FIELDS: Final = (
    *("actions_after_crash", "actions_after_reboot", "actions_after_shutdown"),
    *("HVM_boot_params", "HVM_boot_policy", "HVM_shadow_multiplier"),
    *("memory_dynamic_max", "memory_dynamic_min", "memory_static_max", "memory_static_min"),
    *("other_config", "PCI_bus", "platform", "PV_args", "PV_bootloader_args", "PV_bootloader"),
    *("PV_kernel", "PV_legacy_args", "PV_ramdisk", "recommendations", "user_version"),
    *("VCPUs_at_startup", "VCPUs_max", "VCPUs_params", "domain_type", "generation_id"),
    *("hardware_platform_version", "has_vendor_device", "is_vmss_snapshot"),
    *("name_description", "NVRAM", "order", "reference_label", "shutdown_delay", "start_delay"),
    *("tags", "version", "xenstore_data", "last_boot_CPU_flags", "last_booted_record"),
)
_VM_NEEDS: Final[Mapping[str, Any]] = {
    "actions_after_crash": "restart",
    "actions_after_reboot": "restart",
    "actions_after_shutdown": "destroy",
    "HVM_boot_params": {},
    "HVM_boot_policy": "",
    "PCI_bus": "",
    "platform": {},
    "PV_args": "",
    "PV_bootloader": "",
    "PV_bootloader_args": "",
    "PV_kernel": "",
    "PV_legacy_args": "",
    "PV_ramdisk": "",
    "recommendations": "",
    "user_version": 1,
    "VCPUs_at_startup": 1,
    "VCPUs_max": 1,
    "VCPUs_params": {},
    "has_vendor_device": False,
    "other_config": {},
}
"""What a host demands and an old backup may lack."""
_BIOS_STRINGS: Final = frozenset(
    {
        *("bios-vendor", "bios-version", "system-manufacturer", "system-product-name"),
        *("system-version", "system-serial-number", "enclosure-asset-tag"),
        *("baseboard-manufacturer", "baseboard-product-name", "baseboard-version"),
        *("baseboard-serial-number", "baseboard-asset-tag", "baseboard-location-in-chassis"),
    }
)


def importing(name: object) -> str:
    """The temporary name of a VM or disk that is being made."""
    return f"{_UNFINISHED}{name or ''}"


def own_name(name: str) -> str:
    """``name`` without what :func:`importing` adds."""
    return name.removeprefix(RECEIVING).removeprefix(_UNFINISHED)


def is_importing(name: object) -> bool:
    """Whether it is the name of something unfinished, also while a disk receives its content."""
    return isinstance(name, str) and name.removeprefix(RECEIVING).startswith(_UNFINISHED)


async def create_vm(
    xapi: Xapi,
    record: Mapping[str, Any],
    *,
    marks: Mapping[str, str],
    new_mac_addresses: bool,
    suspend_vdi: str | None = None,
) -> str:
    """A halted VM (``suspend_vdi``: a suspended one) without devices, which nobody can start yet.

    Its name says that it is being imported; ``marks`` are among its keys from its first
    moment.  The drives that the host made by itself are gone.
    """
    fields = {**_VM_NEEDS, **{name: record[name] for name in _VM_FIELDS if name in record}}
    config = {**fields["other_config"], **marks}
    if new_mac_addresses:
        config.pop("mac_seed", None)
    fields |= {
        "other_config": config,
        "affinity": NULL,
        "appliance": NULL,
        "blocked_operations": dict.fromkeys(_START, IMPORTING),
        "ha_always_run": False,
        "ha_restart_priority": "",
        "is_a_template": False,
        "name_label": importing(record.get("name_label")),
        "snapshot_schedule": NULL,
        "suspend_SR": NULL,
    }
    # XAPI takes it as a float, which one sent as an integer is not
    if fields.get("HVM_shadow_multiplier") in (1, None):
        fields.pop("HVM_shadow_multiplier", None)
    if suspend_vdi is not None:
        fields |= {"power_state": "Suspended", "suspend_VDI": suspend_vdi}
    return str(await xapi.call("VM.create", fields))


async def dress_vm(xapi: Xapi, vm_ref: str, record: Mapping[str, Any]) -> None:
    """What a host sets only after the VM exists: block its start, BIOS strings, no drives."""
    await xapi.update_map("VM", vm_ref, "blocked_operations", dict.fromkeys(_START, IMPORTING))
    strings: Mapping[str, str] = record.get("bios_strings") or {}
    wanted = {key: value for key, value in strings.items() if key in _BIOS_STRINGS and value}
    if wanted:
        try:
            await xapi.call("VM.set_bios_strings", vm_ref, wanted)
        except XapiError as error:
            if error.code != "MESSAGE_METHOD_UNKNOWN":
                raise
    for vbd in await xapi.call("VM.get_VBDs", vm_ref):
        await xapi.call("VBD.destroy", vbd)


async def release_vm(xapi: Xapi, vm_ref: str, record: Mapping[str, Any]) -> None:
    """The VM is complete: it has only the blocks that it had.  Its name says so still not."""
    former: Mapping[str, str] = record.get("blocked_operations") or {}
    if record.get("ha_always_run"):
        await xapi.call("VM.set_ha_always_run", vm_ref, True)
    changes: dict[str, str | None] = {op: former.get(op) for op in _START}
    await xapi.update_map("VM", vm_ref, "blocked_operations", {**changes, **former})


async def create_vdi(
    xapi: Xapi, record: Mapping[str, Any], sr_ref: str, *, marks: Mapping[str, str]
) -> str:
    """An empty VDI like ``record`` on another SR; a large one as qcow2 where that is needed.

    Under a temporary name and with ``marks`` from its first moment, until :func:`release_vdi`.
    """
    size = int(record["virtual_size"])
    fields: Record = {
        "name_description": record.get("name_description", ""),
        "name_label": importing(record.get("name_label")),
        "other_config": {**(record.get("other_config") or {}), **marks},
        "read_only": bool(record.get("read_only", False)),
        "sharable": bool(record.get("sharable", False)),
        "SR": sr_ref,
        "tags": list(record.get("tags") or ()),
        "type": record.get("type", "user"),
        "virtual_size": size,
        "xenstore_data": dict(record.get("xenstore_data") or {}),
    }
    if size > MAX_VIRTUAL_SIZE and await _takes_qcow2(xapi, sr_ref):
        fields["sm_config"] = {"image-format": "qcow2"}
    return str(await xapi.call("VDI.create", fields))


async def clone_vdi(
    xapi: Xapi,
    base_ref: str,
    record: Mapping[str, Any],
    *,
    marks: Mapping[str, str],
    made: Callable[[str], None],
) -> str:
    """A VDI with the content of ``base_ref`` that is otherwise as :func:`create_vdi` makes it.

    As large as ``record`` says, if the base is smaller.  ``made`` hears of its reference as
    soon as it exists: what follows may fail.  A cancel is felt when it exists.
    """

    async def discard(result: Any) -> None:
        await vms.destroy_vdi(xapi, str(result))

    # Not cancelled on the host: a clone whose task was cancelled too late looks like its base,
    # and nobody would find it.  It takes no time to speak of.
    vdi_ref = ""
    with trio.CancelScope(shield=True):
        vdi_ref = str(
            await xapi.call_async(
                "VDI.clone", base_ref, on_late_success=discard, timeout=_CLONE_SECONDS
            )
        )
        made(vdi_ref)
    # The name and the marks at once, for the same reason.
    await xapi.call("VDI.set_name_label", vdi_ref, importing(record.get("name_label")))
    keys: Mapping[str, str] = record.get("other_config") or {}
    await xapi.call("VDI.set_other_config", vdi_ref, {**keys, **marks})
    size = int(record["virtual_size"])
    if int((await xapi.record("VDI", vdi_ref))["virtual_size"]) < size:
        await xapi.call_async("VDI.resize", vdi_ref, size)
    return vdi_ref


async def release_vdi(xapi: Xapi, vdi_ref: str, record: Mapping[str, Any]) -> None:
    """The VDI has its content: its own name, and no keys of backups."""
    await xapi.call("VDI.set_name_label", vdi_ref, str(record.get("name_label", "")))
    await ownership.reset_disk_keys(xapi, vdi_ref)


async def _takes_qcow2(xapi: Xapi, sr_ref: str) -> bool:
    refs = [ref for ref in (await xapi.record("SR", sr_ref)).get("PBDs", []) if vms.is_ref(ref)]
    if not refs:
        return True
    config: dict[str, str] = (await xapi.record("PBD", refs[0])).get("device_config") or {}
    preferred = config.get("preferred-image-formats")
    return preferred is None or "qcow2" in preferred


VBD_FIELDS: Final = (
    *("bootable", "mode", "other_config", "qos_algorithm_params", "qos_algorithm_type"),
    *("type", "unpluggable", "userdevice"),
)


async def create_vbd(xapi: Xapi, record: Mapping[str, Any], vm_ref: str, vdi_ref: str) -> str:
    """The drive by which the VM has a disk, at the place it had."""
    fields = {name: record[name] for name in VBD_FIELDS if name in record}
    if not fields.get("userdevice"):
        free = await xapi.call("VM.get_allowed_VBD_devices", vm_ref)
        # 3 is where a CD drive is expected
        devices = [device for device in free if device != "3"] or list(free)
        if not devices:
            raise Refused("the VM has no room for another disk", code="ENOSPC")
        fields["userdevice"] = devices[0]
    return str(
        await xapi.call("VBD.create", {**fields, "empty": False, "VDI": vdi_ref, "VM": vm_ref})
    )


VIF_FIELDS: Final = (
    *("device", "ipv4_allowed", "ipv6_allowed", "locking_mode", "MAC", "MTU"),
    *("other_config", "qos_algorithm_params", "qos_algorithm_type"),
)


class Networks:
    """The networks of a pool, to find the one that a backed up interface belongs to."""

    def __init__(self, networks: Mapping[str, Record], pifs: Mapping[str, Record]) -> None:
        self._networks = networks
        self._pifs = pifs

    @classmethod
    async def read(cls, xapi: Xapi) -> Networks:
        return cls(
            await xapi.call("network.get_all_records"), await xapi.call("PIF.get_all_records")
        )

    def match(self, vif: Mapping[str, Any]) -> str | None:
        """By uuid, else the same VLAN and name, else that VLAN; without a VLAN any real network.

        ``None`` when nothing fits: the interface is left out.
        """
        for ref, network in self._networks.items():
            if network["uuid"] == vif.get("$network$uuid"):
                return ref
        vlan = vif.get("$network$VLAN")
        if vlan is None:
            return next((ref for ref in self._networks if self._vlans(ref)), None)
        same = [ref for ref in self._networks if vlan in self._vlans(ref)]
        name = vif.get("$network$name_label")
        named = [ref for ref in same if self._networks[ref]["name_label"] == name]
        return next(iter(named or same), None)

    def _vlans(self, ref: str) -> Sequence[Any]:
        return [self._pifs[pif]["VLAN"] for pif in self._networks[ref]["PIFs"] if pif in self._pifs]


async def create_vif(
    xapi: Xapi,
    record: Mapping[str, Any],
    vm_ref: str,
    networks: Networks,
    *,
    new_mac_address: bool,
) -> str | None:
    """The interface on the pool's network that fits; ``None`` when there is none."""
    network = networks.match(record)
    if network is None:
        return None
    fields = {name: record[name] for name in VIF_FIELDS if name in record}
    if new_mac_address:
        fields["MAC"] = ""
    if not fields.get("device"):
        fields["device"] = (await xapi.call("VM.get_allowed_VIF_devices", vm_ref))[0]
    if "MTU" not in fields:
        fields["MTU"] = await xapi.call("network.get_MTU", network)
    return str(await xapi.call("VIF.create", {**fields, "network": network, "VM": vm_ref}))


async def restore_vtpms(xapi: Xapi, vm_ref: str, contents: Sequence[str | None]) -> list[str]:
    """Replace the VM's TPMs by those of the backup; says what could not be restored."""
    for ref in await xapi.call("VM.get_VTPMs", vm_ref):
        await xapi.call("VTPM.destroy", ref)
    lost: list[str] = []
    for content in contents:
        if content is None:
            lost.append("the backup does not have the content of the VTPM")
            continue
        ref = await xapi.call("VTPM.create", vm_ref, False)
        await xapi.call("VTPM.set_contents", ref, content)
    return lost
