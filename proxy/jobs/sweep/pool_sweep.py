"""What a dead run left on a pool.

Touched are only things that are *unfinished*: under the temporary name that only we give, with
the mark of this installation, of a run that the journal knows as ended, and not well.  A
thing of which any of this is not so stays: a mark alone may be a copy.  A VM of a health check,
which may run under a name of its own, says by its own uuid what it is.  What is done to a VM for
a time is undone when its mark names that very VM.  Each thing is read once more right before
it is touched; one that is gone meanwhile is fine.

In this order, so that a sweep that dies in between can be run again: tasks of the pool are
stopped, since they may still be making something; the disks that they left attached to a
control domain; VMs and snapshots; disks; blocks on migration; VMs that were shut down; and last
the records of the tasks, by which the attached disks were known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from proxy.errors import ProxyError, Unreachable, XapiError
from proxy.jobs.sweep.findings import Fate, Report
from proxy.xapi import ownership, vm_create, vms
from proxy.xapi.migration import REASON, unblock_migration
from proxy.xapi.ownership import Owner
from proxy.xapi.snapshots import TEMPORARY_NAME

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from proxy.jobs.sweep.findings import Entry, Fates
    from proxy.xapi import Xapi

    Record = dict[str, Any]

_TASK_SECONDS: Final = 10.0
_SETTLED: Final = frozenset({"success", "failure", "cancelled"})
_TASK_OF_DRIVE: Final = "task_id"
"""The key by which a host notes on a drive of a control domain the task that it serves (xapi's
``vbd_task_key``); by its own rule the drive has leaked when that task has ended."""


async def sweep_pool(
    xapi: Xapi, installation: str, fates: Fates, *, dry_run: bool = False
) -> Report:
    """Undo what dead runs of ``installation`` left on the pool; with ``dry_run`` only say it.

    What fails is in the report, and everything else is tried.  Raises the pool's error when it
    cannot be read.  May be stopped anywhere and run again.
    """
    sweep = _Sweep(xapi, installation, fates, dry_run=dry_run)
    await sweep.run()
    return sweep.report


class _Sweep:
    def __init__(self, xapi: Xapi, installation: str, fates: Fates, *, dry_run: bool) -> None:
        self._xapi = xapi
        self._installation = installation
        self._fates = fates
        self._known: dict[str, Fate] = {}
        self._dry_run = dry_run
        self.report = Report()

    async def run(self) -> None:
        xapi = self._xapi
        tasks = await self._stop_tasks()
        if tasks:
            kept = await self._drives(tasks)
            tasks = {ref: record for ref, record in tasks.items() if ref not in kept}
        records: Mapping[str, Record] = await xapi.call("VM.get_all_records")
        for ref, record in records.items():
            await self._object("VM", ref, record, _unfinished_vm)
        disks: Mapping[str, Record] = await xapi.call("VDI.get_all_records")
        for ref, record in disks.items():
            if not await self._goes_with_its_vm(record, records):
                await self._object("VDI", ref, record, _unfinished_disk)
        for ref, record in records.items():
            await self._blocks(ref, record)
            await self._power(ref, record)
        await self._forget_tasks(tasks)

    async def _fate(self, run: str) -> Fate:
        if run not in self._known:
            self._known[run] = await self._fates(run)
        return self._known[run]

    async def _act(self, entry: Entry, action: Callable[[], Awaitable[str | None]]) -> bool:
        """Do it unless this is a dry run; whether the thing is no more.

        What the action answers is why the thing stays; nothing when somebody else removed it.
        """
        try:
            why = None if self._dry_run else await action()
        except ProxyError as error:
            if isinstance(error, XapiError) and error.code == "HANDLE_INVALID":
                return True
            self.report.failed(entry, error)
            return False
        if why is None:
            self.report.swept.append(entry)
        elif why:
            self.report.left.append({**entry, "reason": f"{entry['reason']}; {why}"})
        return not why

    # -- tasks, and what they attached -------------------------------------------------------

    async def _stop_tasks(self) -> dict[str, Record]:
        """The records of our tasks that have ended or, in a dry run, would have."""
        records: Mapping[str, Record] = await self._xapi.call("task.get_all_records")
        found: dict[str, Record] = {}
        for ref, record in records.items():
            keys = _keys(record)
            if keys.get(ownership.PROXY) != self._installation:
                continue
            if await self._fate(keys.get(ownership.RUN, "")) is not Fate.DEAD:
                continue
            if not self._dry_run and record.get("status") not in _SETTLED:
                entry = _entry("task", record, "a task of a transfer")
                if not await self._stop(ref, entry):
                    continue
            found[ref] = record
        return found

    async def _stop(self, ref: str, entry: Entry) -> bool:
        xapi = self._xapi
        try:
            await xapi.call("task.cancel", ref)
            await xapi.wait_for(
                "task",
                ref,
                lambda fields: fields["status"] in _SETTLED,
                name="a task of a dead run",
                timeout=_TASK_SECONDS,
            )
        except XapiError as error:
            if error.code != "HANDLE_INVALID":
                self.report.failed(entry, error)
            return False
        except Unreachable as error:
            if error.code != "ETIMEDOUT":
                raise
            # No host may be working on it: then it goes with its session.
            why = "no host has ended it yet"
            self.report.left.append({**entry, "reason": f"{entry['reason']}; {why}"})
            return False
        return True

    async def _drives(self, tasks: Mapping[str, Record]) -> set[str]:
        """The tasks by which disks are known that are still attached."""
        kept: set[str] = set()
        records: Mapping[str, Record] = await self._xapi.call("VBD.get_all_records")
        for ref, record in records.items():
            task = tasks.get(_keys(record).get(_TASK_OF_DRIVE, ""))
            if task is None:
                continue
            vm = await vms.record_or_none(self._xapi, "VM", record["VM"])
            vdi = await vms.record_or_none(self._xapi, "VDI", record["VDI"])
            if vm is None or vdi is None or not vm.get("is_control_domain"):
                continue
            entry = {
                "type": "VBD",
                "uuid": str(record["uuid"]),
                "name": str(vdi["name_label"]),
                "run": _keys(task)[ownership.RUN],
                "reason": "a disk that a transfer left attached to a control domain",
            }

            async def detach(ref: str = ref) -> str | None:
                return await vms.detach_leaked(self._xapi, ref)

            if not await self._act(entry, detach):
                kept.add(_keys(record)[_TASK_OF_DRIVE])
        return kept

    async def _forget_tasks(self, tasks: Mapping[str, Record]) -> None:
        for ref, record in tasks.items():

            async def forget(ref: str = ref) -> None:
                await self._xapi.call("task.destroy", ref)

            await self._act(_entry("task", record, "a task of a transfer"), forget)

    # -- things that are unfinished ----------------------------------------------------------

    async def _object(
        self, cls: str, ref: str, record: Record, what: Callable[[Record], str | None]
    ) -> None:
        reason = what(record)
        keys = _keys(record)
        if reason is None or ownership.PROXY not in keys:
            return
        entry = _entry(cls, record, reason)
        why = await self._why_kept(cls, ref, record)
        if why is not None:
            self.report.left.append({**entry, "reason": f"{reason}; {why}"})
            return

        async def destroy() -> str | None:
            now = await vms.record_or_none(self._xapi, cls, ref)
            if now is None:
                return ""
            if _keys(now) != keys or what(now) is None:
                return "somebody has changed it just now"
            why = await self._why_kept(cls, ref, now)
            if why is not None:
                return why
            if cls == "VM":
                await self._condemn(now)
                await vms.destroy_vm(self._xapi, ref, bypass_blocked=True)
            else:
                await vms.destroy_vdi(self._xapi, ref)
            return None

        await self._act(entry, destroy)

    async def _why_kept(self, cls: str, ref: str, record: Record) -> str | None:
        keys = _keys(record)
        if keys.get(ownership.PROXY) != self._installation:
            return "another installation made it"
        run = keys.get(ownership.RUN, "")
        fate = await self._fate(run)
        if fate is not Fate.DEAD:
            return str(fate)
        if Owner(self._installation, run) in ownership.blocked_by(record):
            return "it is no copy, but the VM that was backed up"
        if cls == "VDI":
            return await self._why_used(ref, record)
        # One that runs was released by somebody: it is in use.
        is_test = ownership.is_of_health_check(record)
        if not is_test and record.get("power_state") not in ("Halted", "Suspended"):
            return "it runs: somebody uses it"
        return None

    async def _why_used(self, ref: str, record: Record) -> str | None:
        for vbd_ref in record.get("VBDs", []):
            vbd = await vms.record_or_none(self._xapi, "VBD", vbd_ref)
            vm = await vms.record_or_none(self._xapi, "VM", vbd["VM"]) if vbd else None
            if vm is not None and not vm.get("is_control_domain"):
                return f"the VM {vm.get('name_label')} has it"
        if await self._xapi.records_where("VM", f'field "suspend_VDI" = "{ref}"'):
            return "it is the memory of a suspended VM"
        return None

    async def _goes_with_its_vm(self, disk: Record, records: Mapping[str, Record]) -> bool:
        """In a dry run the VM that goes is still there, and would be the reason to keep it."""
        if not self._dry_run:
            return False
        gone = {entry["uuid"] for entry in self.report.swept if entry["type"] == "VM"}
        for vbd_ref in disk.get("VBDs", []):
            vbd = await vms.record_or_none(self._xapi, "VBD", vbd_ref)
            vm = records.get(vbd["VM"]) if vbd else None
            if vm is not None and vm["uuid"] in gone:
                return True
        return False

    async def _condemn(self, vm: Record) -> None:
        """Make the VM's disks known as unfinished too: should we die after the VM is gone, the
        next sweep finds them."""
        marks = {key: vm["other_config"][key] for key in (ownership.PROXY, ownership.RUN)}
        for _, ref, vdi in await vms.disks(self._xapi, vm):
            await self._xapi.call("VDI.set_name_label", ref, TEMPORARY_NAME)
            await self._xapi.call("VDI.set_other_config", ref, {**_keys(vdi), **marks})

    # -- what was done to a VM for a time ----------------------------------------------------

    async def _blocks(self, ref: str, record: Record) -> None:
        for owner in ownership.blocked_by(record):
            if owner.installation != self._installation:
                continue
            fate = await self._fate(owner.run)
            if fate is Fate.LIVE:
                continue
            entry = _entry("VM", record, f"its migration was blocked: {REASON}", owner.run)
            if fate is Fate.UNKNOWN:
                self.report.left.append({**entry, "reason": f"{entry['reason']}; {fate}"})
                continue

            async def unblock(owner: Owner = owner) -> None:
                await unblock_migration(self._xapi, ref, owner)

            await self._act({**entry, "type": "blocked_operations"}, unblock)

    async def _power(self, ref: str, record: Record) -> None:
        owner = ownership.shut_down_by(record)
        if owner is None or owner.installation != self._installation:
            return
        fate = await self._fate(owner.run)
        if fate is Fate.LIVE:
            return
        halted = record.get("power_state") == "Halted"
        reason = "it was shut down for its backup" + ("" if halted else ", and runs again")
        entry = {**_entry("VM", record, reason, owner.run), "type": "shutdown"}
        if fate is not Fate.DEAD:
            self.report.left.append({**entry, "reason": f"{reason}; {fate}"})
            return

        async def start() -> str | None:
            now = await vms.record_or_none(self._xapi, "VM", ref)
            if now is None or ownership.shut_down_by(now) != owner:
                return "somebody has changed it just now"
            if now.get("power_state") == "Halted":
                await vms.start(self._xapi, ref)
            await self._xapi.update_map("VM", ref, "other_config", {ownership.SHUT_DOWN: None})
            return None

        await self._act(entry, start)


def _keys(record: Mapping[str, Any]) -> dict[str, str]:
    return record.get("other_config") or {}


def _entry(cls: str, record: Record, reason: str, run: str | None = None) -> Entry:
    return {
        "type": cls,
        "uuid": str(record["uuid"]),
        "name": str(record["name_label"]),
        "run": _keys(record).get(ownership.RUN, "") if run is None else run,
        "reason": reason,
    }


def _unfinished_vm(record: Record) -> str | None:
    """What it is; ``None`` for a VM that is none of ours, or finished."""
    if record.get("is_control_domain") or record.get("is_default_template"):
        return None
    if record.get("is_a_snapshot"):
        is_temporary = record.get("name_label") == TEMPORARY_NAME
        return "a snapshot that was not finished" if is_temporary else None
    if vm_create.is_importing(record.get("name_label")):
        return "a VM that was not finished"
    return "the VM of a health check" if ownership.is_of_health_check(record) else None


def _unfinished_disk(record: Record) -> str | None:
    name = record.get("name_label")
    if not record.get("managed", True):
        return None
    if ownership.is_of_health_check(record):
        return "a disk of a health check"
    is_new = vm_create.is_importing(name) and not record.get("is_a_snapshot")
    return "a disk that was not finished" if is_new or name == TEMPORARY_NAME else None
