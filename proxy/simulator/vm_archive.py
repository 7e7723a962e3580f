"""A VM's records as ``ova.xml`` carries them, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from proxy.errors import XapiError
from proxy.formats.xva import ArchivedObject, build_ova_xml
from proxy.simulator.disks import DiskContent
from proxy.simulator.records import COMPUTED, NULL, SCHEMA, is_null

if TYPE_CHECKING:
    from proxy.simulator.pool import SimulatedPool
    from proxy.simulator.store import Record

_AS_HALTED: dict[str, Any] = {
    "power_state": "Halted",
    "is_a_snapshot": False,
    "snapshot_of": "",
    "snapshots": [],
    "parent": "",
    "children": [],
    "current_operations": {},
    "allowed_operations": [],
    "resident_on": "",
    "suspend_VDI": NULL,
    "domid": -1,
}


def describe(pool: SimulatedPool, vm: str) -> tuple[bytes, list[tuple[str, str]]]:
    """``ova.xml`` of a VM and its disks as (VDI reference, id in the archive)."""
    ids: dict[str, str] = {}
    listed: list[tuple[str, str, Record]] = []

    def add(kind: str, ref: str) -> None:
        if is_null(ref) or ref in ids or pool.store.find(kind, ref) is None:
            return
        ids[ref] = f"Ref:{len(ids)}"
        listed.append((kind, ref, pool.store.get(kind, ref)))

    add("VM", vm)
    disks: list[str] = []
    for ref, drive in pool.vms.vbds(vm):
        add("VBD", ref)
        if drive["type"] == "Disk" and not is_null(drive["VDI"]):
            add("VDI", drive["VDI"])
            add("SR", pool.store.get("VDI", drive["VDI"])["SR"])
            disks.append(drive["VDI"])
    record = pool.store.get("VM", vm)
    for ref in record["VIFs"]:
        add("VIF", ref)
        add("network", pool.store.get("VIF", ref)["network"])
    for ref in record["VTPMs"]:
        add("VTPM", ref)
    add("VM_guest_metrics", record["guest_metrics"])
    objects = [
        ArchivedObject(kind, ids[ref], _rewritten(kind, fields, ids, pool, ref))
        for kind, ref, fields in listed
    ]
    host = pool.store.get("host", pool.master)
    version = {
        "hostname": host["hostname"],
        "date": "2026-01-01",
        "product_version": host["software_version"]["product_version"],
        "product_brand": host["software_version"]["product_brand"],
        "build_number": host["software_version"]["build_number"],
        "xapi_major": 1,
        "xapi_minor": 20,
        "export_vsn": 2,
    }
    return build_ova_xml(version, objects), [(vdi, ids[vdi]) for vdi in disks]


def _rewritten(
    kind: str, record: Record, ids: dict[str, str], pool: SimulatedPool, ref: str
) -> Record:
    """The record with references as ids of the archive; those that lead out are empty."""
    fields = {**record, **(_AS_HALTED if kind == "VM" else {})}
    if kind == "VTPM":
        fields["contents"] = pool.vtpm_contents.get(ref, "")
    result: Record = {}
    for name, value in fields.items():
        field = SCHEMA[kind].get(name)
        if field is not None and field.code == "R":
            result[name] = value if is_null(value) else ids.get(value, "")
        elif field is not None and field.code == "RL":
            result[name] = [ids[each] for each in value if each in ids]
        else:
            result[name] = value
    return result


class Restoration:
    """Objects made from an archive: all of them, or after :meth:`undo` none."""

    def __init__(
        self, pool: SimulatedPool, objects: list[ArchivedObject], sr: str, *, restore: bool
    ) -> None:
        self._pool = pool
        self._sr = sr
        self._restore = restore
        self._refs: dict[str, str] = {}
        self.vms: list[str] = []
        self.disks: dict[str, str] = {}
        """VDI reference by its id in the archive."""
        by_kind = {
            kind: [each for each in objects if each.kind == kind]
            for kind in ("VM", "VDI", "VBD", "VIF", "network", "VTPM")
        }
        if not by_kind["VM"]:
            raise XapiError("IMPORT_ERROR", ["the archive holds no VM"])
        try:
            self._make(by_kind)
        except BaseException:
            self.undo()
            raise

    def _make(self, by_kind: dict[str, list[ArchivedObject]]) -> None:
        for each in by_kind["network"]:
            self._refs[each.id] = self._network(each.snapshot)
        for each in by_kind["VM"]:
            self._vm(each)
        for each in by_kind["VDI"]:
            self._vdi(each)
        for kind in ("VBD", "VIF", "VTPM"):
            for each in by_kind[kind]:
                self._device(each)

    def _network(self, snapshot: Record) -> str:
        store = self._pool.store
        for ref, record in store.all("network"):
            if record["uuid"] == snapshot.get("uuid"):
                return ref
        for ref, record in store.all("network"):
            if record["name_label"] == snapshot.get("name_label"):
                return ref
        return store.create("network", name_label=snapshot.get("name_label", ""))

    def _fields(self, each: ArchivedObject) -> Record:
        """What to create it with: references rewritten, computed fields left out."""
        fields: Record = {}
        for name, value in each.snapshot.items():
            field = SCHEMA[each.kind].get(name)
            if field is None or (each.kind, name) in COMPUTED:
                continue
            if field.code == "R":
                fields[name] = self._refs.get(value, NULL)
            elif field.code != "RL":
                fields[name] = value
        taken = (each.kind, fields.get("uuid", "")) if self._restore else None
        if taken is None or self._is_taken(*taken):
            fields.pop("uuid", None)
        return fields

    def _is_taken(self, kind: str, identifier: str) -> bool:
        return any(record["uuid"] == identifier for _, record in self._pool.store.all(kind))

    def _vm(self, each: ArchivedObject) -> None:
        store = self._pool.store
        fields = self._fields(each)
        fields.update(power_state="Halted", is_a_snapshot=False, current_operations={})
        fields.update(is_default_template=False, resident_on=NULL, snapshot_time="")
        fields["metrics"] = store.create("VM_metrics")
        if not self._restore:
            config = fields.get("other_config", {})
            fields["other_config"] = {**config, "mac_seed": store.new_uuid()}
        vm = store.create("VM", **fields)
        self._refs[each.id] = vm
        self.vms.append(vm)

    def _vdi(self, each: ArchivedObject) -> None:
        fields = self._fields(each)
        size = int(fields["virtual_size"])
        fields.update(SR=self._sr, is_a_snapshot=False, managed=True, sm_config={})
        vdi = self._pool.disks.create(DiskContent(size), **fields)
        self._refs[each.id] = vdi
        self.disks[each.id] = vdi

    def _device(self, each: ArchivedObject) -> None:
        store = self._pool.store
        fields = self._fields(each)
        fields["currently_attached"] = False
        if each.kind == "VIF":
            if not self._restore:
                fields["MAC"] = store.new_mac()
            if is_null(fields.get("network")):
                fields["network"] = self._pool.network
        ref = store.create(each.kind, **fields)
        if each.kind == "VTPM":
            self._pool.vtpm_contents[ref] = str(each.snapshot.get("contents", ""))

    def undo(self) -> None:
        """Remove everything again, as a failed import does."""
        for vm in self.vms:
            if self._pool.store.find("VM", vm):
                self._pool.vms.destroy(vm)
        for vdi in self.disks.values():
            if self._pool.store.find("VDI", vdi):
                self._pool.disks.forget(vdi)
