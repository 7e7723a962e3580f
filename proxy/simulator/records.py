"""The classes of XAPI's database as far as backups see them: every field, its type, its default.

A client learns the fields of a class from the first record that it sees, so each record
carries all of them with the right JSON type.  Facts: xen-api, ``ocaml/idl/datamodel*.ml``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from proxy.errors import XapiError
from proxy.formats.xmlrpc import is_list, is_map

if TYPE_CHECKING:
    from collections.abc import Callable

NULL = "OpaqueRef:NULL"
EPOCH = "19700101T00:00:00Z"

_DEFAULTS: dict[str, Any] = {"S": "", "I": 0, "F": 1.0, "B": False, "D": EPOCH, "R": NULL}
# Codes: S string, I int, F float, B bool, D date, R reference, L set, M map, RL set of
# references.  "name:S=value" gives a default; the class of a reference follows in <>.
_COMMON = "allowed_operations:L current_operations:M"

_SCHEMAS = {
    "pool": """uuid:S name_label:S name_description:S master:R<host> default_SR:R<SR>
        suspend_image_SR:R<SR> crash_dump_SR:R<SR> other_config:M ha_enabled:B
        ha_configuration:M ha_statefiles:L restrictions:M tags:L gui_config:M
        health_check_config:M cpu_info:M live_patching_disabled:B blobs:M"""
    " " + _COMMON,
    "host": """uuid:S name_label:S name_description:S address:S hostname:S enabled:B=1
        API_version_major:I=2 API_version_minor:I=21 API_version_vendor:S
        software_version:M other_config:M PIFs:RL<PIF> PBDs:RL<PBD> resident_VMs:RL<VM>
        metrics:R<host_metrics> tags:L license_params:M edition:S cpu_info:M
        memory_overhead:I bios_strings:M control_domain:R<VM> """
    + _COMMON,
    "host_metrics": "uuid:S memory_total:I memory_free:I live:B=1 last_updated:D other_config:M",
    "SR": """uuid:S name_label:S name_description:S VDIs:RL<VDI> PBDs:RL<PBD>
        virtual_allocation:I physical_utilisation:I physical_size:I type:S=ext
        content_type:S=user shared:B other_config:M tags:L sm_config:M blobs:M
        local_cache_enabled:B introduced_by:R is_tools_sr:B clustered:B """
    + _COMMON,
    "PBD": "uuid:S host:R<host> SR:R<SR> device_config:M currently_attached:B=1 other_config:M",
    "network": """uuid:S name_label:S name_description:S VIFs:RL<VIF> PIFs:RL<PIF> MTU:I=1500
        other_config:M bridge:S=xenbr0 managed:B=1 blobs:M tags:L
        default_locking_mode:S=unlocked assigned_ips:M purpose:L """
    + _COMMON,
    "PIF": """uuid:S device:S=eth0 network:R<network> host:R<host> MAC:S MTU:I=1500 VLAN:I=-1
        metrics:R physical:B=1 currently_attached:B=1 ip_configuration_mode:S=Static IP:S
        netmask:S gateway:S DNS:S bond_slave_of:R bond_master_of:L VLAN_master_of:R
        VLAN_slave_of:L management:B=1 other_config:M IPv6:L primary_address_type:S=IPv4
        managed:B=1 properties:M capabilities:L""",
    "VM": """uuid:S name_label:S name_description:S allowed_operations:L current_operations:M
        power_state:S=Halted user_version:I=1 is_a_template:B is_default_template:B
        suspend_VDI:R<VDI> resident_on:R<host> scheduled_to_be_resident_on:R<host>
        affinity:R<host> memory_overhead:I memory_target:I memory_static_max:I
        memory_dynamic_max:I memory_dynamic_min:I memory_static_min:I VCPUs_params:M
        VCPUs_max:I=1 VCPUs_at_startup:I=1 actions_after_softreboot:S=soft_reboot
        actions_after_shutdown:S=destroy actions_after_reboot:S=restart
        actions_after_crash:S=restart consoles:RL VIFs:RL<VIF> VBDs:RL<VBD> VUSBs:RL<VUSB>
        crash_dumps:RL VTPMs:RL<VTPM> PV_bootloader:S PV_kernel:S PV_ramdisk:S PV_args:S
        PV_bootloader_args:S PV_legacy_args:S HVM_boot_policy:S HVM_boot_params:M
        HVM_shadow_multiplier:F platform:M PCI_bus:S other_config:M domid:I=-1 domarch:S
        last_boot_CPU_flags:M is_control_domain:B metrics:R<VM_metrics>
        guest_metrics:R<VM_guest_metrics> last_booted_record:S recommendations:S
        xenstore_data:M ha_always_run:B ha_restart_priority:S is_a_snapshot:B
        snapshot_of:R<VM> snapshots:RL<VM> snapshot_time:D transportable_snapshot_id:S
        blobs:M tags:L blocked_operations:M snapshot_info:M snapshot_metadata:S
        parent:R<VM> children:RL<VM> bios_strings:M protection_policy:R
        is_snapshot_from_vmpp:B snapshot_schedule:R is_vmss_snapshot:B appliance:R
        start_delay:I shutdown_delay:I order:I VGPUs:RL attached_PCIs:RL suspend_SR:R<SR>
        version:I generation_id:S=0:0 hardware_platform_version:I has_vendor_device:B
        requires_reboot:B reference_label:S domain_type:S=hvm NVRAM:M
        pending_guidances:L""",
    "VM_metrics": """uuid:S memory_actual:I VCPUs_number:I VCPUs_utilisation:M VCPUs_CPU:M
        VCPUs_params:M VCPUs_flags:M state:L start_time:D install_time:D last_updated:D
        other_config:M hvm:B nested_virt:B nomigrate:B current_domain_type:S=hvm""",
    "VM_guest_metrics": """uuid:S os_version:M PV_drivers_version:M PV_drivers_up_to_date:B
        memory:M disks:M networks:M other:M last_updated:D other_config:M live:B
        can_use_hotplug_vbd:S=unspecified can_use_hotplug_vif:S=unspecified
        PV_drivers_detected:B""",
    "VDI": """uuid:S name_label:S name_description:S SR:R<SR> VBDs:RL<VBD> crash_dumps:RL
        virtual_size:I physical_utilisation:I type:S=user sharable:B read_only:B
        other_config:M storage_lock:B location:S managed:B=1 missing:B parent:R
        xenstore_data:M sm_config:M is_a_snapshot:B snapshot_of:R<VDI> snapshots:RL<VDI>
        snapshot_time:D tags:L allow_caching:B on_boot:S=persist metadata_of_pool:R
        metadata_latest:B is_tools_iso:B cbt_enabled:B """
    + _COMMON,
    "VBD": """uuid:S VM:R<VM> VDI:R<VDI> device:S userdevice:S bootable:B mode:S=RW type:S=Disk
        unpluggable:B=1 storage_lock:B empty:B other_config:M currently_attached:B
        status_code:I status_detail:S runtime_properties:M qos_algorithm_type:S
        qos_algorithm_params:M qos_supported_algorithms:L metrics:R """
    + _COMMON,
    "VIF": """uuid:S device:S network:R<network> VM:R<VM> MAC:S MTU:I=1500 other_config:M
        currently_attached:B status_code:I status_detail:S runtime_properties:M
        qos_algorithm_type:S qos_algorithm_params:M qos_supported_algorithms:L metrics:R
        MAC_autogenerated:B locking_mode:S=network_default ipv4_allowed:L ipv6_allowed:L
        ipv4_configuration_mode:S=None ipv4_addresses:L ipv4_gateway:S
        ipv6_configuration_mode:S=None ipv6_addresses:L ipv6_gateway:S """
    + _COMMON,
    "VTPM": "uuid:S VM:R<VM> backend:R<VM> persistence_backend:S=xapi is_unique:B is_protected:B "
    + _COMMON,
    "VUSB": "uuid:S VM:R<VM> USB_group:R other_config:M currently_attached:B " + _COMMON,
    "task": """uuid:S name_label:S name_description:S created:D finished:D status:S=pending
        resident_on:R<host> progress:F=0.0 externally_visible_progress:F=-1.0 type:S=<none/>
        result:S error_info:L other_config:M subtask_of:R<task> subtasks:RL<task>
        backtrace:S=() """
    + _COMMON,
    "message": "uuid:S name:S priority:I cls:S obj_uuid:S timestamp:D body:S",
}
_EMPTY = """
    console SM crashdump subject Bond VLAN VMSS VM_appliance GPU_group VGPU PCI PUSB USB_group
    pool_patch pool_update role secret
""".split()  # noqa: SIM905 - a list of forty lines says no more


@dataclass(frozen=True, slots=True)
class Field:
    """Type code, default and, for references, the class they lead to."""

    code: str
    default: Any
    target: str = ""


def _integer(value: Any) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise TypeError
    return int(value)


def _boolean(value: Any) -> bool:
    if value in ("true", "1", True):
        return True
    if value in ("false", "0", False):
        return False
    raise TypeError


def _set(value: Any) -> list[str]:
    if not is_list(value):
        raise TypeError
    return [str(item) for item in value]


def _map(value: Any) -> dict[str, str]:
    if not is_map(value):
        raise TypeError
    return {str(key): str(item) for key, item in value.items()}


def _reference(value: Any) -> str:
    return NULL if is_null(value) else str(value)


def _text(value: Any) -> str:
    if isinstance(value, bool | dict | list):
        raise TypeError
    return "" if value is None else str(value)


def is_null(ref: Any) -> bool:
    """Whether a reference leads nowhere; clients and archives also write it empty."""
    return not ref or ref == NULL


_CONVERT: dict[str, Callable[[Any], Any]] = {
    "S": _text,
    "I": _integer,
    "F": float,
    "B": _boolean,
    "D": _text,
    "R": _reference,
    "L": _set,
    "RL": _set,
    "M": _map,
}


def _parse(text: str) -> dict[str, Field]:
    fields: dict[str, Field] = {}
    for word in text.split():
        name, _, rest = word.partition(":")
        code, _, given = rest.partition("=")
        code, _, target = code.partition("<")
        default: Any = _DEFAULTS.get(code, "")
        if code in ("L", "RL"):
            default = ()
        elif code == "M":
            default = None
        elif given:
            default = _CONVERT[code](given)
        fields[name] = Field(code, default, target.rstrip(">"))
    return fields


SCHEMA: dict[str, dict[str, Field]] = {name: _parse(text) for name, text in _SCHEMAS.items()}
SCHEMA.update({name: {"uuid": Field("S", "")} for name in _EMPTY})

BY_LOWER = {name.lower(): name for name in SCHEMA}

BACK_REFERENCES: dict[tuple[str, str], tuple[str, str]] = {
    ("VBD", "VM"): ("VM", "VBDs"),
    ("VBD", "VDI"): ("VDI", "VBDs"),
    ("VIF", "VM"): ("VM", "VIFs"),
    ("VIF", "network"): ("network", "VIFs"),
    ("PIF", "network"): ("network", "PIFs"),
    ("PIF", "host"): ("host", "PIFs"),
    ("PBD", "host"): ("host", "PBDs"),
    ("PBD", "SR"): ("SR", "PBDs"),
    ("VDI", "SR"): ("SR", "VDIs"),
    ("VDI", "snapshot_of"): ("VDI", "snapshots"),
    ("VM", "snapshot_of"): ("VM", "snapshots"),
    ("VM", "parent"): ("VM", "children"),
    ("VM", "resident_on"): ("host", "resident_VMs"),
    ("VTPM", "VM"): ("VM", "VTPMs"),
    ("VUSB", "VM"): ("VM", "VUSBs"),
    ("task", "subtask_of"): ("task", "subtasks"),
}
"""A reference (class, field) and the computed set at its other end."""

COMPUTED = {(kind, field) for kind, field in BACK_REFERENCES.values()}


_WITHOUT_SETTER = {
    "pool": "cpu_info ha_configuration ha_enabled ha_statefiles master restrictions blobs",
    "host": """enabled API_version_major API_version_minor API_version_vendor software_version
        metrics edition cpu_info memory_overhead bios_strings control_domain""",
    "SR": """blobs clustered content_type introduced_by is_tools_sr local_cache_enabled type""",
    "PBD": "SR currently_attached host",
    "network": "assigned_ips blobs bridge managed purpose",
    "PIF": """DNS IP IPv6 MAC MTU VLAN VLAN_master_of VLAN_slave_of bond_master_of bond_slave_of
        capabilities currently_attached device gateway host ip_configuration_mode managed
        management metrics netmask network physical""",
    "VM": """power_state resident_on scheduled_to_be_resident_on memory_overhead memory_target
        consoles crash_dumps domid domarch last_boot_CPU_flags is_control_domain metrics
        guest_metrics last_booted_record is_a_snapshot snapshot_of snapshot_time
        transportable_snapshot_id blobs snapshot_info snapshot_metadata parent
        is_snapshot_from_vmpp is_vmss_snapshot VGPUs attached_PCIs version generation_id
        requires_reboot reference_label pending_guidances""",
    "VM_guest_metrics": """os_version PV_drivers_version PV_drivers_up_to_date memory disks
        networks other last_updated live can_use_hotplug_vbd can_use_hotplug_vif
        PV_drivers_detected""",
    "VDI": "SR crash_dumps type storage_lock location metadata_latest is_tools_iso",
    "VBD": """VM VDI device storage_lock empty currently_attached status_code status_detail
        runtime_properties qos_supported_algorithms metrics""",
    "VIF": """device network VM MAC MTU currently_attached status_code status_detail
        runtime_properties qos_supported_algorithms metrics MAC_autogenerated
        ipv4_configuration_mode ipv4_addresses ipv4_gateway ipv6_configuration_mode
        ipv6_addresses ipv6_gateway""",
    "VTPM": "VM backend persistence_backend is_unique is_protected",
    "VUSB": "VM USB_group currently_attached",
    "task": "created subtask_of backtrace",
    "message": "name priority cls obj_uuid timestamp body",
}

READ_ONLY = COMPUTED | {
    (kind, name)
    for kind, fields in SCHEMA.items()
    for name in fields
    if name in ("uuid", "allowed_operations", "current_operations")
    or name in _WITHOUT_SETTER.get(kind, "").split()
}
"""Fields (class, field) that only xapi itself changes: there is no call for it."""


def blank(kind: str) -> dict[str, Any]:
    """A record of ``kind`` with every field at its default."""
    record: dict[str, Any] = {}
    for name, field in SCHEMA[kind].items():
        if field.code in ("L", "RL"):
            record[name] = []
        elif field.code == "M":
            record[name] = {}
        else:
            record[name] = field.default
    return record


def coerce(kind: str, name: str, value: Any) -> Any:
    """``value`` as the field's type: XML-RPC brings integers as strings.

    Raises ``XapiError`` ``FIELD_TYPE_ERROR`` as xapi does.
    """
    field = SCHEMA[kind][name]
    try:
        return _CONVERT[field.code](value)
    except (TypeError, ValueError) as error:
        raise XapiError("FIELD_TYPE_ERROR", [name]) from error
