"""The VM of an incremental replica: made, or given its new disks; and the snapshot of it.

An update can be taken back at any time before the snapshot has its name: the disks that the
replica had are only put aside until then, not written to.  Everything that is unfinished
carries the marks of the run, also the disks that are put aside: who comes after a crash
knows them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from proxy.errors import ProxyError
from proxy.jobs.replication import keys
from proxy.jobs.undo import UNDO_SECONDS, Undo
from proxy.repository import date_name
from proxy.runtime.deadlines import undo_within
from proxy.xapi import ownership, vm_create, vm_update, vms
from proxy.xapi.snapshots import take_snapshot

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from proxy.jobs.incremental_metadata import ExportedDisk
    from proxy.jobs.replication.follower import Follower
    from proxy.jobs.replication.sr_target import SrTarget
    from proxy.jobs.target import IncrementalCopy
    from proxy.tasks import Task

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class NewDisk:
    """A disk on the SR that has the content of the source's snapshot, and no VM yet."""

    ref: str
    exported: ExportedDisk


class ReplicaVm:
    """Puts the disks of one transfer in place.  ``undo`` takes all of it back until it is done."""

    def __init__(
        self,
        target: SrTarget,
        copy: IncrementalCopy,
        disks: Sequence[NewDisk],
        size: int,
        timestamp: int,
        undo: Undo,
    ) -> None:
        assert copy.metadata is not None
        self.ref = ""
        """The replica, once there is one."""
        self._target = target
        self._xapi = target.xapi
        self._copy = copy
        self._metadata = copy.metadata
        self._source: Record = copy.metadata["vmSnapshot"]
        self._disks = [disk for disk in disks if not disk.exported.is_memory]
        self._memory = next((disk for disk in disks if disk.exported.is_memory), None)
        self._size = size
        self._timestamp = timestamp
        self._undo = undo

    async def put_in_place(self, transfer: Task, follower: Follower | None) -> None:
        """Make the replica, of ``follower`` if that can still be updated.

        When this returns the replica is complete and the target is among those stored.
        """
        if follower is not None and not await self._can_update(follower, transfer):
            follower = None
        aside: list[str] = []
        if follower is None:
            await self._create(transfer)
        else:
            aside = [ref for ref, _ in follower.disks]
            await self._update(transfer, follower)
        async with transfer.child("target snapshot"):
            snapshot = await self._snapshot()
            if follower is None:
                name = str(self._source["name_label"])
                # With its name it is a replica: until then it goes, with its snapshot.
                await self._xapi.call("VM.set_name_label", self.ref, name)
            self._target.replica = self.ref
            self._copy.stored.add(self._target.id)
            self._undo.keep()
            with undo_within("finishing the replica", UNDO_SECONDS):
                await self._finish(snapshot, aside)

    async def _can_update(self, follower: Follower, transfer: Task) -> bool:
        reason = None
        if self._memory is not None:
            reason = "the memory of the source is replicated too"
        else:
            record = await vms.record_or_none(self._xapi, "VM", follower.ref)
            if record is None or not follower.is_still(record):
                reason = "somebody works on the last replica"
        if reason is not None:
            transfer.info("a new replica is made", {"reason": reason})
        return reason is None

    # -- a new VM ----------------------------------------------------------------------------

    async def _create(self, transfer: Task) -> None:
        xapi = self._xapi
        self.ref = await vm_create.create_vm(
            xapi,
            self._fields(),
            marks=self._target.marks,
            new_mac_addresses=False,
            suspend_vdi=None if self._memory is None else self._memory.ref,
        )
        self._undo.add(
            "destroy the half-made replica",
            partial(vms.destroy_vm, xapi, self.ref, bypass_blocked=True),
        )
        await vm_create.dress_vm(xapi, self.ref, self._source)
        await self._add_devices(transfer)
        if self._target.settings.warm_migration and self._source.get("ha_restart_priority"):
            await xapi.call(
                "VM.set_ha_restart_priority", self.ref, self._source["ha_restart_priority"]
            )
        await self._block_start({})
        if self._memory is not None:
            own = str(self._memory.exported.vdi["name_label"])
            await xapi.call("VDI.set_name_label", self._memory.ref, own)

    async def _block_start(self, present: Mapping[str, str]) -> None:
        """In one call: at no time can the replica be started."""
        wanted = {**present, **keys.BLOCKED_OPERATIONS}
        if wanted != present:
            await self._xapi.call("VM.set_blocked_operations", self.ref, wanted)

    async def _add_devices(self, transfer: Task) -> None:
        xapi = self._xapi
        by_source = {disk.exported.ref: disk.ref for disk in self._disks}
        for record in self._records("vbds"):
            if record.get("VDI") in by_source:
                await vm_create.create_vbd(xapi, record, self.ref, by_source[record["VDI"]])
        networks = await vm_create.Networks.read(xapi)
        for record in self._records("vifs"):
            made = await vm_create.create_vif(
                xapi, record, self.ref, networks, new_mac_address=False
            )
            if made is None:
                transfer.warning(
                    "no network of the pool fits an interface of the VM: it is left out",
                    {"device": record.get("device"), "network": record.get("$network$name_label")},
                )
        for lost in await vm_create.restore_vtpms(
            xapi, self.ref, self._metadata.get("vtpms") or []
        ):
            transfer.warning(lost)

    def _records(self, field: str) -> list[Record]:
        found: Mapping[str, Record] = self._metadata.get(field) or {}
        return list(found.values())

    # -- the VM that follows -----------------------------------------------------------------

    async def _update(self, transfer: Task, follower: Follower) -> None:
        xapi = self._xapi
        self.ref = follower.ref
        saved = await vm_update.save(xapi, follower.ref)
        self._undo.add("put the replica back as it was", partial(self._put_back, follower, saved))
        for ref, vdi in follower.disks:
            await self._put_aside(ref, vdi)
        places = {str(record.get("userdevice")) for record in self._records("vbds")}
        for ref, drive in saved.drives.items():
            if drive.get("type") == "Disk" or drive.get("userdevice") in places:
                await xapi.call("VBD.destroy", ref)
        for ref in saved.interfaces:
            await xapi.call("VIF.destroy", ref)
        fields = self._fields()
        wanted = {
            **fields,
            "other_config": {**fields["other_config"], **self._target.marks},
            "name_label": str(self._source["name_label"]),
            "ha_restart_priority": self._source.get("ha_restart_priority", "")
            if self._target.settings.warm_migration
            else "",
        }
        await vm_update.set_fields(xapi, self.ref, saved.record, wanted)
        await self._add_devices(transfer)
        await self._block_start(saved.record["blocked_operations"])

    async def _put_aside(self, ref: str, vdi: Record) -> None:
        """Marked before its VM lets go of it: a crash in between must not lose it."""
        config: Mapping[str, str] = vdi.get("other_config") or {}
        await self._xapi.call("VDI.set_other_config", ref, {**config, **self._target.marks})
        if not vm_create.is_importing(vdi["name_label"]):
            name = vm_create.importing(vdi["name_label"])
            await self._xapi.call("VDI.set_name_label", ref, name)

    async def _put_back(self, follower: Follower, saved: vm_update.SavedVm) -> None:
        await vm_update.put_back(self._xapi, follower.ref, saved)
        await self._xapi.call(
            "VM.set_blocked_operations", follower.ref, saved.record["blocked_operations"]
        )
        for ref, vdi in follower.disks:
            await self._xapi.call("VDI.set_name_label", ref, vdi["name_label"])
            await self._xapi.call("VDI.set_other_config", ref, vdi.get("other_config") or {})

    # -- both --------------------------------------------------------------------------------

    def _fields(self) -> Record:
        """The record of the source's snapshot as the replica is to have it."""
        config = {
            **ownership.without_keys(self._source.get("other_config") or {}),
            **self._target.keys(self._timestamp),
            ownership.COPY_OF: str(self._source["uuid"]),
            ownership.INCLUDE_NON_NBD_QCOW2_FIX: "true",
        }
        tags: list[str] = list(self._source.get("tags") or [])
        if not self._target.settings.warm_migration:
            tags.append(keys.INCREMENTAL_TAG)
            if self._source.get("ha_restart_priority"):
                tags.append(keys.HA_TAG)
        date, size = date_name(self._timestamp), _readable(self._size)
        description = str(self._source.get("name_description") or "")
        return {
            **self._source,
            "name_description": f"{description} -- last replication: {date} {size} read",
            "other_config": config,
            "tags": list(dict.fromkeys(tags)),
        }

    async def _snapshot(self) -> str:
        """The snapshot that is this transfer, whatever becomes of the VM: with its name it is."""
        xapi, backup = self._xapi, self._target.backup
        for disk in self._disks:
            # Only now: by this key the next delta finds its base.
            await xapi.call(
                "VDI.add_to_other_config",
                disk.ref,
                ownership.COPY_OF,
                str(disk.exported.vdi["uuid"]),
            )
        snapshot = await take_snapshot(
            xapi, self.ref, bypass_chain_check=True, marked=self._target.marks
        )
        self._undo.add(
            "destroy the snapshot of the replica",
            partial(vms.destroy_vm, xapi, snapshot, bypass_blocked=True),
        )
        for _, ref, vdi in await vms.disks(xapi, await xapi.record("VM", snapshot)):
            own = vm_create.own_name(str(vdi["name_label"]))
            await xapi.call("VDI.set_name_label", ref, own)
        name, job = str(backup.vm["name_label"]), backup.job
        date = date_name(self._timestamp)
        await xapi.call(
            "VM.set_name_label", snapshot, f"{name} - {job.name} / {job.schedule_name} {date}"
        )
        return snapshot

    async def _finish(self, snapshot: str, aside: Sequence[str]) -> None:
        """The transfer is kept: the VM itself is no copy of anything any more, and ready for
        the next; what it had before goes.  All is tried; the first error is raised."""
        xapi = self._xapi
        # The marks of the VM after those of its disks: by the former a later run finds both.
        steps: list[Callable[[], Awaitable[object]]] = [
            partial(ownership.set_keys, xapi, snapshot, self._target.unmarked)
        ]
        for disk in self._disks:
            own = str(disk.exported.vdi["name_label"])
            steps.append(partial(xapi.call, "VDI.set_name_label", disk.ref, own))
            steps.append(partial(self._reset, "VDI", disk.ref))
        if self._memory is not None:
            steps.append(partial(self._reset, "VDI", self._memory.ref))
        steps.append(partial(self._reset, "VM", self.ref))
        steps += [partial(vms.destroy_vdi, xapi, ref) for ref in aside]
        errors: list[ProxyError] = []
        for step in steps:
            try:
                await step()
            except ProxyError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    async def _reset(self, cls: str, ref: str) -> None:
        """Remove the keys in one call: nobody else writes to what we have just made."""
        config: Mapping[str, str] = (await self._xapi.record(cls, ref)).get("other_config") or {}
        kept = {key: value for key, value in config.items() if key not in ownership.RESET_KEYS}
        await self._xapi.call(f"{cls}.set_other_config", ref, kept)


def _readable(size: int) -> str:
    """Bytes as people read them, in steps of a thousand."""
    number, unit = float(size), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 1000 or unit == "TB":
            break
        number /= 1000
    return f"{number:.3g} {unit}"
