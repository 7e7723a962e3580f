"""The disks on an SR that a delta can be laid over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from proxy.disks.disk import block_pool
from proxy.errors import ProxyError
from proxy.formats.vhd import BLOCK_SIZE
from proxy.jobs.job_snapshots import keys_of, sortable
from proxy.jobs.replication.keys import timestamp_of
from proxy.jobs.replication.replicas import is_blocked
from proxy.jobs.target import Refusal
from proxy.xapi import ownership, vm_create, vms
from proxy.xapi.snapshots import TEMPORARY_NAME
from proxy.xapi.vdi_export import ExportOptions, export_vdi

if TYPE_CHECKING:
    from proxy.jobs.disk_snapshots import DiskSnapshot
    from proxy.tasks import Task
    from proxy.xapi import Xapi

Record = dict[str, Any]

_ZEROS: Final = bytes(BLOCK_SIZE)
_PROBED: Final = 10
"""How many blocks without data make a replica suspect."""


@dataclass(frozen=True, slots=True)
class ReplicaBase:
    """A disk on the SR with the content of a snapshot of the source, which nobody writes to."""

    ref: str
    uuid: str
    vm_ref: str | None
    """The replica that it belongs to, if that still exists."""


class ReplicaBases:
    """The bases of one VM on one SR, as they were when the first was asked for."""

    def __init__(
        self, xapi: Xapi, sr_ref: str, *, job_id: str, vm_uuid: str, checks_qcow2: bool
    ) -> None:
        """``checks_qcow2``: deltas of qcow2 disks may come, for which an old fault of Xen
        Orchestra may have left the base without content."""
        self._xapi = xapi
        self._sr_ref = sr_ref
        self._job_id = job_id
        self._vm_uuid = vm_uuid
        self._checks_qcow2 = checks_qcow2
        self._disks: dict[str, Record] | None = None

    async def find(
        self, task: Task, snapshot: DiskSnapshot, *, by_content: bool
    ) -> ReplicaBase | Refusal:
        """The base of a delta since ``snapshot``; with ``by_content`` any disk of its content.

        An error of the pool is a refusal too: the whole disk that follows will tell it.
        """
        try:
            return await self._find(task, snapshot, by_content=by_content)
        except ProxyError as error:
            return Refusal(
                "UNREADABLE_SR",
                "the replicas on the SR cannot be read",
                {"error": error.message, "code": error.code},
            )

    async def _find(
        self, task: Task, snapshot: DiskSnapshot, *, by_content: bool
    ) -> ReplicaBase | Refusal:
        if self._disks is None:
            self._disks = await self._xapi.records_where("VDI", f'field "SR" = "{self._sr_ref}"')
        frozen = [
            (keys_of(vdi).get(ownership.DATETIME, ""), ref)
            for ref, vdi in self._disks.items()
            if vdi.get("is_a_snapshot")
            and _is_whole(vdi)
            and self._is_it(vdi, snapshot, by_content)
        ]
        if frozen:
            # Two would be equal: the younger one has the longer life.
            ref = max((sortable(date), ref) for date, ref in frozen)[1]
            if await self._is_suspect(task, ref):
                return Refusal(
                    "SUSPECT_BASE",
                    "the replica may lack data since an old fault of Xen Orchestra",
                    {"base": snapshot.uuid},
                )
            return ReplicaBase(ref, self._disks[ref]["uuid"], await self._owner(ref))
        if not by_content:
            for ref, vdi in self._disks.items():
                if not vdi.get("is_a_snapshot") and _is_whole(vdi):
                    owner = await self._owner_of_old_model(ref, vdi, snapshot)
                    if owner is not None:
                        return ReplicaBase(ref, vdi["uuid"], owner)
        return Refusal("NO_REPLICA", "the SR has no replica of the base", {"base": snapshot.uuid})

    def _is_it(self, vdi: Record, snapshot: DiskSnapshot, by_content: bool) -> bool:
        assert self._disks is not None
        keys = keys_of(vdi)
        if by_content:
            # Never the source's own snapshot, where the SR is the source's.
            live = self._disks.get(str(vdi.get("snapshot_of")), {})
            return (
                bool(snapshot.content_key)
                and keys.get(ownership.CONTENT_KEY) == snapshot.content_key
                and ownership.COPY_OF in keys
                and live.get("uuid") != snapshot.source_uuid
            )
        return (
            keys.get(ownership.JOB) == self._job_id
            and keys.get(ownership.VM) == self._vm_uuid
            and keys.get(ownership.COPY_OF) == snapshot.uuid
        )

    async def _owner(self, ref: str) -> str | None:
        owners = await self._owners(ref)
        return owners[0][0] if len(owners) == 1 else None

    async def _owners(self, ref: str) -> list[tuple[str, Record]]:
        assert self._disks is not None
        found: dict[str, Record] = {}
        for vbd_ref in self._disks[ref].get("VBDs", []):
            vbd = await vms.record_or_none(self._xapi, "VBD", vbd_ref)
            vm = None if vbd is None else await vms.record_or_none(self._xapi, "VM", vbd["VM"])
            if vbd is not None and vm is not None and not vm.get("is_control_domain"):
                found[str(vbd["VM"])] = vm
        return list(found.items())

    async def _owner_of_old_model(
        self, ref: str, vdi: Record, snapshot: DiskSnapshot
    ) -> str | None:
        """The replica whose disk this is: a VM that was made for one transfer, that is complete
        and that nobody could have started since."""
        if keys_of(vdi).get(ownership.COPY_OF) != snapshot.uuid or ownership.RUN in keys_of(vdi):
            return None
        owners = await self._owners(ref)
        if len(owners) != 1:
            return None
        vm_ref, vm = owners[0]
        keys = keys_of(vm)
        whole = (timestamp_of(keys.get(ownership.DATETIME, "")) or 0) > 0
        ours = keys.get(ownership.VM) == self._vm_uuid and is_blocked(vm)
        halted = vm.get("power_state") in ("Halted", "Suspended")
        named = not vm_create.is_importing(vm.get("name_label"))
        return vm_ref if whole and ours and halted and named else None

    async def _is_suspect(self, task: Task, ref: str) -> bool:
        """Whether the chain of a replica's disk may lack data.

        Not when its youngest copy was made since the fault was mended.  Otherwise the oldest
        tells most: later deltas may cover what it lacks.
        """
        assert self._disks is not None
        vdi = self._disks[ref]
        keys = keys_of(vdi)
        if not self._checks_qcow2 or keys.get(ownership.INCLUDE_NON_NBD_QCOW2_FIX) == "true":
            return False
        chain = [
            (sortable(keys_of(each).get(ownership.DATETIME, "")), each_ref)
            for each_ref, each in self._disks.items()
            if each.get("is_a_snapshot")
            and _is_whole(each)
            and each.get("snapshot_of") == vdi.get("snapshot_of")
            and keys_of(each).get(ownership.JOB) == keys.get(ownership.JOB)
            and keys_of(each).get(ownership.VM) == keys.get(ownership.VM)
        ]
        oldest = min(chain)[1] if chain else ref
        try:
            suspect = not await _has_data(self._xapi, oldest, self._disks[oldest])
        except ProxyError:
            suspect = True  # what cannot be read cannot be cleared
        if suspect:
            task.warning(
                "forcing a full: replicated qcow2 chain predates the non-NBD qcow2 fix and looks"
                " corrupt",
                {"baseVdi": self._disks[oldest]["uuid"]},
            )
        return suspect


def _is_whole(vdi: Record) -> bool:
    """Whether a disk is one that can be cloned, and finished."""
    return (
        bool(vdi.get("managed", True))
        and vdi.get("type") != "cbt_metadata"
        and vdi.get("name_label") != TEMPORARY_NAME
        and not vm_create.is_importing(vdi.get("name_label"))
    )


async def _has_data(xapi: Xapi, ref: str, vdi: Record) -> bool:
    """Whether any of the first blocks behind the very first holds something."""
    async with (
        export_vdi(xapi, ref, vdi, None, ExportOptions()) as opened,
        opened.disk.read(block_pool(2)) as reader,
    ):
        looked_at = 0
        while looked_at < _PROBED and (block := await reader.next()) is not None:
            try:
                if block.index == 0:
                    continue
                looked_at += 1
                if bytes(block.data) != _ZEROS:
                    return True
            finally:
                block.release()
    return False
