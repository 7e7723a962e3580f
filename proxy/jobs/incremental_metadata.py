"""What the metadata of an incremental backup says of the VM and its devices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from proxy.errors import ProxyError
from proxy.xapi import ownership, vms
from proxy.xapi.together import together

if TYPE_CHECKING:
    from collections.abc import Mapping

    from proxy.xapi import Xapi

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ExportedDisk:
    """One disk of the snapshot that is exported."""

    ref: str
    vdi: Record
    source_uuid: str
    """Names its directory on a remote: the live disk, or the memory's own uuid."""
    is_memory: bool


async def exported_disks(xapi: Xapi, snapshot: Record) -> list[ExportedDisk]:
    """The disks of a snapshot VM in the order of its VBDs, its memory last.

    A disk whose live disk is gone meanwhile is named after itself.
    """
    found: list[ExportedDisk] = []
    for _, ref, vdi in await vms.disks(xapi, snapshot):
        live = await vms.record_or_none(xapi, "VDI", str(vdi.get("snapshot_of")))
        found.append(ExportedDisk(ref, vdi, (live or vdi)["uuid"], is_memory=False))
    memory = snapshot.get("suspend_VDI")
    if vms.is_ref(memory):
        vdi = await xapi.record("VDI", str(memory))
        found.append(ExportedDisk(str(memory), vdi, vdi["uuid"], is_memory=True))
    return found


async def devices(
    xapi: Xapi, vm_uuid: str, snapshot: Record, disks: list[ExportedDisk], bases: Mapping[str, str]
) -> dict[str, Any]:
    """The fields ``vbds``, ``vdis``, ``vifs`` and ``vtpms`` of the metadata.

    ``bases`` gives the uuid of the base snapshot by the reference of a disk that is a delta.
    """
    srs = {ref: await xapi.record("SR", ref) for ref in {disk.vdi["SR"] for disk in disks}}
    vdis: dict[str, Record] = {}
    for disk in disks:
        record = {**disk.vdi, "$SR$uuid": srs[disk.vdi["SR"]]["uuid"]}
        if not disk.is_memory:
            config: dict[str, str] = {**(disk.vdi.get("other_config") or {})}
            config.pop(ownership.BASE_DELTA_VDI, None)
            if disk.ref in bases:
                config[ownership.BASE_DELTA_VDI] = bases[disk.ref]
            config[ownership.VM] = vm_uuid
            record |= {"$snapshot_of$uuid": disk.source_uuid, "other_config": config}
        vdis[disk.ref] = record

    async def vbd(ref: str) -> tuple[str, Record]:
        return ref, await xapi.record("VBD", ref)

    vbds = await together(vbd, [ref for ref in snapshot.get("VBDs", []) if vms.is_ref(ref)])

    async def vif(ref: str) -> tuple[str, Record]:
        return ref, await _vif(xapi, await xapi.record("VIF", ref))

    vifs = await together(vif, [ref for ref in snapshot.get("VIFs", []) if vms.is_ref(ref)])

    async def vtpm(ref: str) -> str | None:
        try:
            return str(await xapi.call("VTPM.get_contents", ref))
        except ProxyError:
            return None  # as upstream: the other parts of the VM are worth having

    vtpms = await together(vtpm, [ref for ref in snapshot.get("VTPMs", []) if vms.is_ref(ref)])
    return {
        "vbds": {
            ref: record
            for ref, record in vbds
            if record.get("type") == "Disk" and record.get("VDI") in vdis
        },
        "vdis": vdis,
        "vifs": dict(vifs),
        "vtpms": vtpms,
    }


async def _vif(xapi: Xapi, vif: Record) -> Record:
    network = await vms.record_or_none(xapi, "network", str(vif.get("network")))
    if network is None:
        return vif
    found = {
        **vif,
        "$network$uuid": network["uuid"],
        "$network$name_label": network["name_label"],
    }
    refs = [ref for ref in network.get("PIFs", []) if vms.is_ref(ref)]
    pif = await vms.record_or_none(xapi, "PIF", refs[0]) if refs else None
    if pif is not None:
        found["$network$VLAN"] = pif["VLAN"]
    return found
