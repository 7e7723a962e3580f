"""What happens to virtual disks: snapshots with their hidden parents, copies, destruction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from proxy.errors import XapiError
from proxy.simulator.disks import DiskContent
from proxy.simulator.records import EPOCH, NULL, is_null
from proxy.simulator.tasks import now

if TYPE_CHECKING:
    from proxy.simulator.pool import SimulatedPool
    from proxy.simulator.store import Record

LARGEST_VHD = 2040 * 1024**3
"""What storage takes and exports as VHD, in bytes."""
_COPIED = (
    "name_label",
    "name_description",
    "type",
    "sharable",
    "other_config",
    "tags",
    "xenstore_data",
    "on_boot",
    "allow_caching",
)
_CREATED = """
    name_label name_description SR type sharable read_only other_config xenstore_data sm_config
    tags
""".split()  # noqa: SIM905 - as the other lists of fields
"""What ``VDI.create`` takes from a record, beside the size."""


class Disks:
    """The effects of ``VDI.*`` calls, and the bytes of each VDI (``contents``)."""

    def __init__(self, pool: SimulatedPool) -> None:
        self._pool = pool
        self._store = pool.store
        self.contents: dict[str, DiskContent] = {}
        self.unfinished: set[str] = set()
        """Disks that an import wrote into and did not finish."""

    def create(self, content: DiskContent, **fields: Any) -> str:
        """A VDI with this content."""
        identifier = fields.get("uuid") or self._store.new_uuid()
        computed = ("uuid", "location", "virtual_size", "physical_utilisation")
        given = {name: value for name, value in fields.items() if name not in computed}
        ref = self._store.create(
            "VDI",
            uuid=identifier,
            location=identifier,
            virtual_size=content.size,
            physical_utilisation=content.allocated,
            **given,
        )
        self.contents[ref] = content
        self._account(self._store.get("VDI", ref)["SR"])
        return ref

    def create_empty(self, record: Record) -> str:
        """``VDI.create``: zeros; what a client may not set is ignored."""
        fields = {field: record[field] for field in _CREATED if field in record}
        self._store.get("SR", fields.get("SR"))
        if fields.get("type") == "cbt_metadata":
            raise XapiError("VDI_INCOMPATIBLE_TYPE", ["", "cbt_metadata"])
        size = int(record["virtual_size"])
        _check_size(size, fields.get("sm_config", {}))
        return self.create(DiskContent(size), **fields)

    def create_suspend(self, vm: str, name: str, *, is_a_snapshot: bool = False) -> str:
        """The memory image of a VM, on its suspend SR or the default one."""
        record = self._store.get("VM", vm)
        size = min(record["memory_static_max"], 4 * 1024 * 1024)
        sr = record["suspend_SR"]
        return self.create(
            DiskContent(size, kind="random", seed=self._pool.seed + 1000),
            SR=self._pool.default_sr if is_null(sr) else sr,
            type="suspend",
            name_label=name,
            is_a_snapshot=is_a_snapshot,
            snapshot_time=now() if is_a_snapshot else EPOCH,
        )

    def content(self, vdi: str) -> DiskContent:
        """The bytes; raises ``XapiError`` when there are none to read."""
        record = self._store.get("VDI", vdi)
        if record["type"] == "cbt_metadata":
            raise XapiError("VDI_INCOMPATIBLE_TYPE", [vdi, record["type"]])
        return self.contents[vdi]

    def snapshot(self, vdi: str, _options: Any = None) -> str:
        """Freeze a disk.  Both sides then hang under a hidden parent, as SMAPI leaves them."""
        record = self._managed(vdi)
        content = self.content(vdi)
        kept = _format_of(record)
        hidden = self.create(
            content.copy(),
            SR=record["SR"],
            name_label="base copy",
            managed=False,
            read_only=True,
            sm_config=_under(record["sm_config"].get("vhd-parent")) | kept,
        )
        parent = self._store.get("VDI", hidden)["uuid"]
        frozen = self.create(
            content.copy(),
            SR=record["SR"],
            is_a_snapshot=True,
            snapshot_of=vdi,
            snapshot_time=now(),
            read_only=False,
            cbt_enabled=record["cbt_enabled"],
            sm_config=_under(parent) | kept,
            **{field: record[field] for field in _COPIED},
        )
        self._store.update("VDI", vdi, sm_config={**record["sm_config"], "vhd-parent": parent})
        return frozen

    def clone(self, vdi: str, sr: Any = None) -> str:
        """An independent disk with the same bytes, on ``sr`` or beside the source."""
        record = self._managed(vdi)
        target = sr if isinstance(sr, str) and not is_null(sr) else record["SR"]
        return self.create(
            self.content(vdi).copy(),
            SR=target,
            sm_config=_format_of(record),
            **{field: record[field] for field in _COPIED},
        )

    def resize(self, vdi: str, size: int, *, online: bool = False) -> None:
        """Grow it: detached, unless ``online``.  Storage refuses to shrink a disk."""
        record = self._store.get("VDI", vdi)
        self.content(vdi)
        if self.attached(record) and not online:
            raise XapiError("VDI_IN_USE", [vdi, "resize"])
        if size < record["virtual_size"]:
            raise _invalid_size("shrinking not allowed")
        _check_size(size, record["sm_config"])
        self.contents[vdi].resize(size)
        self._store.update("VDI", vdi, virtual_size=size)

    def destroy(self, vdi: str) -> None:
        """Remove it with its drives; ``VDI_IN_USE`` while attached."""
        record = self._managed(vdi)
        if self.attached(record):
            raise XapiError("VDI_IN_USE", [vdi, "destroy"])
        for ref in record["VBDs"]:
            self._store.destroy("VBD", ref)
        for vm, owner in self._store.all("VM"):
            if owner["suspend_VDI"] == vdi:
                self._store.update("VM", vm, suspend_VDI=NULL)
        self.forget(vdi)

    def _managed(self, vdi: str) -> Record:
        record = self._store.get("VDI", vdi)
        if not record["managed"]:
            raise XapiError("VDI_NOT_MANAGED", [vdi])
        return record

    def attached(self, record: Record) -> bool:
        return any(self._store.get("VBD", ref)["currently_attached"] for ref in record["VBDs"])

    def forget(self, vdi: str) -> None:
        """Drop record and bytes without asking."""
        record = self._store.get("VDI", vdi)
        self._store.destroy("VDI", vdi)
        self.contents.pop(vdi, None)
        self.unfinished.discard(vdi)
        self._account(record["SR"])
        if self._pool.coalesces:
            self._coalesce()

    def _coalesce(self) -> None:
        """Merge hidden parents that are not needed any more, as the SR's garbage collector."""
        again = True
        while again:
            again = False
            children: dict[str, list[str]] = {}
            for ref, record in self._store.all("VDI"):
                children.setdefault(record["sm_config"].get("vhd-parent", ""), []).append(ref)
            for ref, record in self._store.all("VDI"):
                below = children.get(record["uuid"], [])
                if record["managed"] or len(below) > 1:
                    continue
                for child in below:
                    config = dict(self._store.get("VDI", child)["sm_config"])
                    config.pop("vhd-parent")
                    config.update(_under(record["sm_config"].get("vhd-parent")))
                    self._store.update("VDI", child, sm_config=config)
                self._store.destroy("VDI", ref)
                self.contents.pop(ref, None)
                again = True
                break

    def changed_blocks(self, base: str, vdi: str) -> list[int]:
        """The 2 MiB blocks that changed from ``base`` to ``vdi``, both tracked all the time."""
        old, new = self._store.get("VDI", base), self._store.get("VDI", vdi)
        if any(
            self._store.get("VBD", ref)["currently_attached"]
            and not self._store.get("VM", self._store.get("VBD", ref)["VM"])["is_a_snapshot"]
            for ref in new["VBDs"]
        ):
            raise XapiError("VDI_IN_USE", [vdi, "list_changed_blocks"])
        content = self.content(vdi)
        origin = new["snapshot_of"] if new["is_a_snapshot"] else vdi
        tracked = old["cbt_enabled"] and new["cbt_enabled"]
        if not tracked or base == vdi or old["snapshot_of"] != origin:
            unrelated = "Failed to calculate changed blocks for given VDIs."
            raise XapiError(
                "SR_BACKEND_FAILURE_460",
                ["", f"{unrelated} [opterr=Source and target VDI are unrelated]", ""],
            )
        return content.changed_units(self.contents[base])

    def data_destroy(self, vdi: str) -> None:
        record = self._store.get("VDI", vdi)
        if record["type"] == "cbt_metadata":
            return
        if not record["is_a_snapshot"]:
            raise XapiError("OPERATION_NOT_ALLOWED", ["VDI is not a snapshot: " + vdi])
        if not record["cbt_enabled"]:
            raise XapiError("VDI_NO_CBT_METADATA", [vdi])
        if record["VBDs"]:  # attached or not: xapi waits 4 s for each of them to be gone
            raise XapiError("VDI_IN_USE", [vdi, "data_destroy"])
        self._store.update("VDI", vdi, type="cbt_metadata", physical_utilisation=0)

    def set_cbt(self, vdi: str, *, enabled: bool) -> None:
        record = self._store.get("VDI", vdi)
        if record["is_a_snapshot"]:
            raise XapiError("OPERATION_NOT_ALLOWED", ["VDI is a snapshot: " + vdi])
        if record["type"] not in ("user", "system"):
            raise XapiError("VDI_INCOMPATIBLE_TYPE", [vdi, record["type"]])
        if record["on_boot"] == "reset":
            raise XapiError("VDI_ON_BOOT_MODE_INCOMPATIBLE_WITH_OPERATION", [])
        self._store.update("VDI", vdi, cbt_enabled=enabled)

    def check_free(self, vdi: str, *, write: bool) -> None:
        """Raise ``XapiError`` ``VDI_IN_USE`` unless one more may attach the disk."""
        record = self._store.get("VDI", vdi)
        for drive in (self._store.get("VBD", ref) for ref in record["VBDs"]):
            clash = write or drive["mode"] == "RW"
            if drive["currently_attached"] and clash and not record["sharable"]:
                raise XapiError("VDI_IN_USE", [vdi])

    def attach_to_dom0(self, vdi: str, *, write: bool = False, task: str = "") -> str:
        """The drive that the pool makes while it reads or writes a disk, for ``task`` if any.

        A host notes the task on the drive (xapi: ``vbd_task_key``), its NBD server notes nothing.

        Raises ``XapiError``: ``VDI_IN_USE`` when somebody may write it, or for ``write``
        when somebody has it at all; ``VDI_INCOMPATIBLE_TYPE`` when it has no data.
        """
        dom0 = self._pool.dom0
        self.content(vdi)
        self.check_free(vdi, write=write)
        return self._store.create(
            "VBD",
            VM=dom0,
            VDI=vdi,
            mode="RW" if write else "RO",
            other_config={"task_id": task} if task else {},
            currently_attached=True,
            userdevice=str(len(self._store.get("VM", dom0)["VBDs"])),
        )

    def detach_from_dom0(self, vbd: str) -> None:
        if self._store.find("VBD", vbd):
            self._store.destroy("VBD", vbd)

    def written(self, vdi: str) -> None:
        """The bytes changed: refresh what is computed from them."""
        if self._store.find("VDI", vdi):
            used = self.contents[vdi].allocated
            self._store.update("VDI", vdi, physical_utilisation=used)
            self._account(self._store.get("VDI", vdi)["SR"])

    def _account(self, sr: str) -> None:
        if is_null(sr) or self._store.find("SR", sr) is None:
            return
        used = sum(
            self._store.get("VDI", ref)["physical_utilisation"]
            for ref in self._store.get("SR", sr)["VDIs"]
        )
        self._store.update("SR", sr, physical_utilisation=used)


def _format_of(record: Record) -> dict[str, str]:
    """The entry of ``sm_config`` that a copy of a disk has too."""
    config = record["sm_config"]
    return {key: config[key] for key in ("image-format",) if key in config}


def _check_size(size: int, sm_config: Record) -> None:
    if sm_config.get("image-format") == "qcow2" or size <= LARGEST_VHD:
        return
    raise _invalid_size(f"VHD size must be between 1 MB and {LARGEST_VHD // 1024**2} MB")


def _invalid_size(why: str) -> XapiError:
    return XapiError("SR_BACKEND_FAILURE_79", ["", f"VDI Invalid size [opterr={why}]", ""])


def _under(parent: str | None) -> dict[str, str]:
    return {"vhd-parent": parent} if parent and parent != NULL else {}
