"""What a dead run left on a pool: removed at the next contact, before anything else (I7).

No credential of a pool is ever stored, so nobody can go there when the daemon starts.
Touched are only things that are *unfinished*: under the temporary name that only we give, with
the mark of this installation, of a run that the journal knows as ended, and not well.  A
thing of which any of this is not so stays: a mark alone may be a copy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import trio

from proxy.errors import NoSuchObject, ProxyError
from proxy.tasks.status import Status
from proxy.xapi import ownership, vm_create, vms
from proxy.xapi.snapshots import TEMPORARY_NAME

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from proxy.tasks import Task, Tasks
    from proxy.xapi import Xapi

    Record = dict[str, Any]
    IsDead = Callable[[str], Awaitable[bool]]


class _Outcome(msgspec.Struct):
    status: str


class Sweeper:
    """Sweeps each pool at the first contact of this life of the daemon, and again when a run
    has ended badly since.  Made once; for any number of tasks."""

    def __init__(self, tasks: Tasks) -> None:
        self._tasks = tasks
        self._locks: dict[str, trio.Lock] = {}
        self._swept: dict[str, int] = {}
        """By pool: how many runs had ended badly when it was swept last."""
        self._ending: list[Task] = []
        self._bad = 0

    def ended(self, root: Task) -> None:
        """A run is about to end, however."""
        self._ending.append(root)

    async def contact(self, root: Task, xapi: Xapi) -> None:
        """To be awaited before the run ``root`` does anything on the pool.

        Whoever comes while the pool is being swept waits.  What was swept is an info of
        ``root``; trouble is a warning, and the next contact tries again.  On return ``root``
        is in the journal, so that what it marks can be swept should it die.
        """
        await self._tasks.flush()
        async with self._locks.setdefault(xapi.pool_ref, trio.Lock()):
            bad = self._ended_badly()
            if self._swept.get(xapi.pool_ref) == bad:
                return
            try:
                swept = await sweep_pool(xapi, self._tasks.installation, self._is_dead)
            except ProxyError as error:
                root.warning("could not sweep what dead runs left", {"error": error.message})
                return
            self._swept[xapi.pool_ref] = bad
            if swept:
                root.info("swept what dead runs left on the pool", {"swept": swept})

    def _ended_badly(self) -> int:
        self._bad += sum(
            not root.pending and root.status is not Status.SUCCESS for root in self._ending
        )
        self._ending = [root for root in self._ending if root.pending]
        return self._bad

    async def _is_dead(self, run: str) -> bool:
        if not run or self._tasks.live(run) is not None:
            return False
        try:
            outcome = msgspec.json.decode(await self._tasks.get(run), type=_Outcome)
        except NoSuchObject:
            return False  # forgotten, or another life's: nothing says that it is dead
        return outcome.status not in (Status.PENDING, Status.SUCCESS)


async def sweep_pool(xapi: Xapi, installation: str, is_dead: IsDead) -> list[dict[str, str]]:
    """Destroy half-restored VMs, their disks, and unfinished snapshots; what was destroyed.

    Raises the first error of the pool, when everything was tried.
    """
    sweep = _Sweep(xapi, installation, is_dead)
    await sweep.vms()
    await sweep.disks()
    if sweep.errors:
        raise sweep.errors[0]
    return sweep.swept


class _Sweep:
    def __init__(self, xapi: Xapi, installation: str, is_dead: IsDead) -> None:
        self._xapi = xapi
        self._installation = installation
        self._is_dead = is_dead
        self.swept: list[dict[str, str]] = []
        self.errors: list[ProxyError] = []

    async def vms(self) -> None:
        records: Mapping[str, Record] = await self._xapi.call("VM.get_all_records")
        for ref, record in records.items():
            # One that runs was released by somebody: it is in use.
            if _is_unfinished_vm(record) and await self._is_ours(record):
                await self._destroy("VM", ref, record)

    async def disks(self) -> None:
        """Those that no VM has; the others went with their VM, or are in use."""
        records: Mapping[str, Record] = await self._xapi.call("VDI.get_all_records")
        for ref, record in records.items():
            if (
                _is_unfinished_disk(record)
                and await self._is_ours(record)
                and not await self._is_used(ref, record)
            ):
                await self._destroy("VDI", ref, record)

    async def _is_ours(self, record: Record) -> bool:
        keys: Mapping[str, str] = record.get("other_config") or {}
        return keys.get(ownership.PROXY) == self._installation and await self._is_dead(
            keys.get(ownership.RUN, "")
        )

    async def _is_used(self, ref: str, record: Record) -> bool:
        for vbd_ref in record.get("VBDs", []):
            vbd = await vms.record_or_none(self._xapi, "VBD", vbd_ref)
            vm = await vms.record_or_none(self._xapi, "VM", vbd["VM"]) if vbd else None
            if vm is not None and not vm.get("is_control_domain"):
                return True
        return bool(await self._xapi.records_where("VM", f'field "suspend_VDI" = "{ref}"'))

    async def _destroy(self, cls: str, ref: str, record: Record) -> None:
        keys = record["other_config"]
        try:
            if cls == "VM":
                await self._condemn(record)
                await vms.destroy_vm(self._xapi, ref, bypass_blocked=True)
            else:
                await vms.destroy_vdi(self._xapi, ref)
        except ProxyError as error:
            self.errors.append(error)
            return
        self.swept.append(
            {
                "type": cls,
                "uuid": record["uuid"],
                "name": record["name_label"],
                "run": keys[ownership.RUN],
            }
        )

    async def _condemn(self, vm: Record) -> None:
        """Make the VM's disks known as unfinished too: should we die after the VM is gone, the
        next sweep finds them."""
        marks = {key: vm["other_config"][key] for key in (ownership.PROXY, ownership.RUN)}
        for _, ref, vdi in await vms.disks(self._xapi, vm):
            await self._xapi.call("VDI.set_name_label", ref, TEMPORARY_NAME)
            keys: Mapping[str, str] = vdi.get("other_config") or {}
            await self._xapi.call("VDI.set_other_config", ref, {**keys, **marks})


def _is_unfinished_vm(record: Record) -> bool:
    if record.get("is_control_domain") or record.get("is_default_template"):
        return False
    if record.get("is_a_snapshot"):
        return record.get("name_label") == TEMPORARY_NAME
    halted = record.get("power_state") in ("Halted", "Suspended")
    return halted and vm_create.is_importing(record.get("name_label"))


def _is_unfinished_disk(record: Record) -> bool:
    name = record.get("name_label")
    if not record.get("managed", True):
        return False
    is_new = vm_create.is_importing(name) and not record.get("is_a_snapshot")
    return is_new or name == TEMPORARY_NAME
